"""
Noise scale: the batch size at which noise and signal in the gradient are equal.

    noise_scale = (b / K) (K S - N) / (N - S)

with b examples in a step, and N, S and K as in :mod:`.noise_fraction`, summed
over the last 25 to 50 measurements before they are divided. It is the trace of
the covariance of one example's gradient over the squared norm of the true
gradient. Where N <= S it has no value: the batch tells too little of the true
gradient.

References:
    .. [McCandlish2018] McCandlish et al., "An empirical model of large-batch
       training", arXiv 1812.06162, 2018, appendix A.1: the simple noise scale.
"""
import math

from ._registry import metric
from ._words import Words
from .noise_fraction import is_covered


@metric(
    needs=('recent.pieces.example_noise', 'recent.pieces.noise', 'recent.pieces.signal', 'recent.pieces.gradient'),
    network='sum', every='log', group='tuning', notes='batch_examples',
    words=Words('Noise scale', 'batch size at which noise and signal in the gradient are equal'))
def noise_scale(example_noise, noise, signal, gradient):
    """
    Batch size at which noise equals signal [McCandlish2018]_; ``fraction`` and ``covered`` as in noise_fraction.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.noise_scale import noise_scale
        >>> noise_scale(example_noise=80., noise=5., signal=3., gradient=8.)  # 16 examples in two pieces
        {'value': 26.666666666666668, 'fraction': 0.625, 'covered': 1.0}
    """
    covered = is_covered(noise + signal, gradient)
    return {'value': example_noise / signal if covered and signal > 0 else math.nan,
            'fraction': noise / (noise + signal) if covered else math.nan,
            'covered': round((noise + signal) / gradient, 6) if gradient else math.nan}
