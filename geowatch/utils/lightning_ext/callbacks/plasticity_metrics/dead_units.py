"""
Dead units: those that sit at a saturated value on every sample.

    dead_units = dead units / all units

pooled over all layers. A unit is a feature of a linear layer or a channel of a
convolution; a sample is an example, a token, a pixel. Which output values are
saturated is listed in :data:`.functions.SATURATED_VALUES`. Exact for
piecewise-linear functions, within epsilon for smooth ones.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
from ._registry import metric
from ._words import Words


@metric(
    needs=('activations.away',), network='units', group='paper',
    words=Words(
        'Dead units', 'fraction of units saturated on every sample', rises=0.05, percent=True, change_by_layer=False,
        why='A unit that is saturated on every sample passes no gradient on, so that it no longer learns.'))
def dead_units(away):
    """
    Fraction of units that are saturated on every sample [Dohare2024]_.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.dead_units import dead_units
        >>> import numpy as np
        >>> # Three units of a sigmoid: one always 0, one always 1, one neither
        >>> round(float(dead_units(np.array([[0., 4., 4.], [4., 0., 4.]]))), 4)
        0.6667
    """
    return (away == 0).any(0).mean()
