"""
The pieces of which a gradient is the sum.
"""
from functools import partial

import torch

from ..sharding import count_of, is_sharded, local_part
from ..statistics.sums import double, sums
from .chunks import Chunks, known
from .step import StepSource


class Pieces(StepSource):
    """
    The pieces whose sum is the gradient: micro-batches, on each process its own.

    A plain parameter's piece is what reaches it in backward, before DDP
    reduces it. The gradient of a sharded one is reduced over processes at
    once, so that its piece is by how much it grew. Of a single micro-batch on
    a single process the pieces are :class:`.Chunks` of it. One piece alone
    tells nothing, and is left out.

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
        >>> {field: float(own['fc']) for field, own in sorted(source.take().items())}
        {'count': 2.0, 'examples': 16.0, 'gradient': 32.0, 'squares': 26.0}
    """
    name = 'pieces'
    are_parts = True
    sees_backward = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._handles = []
        self._chunks = None     # of a micro-batch that is alone
        self._begin()

    def _begin(self):
        self._batches = 0   # micro-batches of this step
        self._examples = 0  # of this process
        self._is_whole = False  # from the first micro-batch of the step on, each with one backward pass
        self._arrived = {}  # layer to the statistics of this micro-batch's piece
        self._sums = {}     # layer to field to a number
        self._grown = {}    # sharded layer to its gradient so far

    def begin_batch(self, weights, is_first=True, examples=1, is_alone=False):
        self.close()
        if is_first:
            self._begin()
            self._is_whole = True
        self._begins = True
        self._batches += 1
        self._examples += examples
        self._chunks = None
        if is_alone:
            self._begin_chunks(weights, examples)
        elif self._is_whole:
            for layer, weight in weights.items():
                if not is_sharded(weight):
                    self._handles.append(weight.register_hook(lambda grad, layer=layer: self._arrives(layer, grad)))

    def _begin_chunks(self, weights, examples):
        if not examples:
            self.why_not = 'the network may take the items of a batch one by one; use accumulate_grad_batches'
        elif examples < Chunks.count:
            self.why_not = (f'a batch of less than {Chunks.count} examples has no pieces to compare; '
                            'use accumulate_grad_batches')
        else:
            self._chunks = Chunks(weights, examples, partial(self._guard, self.name, self.fields))

    def before_backward(self, loss):
        if self._chunks is not None:
            self._chunks.watch(loss)

    def _arrives(self, layer, grad):
        with torch.no_grad(), self._guard(self.name, self.fields):
            # DDP takes the mean over processes, of which this is one part.
            self._arrived[layer] = self._statistics(grad, 1. / self._processes, 1. / max(grad.numel(), 1))

    def after_backward(self, weights):
        self.close()
        if self._chunks is not None:
            return
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
            gradients = self._gradients({layer: weight for layer, weight in weights.items()
                                         if weight.grad is not None}, scale)
            found = self._of_chunks if self._chunks is not None else self._of_micro_batches
            for layer, own in found(weights, gradients).items():
                for field in self.fields.intersection(own):
                    self._found.setdefault(field, {})[layer] = own[field]

    def _of_micro_batches(self, weights, gradients):
        found, scale = {}, self._loss_scale_squared()
        for layer, gradient in gradients.items():
            weight = weights[layer]
            # A layer that a micro-batch has not reached, here or on any process, has a piece of zeros.
            own = self._sums.pop(layer, {'squares': 0., 'nonfinite': 0.} if self._processes > 1 else None)
            if own is not None and self._tells(weight):
                of_all = count_of(weight, local_part(weight)[1]) / weight.numel()
                found[layer] = {**own, 'count': self._batches * of_all, 'examples': float(self._examples),
                                'gradient': gradient, 'known': gradient}
                if 'squares' in own:
                    found[layer]['squares'] = own['squares'] / scale
        return found

    def _of_chunks(self, weights, gradients):
        chunks, found, scale = self._chunks, {}, self._loss_scale_squared()
        unknown = {layer: chunks.unknown.get(layer, 'not in the graph of the loss')
                   for layer in gradients if layer in chunks.unknown or layer not in chunks.found}
        if unknown:
            self.why_not = _explain(unknown, len(gradients))
        if len(unknown) == len(gradients):
            return {}
        for layer, gradient in gradients.items():
            squares, of_sum = 0., 0.
            if layer not in unknown:
                squares, of_sum = known(*(x / scale for x in chunks.found[layer]), gradient)
            found[layer] = {'squares': squares, 'known': of_sum, 'gradient': gradient, 'count': chunks.equal_pieces,
                            'examples': float(self._examples)}
        bad = sums({layer: weights[layer].grad for layer in found}, ['nonfinite'])['nonfinite']
        for layer, own in found.items():
            own['nonfinite'] = bad[layer] * (chunks.equal_pieces / weights[layer].numel())
        return found

    def _loss_scale_squared(self):
        """ What arrives in backward is scaled; what an optimizer steps with is not any more. """
        scale = self.loss_scale()
        return 1. if scale is None else double(scale) ** 2

    def _tells(self, weight):
        """ Whether there is more than one piece. """
        if not self._is_whole:
            return False
        if self._batches > 1 or self._processes > 1 and not is_sharded(weight):
            return True
        if is_sharded(weight):
            self.why_not = ('gradients of sharded weights are reduced at once, so that there are no pieces to compare '
                            'without accumulate_grad_batches')
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
        if self._chunks is not None:
            self._chunks.close()


def _explain(unknown, count, shown=3):
    """ Of which layers pieces are not known, for the user to read. """
    named = [f'{layer} ({why})' for layer, why in list(unknown.items())[:shown]]
    more = f' and {len(unknown) - shown} more' if len(unknown) > shown else ''
    then = ('there is no value; use accumulate_grad_batches' if len(unknown) == count else
            'there is a value while the others have 0.9 of the squared gradient, see its column `covered`')
    return f'no pieces of the gradient are known of {", ".join(named)}{more}: {then}'
