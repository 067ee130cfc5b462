"""
What a step has done to the weights.
"""
import torch

from ..sharding import count_of, local_part
from ..statistics.sums import double, sums
from .step import StepSource

# Sums over the step and over the weight before it, to the fields that they are.
_SUMS = {'step': {'squares': 'squares', 'nonfinite': 'nonfinite'}, 'before': {'squares': 'before_squares'}}


class Updates(StepSource):
    """
    The weights after the step less those before the first optimizer of the batch stepped.

    All between the two is in it: momentum, clipping, decay. Of a layer with
    more than `most` numbers every k-th is kept, k odd, and the sums are those
    of the whole layer by proportion; with ``Updates.most = math.inf`` they
    are exact.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.updates import Updates
        >>> import contextlib
        >>> import torch
        >>> weight = torch.ones(1, 2)
        >>> weight.grad = torch.ones(1, 2)
        >>> source = Updates(['squares', 'before_squares', 'moving', 'unmoved'], lambda *args: contextlib.nullcontext())
        >>> source.before_step({'fc': weight}, scale=1.)
        >>> weight[0, 0] = 4.
        >>> source.end_step({'fc': weight})
        >>> {field: own['fc'].item() for field, own in sorted(source.take().items())}
        {'before_squares': 2.0, 'moving': 2.0, 'squares': 9.0, 'unmoved': 1.0}
    """
    name = 'updates'
    most = 1 << 14

    def __init__(self, fields, guard, processes=1, scaler=None):
        super().__init__(fields, guard, processes, scaler)
        self._before = {}   # layer to the entries that are looked at
        self._moving = {}   # layer to which of them have a gradient
        self._skipped = {}  # layer to whether its step was skipped
        self._stepping = None

    def before_step(self, weights, scale):
        with self._guard(self.name, self.fields):
            self._end_optimizer()
            for layer, weight in weights.items():
                if layer not in self._before:
                    self._before[layer] = self.entries(weight).clone()
                    if not self.fields.isdisjoint(('moving', 'unmoved')):
                        self._moving[layer] = self._has_gradient(weight)
            self._stepping = list(weights), self.loss_scale()

    def _has_gradient(self, weight):
        grad = weight.grad
        # Of sparse gradients the entries are not those of the weight.
        if grad is None or grad.layout is not torch.strided:
            return None
        grad = self.entries(grad, weight)
        return (grad.float() if grad.element_size() == 1 else grad) != 0

    def _end_optimizer(self):
        """ Of the optimizer that has stepped last: a GradScaler makes its scale smaller if it has skipped the step. """
        if self._stepping is not None:
            (layers, before), now = self._stepping, self.loss_scale()
            skipped = 0. if before is None or now is None else double(now < before)
            self._skipped.update(dict.fromkeys(layers, skipped))
            self._stepping = None

    def end_step(self, weights):
        with self._guard(self.name, self.fields):
            self._end_optimizer()
            self._found = self._of_steps(weights)
        self.close()

    def _of_steps(self, weights):
        layers = [layer for layer in self._before if layer in weights]
        tensors = {'before': {layer: self._before[layer] for layer in layers},
                   'step': {layer: self._step(weights[layer], self._before[layer]) for layer in layers}}
        by = {layer: self.weight_of_an_entry(weights[layer], self._before[layer]) for layer in layers}
        found = {}
        for kind, names in _SUMS.items():
            own = sums(tensors[kind], [name for name, field in names.items() if field in self.fields])
            found.update({names[name]: of for name, of in own.items()})
        for field in self.fields.intersection(('moving', 'unmoved')):
            found[field] = {layer: self._count(field, layer, tensors['step'][layer]) for layer in layers}
        found = {field: {layer: x * by[layer] for layer, x in own.items()} for field, own in found.items()}
        if 'count' in self.fields:
            found['count'] = {layer: count_of(weights[layer], local_part(weights[layer])[1]) for layer in layers}
        if 'skipped' in self.fields:
            found['skipped'] = {layer: self._skipped[layer] for layer in layers}
        return found

    def _count(self, field, layer, step):
        moving = self._moving.get(layer)
        if moving is None:
            return 0.
        return double(torch.count_nonzero(moving if field == 'moving' else moving & (step == 0)))

    def _step(self, weight, before):
        # bfloat16 is made wider first, so that the difference is exact.
        after, before = (x.float() if x.element_size() < 4 else x for x in (self.entries(weight), before))
        return after - before

    @classmethod
    def entries(cls, tensor, weight=None):
        """
        Those that are looked at, of this process's part.

        Args:
            tensor (Tensor): a weight, or one of its shape
            weight (Tensor | None): whose order of memory tells which entries; by default the tensor's

        Returns:
            Tensor: 1-d; a view where that is possible
        """
        part = local_part(tensor)[0]
        like = part if weight is None else local_part(weight)[0]
        if part.is_contiguous() and like.is_contiguous():
            flat = part.view(-1)
        else:
            flat = part.permute(sorted(range(like.ndim), key=like.stride, reverse=True)).reshape(-1)
        return flat if len(flat) <= cls.most else flat[::-(-len(flat) // cls.most) | 1]

    @staticmethod
    def weight_of_an_entry(weight, entries):
        """ How many numbers of a weight each entry that is looked at stands for, times this process's share. """
        part, share = local_part(weight)
        return share * part.numel() / max(len(entries), 1)

    def close(self):
        self._before, self._moving, self._skipped, self._stepping = {}, {}, {}, None
