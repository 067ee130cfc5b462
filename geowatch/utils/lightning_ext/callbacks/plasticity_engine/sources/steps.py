"""
Sources whose statistics are those of one optimizer step: weights, gradients, updates, pieces of a gradient.

Each says when it looks: as a batch begins, before an optimizer steps, and when
the step is over. What it has found is taken with ``take``.
"""
import torch

from ..sharding import count_of, is_sharded, local_part
from ..statistics.sums import sums
from ..statistics.tensors import functions_of

# A gradient is scaled by a GradScaler: how a field grows with that scale.
_POWERS = {'abs': 1, 'squares': 2, 'gram': 2}


class StepSource:
    """
    Yields tensors of one step once, and keeps their statistics until they are taken.

    Args:
        fields (Collection[str]): additive ones that are needed at this step
        guard (Callable): guard(source, fields) is a context in which a failure
            of the fields stays
        processes (int): how many train together

    Attributes:
        name (str): a key of SOURCES
        are_parts (bool): if True, each process has statistics of its own to
            be added up, whatever the layout of the weights
    """
    name = None
    are_parts = False

    def __init__(self, fields, guard, processes=1):
        self.fields = set(fields)
        self._guard = guard
        self._processes = processes
        self._found = {}

    def begin_batch(self, weights, is_first=True):
        """ A batch begins, which may be the first of its step; `weights` is a Dict[str, Parameter] by layer. """

    def after_backward(self, weights):
        """ A micro-batch has been through backward. """

    def before_step(self, weights, scale):
        """ An optimizer is about to step on some weights, whose gradients are scaled by a number. """

    def end_step(self, weights):
        """ All optimizers of the batch have stepped. """

    def close(self):
        """ Leave nothing behind. """

    def take(self):
        """
        Returns:
            Dict[str, Dict[str, Tensor | float]]: for each field and layer, of this step
        """
        found, self._found = self._found, {}
        return found

    def _add_tensors(self, tensors, scale=1.):
        for function, fields in functions_of(self.fields).items():
            with self._guard(self.name, fields):
                for field, own in function(tensors, fields).items():
                    power = scale ** _POWERS.get(field, 0)
                    own = own if power == 1 else {layer: x / power for layer, x in own.items()}
                    self._found.setdefault(field, {}).update(own)


class Weights(StepSource):
    """
    The weights after the step.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.steps import Weights
        >>> import contextlib
        >>> import torch
        >>> source = Weights(['abs'], lambda *args: contextlib.nullcontext())
        >>> source.end_step({'fc': torch.tensor([[1., -3.]])})
        >>> source.take()['abs']['fc'].item()
        4.0
    """
    name = 'weights'

    def end_step(self, weights):
        self._add_tensors(weights)


class Gradients(StepSource):
    """
    The gradients that optimizers are about to step with: accumulated, reduced, unscaled, not clipped.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.steps import Gradients
        >>> import contextlib
        >>> import torch
        >>> source, weight = Gradients(['squares'], lambda *args: contextlib.nullcontext()), torch.ones(1, 2)
        >>> weight.grad = torch.tensor([[3., 4.]]) * 1024
        >>> source.before_step({'fc': weight}, scale=1024.)
        >>> source.take()['squares']['fc'].item()
        25.0
    """
    name = 'gradients'

    def before_step(self, weights, scale):
        gradients = {layer: weight.grad for layer, weight in weights.items() if weight.grad is not None}
        self._add_tensors(gradients, scale)


class Updates(StepSource):
    """
    The weights after the step less those before the first optimizer of the batch stepped.

    All between the two is in it: momentum, clipping, decay. Of a layer with
    more than `most` numbers every k-th is kept, k odd, and the sums are those
    of the whole layer by proportion.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.steps import Updates
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


class Pieces(StepSource):
    """
    The pieces whose sum is the gradient: micro-batches, on each process its own.

    A plain parameter's piece is what reaches it in backward, before DDP
    reduces it. The gradient of a sharded one is reduced over processes at
    once, so that its piece is by how much it grew.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.steps import Pieces
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

    def __init__(self, fields, guard, processes=1):
        super().__init__(fields, guard, processes)
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
        found = {field: own[0] * (share * scale ** _POWERS.get(field, 0))
                 for field, own in sums({0: piece}, read).items()}
        return {'count': count, **found}

    def before_step(self, weights, scale):
        for layer in weights:
            own = self._sums.pop(layer, {})
            self._grown.pop(layer, None)
            for field, x in own.items():
                self._found.setdefault(field, {})[layer] = x / scale ** _POWERS.get(field, 0)

    def close(self):
        for handle in self._handles:
            handle.remove()
        self._handles = []


STEP_SOURCES = {source.name: source for source in (Weights, Gradients, Updates, Pieces)}
