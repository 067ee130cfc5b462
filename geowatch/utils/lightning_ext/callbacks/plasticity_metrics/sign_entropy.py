"""
Sign entropy: how evenly the units of a layer switch between on and off.

    sign_entropy = mean over units of -p log2 p - (1 - p) log2 (1 - p),  p = P(z > 0)

where z is the input of the activation function. A unit that is always off, or
always on and so linear, has 0 bits; one that is on for half of the samples has
1. For an activation whose output has the sign of its input the output tells.

References:
    .. [Lewandowski2024] Lewandowski et al., "Plastic learning with deep Fourier
       features", arXiv 2410.20634, 2024, where a unit's entropy tells of its linearity.
"""
from ._formulas import binary_entropy
from ._registry import metric
from ._words import Words


@metric(
    needs=('activations.positive', 'activations.samples'), network='units', group='units',
    words=Words(
        'Sign entropy', 'entropy in bits of whether a unit is on, mean over units', shrinks=0.7,
        why='Units that are always on are linear, those that are always off are dead: neither tells samples apart.',
        change_by_layer=False))
def sign_entropy(positive, samples):
    """
    Mean binary entropy of whether a unit is on, in bits; ``linear`` is the share of units that always are.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.sign_entropy import sign_entropy
        >>> import numpy as np
        >>> sign_entropy(np.array([0., 2., 1., 4.]), samples=4.)  # P = 0, 0.5, 0.25, 1
        {'value': 0.45281953111478324, 'linear': 0.25}
    """
    p = positive / samples
    return {'value': float(binary_entropy(p).mean()), 'linear': float((p == 1).mean())}
