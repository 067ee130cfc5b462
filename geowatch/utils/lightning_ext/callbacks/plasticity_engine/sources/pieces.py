"""
The pieces of which a gradient is the sum.
"""
import torch

from ..sharding import count_of, is_sharded, local_part
from ..statistics.sums import sums
from .step import POWERS, StepSource


class Pieces(StepSource):
    """
    The pieces whose sum is the gradient: micro-batches, on each process its own.

    A plain parameter's piece is what reaches it in backward, before DDP
    reduces it. The gradient of a sharded one is reduced over processes at
    once, so that its piece is by how much it grew.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.pieces import Pieces
        >>> import contextlib
        >>> import torch
        >>> source, weight = Pieces(['count', 'squares'], lambda *args: contextlib.nullcontext()), torch.ones(1, 2)
        >>> weight.requires_grad_()
        >>> for i, x in enumerate([[3., 4.], [1., 0.]]):
        >>>     source.begin_batch({'fc': weight}, is_first=i == 0)
        >>>     (weight * torch.tensor([x])).sum().backward()
        >>>     source.after_backward({'fc': weight})
        >>> source.before_step({'fc': weight}, scale=1.)
        >>> {field: float(own['fc']) for field, own in source.take().items()}
        {'count': 2.0, 'squares': 26.0}
    """
    name = 'pieces'
    are_parts = True
    sees_backward = True

    def __init__(self, fields, guard, processes=1, scaler=None):
        super().__init__(fields, guard, processes, scaler)
        self._is_whole = False  # from the first micro-batch of the step on
        self._handles = []
        self._arrived = {}      # layer to the statistics of this micro-batch's piece
        self._sums = {}         # layer to field to a number
        self._grown = {}        # sharded layer to its gradient so far

    def begin_batch(self, weights, is_first=True):
        self.close()
        self._is_whole |= is_first
        if self._is_whole:
            for layer, weight in weights.items():
                if not is_sharded(weight):
                    self._handles.append(weight.register_hook(lambda grad, layer=layer: self._arrives(layer, grad)))

    def _arrives(self, layer, grad):
        with torch.no_grad(), self._guard(self.name, self.fields):
            # DDP takes the mean over processes, of which this is one part.
            self._arrived[layer] = self._statistics(grad, 1., 1. / self._processes, 1.)

    def after_backward(self, weights):
        self.close()
        arrived, self._arrived = self._arrived, {}
        with self._guard(self.name, self.fields):
            for layer, weight in weights.items():
                if is_sharded(weight) and weight.grad is not None and self._is_whole:
                    part, share = local_part(weight.grad)
                    grown = self._grown.get(layer)
                    self._grown[layer] = part.clone()
                    arrived[layer] = self._statistics(part if grown is None else part - grown, share, 1.,
                                                      count_of(weight, share) / weight.numel())
            for layer, own in arrived.items():
                total = self._sums.setdefault(layer, {})
                for field, x in own.items():
                    total[field] = total.get(field, 0.) + x

    def _statistics(self, piece, share, scale, count):
        read = [field for field in ('squares', 'nonfinite') if field in self.fields]
        found = {field: own[0] * (share * scale ** POWERS.get(field, 0))
                 for field, own in sums({0: piece}, read).items()}
        return {'count': count, **found}

    def before_step(self, weights, scale):
        for layer in weights:
            own = self._sums.pop(layer, {})
            self._grown.pop(layer, None)
            for field, x in own.items():
                self._found.setdefault(field, {})[layer] = x / scale ** POWERS.get(field, 0)

    def close(self):
        for handle in self._handles:
            handle.remove()
        self._handles = []
