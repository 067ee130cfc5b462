"""
Noise fraction: how much of the squared gradient of a batch is noise.

    noise_fraction = (K S - N) / ((K - 1) N)

with the gradient's squared norm N, and S the sum of those of the K pieces that
add up to it: micro-batches, ranks, or chunks of the batch. S and N are summed
over the last 25 to 50 measurements before they are divided. It can exceed 1
where there is hardly anything but noise.

References:
    .. [McCandlish2018] McCandlish et al., "An empirical model of large-batch
       training", arXiv 1812.06162, 2018, appendix A.1.
"""
import math

from ._registry import metric
from ._words import Words


@metric(
    needs=('recent.pieces.noise', 'recent.pieces.signal', 'recent.pieces.gradient'), network='sum', every='log',
    group='tuning', along='noise_scale',
    words=Words('Noise fraction', 'share of noise in the squared gradient of a batch'))
def noise_fraction(noise, signal, gradient):
    """
    Share of noise in the squared gradient of a batch [McCandlish2018]_; ``covered``: share whose pieces are known.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.noise_fraction import noise_fraction
        >>> noise_fraction(noise=5., signal=3., gradient=8.)  # of the pieces [1.5, 2] and [.5, 0]
        {'value': 0.625, 'covered': 1.0}
    """
    return {'value': noise / (noise + signal) if is_covered(noise + signal, gradient) else math.nan,
            'covered': round((noise + signal) / gradient, 6) if gradient else math.nan}


def is_covered(known: float, gradient: float) -> bool:
    """
    Whether pieces are known of so much of a squared gradient that they speak for it.

    Args:
        known (float): squared norm of the part of the gradient whose pieces are known
        gradient (float): squared norm of all of it

    Returns:
        bool:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.noise_fraction import is_covered
        >>> is_covered(9.5, 10.), is_covered(5., 10.), is_covered(0., 0.)
        (True, False, False)
    """
    return known > 0 and known >= 0.9 * gradient
