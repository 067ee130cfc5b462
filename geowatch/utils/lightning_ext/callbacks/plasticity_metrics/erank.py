"""
Effective rank of every weight matrix, and their mean.

With singular values s and p = s / sum(s): exp(-sum p log p) [Roy2007]_. A
convolution kernel is the matrix (out, in * kh * kw).

References:
    .. [Roy2007] Roy and Vetterli, "The effective rank: a measure of effective
       dimensionality", EUSIPCO 2007.
"""
from ._metric import Metric, Result, column, finite_mean
from ._spectrum import entropy_ranks, gram, smaller_side
from ._sums import nonfinite
from ._weights import is_sharded, local_part, sharded_axis


class ERank(Metric):
    """
    Effective rank of each weight matrix; the network value is their mean.

    Logs ``erank``.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.erank import ERank
        >>> import torch
        >>> metric = ERank()
        >>> weights = {'a': torch.eye(4), 'b': torch.ones(3, 2)}
        >>> result = metric.compute(metric.statistics(weights))['erank']
        >>> round(float(result.value), 6), result.names
        (2.5, ['a', 'b'])
    """
    name = 'erank'
    tags = ('erank',)
    looks_at = 'weights'
    dear = True

    def why_not(self, tensor):
        """ See :class:`Metric`. Gram matrices of column shards do not add up. """
        if is_sharded(tensor) and any(p.is_shard() for p in tensor.placements) and sharded_axis(tensor) != 0:
            return 'sharded by columns'
        return None

    def statistics(self, tensors, scale=1.):
        """ See :class:`Metric`; fields 'gram' of shape (d, d) and 'nonfinite', 0-d. """
        stats = {}
        for name, weight in tensors.items():
            part, share = local_part(weight)
            # Shards hold whole rows, of which only the column side adds up.
            side = 'columns' if is_sharded(weight) else smaller_side(part.flatten(1))
            matrix = gram(part.flatten(1), side)
            own = {'gram': matrix, 'nonfinite': nonfinite(part) / weight.numel()}
            stats[name] = own if share == 1 else {field: x * share for field, x in own.items()}
        return stats

    def compute(self, stats):
        """ See :class:`Metric`. """
        ranks = entropy_ranks([s['gram'] for s in stats.values()])
        columns = {'value': ranks, 'nonfinite': column(stats, 'nonfinite')}
        return {'erank': Result(finite_mean(ranks), list(stats), columns)}
