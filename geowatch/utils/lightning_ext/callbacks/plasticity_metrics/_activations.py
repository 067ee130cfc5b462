"""
Sees every call of an activation function while a capture is open.

A module hook sees ``nn.ReLU`` but not ``F.relu``, ``torch.relu`` or
``x.relu_()``. A :class:`torch.overrides.TorchFunctionMode` sees them all. It
also sees the layers, so that each tensor can carry a trail: which run of which
layer produced it, and on which axis its units are. A site is (module,
function, producing layer, k-th such call since that layer ran): one ``nn.ReLU``
used after two layers is two sites, one layer that runs for each item of a list
is one.
"""
import contextlib
import dataclasses
import functools
import itertools
import sys
import time
import weakref
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import _disable_current_modes

from ._saturation import SATURATED_VALUES, saturated_values
from ._units import LAYER_FUNCTIONS, NORM_AXIS, SLICES, Place, default_axis, follow_units, layer_axis
from ._weights import clean_name

_graph_task = torch._C._current_graph_task_id
_functorch_level = torch._C._functorch.peek_interpreter_stack

# Modules and functions that compute activations inside one kernel.
FUSED_MODULES = (nn.RNNBase, nn.RNNCellBase)
FUSED_FUNCTIONS = {'lstm', 'gru', 'rnn_tanh', 'rnn_relu', 'lstm_cell', 'gru_cell', 'rnn_tanh_cell',
                   'rnn_relu_cell', 'scaled_dot_product_attention', 'multi_head_attention_forward'}
# In eval they may take a fast path, which any mode or hook would switch off.
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclasses.dataclass(frozen=True)
class Site:
    """
    Where an activation function is called.

    Attributes:
        module (str): path of the module whose forward made the call
        function (str): name of the function, or class of a module that was
            registered as an activation
        layer (str): path of the layer that produced the input
        nth (int): how many such calls came before since that layer ran
        units (int): number of units
        is_module (bool): True if the module is one activation, as ``nn.ReLU``

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._activations import Site
        >>> Site('block.relu', 'relu', 'block.conv1', is_module=True).names()[:2]
        ['block.relu', 'block.relu@conv1']
        >>> Site('block', 'relu', 'block.conv1').names()[:2]
        ['block.relu', 'block.relu@conv1']
    """
    module: str
    function: str
    layer: str = ''
    nth: int = 0
    units: int = 0
    is_module: bool = False

    def names(self):
        """ Names from the shortest to the one that tells all sites apart. """
        function = '' if self.is_module else self.function
        short = '.'.join(part for part in (self.module, function) if part)
        parent = self.module.rpartition('.')[0] if self.is_module else self.module
        layer = self.layer.removeprefix(f'{parent}.') if parent else self.layer
        at_layer = f'{short}@{layer}' if layer else short
        numbered = f'{at_layer}#{self.nth + 1}'
        return [short, at_layer, numbered, f'{numbered}:{self.function}/{self.units}']


def site_names(sites):
    """
    Readable names, in the order given: as short as is unambiguous.

    Args:
        sites (Iterable[Site]):

    Returns:
        Dict[Site, str]:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._activations import Site, site_names
        >>> sites = [Site('block.relu', 'relu', 'block.conv1', is_module=True),
        >>>          Site('block.relu', 'relu', 'block.conv2', is_module=True), Site('', 'tanh', 'head')]
        >>> list(site_names(sites).values())
        ['block.relu@conv1', 'block.relu@conv2', 'tanh']
    """
    candidates = {site: site.names() for site in sites}
    counts = Counter(name for names in candidates.values() for name in set(names))
    return {site: next((name for name in names if counts[name] == 1), names[-1])
            for site, names in candidates.items()}


class _Run:
    """ One run of a layer, and the activation calls on what it produced. """
    __slots__ = ('layer', 'order', 'calls')

    def __init__(self, layer, order):
        self.layer = layer
        self.order = order
        self.calls = {}


class _Trail(NamedTuple):
    run: _Run
    place: Place
    extent: int = 0  # which slice of what the layer produced


class _Known(weakref.ref):
    """ What is known of a tensor, which it does not keep alive. """
    __slots__ = ('key', 'trail', 'owner')


class _Module(NamedTuple):
    """ A module of the model, while it runs. """
    module: nn.Module
    path: str
    activation: str | None  # its class, where that is registered as an activation
    may_be_fast: bool


class Capture(TorchFunctionMode):
    """
    Reports every activation call inside a ``with`` block.

    Nothing is attached to the model: the modules that run are followed by two
    global hooks of torch, which are removed on exit. An activation of weights
    alone, such as a learned gate, has no samples and is not reported.

    Args:
        model (torch.nn.Module): names of layers come from it
        observe (Callable): called with (site, output, axis, saturated): the
            output of the call, the axis of its units, and the values at which
            a unit of this function is dead, a tuple.
        on_error (Callable | None): called with an exception of ours, after
            which this capture sees nothing more. By default it is raised.

    Attributes:
        unseen (Dict[str, str]): module path to the fused function that ran
        seconds (float): of our own work so far, without that of `observe`

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._activations import Capture
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> seen = []
        >>> with Capture(model, lambda *args: seen.append(args)):
        >>>     _ = model(torch.ones(2, 3))
        >>> [(site.names()[0], tuple(x.shape), axis, dead) for site, x, axis, dead in seen]
        [('1', (2, 4), 1, (0.0,))]
    """

    def __init__(self, model, observe, on_error=None):
        super().__init__()
        self._model = model
        self._observe = observe
        self._on_error = on_error
        self.unseen = {}
        self.seconds = 0.

    # --- attach and detach -------------------------------------------------

    def __enter__(self):
        self._paths = {}
        self._constants = {}    # id of a parameter or buffer to the path of its layer
        for path, module in self._model.named_modules():
            path = self._paths[id(module)] = clean_name(path)
            layer = _layer_path(path) if 'parametrizations' in path else path
            for table in (module._parameters, module._buffers):
                for tensor in table.values():
                    self._constants[id(tensor)] = layer
        self._constants.pop(id(None), None)
        self._modules = {}      # id to _Module, of those that have run
        self._sites = {}
        self._known = {}        # id of a tensor to _Known
        self._order = itertools.count(1)
        self._stack = []        # _Module for each module that runs now
        self._suspended = None  # the module that runs without us
        self._inside = 0        # registered activation modules that run now
        self._at_work = False
        self._broken = False
        self._exit = contextlib.ExitStack()
        with contextlib.ExitStack() as exit:
            exit.enter_context(_eager())
            exit.callback(register_module_forward_pre_hook(self._entering).remove)
            handle = register_module_forward_hook(self._leaving, with_kwargs=True, always_call=True)
            # Of a hook with kwargs, torch leaves an entry behind.
            exit.callback(getattr(torch_module, '_global_forward_hooks_with_kwargs', {}).pop, handle.id, None)
            exit.callback(handle.remove)
            super().__enter__()
            self._exit = exit.pop_all()
        return self

    def __exit__(self, *exc):
        try:
            if self._suspended is None:
                super().__exit__(*exc)
        finally:
            self._suspended = None
            self._stack.clear()
            for table in (self._known, self._constants, self._modules, self._paths):
                table.clear()
            self._exit.close()

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
        entered = self._modules.get(id(module)) or self._look_up(module)
        if entered is not None:
            self._stack.append(entered)
            if entered.activation:
                self._inside += 1
            if entered.may_be_fast and self._suspended is None and self._is_fast(module):
                super().__exit__(None, None, None)
                self._suspended = module

    def _look_up(self, module):
        path = self._paths.get(id(module))
        if path is None:
            return None
        name = type(module).__name__
        entered = self._modules[id(module)] = _Module(
            module, path, name if name in SATURATED_VALUES else None, isinstance(module, _FAST_PATHS))
        return entered

    def _leaving(self, module, args, *kwargs_and_output):
        if not self._stack or self._stack[-1].module is not module and not any(
                entered.module is module for entered in self._stack):
            return
        entered = None
        while entered is None or entered.module is not module:  # an exception may have left more than one
            entered = self._stack.pop()
            # After an exception torch gives neither kwargs nor output.
            returned = entered.module is module and len(kwargs_and_output) == 2
            if self._suspended is entered.module:
                self._suspended = None
                super().__enter__()
                if returned:
                    self._guard(self._look_apart, entered, args, *kwargs_and_output)
            if entered.activation:
                self._inside -= 1
                if returned:
                    self._guard(self._report_module, entered, kwargs_and_output[1])

    def _is_fast(self, module):
        # Also a frozen part of a network in training.
        return (not module.training and _get_current_function_mode() is self and not (
            torch.is_grad_enabled() and any(param.requires_grad for param in module.parameters())))

    def _look_apart(self, entered, args, kwargs, output):
        """ What ran without us runs once more, for the look only. """
        outputs = _tensors([output])
        if isinstance(entered.module, nn.MultiheadAttention):  # it has no activation
            self.unseen[entered.path] = 'scaled_dot_product_attention'
            self._start(entered.path, outputs[:1], -1)
        elif outputs and not any(x.is_nested for x in _tensors([args, kwargs])):
            self._stack.append(entered)
            self._suspended = entered.module  # so that nothing inside is suspended again
            try:
                with torch.no_grad():
                    apart = entered.module.forward(*args, **kwargs)
            finally:
                self._suspended = None
                self._stack.pop()
            trail = self._trail_of(_tensors([apart]))
            if trail is not None:
                self._remember(outputs[0], trail)

    # --- the functions that are called -------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs) if kwargs else func(*args)
        # Activation checkpointing runs the forward again inside backward.
        if _graph_task() == -1:
            self._guard(self._follow, func, args, kwargs or {}, output)
        return output

    # This runs for each call of a torch function: it has to be cheap.
    def _follow(self, func, args, kwargs, output):
        if isinstance(output, torch.Tensor):
            outputs = [output] if output.is_floating_point() else None
        elif isinstance(output, (tuple, list)) and type(output) is not torch.Size:
            outputs = [x for x in _tensors(output) if x.is_floating_point()]
        else:
            outputs = None
        if not outputs or _functorch_level() is not None:
            return
        name = _name_of(func)
        path = self._stack[-1].path if self._stack else ''
        if name in FUSED_FUNCTIONS:
            self.unseen[path] = name
        inputs = _tensors(args)
        if kwargs:
            inputs += _tensors(kwargs.values())
        source = trail = None
        owners = []  # of those inputs that are weights, or made of weights alone
        for x in inputs:
            known = self._known.get(id(x))
            if known is None:
                owner = self._constants.get(id(x))
                # Sharding replaces parameters just before they are used.
                owners.append(path if owner is None and isinstance(x, nn.Parameter) else owner)
            else:
                owners.append(known.owner)
                if known.trail is not None and (trail is None or known.trail.run.order > trail.run.order):
                    source, trail = x, known.trail
        is_constant = bool(inputs) and None not in owners
        if name in LAYER_FUNCTIONS and (LAYER_FUNCTIONS[name] or (not is_constant and any(
                owner is not None for owner in owners))):
            layer = path
            for owner in owners:
                if owner is not None:
                    layer = owner
                    break
            self._start(layer, outputs, layer_axis(name, args, kwargs, owners, output))
        elif is_constant:
            for x in outputs:
                if id(x) not in self._constants:
                    self._remember(x, None, owners[0])
            return  # an activation of weights has no samples
        elif trail is not None:
            for x in outputs:
                place, extent = follow_units(name, args, kwargs, source, trail.place, x), trail.extent
                if name in SLICES and x.ndim and x.numel() < source.numel() and (
                        x.shape[place.axis] == source.shape[trail.place.axis]):
                    extent = next(self._order)
                same = place == trail.place and extent == trail.extent
                self._remember(x, trail if same else _Trail(trail.run, place, extent))
        elif name in NORM_AXIS:
            self._start(path, outputs, NORM_AXIS[name])
        if name in SATURATED_VALUES and not self._inside:
            known = self._known.get(id(outputs[0]))
            self._report(name, saturated_values(name, args, kwargs), outputs[0], known and known.trail)

    def _start(self, layer, outputs, axis):
        """ A layer ran: everything made of its output leads back to here. """
        run = _Run(layer, next(self._order))
        for x in outputs:
            if x.ndim:
                self._remember(x, _Trail(run, Place(axis % x.ndim, x.shape[axis])))

    def _trail_of(self, tensors):
        """ The trail of the layer that ran last. """
        trails = [known.trail for known in map(self._known.get, map(id, tensors)) if known and known.trail]
        return max(trails, key=lambda trail: trail.run.order, default=None)

    def _remember(self, tensor, trail, owner=None):
        key = id(tensor)
        known = self._known.get(key)
        if known is None or known() is not tensor:
            known = self._known[key] = _Known(tensor, self._forget)
            known.key = key
        known.trail = trail
        known.owner = owner

    def _forget(self, known):
        # Not if the id has been given to a new tensor meanwhile.
        if self._known.get(known.key) is known:
            del self._known[known.key]

    def _report_module(self, entered, output):
        if not self._inside and isinstance(output, torch.Tensor):
            self._stack.append(entered)
            try:
                with torch._C.DisableTorchFunction():  # unlike a call, a hook runs under our mode
                    self._report(entered.activation, saturated_values(entered.activation), output,
                                 self._trail_of([output]))
            finally:
                self._stack.pop()

    def _report(self, name, values, output, trail):
        if not _can_be_read(output):
            return
        entered = self._stack[-1] if self._stack else None
        path = entered.path if entered else ''
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
            site = self._sites[key] = Site(*key, is_module=entered is not None and _is_leaf(entered))
        device, start = output.device.type, time.perf_counter()
        with torch.no_grad(), _unseen():
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    self._observe(site, output.detach(), axis, values)
            else:
                self._observe(site, output.detach(), axis, values)
        self.seconds -= time.perf_counter() - start


def fused_modules(model):
    """
    Modules whose activations are computed inside one kernel.

    Args:
        model (torch.nn.Module):

    Returns:
        Dict[str, str]: module path to the reason

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._activations import fused_modules
        >>> import torch
        >>> fused_modules(torch.nn.ModuleDict({'rnn': torch.nn.LSTM(2, 3)}))
        {'rnn': 'LSTM is one fused kernel'}
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, FUSED_MODULES):
            found[clean_name(path)] = f'{type(module).__name__} is one fused kernel'
        elif isinstance(module, nn.MultiheadAttention):
            found[clean_name(path)] = 'scaled_dot_product_attention is one fused kernel'
    return found


def _eager():
    """ Compiled code runs as written, where modes and hooks work; nothing is recompiled later. """
    if 'torch._dynamo' in sys.modules and hasattr(torch.compiler, 'set_stance'):
        return torch.compiler.set_stance('force_eager')
    return contextlib.nullcontext()


def _unseen():
    """ What we call is none of the user's: selective checkpointing would replay its results as the model's. """
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else contextlib.nullcontext()


def _is_leaf(entered):
    """ Whether a module goes by its path alone: nn.ReLU, or a user's own without layers. """
    return bool(entered.path) and not entered.module._modules and all(
        param is None or param.ndim < 2 for param in entered.module._parameters.values())


def _can_be_read(tensor):
    return (tensor.ndim > 0 and tensor.layout is torch.strided and tensor.is_floating_point()
            and not tensor.is_meta and not tensor.is_nested)


def _tensors(items):
    """ All tensors in any nesting of lists, tuples and dicts. """
    found = []
    for item in items:
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            if item and type(item[0]) is not int:  # most are strides and sizes
                found += _tensors(item)
        elif isinstance(item, dict):
            found += _tensors(item.values())
    return found


@functools.lru_cache(maxsize=1024)
def _name_of(func):
    """ As we know it: without the underscores of in-place and private functions. """
    name = func.__name__
    if name == '__get__':  # a property, such as x.T
        name = getattr(func.__self__, '__name__', '')
    return name if name.startswith('__') else name.strip('_')  # F.threshold is _threshold


def _layer_path(path):
    """ The layer whose weight a parametrization makes. """
    parts = path.split('.')
    return '.'.join(parts[:parts.index('parametrizations')]) if 'parametrizations' in parts else path
