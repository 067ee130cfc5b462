"""
Weight magnitude: the mean absolute value of all weights of the network.

    weight_mag = sum |w| / number of weights

over what an optimizer trains, as the network uses it, without biases, tokens
and scales; a mean over weights, not a mean of layer means.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
from ._registry import metric
from ._words import Words


@metric(
    needs=('weights.abs', 'weights.count'), network='sum', every='log', group='paper',
    words=Words(
        'Weight magnitude', 'mean absolute weight', grows=1.5,
        why='The larger the weights, the less a step of the same size turns them, so that learning slows.'))
def weight_mag(absolute, count):
    """
    Mean absolute weight [Dohare2024]_.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.weight_mag import weight_mag
        >>> weight_mag(absolute=4., count=2.)  # of [[1, -3]]
        2.0
    """
    return absolute / count
