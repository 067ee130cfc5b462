"""
What a step has done to the weights.
"""
from ..sharding import count_of, local_part
from ..statistics.sums import sums
from .step import StepSource


class Updates(StepSource):
    """
    The weights after the step less those before the first optimizer of the batch stepped.

    All between the two is in it: momentum, clipping, decay. Of a layer with
    more than `most` numbers every k-th is kept, k odd, and the sums are those
    of the whole layer by proportion.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.updates import Updates
        >>> import contextlib
        >>> import torch
        >>> weight = torch.ones(1, 2)
        >>> source = Updates(['squares', 'before_squares'], lambda *args: contextlib.nullcontext())
        >>> source.before_step({'fc': weight}, scale=1.)
        >>> weight[0, 0] = 4.
        >>> source.end_step({'fc': weight})
        >>> found = source.take()
        >>> found['squares']['fc'].item(), found['before_squares']['fc'].item()
        (9.0, 2.0)
    """
    name = 'updates'
    most = 1 << 14

    def __init__(self, fields, guard, processes=1):
        super().__init__(fields, guard, processes)
        self._before = {}

    def before_step(self, weights, scale):
        with self._guard(self.name, self.fields):
            for layer, weight in weights.items():
                if layer not in self._before:
                    self._before[layer] = self._sample(weight).clone()

    def end_step(self, weights):
        before, self._before = self._before, {}
        with self._guard(self.name, self.fields):
            found = {field: {} for field in self.fields}
            for layer, old in before.items():
                if layer not in weights:
                    continue
                weight = weights[layer]
                part, share = local_part(weight)
                # bfloat16 is made wider first, so that the difference is exact.
                step = (self._sample(weight).float() if old.element_size() < 4 else self._sample(weight)) - old
                by = share * part.numel() / max(old.numel(), 1)
                sums_of = {'squares': (step, 'squares'), 'before_squares': (old, 'squares'),
                           'nonfinite': (step, 'nonfinite')}
                for field in self.fields:
                    if field == 'count':
                        found[field][layer] = count_of(weight, share)
                    else:
                        tensor, name = sums_of[field]
                        found[field][layer] = sums({layer: tensor}, [name])[name][layer] * by
            self._found = found

    def _sample(self, weight):
        part = local_part(weight)[0]
        stride = -(-part.numel() // self.most) | 1
        return part.flatten()[::stride] if stride > 1 else part

    def close(self):
        self._before = {}
