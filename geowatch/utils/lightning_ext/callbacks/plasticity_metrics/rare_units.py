"""
Rare units: those that are on for fewer than one sample in a hundred.

    rare_units = units with P(z > 0) < 0.01 / all units

Dead units are among them; the others are about to die, or detect something
rare. P(z > 0) is that of :mod:`.sign_entropy`.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812. Their measure counts
       the units that are active for less than 1 % of the samples.
"""
from ._registry import metric
from ._words import Words

RARE = 0.01


@metric(
    needs=('activations.positive', 'activations.samples'), network='units', group='units',
    words=Words(
        'Rare units', 'fraction of units that are on for under 1 % of the samples', rises=0.1, percent=True,
        change_by_layer=False,
        why='A unit that is hardly ever on hardly ever learns, and is the next to die.'))
def rare_units(positive, samples):
    """
    Fraction of units that are on for under 1 % of the samples [Dohare2024]_; ``linear`` as in sign_entropy.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.rare_units import rare_units
        >>> import numpy as np
        >>> rare_units(np.array([0., 2., 1., 4.]), samples=4.)
        {'value': 0.25, 'linear': 0.25}
    """
    p = positive / samples
    return {'value': float((p < RARE).mean()), 'linear': float((p == 1).mean())}
