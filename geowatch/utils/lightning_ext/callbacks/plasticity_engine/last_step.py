"""
Optimizer steps: which was the last, what is there of it still, and those that Lightning does not tell of.

A run may end at a step that nobody knew to be the last: a loader ends early,
the time is over, a callback stops it, something fails.
"""
import dataclasses
import weakref

from .lightning import Moment
from .sources.flat import stepped_by
from .sources.weights import among


class LastStep:
    """
    The last step of a fit so far.

    Attributes:
        moment (Moment | None): of the last step that is over, if there is one

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.last_step import LastStep
        >>> import torch
        >>> last, weight = LastStep(), torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> last.begin_batch(0, epoch=0)
        >>> last.before_step(optimizer)
        >>> optimizer.step()
        >>> list(last.left({'fc': weight}))
        ['fc']
        >>> _ = weight.grad.mul_(0.5)
        >>> last.left({'fc': weight})
        {}
    """

    def __init__(self):
        self._begun = self._made = None  # index and epoch of a step
        self._gradients = {}             # optimizer to one of the gradients that it steps with, and its version
        self._held = {}                  # name of a place to the Reading that was made there

    @property
    def moment(self):
        return None if self._made is None else Moment(*self._made, True)

    def begin_batch(self, step, epoch):
        """ Note that a batch of a step begins. Like what follows it runs at each step, and so calls little. """
        self._begun = step, epoch

    def before_step(self, optimizer, is_scaled=False):
        """ Note that an optimizer makes the step, and with which gradients: whoever changes them does it to all. """
        if self._made is not self._begun:
            self._made, self._gradients = self._begun, {}
        self._gradients[optimizer] = None, None, None
        if not is_scaled:
            for group in optimizer.param_groups:
                for param in group['params']:
                    if param.grad is not None:
                        self._gradients[optimizer] = param, weakref.ref(param.grad), param.grad._version
                        return

    def end_batch(self):
        """ Note that a batch has ended that counts as a step, as each does under manual optimization. """
        self._made = self._begun

    def left(self, weights):
        """
        Args:
            weights (Dict[str, Parameter]): by layer

        Returns:
            Dict[str, Parameter]: those that the last step has changed, if their gradients are still those of it: not
                clipped, not zero again, not added to
        """
        for param, gradient, version in self._gradients.values():
            if param is None or param.grad is None or param.grad is not gradient() or param.grad._version != version:
                return {}
        return among(weights, stepped_by(self._gradients))

    # --- what was read in case it was the last ---------------------------------

    def hold(self, place, reading):
        """ Keep a Reading of a 'step' or a 'validation', in case none follows it. """
        self._held[place] = reading

    def holds(self, place, moment):
        """ Whether something was read of it at this moment already. """
        return place in self._held and self._held[place].moment.step == moment.step

    def take(self, place, names, moment):
        """
        Args:
            place (str): 'step' or 'validation'
            names (List[str]): metrics that have no value of this epoch
            moment (Moment): of the end of the epoch

        Returns:
            List[Reading]: what was read of these metrics, if it is not old
        """
        reading = self._held.pop(place, None)
        if reading is None or reading.moment.epoch != moment.epoch or (
                place == 'step' and reading.moment.step < moment.step):
            return []
        own = [name for name in reading.metrics if name in names]
        return [dataclasses.replace(reading, metrics=own)] if own else []


def listen(before_step):
    """
    Be told of each step of any optimizer of torch.

    Args:
        before_step (Callable[[Optimizer], None]): called as a step begins

    Returns:
        RemovableHandle: of torch

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.last_step import listen
        >>> import torch
        >>> seen = []
        >>> handle = listen(lambda optimizer: seen.append(type(optimizer).__name__))
        >>> torch.optim.Adam([torch.ones(2)]).step()
        >>> handle.remove()
        >>> seen
        ['Adam']
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    return register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: before_step(optimizer))
