"""
The pieces of which a gradient is the sum.
"""
import torch

from ..sharding import count_of, is_sharded, local_part
from ..statistics.sums import sums
from .step import StepSource


class Pieces(StepSource):
    """
    The pieces whose sum is the gradient: micro-batches, on each process its own.

    A plain parameter's piece is what reaches it in backward, before DDP
    reduces it. The gradient of a sharded one is reduced over processes at
    once, so that its piece is by how much it grew. A single piece tells
    nothing, and is left out.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.pieces import Pieces
        >>> import contextlib
        >>> import torch
        >>> fields, weight = ['count', 'squares', 'gradient', 'examples'], torch.ones(1, 2).requires_grad_()
        >>> source = Pieces(fields, lambda *args: contextlib.nullcontext())
        >>> for i, x in enumerate([[3., 4.], [1., 0.]]):
        >>>     source.begin_batch({'fc': weight}, is_first=i == 0, examples=8)
        >>>     (weight * torch.tensor([x])).sum().backward()
        >>>     source.after_backward({'fc': weight})
        >>> source.before_step({'fc': weight}, scale=1.)
        >>> {field: float(own['fc']) for field, own in source.take().items()}
        {'count': 2.0, 'examples': 16.0, 'squares': 26.0, 'gradient': 32.0}
    """
    name = 'pieces'
    are_parts = True
    sees_backward = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._handles = []
        self._begin()

    def _begin(self):
        self._batches = 0   # micro-batches of this step
        self._examples = 0  # of this process
        self._is_whole = False  # from the first micro-batch of the step on, each with one backward pass
        self._arrived = {}  # layer to the statistics of this micro-batch's piece
        self._sums = {}     # layer to field to a number
        self._grown = {}    # sharded layer to its gradient so far

    def begin_batch(self, weights, is_first=True, examples=1):
        self.close()
        if is_first:
            self._begin()
            self._is_whole = True
        self._begins = True
        self._batches += 1
        self._examples += examples
        if self._is_whole:
            for layer, weight in weights.items():
                if not is_sharded(weight):
                    self._handles.append(weight.register_hook(lambda grad, layer=layer: self._arrives(layer, grad)))

    def _arrives(self, layer, grad):
        with torch.no_grad(), self._guard(self.name, self.fields):
            # DDP takes the mean over processes, of which this is one part.
            self._arrived[layer] = self._statistics(grad, 1. / self._processes, 1. / max(grad.numel(), 1))

    def after_backward(self, weights):
        self.close()
        # Several losses of one batch are no pieces of it.
        self._is_whole &= self._begins
        self._begins = False
        arrived, self._arrived = self._arrived, {}
        with self._guard(self.name, self.fields):
            for layer, weight in weights.items():
                if is_sharded(weight) and weight.grad is not None and self._is_whole:
                    part, share = local_part(weight.grad)
                    grown = self._grown.get(layer)
                    self._grown[layer] = part.clone()
                    arrived[layer] = self._statistics(part if grown is None else part - grown, 1.,
                                                      share / weight.numel(), share)
            for layer, own in arrived.items():
                total = self._sums.setdefault(layer, {})
                for field, x in own.items():
                    total[field] = total.get(field, 0.) + x

    def _statistics(self, piece, scale, of_all, share=1.):
        by = {'squares': share * scale ** 2, 'nonfinite': of_all}
        return {field: own[0] * by[field] for field, own in sums({0: piece}, self.fields.intersection(by)).items()}

    def before_step(self, weights, scale):
        with self._guard(self.name, self.fields):
            layers = {layer: weight for layer, weight in weights.items()
                      if layer in self._sums and weight.grad is not None and self._tells(weight)}
            loss_scale = self.loss_scale()
            for layer, weight in layers.items():
                own = self._sums.pop(layer)
                if loss_scale is not None and 'squares' in own:
                    # What arrives in backward is scaled; what an optimizer steps with is not any more.
                    own['squares'] = own['squares'] / loss_scale.double() ** 2
                # A layer that a micro-batch has not reached has a piece of zeros.
                of_all = count_of(weight, local_part(weight)[1]) / weight.numel()
                own.update(count=self._batches * of_all, examples=float(self._examples))
                for field in self.fields.intersection(own):
                    self._found.setdefault(field, {})[layer] = own[field]
            if 'gradient' in self.fields:
                self._found.setdefault('gradient', {}).update(self._gradients(layers, scale))

    def _tells(self, weight):
        """ Whether there is more than one piece. """
        if not self._is_whole:
            return False
        if self._batches > 1 or self._processes > 1 and not is_sharded(weight):
            return True
        self.why_not = ('the gradients of sharded weights are reduced at once, and without accumulate_grad_batches '
                        'there is nothing to compare' if is_sharded(weight) else
                        'the gradient is of one batch on one process, and without accumulate_grad_batches there is '
                        'nothing to compare')
        return False

    def _gradients(self, layers, scale):
        found = sums({layer: weight.grad for layer, weight in layers.items()}, ['squares']).get('squares', {})
        # That of a plain weight is the same on all processes, which will be added up.
        return {layer: x / scale ** 2 / (1 if is_sharded(layers[layer]) else self._processes)
                for layer, x in found.items()}

    def close(self):
        for handle in self._handles:
            handle.remove()
        self._handles = []
