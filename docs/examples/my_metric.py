"""
Two metrics of your own for PlasticityMonitor: one of weights, one of activations.

A metric turns what it looks at into statistics that add up over batches and
processes, and statistics into values. PlasticityMonitor does the rest.

CommandLine:
    geowatch fit --config=train.yaml \
        --trainer.callbacks+=my_metric.Monitor --trainer.callbacks.metrics=all
"""
import torch

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS, Metric, Result, column, ratio_of_sums


class WeightRMS(Metric):
    """
    Root of the mean squared weight. Logs ``weight_rms``.

    Example:
        >>> metric = WeightRMS()
        >>> weights = {'a': torch.tensor([[3., 3.]]), 'b': torch.tensor([[4.], [4.]])}
        >>> result = metric.compute(metric.statistics(weights))['weight_rms']
        >>> result.columns['value'].tolist(), round(float(result.value) ** 2, 6)
        ([3.0, 4.0], 12.5)
    """
    name = 'weight_rms'
    tags = ('weight_rms',)
    looks_at = 'weights'  # or 'gradients', which come to the same method
    dear = False          # interval='auto' is then log_every_n_steps

    def statistics(self, tensors, scale=1.):
        return {
            layer: {'squares': weight.detach().float().square().sum(),
                    'count': torch.tensor(float(weight.numel()), device=weight.device)}
            for layer, weight in tensors.items()}

    def compute(self, stats):
        squares, count = column(stats, 'squares'), column(stats, 'count')
        # A layer that is not finite is left out of the value of the network.
        value = ratio_of_sums(squares, count).sqrt()
        return {'weight_rms': Result(value, list(stats), {'value': (squares / count).sqrt()})}


class ActiveShare(Metric):
    """
    Share of activations that are not saturated: 1 less the sparsity. Logs ``active_share``.

    Example:
        >>> metric, stats = ActiveShare(), {}
        >>> metric.observe(stats, 'fc1', torch.tensor([[0., 1.], [0., 2.]]), 1, (0.,))
        >>> metric.observe(stats, 'fc1', torch.tensor([[1., 1.]]), 1, (0.,))
        >>> round(float(metric.compute(stats)['active_share'].value), 6)
        0.666667
    """
    name = 'active_share'
    tags = ('active_share',)
    looks_at = 'activations'
    dear = True           # interval='auto' is then once per epoch

    def observe(self, stats, site, output, axis, saturated):
        if not saturated:
            return  # such as leaky_relu
        active = torch.stack([output != value for value in saturated]).all(0).sum()
        count = torch.tensor(output.numel(), device=output.device)
        if site in stats:
            stats[site]['active'] += active
            stats[site]['count'] += count
        else:
            stats[site] = {'active': active, 'count': count}

    def compute(self, stats):
        active, count = column(stats, 'active'), column(stats, 'count')
        return {'active_share': Result(ratio_of_sums(active, count), list(stats), {'value': active / count})}


# From here on users can write these names.
for metric in (WeightRMS, ActiveShare):
    METRICS[metric.name] = metric


class Monitor(PlasticityMonitor):
    """ PlasticityMonitor under a name that imports this file, for configuration files. """
