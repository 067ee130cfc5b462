"""
Gradient magnitude: the mean absolute gradient, and the global L2 norm.

    grad_mag  = sum |g| / number of weights
    grad_norm = sqrt(sum g^2)

over the weights that :mod:`.weight_mag` measures, as the optimizer will see
them before clipping: accumulated, reduced over processes, unscaled. A weight
that has no gradient in a step is left out of that step.
"""
import torch

from ._result import Result, float64_sum_abs, total


class GradMag:
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

    def statistics(self, gradients):
        """
        Additive statistics of every gradient.

        Args:
            gradients (Dict[str, Tensor]): layer name to gradient, any shape

        Returns:
            Dict[str, Dict[str, Tensor]]: layer name to 0-d float64 sums
        """
        stats = {}
        for name, grad in gradients.items():
            norm = torch.linalg.vector_norm(grad.detach(), 2, dtype=torch.float64)
            stats[name] = {
                'abs': float64_sum_abs(grad),
                'squared': norm.square(),
                'count': torch.tensor(float(grad.numel()), dtype=torch.float64),
            }
        return stats

    def compute(self, stats):
        """
        Values from statistics.

        Args:
            stats (Dict[str, Dict[str, Tensor]]): see :func:`statistics`

        Returns:
            Dict[str, Result]: for each tag
        """
        mags = {name: {'value': s['abs'] / s['count']} for name, s in stats.items()}
        norms = {name: {'value': s['squared'].sqrt()} for name, s in stats.items()}
        return {
            'grad_mag': Result(total(stats, 'abs') / total(stats, 'count'), mags),
            'grad_norm': Result(total(stats, 'squared').sqrt(), norms),
        }
