"""
Dead units: those that sit at a saturated value on every sample.

    dead_units = dead units / all units

pooled over all layers. A unit is a feature of a linear layer or a channel of a
convolution; a sample is an example, a token, a pixel. Which output values are
saturated is listed in :data:`._saturation.SATURATED_VALUES`. Exact for
piecewise-linear functions, within epsilon for smooth ones.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
import math

import torch

from ._metric import Metric, Result

# Positions of a channel: on a CPU 7 x 7 of 32 images are reduced 9 times as fast the
# other way, 16 x 16 and more are not.
_FEW = 256


class DeadUnits(Metric):
    """
    Fraction of units that are saturated on every sample [Dohare2024]_.

    Logs ``dead_units``.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.dead_units import DeadUnits
        >>> import torch
        >>> metric, stats = DeadUnits(), {}
        >>> metric.observe(stats, 'fc1', torch.tensor([[0., 1.], [0., 0.]]), 1, (0.,))
        >>> result = metric.compute(stats)['dead_units']
        >>> float(result.value), result.columns['units']
        (0.5, [2])
    """
    name = 'dead_units'
    tags = ('dead_units',)
    looks_at = 'activations'
    dear = True
    epsilon = 1e-6

    def observe(self, stats, site, output, axis, saturated):
        """ See :class:`Metric`; field 'away' of shape (values, units). """
        if not saturated:
            return
        high, low = extremes(output, axis)
        # How many calls had a sample away from the value: a sum, so that
        # batches and processes add up, where a minimum would not. NaN passes
        # neither comparison, so that it counts as away.
        away = torch.stack([~((high <= value + self.epsilon) & (low >= value - self.epsilon)) for value in saturated])
        if site in stats:
            stats[site]['away'] += away
        else:
            stats[site] = {'away': away.float()}

    def compute(self, stats):
        """ See :class:`Metric`. """
        units = [s['away'].shape[1] for s in stats.values()]
        dead = torch.stack([(s['away'] == 0).any(0).sum() for s in stats.values()]).double()
        share = dead / torch.tensor(units, dtype=torch.float64).to(dead.device)
        return {'dead_units': Result(dead.sum() / sum(units), list(stats), {'value': share, 'units': units})}


def extremes(output, axis):
    """
    Highest and lowest output of each unit.

    Args:
        output (Tensor): of any shape
        axis (int): of the units

    Returns:
        Tuple[Tensor, Tensor]: both of shape (units,), nan where one is

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.dead_units import extremes
        >>> import torch
        >>> high, low = extremes(torch.tensor([[[1., 2.], [3., 4.]], [[5., 0.], [7., 6.]]]), 1)
        >>> high.tolist(), low.tolist()
        ([5.0, 7.0], [0.0, 3.0])
    """
    axis %= output.ndim
    others = [dim for dim in range(output.ndim) if dim != axis]
    if not others:
        high = low = output
    elif axis and output.is_cpu and output.is_contiguous() and 1 < math.prod(output.shape[axis + 1:]) < _FEW:
        # A reduction of few neighbours is not vectorized there, one over examples is.
        samples = output.flatten(0, axis - 1).flatten(2)
        high, low = samples.amax(0).amax(1), samples.amin(0).amin(1)
    else:
        high, low = output.amax(others), output.amin(others)
    return high.float(), low.float()
