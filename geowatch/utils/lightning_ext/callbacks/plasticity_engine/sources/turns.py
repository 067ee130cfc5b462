"""
How the gradient has turned since the last step: whether the step went too far, or not far enough.
"""
import torch

from ..sharding import count_of, local_part
from ..statistics.sums import double
from .updates import Updates


class Turns(Updates):
    """
    A gradient before clipping, beside what the step before it has done to the weights.

    Of the same entries as :class:`.Updates`. There is nothing where the step
    before was not seen, as after a resume, or was one of other weights.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.turns import Turns
        >>> import contextlib
        >>> import torch
        >>> weight = torch.tensor([[1., 1.]])
        >>> source = Turns(['dot'], lambda *args: contextlib.nullcontext())
        >>> for source.step, (gradient, after) in enumerate([([[1., 4.]], [[.5, -1.]]), ([[.5, -4.]], [[.5, -1.]])]):
        >>>     weight.grad = torch.tensor(gradient)
        >>>     source.before_step({'fc': weight}, scale=1.)
        >>>     weight.copy_(torch.tensor(after))  # xdoctest: +IGNORE_WANT
        >>>     source.end_step({'fc': weight})
        >>> source.take()['dot']['fc'].item()  # of [.5, -4] and [-.5, -2]
        7.75
    """
    name = 'turns'
    lasts = True
    looks_back = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._last = None  # the last step that was seen: its index, what it did to each layer, which steps were skipped

    def begin_step(self, step, fields):
        super().begin_step(step, fields)
        self._found = {}

    def before_step(self, weights, scale):
        with self._guard(self.name, self.fields):
            if self._last is not None and self._last[0] == self.step - 1:
                _, steps, skipped = self._last
                for layer, weight in weights.items():
                    # Of an optimizer that steps more than once in a batch, the first gradient.
                    # The step of a weight that is made of parameters is not along their gradient.
                    if layer in steps and layer not in self._before and not getattr(weight, 'is_made', False):
                        self._compare(layer, weight, steps[layer], skipped[layer], scale)
        super().before_step(weights, scale)

    def _compare(self, layer, weight, step, skipped, scale):
        grad = weight.grad
        if grad is None or grad.layout is not torch.strided:
            return
        grad = self.entries(grad, weight).to(step.dtype)
        if grad.shape != step.shape:
            return
        by = self.weight_of_an_entry(weight, step)
        found = {'dot': double(torch.dot(grad, step)) * (by / scale),
                 'gradient_squares': double(torch.dot(grad, grad)) * (by / scale ** 2),
                 'step_squares': double(torch.dot(step, step)) * by,
                 'nonfinite': double(torch.count_nonzero((grad - grad) + (step - step))) * by,
                 'count': count_of(weight, local_part(weight)[1]), 'skipped': skipped}
        for field in self.fields.intersection(found):
            self._found.setdefault(field, {})[layer] = found[field]

    def end_step(self, weights):
        with self._guard(self.name, self.fields):
            self._end_optimizer()
            if self._last is not None and self._last[1].keys() != self._before.keys():
                self._found = {}
            steps = {layer: self._step(weights[layer], before) for layer, before in self._before.items()
                     if layer in weights}
            self._last = self.step, steps, self._skipped
        self.close()
