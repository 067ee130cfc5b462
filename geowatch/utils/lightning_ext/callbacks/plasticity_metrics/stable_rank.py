"""
Stable rank of every weight matrix, and their mean.

    stable_rank = sum s^2 / max s^2

It weighs the large singular values more than :mod:`.erank` does, and hardly
moves when small ones do.

References:
    .. [Rudelson2007] Rudelson and Vershynin, "Sampling from large matrices",
       J. ACM 54(4), 2007, where it is called the numerical rank.
"""
import numpy as np

from ._registry import metric
from ._words import Words


@metric(
    needs=('weights.spectrum',), group='ranks',
    words=Words(
        'Stable rank of weights', 'sum of squared singular values over the largest, mean over layers', shrinks=0.7,
        why='A few directions outgrow the others, so that the layer uses little else.'))
def stable_rank(spectrum):
    """
    Sum of squared singular values over the largest of them [Rudelson2007]_.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.stable_rank import stable_rank
        >>> import numpy as np
        >>> stable_rank(np.array([1., 2., 3., 4.])), stable_rank(np.zeros(3))
        (1.875, 0.0)
    """
    largest = spectrum.max()
    # In this order tiny and huge matrices are safe from their squares.
    return float(np.square(spectrum / largest).sum()) if largest else 0.
