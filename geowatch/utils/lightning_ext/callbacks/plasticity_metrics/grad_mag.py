"""
Gradient magnitude: the mean absolute gradient, and the global L2 norm.

    grad_mag  = sum |g| / number of weights
    grad_norm = sqrt(sum g^2)

over the weights that :mod:`.weight_mag` measures, as the optimizer will see
them before clipping: accumulated, reduced over processes, unscaled. A weight
that has no gradient in a step is left out of that step.
"""
from ._metric import Metric, Result, column, ratio_of_sums
from ._sums import sums


class GradMag(Metric):
    """
    Mean absolute gradient and global gradient norm.

    Logs ``grad_mag`` and ``grad_norm``.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.grad_mag import GradMag
        >>> import torch
        >>> metric = GradMag()
        >>> grads = {'a': torch.tensor([[3., 4.]]), 'b': torch.tensor([[0., 12.]])}
        >>> results = metric.compute(metric.statistics(grads))
        >>> float(results['grad_norm'].value), float(results['grad_mag'].value)
        (13.0, 4.75)
    """
    name = 'grad_mag'
    tags = ('grad_mag', 'grad_norm')
    looks_at = 'gradients'
    dear = False

    def __init__(self):
        self._cache = {}

    def statistics(self, tensors, scale=1.):
        """ See :class:`Metric`; fields 'count', 'abs', 'squares' and 'nonfinite'. """
        stats = sums(tensors, self._cache, squares=True)
        if scale != 1:
            for own in stats.values():
                own['abs'] = own['abs'] / scale
                own['squares'] = own['squares'] / scale ** 2
        return stats

    def compute(self, stats):
        """ See :class:`Metric`. """
        total, squares, count = (column(stats, field) for field in ('abs', 'squares', 'count'))
        bad = column(stats, 'nonfinite')
        norm = ratio_of_sums(squares, count / count.sum()).sqrt() if len(stats) > 1 else squares.sum().sqrt()
        names = list(stats)
        return {'grad_mag': Result(ratio_of_sums(total, count), names, {'value': total / count, 'nonfinite': bad}),
                'grad_norm': Result(norm, names, {'value': squares.sqrt(), 'nonfinite': bad})}
