"""
Update ratio: how far one optimizer step moves the weights, as a share of their size.

    update_ratio = sqrt(sum |W_after - W_before|^2 / sum |W_before|^2)

over all weights of the network, with all that lies between the two: momentum,
clipping, weight decay. Of the network it is the ratio of sums, not the mean of
layers. A layer of zeros has no ratio. Of a layer with more than 16384 weights
every k-th is looked at.

References:
    .. [Karpathy2015] Karpathy, "CS231n: neural networks part 3", section "Ratio
       of weights:updates", 2015.
"""
import math

from ._registry import metric
from ._words import Words


@metric(
    needs=('updates.squares', 'updates.before_squares', 'updates.moving', 'updates.unmoved'), network='sum',
    every='log', group='tuning', notes='lr',
    words=Words('Update ratio', 'size of a step of the weights over the size of the weights'))
def update_ratio(squares, before_squares, moving, unmoved):
    """
    Size of a step over the size of the weights [Karpathy2015]_; ``unmoved``: share of those with a gradient that stay.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.update_ratio import update_ratio
        >>> update_ratio(squares=.25, before_squares=25., moving=2., unmoved=0.)  # of [[3, 4]] and [[.3, -.4]]
        {'value': 0.1, 'unmoved': 0.0}
    """
    return {'value': math.sqrt(squares / before_squares) if before_squares else math.nan,
            'unmoved': unmoved / moving if moving else math.nan}
