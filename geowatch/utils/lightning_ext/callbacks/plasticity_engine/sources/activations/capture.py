"""
Sees every call of an activation function while it is open.

A module hook sees ``nn.ReLU`` but not ``F.relu``, ``torch.relu`` or
``x.relu_()``. A :class:`torch.overrides.TorchFunctionMode` sees them all. It
also sees the layers, so that each tensor can carry a trail: which run of which
layer produced it, and on which axis its units are. A site is (module,
function, producing layer, k-th such call since that layer ran): one ``nn.ReLU``
used after two layers is two sites, one layer that runs for each item of a list
is one.
"""
import contextlib
import functools
import time
import weakref

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .axes import default_axis
from .functions import SATURATED_VALUES, level, saturated_values
from .modules import FUSED_FUNCTIONS, Hooks, Modules
from .opening import Opening
from .sites import Site
from .trails import Trails, tensors_in

_RETURNED = (torch.Tensor, tuple, list)


class Capture:
    """
    Reports every activation call inside a ``with`` block.

    Nothing is attached to the model. It closes when nobody keeps it, too. An activation of weights alone, such as a
    learned gate, has no samples and is not reported.

    Args:
        model (torch.nn.Module): names of layers come from it
        observe (Callable): called with (site, output, axis, values, level):
            the output of the call, the axis of its units, the values at which
            a unit of this function is dead, a tuple, and the output above
            which its input is positive.
        on_error (Callable | None): called with an exception of ours, after
            which this capture sees nothing more. By default it is raised.

    Attributes:
        unseen (Dict[str, str]): module path to the fused function that ran
        seconds (float): of our own work so far, without that of `observe`

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> seen = []
        >>> with Capture(model, lambda *args: seen.append(args)):
        >>>     _ = model(torch.ones(2, 3))
        >>> [(site.names()[0], tuple(x.shape), axis, dead, level) for site, x, axis, dead, level in seen]
        [('1', (2, 4), 1, (0.0,), 0.0)]
    """

    def __init__(self, model, observe, on_error=None):
        self._model = model
        self._observe = observe
        self._on_error = on_error
        self.unseen = {}
        self.seconds = 0.
        self._modules = self._trails = None
        self._sites = {}
        self._suspended = None  # the module that runs without us
        self._at_work = False
        self._broken = False
        self._mode = _Mode(self)
        self._opening = Opening(self._mode, Hooks(_weakly(self._entering), _weakly(self._leaving)))
        # Private names of torch: where one is missing, no capture opens, and nothing else is lost.
        self._graph_task = torch._C._current_graph_task_id
        self._functorch_level = torch._C._functorch.peek_interpreter_stack
        from torch.overrides import _get_current_function_mode
        self._innermost_mode = _get_current_function_mode

    # --- attach and detach -------------------------------------------------

    def __enter__(self):
        self._modules = Modules(self._model)
        self._trails = Trails(self._modules.named)
        try:
            self._opening.open()
        except Exception:
            self.close()
            raise
        return self

    def __exit__(self, *exc):
        self.close()

    def __del__(self):
        if hasattr(self, '_opening'):
            self.close()

    def close(self):
        """ Leave nothing behind: from any state, and as often as it takes. """
        self._opening.close()
        self._suspended, self._broken = None, True
        for known in filter(None, (self._modules, self._trails)):
            known.clear()

    def _guard(self, function, *args):
        """ An error of ours never reaches the model, and our time is noted. """
        if self._broken:
            return
        outermost, self._at_work = not self._at_work, True
        start = time.perf_counter()
        try:
            function(*args)
        except Exception as ex:
            self._broken = True
            if self._on_error is None:
                raise
            self._on_error(ex)
        finally:
            if outermost:
                self._at_work = False
                self.seconds += time.perf_counter() - start

    # --- the modules that run ----------------------------------------------

    def _entering(self, module, args):
        running = self._modules.enter(module)
        if running is not None and running.may_be_fast and self._suspended is None and self._is_fast(module):
            self._suspended = module
            self._opening.pop()

    def _leaving(self, module, args, *kwargs_and_output):
        for running in self._modules.leave(module):
            # After an exception torch gives neither kwargs nor output.
            returned = running.module is module and len(kwargs_and_output) == 2
            if self._suspended is running.module:
                self._suspended = None
                self._opening.push()
                if returned:
                    self._guard(self._look_apart, running, args, *kwargs_and_output)
            if running.activation and returned:
                self._guard(self._report_module, running, kwargs_and_output[1])

    def _is_fast(self, module):
        # Also a frozen part of a network in training.
        return (not module.training and self._innermost_mode() is self._mode and not (
            torch.is_grad_enabled() and any(param.requires_grad for param in module.parameters())))

    def _look_apart(self, running, args, kwargs, output):
        """ What ran without us runs once more, for the look only. """
        outputs = tensors_in([output])
        if isinstance(running.module, nn.MultiheadAttention):  # it has no activation
            self.unseen[running.path] = 'scaled_dot_product_attention'
            self._trails.start(running.path, outputs[:1], -1)
        elif outputs and not any(x.is_nested for x in tensors_in([args, kwargs])):
            self._modules.push(running)
            self._suspended = running.module  # so that nothing inside is suspended again
            try:
                with torch.no_grad():
                    apart = running.module.forward(*args, **kwargs)
            finally:
                self._suspended = None
                self._modules.pop()
            trail = self._trails.of(tensors_in([apart]))
            if trail is not None:
                self._trails.remember(outputs[0], trail)

    # --- the functions that are called -------------------------------------

    def called(self, func, args, kwargs, output):
        """ Note one call of a torch function, and what it returned. """
        # Activation checkpointing runs the forward again inside backward.
        if self._graph_task() == -1:
            self._guard(self._follow, func, args, kwargs, output)

    def _follow(self, func, args, kwargs, output):
        found = [output] if isinstance(output, torch.Tensor) else tensors_in(output)
        outputs = [x for x in found if x.is_floating_point()]
        if not outputs or self._functorch_level() is not None:
            return
        name, path = name_of(func), self._modules.path
        if name in FUSED_FUNCTIONS:
            self.unseen[path] = name
        has_samples = self._trails.follow(name, args, kwargs, outputs, output, path)
        if has_samples and name in SATURATED_VALUES and not self._modules.inside:
            self._report(name, args, kwargs, outputs[0])

    def _report_module(self, running, output):
        if not self._modules.inside and isinstance(output, torch.Tensor):
            self._modules.push(running._replace(activation=None))
            try:
                with torch._C.DisableTorchFunction():  # unlike a call, a hook runs under our mode
                    self._report(running.activation, (), {}, output)
            finally:
                self._modules.pop()

    def _report(self, name, args, kwargs, output):
        if not _can_be_read(output):
            return
        running, trail = self._modules.top, self._trails.of([output])
        path = self._modules.path
        if trail is None:
            layer, axis, nth = '', default_axis(output), 0
        else:
            layer, axis = trail.run.layer, trail.place.axis
            key = path, name, trail.extent
            nth = trail.run.calls.get(key, 0)
            trail.run.calls[key] = nth + 1
        if not output.numel():
            return
        key = path, name, layer, nth, output.shape[axis]
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = Site(*key, is_module=running is not None and running.is_leaf)
        device, start = output.device.type, time.perf_counter()
        observed = site, output.detach(), axis, saturated_values(name, args, kwargs), level(name, args, kwargs)
        with _unseen(), torch.no_grad():
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    self._observe(*observed)
            else:
                self._observe(*observed)
        self.seconds -= time.perf_counter() - start


class _Mode(TorchFunctionMode):
    """ Tells a capture of each call. What torch keeps of us does not keep the capture. """

    def __init__(self, capture):
        super().__init__()
        self._capture = weakref.ref(capture)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs) if kwargs else func(*args)
        # Many calls only ask for a size.
        if isinstance(output, _RETURNED) and type(output) is not torch.Size and (
                capture := self._capture()) is not None:
            capture.called(func, args, kwargs or {}, output)
        return output


def _weakly(method):
    """ A function that calls a method as long as its object is there. """
    ref = weakref.WeakMethod(method)

    def call(*args):
        alive = ref()
        if alive is not None:
            alive(*args)
    return call


def _unseen():
    """ What we call is none of the user's: selective checkpointing would replay its results as the model's. """
    contexts = contextlib.ExitStack()
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _disable_current_modes
        contexts.enter_context(_disable_current_modes())
    if torch.is_inference_mode_enabled():
        # What adds up in one look has to take calls from inside and from outside of it.
        contexts.enter_context(torch.inference_mode(False))
    return contexts


def _can_be_read(tensor):
    return (tensor.ndim > 0 and tensor.layout is torch.strided and tensor.is_floating_point()
            and not tensor.is_meta and not tensor.is_nested and not _is_wrapper(tensor))


def _is_wrapper(tensor):
    """ Whether it has no numbers of its own: a fake one, while a model is exported, or one that holds others. """
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
    return isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor)


@functools.lru_cache(maxsize=1024)
def name_of(func):
    """
    The name of a torch function, as we know it: without the underscores of in-place and private ones.

    Args:
        func (Callable):

    Returns:
        str:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import name_of
        >>> import torch
        >>> name_of(torch.Tensor.relu_), name_of(torch.Tensor.T.__get__)
        ('relu', 'T')
    """
    name = func.__name__
    if name == '__get__':  # a property, such as x.T
        name = getattr(func.__self__, '__name__', '')
    return name if name.startswith('__') else name.strip('_')  # F.threshold is _threshold
