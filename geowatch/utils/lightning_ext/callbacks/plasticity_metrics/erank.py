"""
Effective rank of every weight matrix, and their mean.

With singular values s and p = s / sum(s): exp(-sum p log p) [Roy2007]_. A
convolution kernel is the matrix (out, in * kh * kw).

References:
    .. [Roy2007] Roy and Vetterli, "The effective rank: a measure of effective
       dimensionality", EUSIPCO 2007.
"""
import torch

from . import _spectrum
from ._result import Result


class ERank:
    """
    Effective rank of each weight matrix; the network value is their mean.

    Logs ``erank``.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.erank import ERank
        >>> import torch
        >>> metric = ERank()
        >>> weights = {'a': torch.eye(4), 'b': torch.ones(3, 2)}
        >>> result = metric.compute(metric.statistics(weights))['erank']
        >>> round(float(result.value), 6)
        2.5
    """
    name = 'erank'
    tags = ('erank',)
    looks_at = 'weights'
    dear = True

    def statistics(self, weights):
        """
        Gram matrix of every weight.

        Args:
            weights (Dict[str, Tensor]): layer name to weight, at least 2-d

        Returns:
            Dict[str, Dict[str, Tensor]]: layer name to a float64 Gram matrix
        """
        stats = {}
        for name, weight in weights.items():
            matrix = weight.detach().flatten(1)
            stats[name] = {'gram': _spectrum.gram(matrix, _spectrum.smaller_side(matrix))}
        return stats

    def compute(self, stats):
        """
        Values from statistics.

        Args:
            stats (Dict[str, Dict[str, Tensor]]): see :func:`statistics`

        Returns:
            Dict[str, Result]: for each tag
        """
        layers = {name: {'value': _spectrum.entropy_rank(s['gram'])}
                  for name, s in stats.items()}
        value = torch.stack([layer['value'] for layer in layers.values()]).mean()
        return {'erank': Result(value, layers)}
