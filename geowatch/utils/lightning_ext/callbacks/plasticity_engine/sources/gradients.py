"""
The gradients that optimizers step with.
"""
from .step import StepSource


class Gradients(StepSource):
    """
    The gradients that optimizers are about to step with: accumulated, reduced, unscaled, not clipped.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.gradients import Gradients
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
