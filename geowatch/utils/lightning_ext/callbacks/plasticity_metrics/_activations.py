"""
Sees every call of an activation function while a capture is open.

A module hook sees ``nn.ReLU`` but not ``F.relu``, ``torch.relu`` or
``x.relu_()``. A :class:`torch.overrides.TorchFunctionMode` sees them all. It
also sees the layers (``F.linear`` with a parameter of the model), so each
tensor carries a trail: which layer produced it, and on which axis its units
are. A site is (module, producing layer, function, k-th such activation since
that layer ran): one ``nn.ReLU`` used after two layers is two sites, one layer
that runs for each item of a list is one.
"""
import dataclasses
import weakref

import torch
from torch.overrides import TorchFunctionMode

# Output values at which a unit's gradient vanishes, by name of the function
# with a trailing underscore (in-place) removed. Callables take the arguments
# of the call.
SATURATED_VALUES = {
    'relu': (0.,),
    'relu6': (0., 6.),
    'sigmoid': (0., 1.),
    'tanh': (-1., 1.),
    'gelu': (0.,),
    'silu': (0.,),
    'softplus': (0.,),
    'elu': lambda input, alpha=1.0, *args, **kwargs: (-float(alpha),),
}

_CONVOLUTIONS = {'conv1d', 'conv2d', 'conv3d', 'conv_transpose1d',
                 'conv_transpose2d', 'conv_transpose3d'}
_PRODUCTS = {'linear', 'matmul', '__matmul__', '__rmatmul__', 'mm', 'bmm', 'addmm',
             'baddbmm', 'einsum', 'bilinear', 'embedding'}


@dataclasses.dataclass(frozen=True)
class Site:
    """
    Where an activation function is called.

    Attributes:
        module (str): path of the module whose forward made the call
        function (str): name of the function, '' if the module is one
            activation, such as ``nn.ReLU``
        layer (str): path of the layer that produced the input
        nth (int): how many such calls came before since that layer ran
    """
    module: str
    function: str
    layer: str
    nth: int = 0

    @property
    def short_name(self):
        """ The module path, with the function where it is not a module. """
        return '.'.join(part for part in (self.module, self.function) if part)

    @property
    def long_name(self):
        """ The short name and the layer, for a name that more sites share. """
        prefix = self.module.rpartition('.')[0]
        layer = self.layer.removeprefix(prefix + '.') if prefix else self.layer
        name = f'{self.short_name}@{layer}' if layer else self.short_name
        return f'{name}#{self.nth + 1}' if self.nth else name


def site_names(sites):
    """
    Readable names, in the order given: short where that is unambiguous.

    Args:
        sites (Iterable[Site]):

    Returns:
        Dict[Site, str]:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._activations import Site, site_names
        >>> sites = [Site('block.relu', '', 'block.conv1'),
        >>>          Site('block.relu', '', 'block.conv2'), Site('', 'tanh', 'head')]
        >>> list(site_names(sites).values())
        ['block.relu@conv1', 'block.relu@conv2', 'tanh']
    """
    sites = list(sites)
    short = [site.short_name for site in sites]
    return {site: site.short_name if short.count(site.short_name) == 1 else site.long_name
            for site in sites}


class Capture(TorchFunctionMode):
    """
    Reports every activation call inside a ``with`` block.

    Args:
        model (torch.nn.Module): names of layers come from it. Hooks that
            follow which module runs are attached on enter, removed on exit.
        observers (List[Callable]): called with (site, features, saturated):
            features is the output as a (rows, units) matrix, saturated the
            values at which a unit of this function is dead, a tuple.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._activations import Capture
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> seen = []
        >>> with Capture(model, [lambda *args: seen.append(args)]):
        >>>     _ = model(torch.ones(2, 3))
        >>> [(site.short_name, tuple(x.shape), dead) for site, x, dead in seen]
        [('1', (2, 4), (0.0,))]
    """

    def __init__(self, model, observers):
        super().__init__()
        self._model = model
        self._observers = observers
        self._handles = []
        self._trails = {}

    def __enter__(self):
        self._layer_of = {
            id(param): clean_name(name).removesuffix('.weight')
            for name, param in self._model.named_parameters(remove_duplicate=False)}
        self._modules = []
        self._runs = {}
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._entering(clean_name(name))),
                module.register_forward_hook(self._leaving, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._trails.clear()
        return super().__exit__(*exc)

    def _entering(self, name):
        def enter(module, args):
            self._modules.append((name, module))
        return enter

    def _leaving(self, module, args, output):
        if self._modules:
            self._modules.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '').removesuffix('_')
        if name == '' or name == '__get__':
            return func(*args, **kwargs)
        trail = self._trail_of_inputs(name, args, kwargs)
        output = func(*args, **kwargs)
        # Activation checkpointing runs the forward again inside backward.
        if torch._C._current_graph_task_id() != -1 or not isinstance(output, torch.Tensor):
            return output
        if trail is not None:
            layer, axis = trail
            axis = _follow_axis(name, args, kwargs, axis, output)
            self._remember(output, layer, axis)
        if name in SATURATED_VALUES:
            self._report(name, args, kwargs, trail, output)
        return output

    def _trail_of_inputs(self, name, args, kwargs):
        tensors = list(_tensors([*args, *kwargs.values()]))
        if name in _CONVOLUTIONS or name in _PRODUCTS:
            for tensor in tensors:
                layer = self._layer_of.get(id(tensor))
                if layer is not None:
                    self._runs[layer] = {}
                    return layer, 1 if name in _CONVOLUTIONS else -1
        for tensor in tensors:
            ref, layer, axis = self._trails.get(id(tensor), (None, None, None))
            if ref is not None and ref() is tensor:
                return layer, axis
        return None

    def _remember(self, tensor, layer, axis):
        key = id(tensor)
        self._trails[key] = weakref.ref(tensor, lambda _: self._trails.pop(key, None)), layer, axis

    def _report(self, name, args, kwargs, trail, output):
        values = SATURATED_VALUES[name]
        if callable(values):
            values = values(*args, **kwargs)
        layer, axis = trail or ('', -1)
        path, module = self._modules[-1] if self._modules else ('', None)
        # A module without layers of its own that calls one activation is
        # named by its path alone: nn.ReLU, or a user's own.
        is_activation = (module is not None and path
                         and not any(True for _ in module.parameters())
                         and not any(True for _ in module.children()))
        function = '' if is_activation else name
        key = (path, function)
        runs = self._runs.setdefault(layer, {})
        nth = runs[key] = runs.get(key, -1) + 1
        if not layer:
            nth = 0  # without a layer nothing tells when a new pass begins
        site = Site(path, function, layer, nth)
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            features = output.detach().movedim(axis, -1).flatten(0, -2) if output.ndim > 1 else output.detach()[None]
            for observer in self._observers:
                observer(site, features, values)


def clean_name(name):
    """
    A parameter's or module's name without the prefixes of wrappers.

    Args:
        name (str): as ``named_parameters`` gives it

    Returns:
        str:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._activations import clean_name
        >>> clean_name('_forward_module.net._orig_mod.0._fsdp_wrapped_module.weight')
        'net.0.weight'
    """
    wrappers = {'_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module',
                '_forward_module'}
    return '.'.join(part for part in name.split('.') if part not in wrappers)


def _tensors(items):
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)


def _follow_axis(name, args, kwargs, axis, output):
    """ The axis of the units after a call that may have moved it. """
    source = next(_tensors([*args, *kwargs.values()]), None)
    if source is None or not source.ndim:
        return axis
    at = axis % source.ndim
    if name in _CONVOLUTIONS:
        return 1 if output.ndim > 1 else 0
    if name in _PRODUCTS:
        return -1
    if name in {'transpose', 'swapaxes', 'permute', 'movedim', 'moveaxis', 't', 'mT', 'T'}:
        # Ask torch itself: send a tensor of axis numbers through the call.
        sizes = torch.empty([1] * at + [2] + [1] * (source.ndim - at - 1), device='meta')
        moved = getattr(torch.Tensor, name)(sizes, *args[1:], **kwargs)
        return list(moved.shape).index(2)
    if output.ndim == source.ndim:
        return at
    units = source.shape[at]
    if at == source.ndim - 1 or output.shape[-1] == units:
        return -1
    if output.ndim > 1 and output.shape[1] == units:
        return 1
    return -1
