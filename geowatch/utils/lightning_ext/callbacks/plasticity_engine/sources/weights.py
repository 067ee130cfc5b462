"""
The weights of a network: which parameters they are, and which matrices those make.
"""
import functools
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..sharding import Slice, is_sharded, sharded_like, whole_of
from .contents import Contents
from .flat import Flattened
from .reparametrized import made_by
from .step import StepSource

_WRAPPERS = {'_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_forward_module'}
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# What linear, convolution, embedding and recurrent layers have, also those of other libraries.
_SIZES = ('in_features', 'in_channels', 'num_embeddings', 'input_size')
# The walk comes at each measurement; names do not change in between.
_cached = functools.lru_cache(maxsize=1 << 16)
# What is no weight by its kind, of which nobody has to be told.
SMALL = 'biases and scales'


@_cached
def clean_name(name: str) -> str:
    """
    A parameter's or module's name without the prefixes of wrappers.

    Args:
        name (str): as ``named_parameters`` gives it

    Returns:
        str:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import clean_name
        >>> clean_name('_forward_module.net._orig_mod.0._fsdp_wrapped_module.weight')
        'net.0.weight'
    """
    return '.'.join(part for part in name.split('.') if part not in _WRAPPERS)


class Weight:
    """
    A matrix of the network that is no parameter as it is: one of several that
    a parameter holds, or what the network makes of parameters.

    It stands wherever a parameter does: it has a gradient, takes a hook, and
    has a part on this process.

    Args:
        parts (List[Parameter | Flattened]): of which it is made
        make (Callable[[List[Tensor]], Tensor] | None): what makes it of them
        index (int | None): its place in the first dimension
        of (str): name of the whole

    Attributes:
        parameter (Parameter | Flattened | None): whose gradient is its own: the one that
            is no scale; None where several are

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import Weight
        >>> import torch
        >>> experts = torch.nn.Parameter(torch.ones(4, 2, 3))
        >>> experts.square().sum().backward()
        >>> weight = Weight([experts], index=1)
        >>> weight.detach().shape, weight.grad.detach().sum().item()
        (torch.Size([2, 3]), 12.0)
    """

    def __init__(self, parts, make=None, index=None, of=''):
        self.parts = parts
        self.of = of
        self._make = make
        self._index = index
        large = [part for part in parts if part.requires_grad and _long(part) > 1] or parts
        self.parameter = large[0] if len(large) == 1 else None

    @property
    def is_made(self):
        """ Whether it is made of parameters, and no part of one (bool). """
        return self._make is not None

    @property
    def whole(self):
        """ The Parameter or Flattened whose layout over processes it has. """
        return self.parts[0] if len(self.parts) == 1 else max(self.parts, key=lambda part: part.numel())

    def detach(self):
        """
        The Tensor, or the Slice or Stretch of one, as the network uses it.

        What is made of sharded parameters is made of whole ones, for which all processes have to come here.
        """
        with torch.no_grad():
            return self._part(self.whole if self._make is None else sharded_like(
                self._make([whole_of(part) for part in self.parts]), self.whole))

    @property
    def grad(self):
        """ The gradient of its parameter (Tensor | Slice | Stretch | None). """
        grad = None if self.parameter is None else self.parameter.grad
        return None if grad is None else self._part(grad)

    def register_hook(self, hook):
        """ Have a function called with each piece of the gradient, see :meth:`torch.Tensor.register_hook`. """
        if self.parameter is None:
            return torch.utils.hooks.RemovableHandle({})
        return self.parameter.register_hook(lambda grad: hook(self._part(grad)))

    def numel(self):
        """ How many numbers (int). """
        return self.whole.numel() if self.is_made and is_sharded(self.whole) else self.detach().numel()

    def _part(self, tensor):
        return tensor.detach() if self._index is None else Slice(tensor, self._index).detach()


def wanted(weights: dict[str, nn.Parameter | Weight], wants: Callable) -> dict[str, nn.Parameter | Weight]:
    """
    Those of some weights that are asked for, by their own name or by that of the whole.

    Args:
        weights (Dict[str, Parameter | Weight]): as :func:`weights_of` gives them
        wants (Callable[[str], bool]): of the name of a layer

    Returns:
        Dict[str, Parameter | Weight]:
    """
    return {layer: weight for layer, weight in weights.items() if wants(layer) or wants(getattr(weight, 'of', layer))}


def parameters_of(weight: nn.Parameter | Flattened | Weight) -> list[nn.Parameter]:
    """ The parameters, as optimizers know them, that one of :func:`weights_of` is made of. """
    parts = weight.parts if isinstance(weight, Weight) else [weight]
    return [part.parameter if isinstance(part, Flattened) else part for part in parts]


def among(weights: dict[str, nn.Parameter | Weight], ids: set[int]) -> dict[str, nn.Parameter | Weight]:
    """
    Those of some weights that are made of some parameters.

    Args:
        weights (Dict[str, Parameter | Weight]): as :func:`weights_of` gives them
        ids (Set[int]): of parameters, as :func:`.flat.stepped_by` gives them

    Returns:
        Dict[str, Parameter | Weight]:
    """
    return {layer: weight for layer, weight in weights.items()
            if any(id(param) in ids for param in parameters_of(weight))}


def weights_of(contents: Contents) -> dict[str, nn.Parameter | Weight]:
    """
    The weights, as the network uses them.

    Args:
        contents (Contents): of the model

    Returns:
        Dict[str, Parameter | Flattened | Weight]: by the names of their
            layers; a Weight where a parameter is not one matrix as it is, a
            Flattened where it lies in a flat buffer. A tied one is there once.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import weights_of
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.LayerNorm([4, 6, 6]), torch.nn.Linear(6, 1))
        >>> _ = torch.nn.utils.parametrizations.spectral_norm(net[2])
        >>> net.cls_token, net.experts = (torch.nn.Parameter(torch.ones(*shape)) for shape in [(1, 6), (2, 5, 6)])
        >>> {name: tuple(weight.detach().shape) for name, weight in weights_of(Contents(net)).items()}
        {'experts.0': (5, 6), 'experts.1': (5, 6), '0': (4, 3, 3, 3), '2': (1, 6)}
    """
    return {name: weight for name, weight, why in walk(contents) if why is None}


def walk(contents: Contents) -> Iterator[tuple[str, nn.Parameter | Weight, str]]:
    """
    All parameters of a model.

    Args:
        contents (Contents): of the model

    Yields:
        Tuple[str, Parameter | Flattened | Weight, str | None]: name of the layer, weight,
            and why it is not measured, None if it is

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import walk
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4).requires_grad_(False))
        >>> [(name, why) for name, _, why in walk(Contents(net))]
        [('0', None), ('0.bias', 'biases and scales'), ('1', 'frozen'), ('1.bias', 'biases and scales')]
    """
    seen, is_trained = set(), contents.is_trained
    for path, module in contents.modules:
        prefix = f'{path}.' if path else ''
        for name, parts, make, keeps_shape in made_by(module, contents.parameters):
            if seen.isdisjoint(map(id, parts)):
                yield from _weights(prefix + name, parts, make, module, is_trained, keeps_shape)
            seen.update(map(id, parts))
        for name, param in contents.parameters[module].items():
            if id(param) not in seen:
                seen.add(id(param))
                yield from _weights(prefix + name, [param], None, module, is_trained)


def _weights(name, parts, make, owner, is_trained, keeps_shape=True):
    """ The matrices of one parameter, or of one tensor that is made of some. """
    name = clean_name(name)
    layer = name.removesuffix('.weight')
    largest = parts[0] if len(parts) == 1 else max(parts, key=lambda part: 0 if is_lazy(part) else part.numel())
    why = why_not_a_weight(largest, name, owner)
    if why == 'frozen' and any(part.requires_grad for part in parts):
        why = None
    if why is None and is_trained is not None and not any([
            is_trained(name, part) for part in parts if part.requires_grad]):
        why = 'in no optimizer'
    if why is None and not keeps_shape and any(map(is_sharded, parts)):
        why = 'reparametrized in a way of its own, and sharded'
    if why is None and _has_slices(largest, name, owner):
        count = len(largest)
        for index in range(count):
            yield f'{layer}.{index}' if count > 1 else layer, Weight(parts, make, index, layer), None
    else:
        yield layer, largest if make is None else Weight(parts, make, of=layer), why


def _long(param):
    return sum(size > 1 for size in param.shape)


@_cached
def _last(name):
    """ What a parameter is called; in a list by the name of that. """
    return next((part for part in reversed(name.split('.')) if not part.isdigit()), '')


def _is_layers_weight(name, owner):
    """ Of a linear, convolution or embedding layer, of torch or of another library. """
    return 'weight' in _last(name) and ('linear' in type(owner).__name__.lower()
                                        or any(hasattr(owner, size) for size in _SIZES))


def _has_slices(param, name, owner):
    """ Whether each entry of the first dimension is a matrix: experts (n, out, in), and a table (1, n, out). """
    if param.ndim < 3 or 'weight' in _last(name) and (hasattr(owner, 'kernel_size') or isinstance(owner, nn.Bilinear)):
        return False
    return len(param) == 1 or param.ndim == _long(param) == 3


def why_not_a_weight(param: nn.Parameter, name: str = '', owner: nn.Module | None = None) -> str | None:
    """
    Why a parameter is not measured.

    Args:
        param (nn.Parameter):
        name (str): path of its module, and what that calls it
        owner (nn.Module | None): its module

    Returns:
        str | None: None if it is measured

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import why_not_a_weight
        >>> import torch
        >>> why_not_a_weight(torch.nn.Parameter(torch.ones(3, 1, 1)), 'gamma')
        'biases and scales'
        >>> why_not_a_weight(torch.nn.Parameter(torch.ones(3, 3), requires_grad=False))
        'frozen'
    """
    if is_lazy(param):
        return 'without a shape yet, measured once it has one'
    if getattr(param, '_fsdp_flattened', False):
        return 'flattened by an FSDP1 of which no trainer knows'
    if (param.ndim < 2 or _long(param) < 2 and not _is_layers_weight(name, owner) or _is_bias(name)
            or _is_norm(owner)):
        return SMALL
    if not param.is_floating_point():
        return 'not floating point'
    if not param.requires_grad:
        return 'frozen'
    if param.is_meta:
        return 'on the meta device'
    if param.layout is not torch.strided or not param.numel():
        return 'sparse or empty'
    return None


@_cached
def _is_bias(name):
    """ By what it is called: bias, w_bias, relative_bias_table, b, b1, b_in. """
    words = re.findall('[A-Za-z]+', _last(name))
    return bool(words) and (words[0] == 'b' or not {'bias', 'biases'}.isdisjoint(words))


def _is_norm(owner):
    return isinstance(owner, _NORMS) or _says_norm(type(owner).__name__)


@_cached
def _says_norm(class_name):
    return re.search(r'norm(\dd)?$', class_name.lower()) is not None


class Weights(StepSource):
    """
    The weights after the step.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import Weights
        >>> import contextlib
        >>> import torch
        >>> source = Weights(['abs'], lambda *args: contextlib.nullcontext())
        >>> source.end_step({'fc': torch.tensor([[1., -3.]])})
        >>> source.take()['abs']['fc'].item()
        4.0
    """
    name = 'weights'
    stays = True

    def end_step(self, weights):
        self._add_tensors(weights)
