"""
Effective rank of the hidden features of every layer, and their mean.

Rows are samples, columns are units; the features are those after the
activation. Neither centred nor squared, see :mod:`.erank`. It cannot exceed
the number of rows and is biased low below about 4 rows per unit, so that each
layer's rows are recorded.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
import functools
import math

import torch

from ._metric import Metric, Result, column, finite_mean
from ._spectrum import entropy_ranks, gram
from ._sums import nonfinite


class FeatureERank(Metric):
    """
    Effective rank of post-activation features [Dohare2024]_.

    Logs ``feature_erank``, the mean over layers. A layer with more than
    `max_units` units is measured on a fixed random choice of so many, and
    its record then has ``"units_used"``.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.feature_erank import FeatureERank
        >>> import torch
        >>> metric, stats = FeatureERank(), {}
        >>> metric.observe(stats, 'fc1', torch.eye(3), 1, (0.,))
        >>> metric.observe(stats, 'fc1', torch.eye(3), 1, (0.,))
        >>> result = metric.compute(stats)['feature_erank']
        >>> round(float(result.value), 6), result.columns['rows'].tolist()
        (3.0, [6.0])
    """
    name = 'feature_erank'
    tags = ('feature_erank',)
    looks_at = 'activations'
    dear = True
    max_rows = 4096    # of one call
    max_units = 2048   # 32 MB of Gram matrix

    def observe(self, stats, site, output, axis, saturated):
        """ See :class:`Metric`; fields 'gram' (d, d), 'rows', 'bad' and 'capped', 0-d. """
        rows = self._rows(output, axis)
        seen = stats.get(site)
        matrix = gram(rows, 'columns', None if seen is None else seen['gram'])
        counts = {
            'rows': len(rows),
            # Non-finite numbers among the features: one makes the rank nan.
            'bad': nonfinite(rows),
            'capped': float(output.shape[axis] > self.max_units),
        }
        if seen is None:
            zero = matrix.new_zeros(())
            seen = stats[site] = {'gram': matrix, **{key: zero.clone() for key in counts}}
        for key, count in counts.items():
            seen[key] += count

    def _rows(self, output, axis):
        """ At most `max_rows` rows, evenly strided, of at most `max_units` units. """
        units = output.shape[axis]
        count = output.numel() // units
        stride = -(-count // self.max_rows)
        if stride > 1:
            # Row by row: to flatten an image with channels first would copy all of it.
            features = output.movedim(axis, -1)
            rows = features[_every(stride, features.shape[:-1], output.device)]
        else:
            # Images have their units first, where neighbours are copied together.
            rows = output.movedim(axis, 0).reshape(units, count).mT
        if units > self.max_units:
            rows = rows[:, _choice(units, self.max_units).to(rows.device)]
        return rows

    def compute(self, stats):
        """ See :class:`Metric`. """
        grams = [s['gram'] for s in stats.values()]
        ranks = entropy_ranks(grams)
        rows, bad, capped = (column(stats, field) for field in ('rows', 'bad', 'capped'))
        widths = torch.tensor([len(g) for g in grams], dtype=torch.float64).to(rows.device)
        return {'feature_erank': Result(finite_mean(ranks), list(stats), {
            'value': ranks, 'rows': rows, 'nonfinite': bad / (rows * widths),
            'units_used': torch.where(capped > 0, widths, 0.)})}


@functools.lru_cache(maxsize=64)  # to make it takes longer than to use it
def _every(stride, shape, device):
    """ Index of every stride-th place of a shape. """
    chosen, index = torch.arange(0, math.prod(shape), stride, device=device), []
    for size in reversed(shape):
        index.insert(0, chosen % size)
        chosen = chosen // size
    return tuple(index)


def _choice(units, most):
    """ The same choice on every batch, process and run, without touching the generators of the run. """
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(units, generator=generator)[:most].sort().values
