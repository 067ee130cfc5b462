"""
Dead units: those that sit at a saturated value on every sample.

    dead_units = dead units / all units

pooled over all layers. A unit is a feature of a linear layer or a channel of a
convolution; a sample is an example, a token, a pixel. Which output values are
saturated is listed in :data:`._activations.SATURATED_VALUES`. Exact for
piecewise-linear functions, within epsilon for smooth ones.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
import torch

from ._result import Result, total


class DeadUnits:
    """
    Fraction of units that are saturated on every sample [Dohare2024]_.

    Logs ``dead_units``.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.dead_units import DeadUnits
        >>> import torch
        >>> metric, stats = DeadUnits(), {}
        >>> metric.observe(stats, 'fc1', torch.tensor([[0., 1.], [0., 0.]]), (0.,))
        >>> result = metric.compute(stats)['dead_units']
        >>> float(result.value), float(result.layers['fc1']['units'])
        (0.5, 2.0)
    """
    name = 'dead_units'
    tags = ('dead_units',)
    looks_at = 'activations'
    dear = True
    epsilon = 1e-6

    def observe(self, stats, site, features, saturated):
        """
        Add one call of an activation function to the statistics.

        Args:
            stats (Dict[Any, Dict[str, Tensor]]): changed in place
            site (Any): key of the site
            features (Tensor): of shape (rows, units)
            saturated (Tuple[float, ...]): output values that count as dead
        """
        if not saturated:
            return
        # Rows away from the value, for each value and unit: a sum, so that
        # batches and processes add up, where a minimum would not.
        away = torch.stack([
            ((features - value).abs() > self.epsilon).sum(dim=0) for value in saturated
        ]).double()
        rows = torch.tensor(float(len(features)), dtype=torch.float64, device=away.device)
        seen = stats.get(site)
        stats[site] = ({'away': away, 'rows': rows} if seen is None else
                       {'away': seen['away'] + away, 'rows': seen['rows'] + rows})

    def compute(self, stats):
        """
        Values from statistics.

        Args:
            stats (Dict[str, Dict[str, Tensor]]): see :func:`observe`

        Returns:
            Dict[str, Result]: for each tag
        """
        pooled, layers = {}, {}
        for name, s in stats.items():
            dead = (s['away'] == 0).any(dim=0).double().sum()
            units = torch.tensor(float(s['away'].shape[1]), dtype=torch.float64)
            pooled[name] = {'dead': dead, 'units': units}
            layers[name] = {'value': dead / units, 'units': units}
        return {'dead_units': Result(total(pooled, 'dead') / total(pooled, 'units'), layers)}
