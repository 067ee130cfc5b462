"""
Effective rank of every weight matrix, and their mean.

With singular values s and p = s / sum(s): exp(-sum p log p) [Roy2007]_. A
convolution kernel is the matrix (out, in * kh * kw).

References:
    .. [Roy2007] Roy and Vetterli, "The effective rank: a measure of effective
       dimensionality", EUSIPCO 2007.
"""
from ._formulas import entropy_rank
from ._registry import metric
from ._words import Words


@metric(
    needs=('weights.spectrum',), group='paper',
    words=Words(
        'Effective rank of weights', 'directions that the weights use, mean over layers', shrinks=0.8,
        why='Weights that use fewer directions can represent less.'))
def erank(spectrum):
    """
    Effective rank of a weight matrix [Roy2007]_.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.erank import erank
        >>> import numpy as np
        >>> round(erank(np.ones(4)), 6)
        4.0
    """
    return entropy_rank(spectrum)
