"""
How far the weights are from where they began.
"""
from ..sharding import is_sharded, local_part
from ..statistics.sums import sums
from .step import StepSource


class Distances(StepSource):
    """
    The weights after the step less those before the first step of the run, of which it keeps a copy.

    The copy has the type of the weights, and goes into checkpoints; that of
    sharded weights does not, since a process has only its part.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.distances import Distances
        >>> import contextlib
        >>> import torch
        >>> weight = torch.tensor([[3., 4.]])
        >>> source = Distances(['squares', 'start_squares'], lambda *args: contextlib.nullcontext())
        >>> source.begin_training({'fc': weight}, is_new=True)
        >>> weight[0, 0] = 1.
        >>> source.end_step({'fc': weight})
        >>> {field: own['fc'].item() for field, own in sorted(source.take().items())}
        {'squares': 4.0, 'start_squares': 25.0}
    """
    name = 'distances'
    lasts = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._start = {}  # layer to its part of the weight before the first step
        self._sharded = set()

    def begin_training(self, weights, is_new, saved=None):
        with self._guard(self.name, self.fields):
            self._sharded = {layer for layer, weight in weights.items() if is_sharded(weight)}
            if is_new:
                self._start = {layer: local_part(weight)[0].clone() for layer, weight in weights.items()}
            elif saved:
                self._start = {layer: saved[layer].to(local_part(weight)[0].device) for layer, weight in weights.items()
                               if layer in saved and layer not in self._sharded}
            if weights and not self._start:
                self.why_not = 'this run goes on from a checkpoint that does not hold the weights of the start'

    def end_step(self, weights):
        with self._guard(self.name, self.fields):
            steps, starts, shares = {}, {}, {}
            for layer, weight in weights.items():
                start = self._start.get(layer)
                part, share = local_part(weight)
                if start is not None and start.shape == part.shape:
                    starts[layer], shares[layer] = start, share
                    new, old = (x.float() if x.element_size() < 4 else x for x in (part, start))
                    steps[layer] = new - old
            found = {**sums(steps, self.fields.intersection(('squares', 'nonfinite'))),
                     'count': sums({layer: weights[layer] for layer in steps}, ['count']).get('count', {}),
                     'start_squares': sums(starts, ['squares']).get('squares', {})}
            for field in self.fields:
                by = {layer: 1. if field == 'count' else share for layer, share in shares.items()}
                self._found[field] = {layer: x * by[layer] for layer, x in found.get(field, {}).items()}

    def state_dict(self):
        return {layer: start for layer, start in self._start.items() if layer not in self._sharded}
