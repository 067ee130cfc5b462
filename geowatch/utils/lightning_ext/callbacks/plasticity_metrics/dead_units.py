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
import torch

from ._metric import Metric, Result


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
        others = [dim for dim in range(output.ndim) if dim != axis % output.ndim]
        high, low = (output.amax(others), output.amin(others)) if others else (output, output)
        high, low = high.float(), low.float()
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
