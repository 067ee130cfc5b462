"""
Weight magnitude: the mean absolute value of all weights of the network.

    weight_mag = sum |w| / number of weights

over trainable parameters with two or more dimensions, so without biases and
norm scales; a mean over weights, not a mean of layer means.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
from ._metric import Metric, Result, column, ratio_of_sums
from ._sums import sums


class WeightMag(Metric):
    """
    Mean absolute weight, of each layer and of the network [Dohare2024]_.

    Logs ``weight_mag``.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.weight_mag import WeightMag
        >>> import torch
        >>> metric = WeightMag()
        >>> weights = {'a': torch.tensor([[1., -3.]]), 'b': torch.zeros(3, 2)}
        >>> result = metric.compute(metric.statistics(weights))['weight_mag']
        >>> float(result.value), result.names, result.columns['value'].tolist()
        (0.5, ['a', 'b'], [2.0, 0.0])
    """
    name = 'weight_mag'
    tags = ('weight_mag',)
    looks_at = 'weights'
    dear = False

    def __init__(self):
        self._cache = {}

    def statistics(self, tensors, scale=1.):
        """ See :class:`Metric`; fields 'count', 'abs' and 'nonfinite'. """
        return sums(tensors, self._cache)

    def compute(self, stats):
        """ See :class:`Metric`. """
        total, count, bad = (column(stats, field) for field in ('abs', 'count', 'nonfinite'))
        return {'weight_mag': Result(ratio_of_sums(total, count), list(stats),
                                     {'value': total / count, 'nonfinite': bad})}
