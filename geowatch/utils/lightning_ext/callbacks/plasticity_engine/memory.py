"""
What is remembered of each metric from one measurement to the next, in checkpoints: a metric has no state.
"""
import math
from collections.abc import Iterable

import numpy as np

from ..plasticity_metrics import Metric
from .measurement import Numbers
from .sources.activations.sites import Site

# Of what is summed over recent measurements: at most two blocks of so many, at least one.
BLOCK = 25
# Where a checkpoint has what is of no metric.
_SITES = '/sites'


class Memory:
    """
    The statistics of earlier measurements, for the needs that ask for them.

    Args:
        saved (Any): as :meth:`state_dict` makes it, or of another version: what cannot be read is left out

    Attributes:
        before (Dict[str, Numbers]): by metric, the statistics at its last measurement
        latest (Dict[str, Dict[str, Tuple[int, Dict[str, float]]]]): by metric and layer, the step of its last
            measurement and what came of it; of metrics whose layers may take turns
        sites (List[Site]): hidden layers that were seen last
        skipped (Dict[str, int]): by metric, measurements that fell on a step which a GradScaler has skipped

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.memory import Memory
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> metric, memory = METRICS['noise_fraction'], Memory()
        >>> for noise in (1., 2., float('nan')):
        >>>     memory.add(metric, {('pieces', field): {'fc': x} for field, x in (
        >>>         ('noise', noise), ('signal', 3.), ('gradient', noise + 3.))})
        >>> memory = Memory(memory.state_dict())
        >>> memory.recent(metric)['pieces', 'noise'], memory.recent(metric)['pieces', 'signal']
        ({'fc': 3.0}, {'fc': 6.0})
    """

    def __init__(self, saved=None):
        self.before, self.latest, self.skipped, self.sites = {}, {}, {}, []
        self._counts = {}  # metric to measurements in its newer block
        self._blocks = {}  # metric to its older and its newer block
        for name, own in saved.items() if isinstance(saved, dict) else ():
            try:
                if name == _SITES:
                    self.sites = [Site(*values) for values in own]
                    continue
                before, blocks = (_read(own['before']), [_read(block) for block in own['recent']])
                count, skipped = int(own['count']), int(own['skipped'])
                latest = {layer: (int(step), {key: float(x) for key, x in columns.items()})
                          for layer, (step, columns) in own.get('latest', {}).items()}
            except Exception:  # also where it is nested too deep
                continue
            if before:
                self.before[name] = before
            if len(blocks) == 2:
                self._blocks[name], self._counts[name] = blocks, count
            if latest:
                self.latest[name] = latest
            if skipped > 0:
                self.skipped[name] = skipped

    def add(self, metric: Metric, numbers: Numbers):
        """
        Add one measurement to the recent ones, of each layer that is finite.

        Args:
            metric (Metric):
            numbers (Dict[Tuple[str, str], Dict[str, ndarray | float]]): of all layers, by source and field
        """
        tables = {(need.source, need.field): numbers.get((need.source, need.field), {})
                  for need in metric.needs if need.when == 'recent'}
        if not any(tables.values()):
            return
        blocks = self._blocks.setdefault(metric.name, [{}, {}])
        count = self._counts.get(metric.name, 0)
        if count >= BLOCK:
            blocks[:] = [blocks[1], {}]
            count = 0
        self._counts[metric.name] = count + 1
        # In the order of the network, so that sums over layers are the same in each run.
        for name in next(iter(tables.values())):
            if all(name in table and np.isfinite(table[name]).all() for table in tables.values()):
                for key, table in tables.items():
                    own = blocks[1].setdefault(key, {})
                    own[name] = own.get(name, 0.) + table[name]

    def recent(self, metric: Metric) -> Numbers:
        """ The sums over the last measurements of a metric: of 25 to 50 of them, once there are so many. """
        older, newer = self._blocks.get(metric.name, ({}, {}))
        return {key: {name: older.get(key, {}).get(name, 0.) + newer.get(key, {}).get(name, 0.)
                      for name in {**older.get(key, {}), **newer.get(key, {})}} for key in {**older, **newer}}

    def remember(self, metric: Metric, numbers: Numbers):
        """ Note what the next measurement will find before it. """
        keys = [(need.source, need.field) for need in metric.needs if need.when == 'before']
        if keys:
            self.before[metric.name] = {key: numbers.get(key, {}) for key in keys}

    def note(self, metric: Metric, step: int, layers: dict[str, dict[str, float]]):
        """ Note what was measured of some layers, whose columns stand until their next turn. """
        self.latest.setdefault(metric.name, {}).update({layer: (step, columns) for layer, columns in layers.items()})

    def earlier(self, metric: Metric) -> dict[str, dict[str, float]]:
        """ The columns of each layer at its last measurement. """
        return {layer: columns for layer, (_, columns) in self.latest.get(metric.name, {}).items()}

    def last_step(self, metrics: Iterable[Metric], layer: str) -> list[float]:
        """ The last step at which each of some metrics has measured a layer, the oldest first. """
        return sorted(self.latest.get(metric.name, {}).get(layer, (-math.inf,))[0] for metric in metrics)

    def state_dict(self) -> dict:
        """ The same as plain values, for a checkpoint. """
        own = {name: {'before': _plain(self.before.get(name, {})),
                      'recent': [_plain(block) for block in self._blocks.get(name, ())],
                      'count': self._counts.get(name, 0), 'skipped': self.skipped.get(name, 0),
                      'latest': {layer: list(own) for layer, own in self.latest.get(name, {}).items()}}
               for name in {**self.before, **self._blocks, **self.latest, **self.skipped}}
        sites = [list(vars(site).values()) for site in self.sites]
        return {**own, **({_SITES: sites} if sites else {})}


def _plain(tables):
    return [[*key, {layer: x.tolist() if hasattr(x, 'tolist') else x for layer, x in own.items()}]
            for key, own in tables.items()]


def _read(tables):
    return {(source, field): {layer: np.array(x, dtype=float) if isinstance(x, list) else float(x)
                              for layer, x in own.items()} for source, field, own in tables}
