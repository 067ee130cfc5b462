"""
What sources have in common whose statistics are those of one optimizer step.

Each says when it looks: as a batch begins, before an optimizer steps, and when
the step is over. What it has found is taken with ``take``.
"""
import torch

from ..statistics.spectrum import made
from ..statistics.tensors import functions_of

# A gradient is scaled by a GradScaler: how a field grows with that scale.
POWERS = {'abs': 1, 'squares': 2, 'gram': 2}


class StepSource:
    """
    Yields tensors of one step once, and keeps their statistics until they are taken.

    Args:
        fields (Collection[str]): additive ones that are needed at this step
        guard (Callable): guard(source, fields) is a context in which a failure
            of the fields stays
        processes (int): how many train together
        scaler (GradScaler | None): which may skip a step

    Attributes:
        name (str): a key of SOURCES
        are_parts (bool): if True, each process has statistics of its own to
            be added up, whatever the layout of the weights
        sees_backward (bool): if True, it is told of batches and backward passes
        lasts (bool): if True, one object is there for all of a fit
        looks_back (bool): if True, it has to see the step before, too
        stays (bool): if True, its tensors stay as they are until they are
            read, so that what is large is made of them then
        step (int): index of the step that goes on
        why_not (str | None): why it finds nothing, or not all, for the user to read
    """
    name = None
    are_parts = False
    sees_backward = False
    lasts = False
    looks_back = False
    stays = False

    def __init__(self, fields, guard, processes=1, scaler=None):
        self.fields = set(fields)
        self._guard = guard
        self._processes = processes
        self._scaler = scaler
        self._found = {}
        self.step = -1
        self.why_not = None

    def begin_training(self, weights, is_new, saved=None):
        """ Before the first step of a fit, of which `is_new` says whether the network is untrained; if it lasts. """

    def state_dict(self):
        """ What a checkpoint needs, as `saved` will be; if it lasts. """
        return {}

    def loss_scale(self):
        """ By what a GradScaler multiplies the loss, on the device, None without one. """
        # A private name, since the public one waits for the device.
        scale = getattr(self._scaler, '_scale', None)
        return None if scale is None else scale.clone()

    def begin_step(self, step, fields):
        """ It is needed at a step, for some fields more. """
        self.step = step
        self.fields |= set(fields)

    def begin_batch(self, weights, is_first=True, examples=1, is_alone=False):
        """
        A batch begins.

        Args:
            weights (Dict[str, Parameter]): by layer
            is_first (bool): of its step
            examples (int): in it; 0 if it is a list of items, which a network may take one by one
            is_alone (bool): whether it is all of its step, over all processes
        """

    def before_backward(self, loss):
        """ A loss (Tensor) is about to be differentiated. """

    def after_backward(self, weights):
        """ A micro-batch has been through backward. """

    def before_step(self, weights, scale):
        """ An optimizer is about to step on some weights, whose gradients are multiplied by a number or 0-d Tensor. """

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
        with self._guard(self.name, self.fields):
            self._add({layer: tensor.detach() for layer, tensor in tensors.items()}, scale)

    def _add(self, tensors, scale):
        for function, fields in functions_of(self.fields).items():
            with self._guard(self.name, fields):
                for field, own in function(tensors, fields).items():
                    own = own if self.stays else {layer: made(x) for layer, x in own.items()}
                    # Of a tensor only the device knows whether it is 1.
                    if POWERS.get(field) and (isinstance(scale, torch.Tensor) or scale != 1):
                        own = {layer: x / scale ** POWERS[field] for layer, x in own.items()}
                    self._found.setdefault(field, {}).update(own)
