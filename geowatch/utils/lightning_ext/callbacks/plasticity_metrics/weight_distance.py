"""
Weight distance: how far the weights are from where they began, as a share of their size there.

    weight_distance = |W - W_0| / |W_0|

over all weights of the network, with W_0 those before the first step. It is
in no group, since a copy of all weights is kept for it.

References:
    .. [Nagarajan2019] Nagarajan and Kolter, "Generalization in deep networks:
       the role of distance from initialization", arXiv 1901.01672, 2019.
"""
import math

from ._registry import metric
from ._words import Words


@metric(
    needs=('distances.squares', 'distances.start_squares'), network='sum', every='log',
    words=Words('Weight distance', 'distance of the weights from their start over their size there'))
def weight_distance(squares, start_squares):
    """
    Distance from the start over the size of the start [Nagarajan2019]_.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.weight_distance import weight_distance
        >>> weight_distance(squares=1., start_squares=25.)
        0.2
    """
    return math.sqrt(squares / start_squares) if start_squares else math.nan
