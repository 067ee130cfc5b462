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
import itertools
import sys
import weakref
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ._saturation import SATURATED_VALUES, saturated_values
from ._units import LAYER_FUNCTIONS, NORM_AXIS, SLICES, default_axis, follow_axis, layer_axis
from ._weights import clean_name

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
        numbered = f'{at_layer}#{self.nth + 1}' if self.nth else at_layer
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

    def __init__(self, layer, order):
        self.layer = layer
        self.order = order
        self.calls = Counter()


class _Trail(NamedTuple):
    run: _Run
    axis: int
    extent: int = 0  # which slice of what the layer produced


class Capture(TorchFunctionMode):
    """
    Reports every activation call inside a ``with`` block.

    Nothing is attached to the model: the modules that run are followed by two
    global hooks of torch, which are removed on exit.

    Args:
        model (torch.nn.Module): names of layers come from it
        observe (Callable): called with (site, output, axis, saturated): the
            output of the call, the axis of its units, and the values at which
            a unit of this function is dead, a tuple.
        on_error (Callable | None): called with an exception of ours, after
            which this capture sees nothing more. By default it is raised.

    Attributes:
        unseen (Dict[str, str]): module path to the fused function that ran

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

    # --- attach and detach -------------------------------------------------

    def __enter__(self):
        self._paths = {id(module): clean_name(path) for path, module in self._model.named_modules()}
        self._constants = {}  # parameters, buffers and what is made of them alone
        for path, module in self._model.named_modules():
            own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            for _, tensor in own:
                self._constants[id(tensor)] = None, clean_name(path)
        self._trails = {}
        self._order = itertools.count(1)
        self._stack = []        # (module, path) of the modules that run now
        self._suspended = None  # the module that runs without us
        self._inside = 0        # registered activation modules that run now
        self._broken = False
        self._exit = contextlib.ExitStack()
        with contextlib.ExitStack() as exit:
            exit.enter_context(_eager())
            exit.callback(register_module_forward_pre_hook(self._entering).remove)
            exit.callback(register_module_forward_hook(self._leaving, with_kwargs=True, always_call=True).remove)
            super().__enter__()
            self._exit = exit.pop_all()
        return self

    def __exit__(self, *exc):
        try:
            if self._suspended is None:
                super().__exit__(*exc)
        finally:
            self._suspended = None
            self._trails.clear()
            self._constants.clear()
            self._exit.close()

    def _guard(self, function, *args):
        """ An error of ours never reaches the model. """
        if self._broken:
            return
        try:
            function(*args)
        except Exception as ex:
            self._broken = True
            if self._on_error is None:
                raise
            self._on_error(ex)

    # --- the modules that run ----------------------------------------------

    def _entering(self, module, args):
        path = self._paths.get(id(module))
        if path is not None:
            self._stack.append((module, path))
            self._inside += type(module).__name__ in SATURATED_VALUES
            if self._suspended is None and self._may_be_fast(module):
                super().__exit__(None, None, None)
                self._suspended = module

    def _leaving(self, module, args, *kwargs_and_output):
        if not any(entered is module for entered, _ in self._stack):
            return
        entered = None
        while entered is not module:  # an exception may have left more than one
            entered, path = self._stack[-1]
            # After an exception torch gives neither kwargs nor output.
            returned = entered is module and len(kwargs_and_output) == 2
            if self._suspended is entered:
                self._suspended = None
                super().__enter__()
                if returned:
                    self._guard(self._look_apart, module, path, args, *kwargs_and_output)
            name = type(entered).__name__
            if name in SATURATED_VALUES:
                self._inside -= 1
                if returned:
                    output = kwargs_and_output[1]
                    self._guard(self._report, name, saturated_values(name), self._trail_of([output]), output)
            self._stack.pop()

    def _may_be_fast(self, module):
        return (isinstance(module, _FAST_PATHS) and not module.training
                and not torch.is_grad_enabled() and _get_current_function_mode() is self)

    def _look_apart(self, module, path, args, kwargs, output):
        """ What ran without us runs once more, for the look only. """
        outputs = list(_tensors([output]))
        if isinstance(module, nn.MultiheadAttention):  # it has no activation
            self.unseen[path] = 'scaled_dot_product_attention'
            self._start(path, outputs[:1], -1)
        elif outputs and not any(x.is_nested for x in _tensors([args, kwargs])):
            self._suspended = module  # so that nothing inside is suspended again
            try:
                apart = module.forward(*args, **kwargs)
            finally:
                self._suspended = None
            trail = self._trail_of([apart])
            if trail is not None:
                self._remember(outputs[0], trail)

    # --- the functions that are called -------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        # Activation checkpointing runs the forward again inside backward.
        if not self._broken and torch._C._current_graph_task_id() == -1:
            self._guard(self._follow, func, args, kwargs, output)
        return output

    def _follow(self, func, args, kwargs, output):
        outputs = [x for x in _tensors([output]) if x.is_floating_point()]
        if not outputs or torch._C._functorch.peek_interpreter_stack() is not None:
            return
        name = func.__name__
        if name == '__get__':  # a property, such as x.T
            name = getattr(func.__self__, '__name__', '')
        name = name if name.startswith('__') else name.removesuffix('_')
        inputs = list(_tensors([args, kwargs]))
        owners = [self._constants.get(id(x), (None, None))[1] for x in inputs]
        path = self._stack[-1][1] if self._stack else ''
        if name in FUSED_FUNCTIONS:
            self.unseen[path] = name
        is_constant = bool(inputs) and None not in owners
        weights = [owner for owner in owners if owner is not None]
        if name in LAYER_FUNCTIONS and (LAYER_FUNCTIONS[name] or (weights and not is_constant)):
            self._start(weights[0] if weights else path, outputs, layer_axis(name, args, kwargs, owners, output))
            trail = None
        elif is_constant:
            for x in outputs:
                self._constants.setdefault(id(x), (weakref.ref(x, self._forget(self._constants, id(x))), owners[0]))
            return
        else:
            trail = self._trail_of(inputs)
            if trail is None and name in NORM_AXIS:
                self._start(path, outputs, NORM_AXIS[name])
            elif trail is not None:
                source = next(x for x in inputs if self._trail_of([x]) is trail)
                for x in outputs:
                    axis = follow_axis(name, args, kwargs, source, trail.axis, x)
                    extent = trail.extent
                    if name in SLICES and x.numel() < source.numel() and x.shape[axis] == source.shape[trail.axis]:
                        extent = next(self._order)
                    self._remember(x, _Trail(trail.run, axis, extent))
        if name in SATURATED_VALUES:
            self._report(name, saturated_values(name, args, kwargs), self._trail_of(outputs), outputs[0])

    def _start(self, layer, outputs, axis):
        """ A layer ran: everything made of its output leads back to here. """
        run = _Run(layer, next(self._order))
        for x in outputs:
            if x.ndim:
                self._remember(x, _Trail(run, axis % x.ndim))

    def _trail_of(self, tensors):
        """ The trail of the layer that ran last. """
        trails = [self._trails[id(x)][1] for x in _tensors(tensors) if id(x) in self._trails]
        return max(trails, key=lambda trail: trail.run.order, default=None)

    def _remember(self, tensor, trail):
        key = id(tensor)
        self._trails[key] = weakref.ref(tensor, self._forget(self._trails, key)), trail

    @staticmethod
    def _forget(table, key):
        def forget(ref):
            # Not if the id has been given to a new tensor meanwhile.
            if table.get(key, (None,))[0] is ref:
                del table[key]
        return forget

    def _report(self, name, values, trail, output):
        if self._inside or values is None or not isinstance(output, torch.Tensor) or not _can_be_read(output):
            return
        module, path = self._stack[-1] if self._stack else (None, '')
        layer, axis, nth = '', default_axis(output), 0
        if trail is not None:
            layer, axis = trail.run.layer, trail.axis
            key = (path, name, trail.extent)
            nth = trail.run.calls[key]
            trail.run.calls[key] += 1
        if output.numel():
            # A module without layers of its own goes by its path alone:
            # nn.ReLU, or a user's own.
            is_module = bool(path) and next(module.children(), None) is None and all(
                param.ndim < 2 for param in module.parameters())
            site = Site(path, name, layer, nth, output.shape[axis], is_module)
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self._observe(site, output.detach(), axis, values)


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


def _can_be_read(tensor):
    return (tensor.ndim > 0 and tensor.layout is torch.strided and tensor.is_floating_point()
            and not tensor.is_meta and not tensor.is_nested)


def _tensors(items):
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)
        elif isinstance(item, dict):
            yield from _tensors(item.values())
