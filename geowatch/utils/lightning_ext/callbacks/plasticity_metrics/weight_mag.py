"""
Weight magnitude: the mean absolute value of all weights of the network.

    weight_mag = sum |w| / number of weights

over trainable parameters with two or more dimensions, so without biases and
norm scales; a mean over weights, not a mean of layer means.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
import torch

from ._result import Result, float64_sum_abs, total


class WeightMag:
    """
    Mean absolute weight, of each layer and of the network [Dohare2024]_.

    Logs ``weight_mag``.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.weight_mag import WeightMag
        >>> import torch
        >>> metric = WeightMag()
        >>> weights = {'a': torch.tensor([[1., -3.]]), 'b': torch.zeros(3, 2)}
        >>> result = metric.compute(metric.statistics(weights))['weight_mag']
        >>> float(result.value), float(result.layers['a']['value'])
        (0.5, 2.0)
    """
    name = 'weight_mag'
    tags = ('weight_mag',)
    looks_at = 'weights'
    dear = False

    def statistics(self, weights):
        """
        Additive statistics of every weight.

        Args:
            weights (Dict[str, Tensor]): layer name to weight, any shape

        Returns:
            Dict[str, Dict[str, Tensor]]: layer name to 0-d float64 sums
        """
        return {
            name: {'abs': float64_sum_abs(weight),
                   'count': torch.tensor(float(weight.numel()), dtype=torch.float64)}
            for name, weight in weights.items()
        }

    def compute(self, stats):
        """
        Values from statistics.

        Args:
            stats (Dict[str, Dict[str, Tensor]]): see :func:`statistics`

        Returns:
            Dict[str, Result]: for each tag
        """
        layers = {name: {'value': s['abs'] / s['count']} for name, s in stats.items()}
        return {'weight_mag': Result(total(stats, 'abs') / total(stats, 'count'), layers)}
