"""
Which tensors are weights, or made of weights alone, and of which layer.

Layers are told apart by their parameters: the two matrices of one module are
two layers, as are the experts that are slices of one parameter.
"""
from typing import NamedTuple

import torch
from torch import nn

from ..flat import Flattened
from .axes import SLICES
from .layers import LAYERS
from .modules import places

# Functions that look rows or matrices up in a table.
LOOKUPS = {'__getitem__', 'index_select'}
# Functions that mask a weight.
MASKS = {'mul', '__mul__', '__rmul__', 'multiply', 'where', 'masked_fill'}


class Owner(NamedTuple):
    """
    The layer of a weight, or of what is made of weights alone.

    Attributes:
        layer (str): its path, with the name of the parameter if that is not the only one
        rank (Tuple[bool, bool, int]): which of several is the weight: a
            parameter of two dimensions and more, that is trained, of the most dimensions
        is_data (bool): no parameter is in it, only buffers
        labels (Tensor | None): which matrices it holds, where some were looked up of several
        count (int): of how many
    """
    layer: str
    rank: tuple
    is_data: bool
    labels: torch.Tensor | None = None
    count: int = 0

    @property
    def ndim(self):
        """ Dimensions of a matrix for each label, or of the parameter. """
        return self.rank[2] if self.labels is None else self.labels.ndim + 2

    @property
    def is_trained(self):
        """ Whether it is trained, and more than a bias or a scale. """
        return self.rank[0] and self.rank[1]


class Owners:
    """
    The parameters and buffers of a model.

    Args:
        contents (Contents): of the model

    Attributes:
        known (Dict[int, Owner]): by the id of a tensor

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.owners import Owners
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> import torch
        >>> layers = torch.nn.ParameterList([torch.ones(2, 3), torch.ones(3, 2)])
        >>> owners = Owners(Contents(torch.nn.ModuleDict({'net': layers})))
        >>> [owners.known[id(param)].layer for param in layers]
        ['net.0', 'net.1']
    """

    def __init__(self, contents):
        self._contents = contents
        known, self._flat, layers = contents.once(_table)
        self.known = dict(known)
        for path, module in contents.once(places):
            for name, tensor in module._buffers.items():  # which may be others at each step
                if tensor is not None and id(tensor) not in self.known:
                    key = path, name
                    if key not in layers:
                        layers[key] = layer_of(path, module, name)
                    self.known[id(tensor)] = Owner(layers[key], (False, False, tensor.ndim), True) if type(
                        tensor) is torch.Tensor else _owner(contents, path, module, name, tensor)

    @property
    def are_flat(self):
        """ Whether any parameter is another tensor in each forward pass (bool). """
        return bool(self._flat)

    def of_unknown(self, tensor, path):
        """
        Sharding replaces parameters just before they are used, FSDP1 by tensors of its buffers.

        Args:
            tensor (Tensor):
            path (str): of the module that runs

        Returns:
            Owner | None: None if it is no parameter
        """
        for flat_path, module, name, param in self._flat:
            if getattr(module, name, None) is tensor:
                return _owner(self._contents, flat_path, module, name, param)
        if not isinstance(tensor, nn.Parameter) or getattr(tensor, '_is_flat_param', False):
            return None
        by_path = self._contents.once(_by_path)
        for at in (path, *by_path):  # most are of the module that runs
            for name, own in by_path[at]._parameters.items() if at in by_path else ():
                if own is tensor:
                    return _owner(self._contents, at, by_path[at], name, tensor)
        # Of a network that the model does not hold.
        return Owner(path, (tensor.ndim > 1, _is_trained(self._contents, path, tensor), tensor.ndim), False)

    def is_trained(self, path, module):
        """ Whether any weight (not a bias) of a module is trained. """
        return any(_owner(self._contents, path, module, f'{part}.{name}' if part else name, param).is_trained
                   for part, own in module.named_modules()
                   for name, param in self._contents.parameters.get(own, {}).items())

    def made(self, name, inputs, owners, weight, outputs):
        """
        What a call makes of weights alone: masked, normalized, sliced, moved, or by other weights.

        Args:
            name (str): of the function
            inputs (List[Tensor]):
            owners (List[Owner]): of each
            weight (Owner): that of the highest rank
            outputs (List[Tensor]):

        Yields:
            Tuple[Tensor, Owner]:
        """
        layer = weight.layer
        if name in LAYERS:
            # As in a hypernetwork, where one layer makes the weights of several.
            others = [owner.layer for owner in owners
                      if owner is not None and owner.layer != layer and owner.layer != f'{layer}.bias']
            layer = f'{layer}({others[0]})' if others else layer
        for x in outputs:
            if id(x) not in self.known:
                own = slice_name(layer, x, inputs[0]) if name in SLICES else layer
                yield x, Owner(own, weight.rank, weight.is_data)

    def clear(self):
        """ Forget the model. """
        self.known.clear()
        self._flat, self._contents = [], None


def _table(contents):
    """
    The Owner of each parameter by its id; path, module, name and Flattened of
    what is another tensor in each forward pass; layers of buffers, once they have been asked for.
    """
    known, flat = {}, []
    for path, module in contents.once(places):
        for name, tensor in contents.parameters[module].items():
            own = getattr(tensor, 'parameter', tensor)
            if getattr(own, '_fsdp_flattened', False):
                flat.append((path, module, name, tensor))
            elif id(own) not in known:
                known[id(own)] = _owner(contents, path, module, name, tensor)
    return known, flat, {}


def _by_path(contents):
    """ Path to module. """
    return dict(reversed(contents.once(places)))


def _owner(contents, path, module, name, tensor):
    """ That of a parameter, or of another tensor in the place of one. """
    is_param = isinstance(tensor, (nn.Parameter, Flattened))
    is_trained = is_param and _is_trained(contents, f'{path}.{name}' if path else name, tensor)
    return Owner(layer_of(path, module, name), (is_param and tensor.ndim > 1, is_trained, tensor.ndim), not is_param)


def _is_trained(contents, name, param):
    return param.requires_grad and (contents.is_trained is None or contents.is_trained(name, param))


def layer_of(path: str, module: nn.Module, name: str) -> str:
    """
    The layer that a parameter is of.

    Args:
        path (str): of its module
        module (nn.Module):
        name (str): of the parameter in it

    Returns:
        str: the path of the module, with the name of the parameter where the
            module has several weights

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.owners import layer_of
        >>> import torch
        >>> layer_of('rnn', torch.nn.LSTM(2, 2), 'weight_ih_l0'), layer_of('vars', torch.nn.ParameterList(), '0')
        ('rnn', 'vars.0')
    """
    parts = path.split('.')
    if 'parametrizations' in parts:
        return '.'.join(parts[:parts.index('parametrizations')])
    is_of_torch = type(module).__module__.startswith('torch.nn.') and not isinstance(
        module, (nn.ParameterList, nn.ParameterDict))
    weights = [own for own, param in module._parameters.items() if param is not None and param.ndim > 1]
    if name == 'weight' or is_of_torch or weights == [name]:
        return path
    return f'{path}.{name}' if path else name


def slice_name(layer: str, x, whole=None) -> str:
    """
    The name of a slice of a layer's weight.

    Args:
        layer (str):
        x (Tensor): the slice
        whole (Tensor | None): what it is a slice of; by default all of its storage

    Returns:
        str: the layer with its number, where slices are of equal size, or with
            where it begins

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.owners import slice_name
        >>> import torch
        >>> experts = torch.ones(4, 3, 2)
        >>> slice_name('up', experts[2], experts), slice_name('up', experts[1:, 0]), slice_name('up', experts)
        ('up.2', 'up.1', 'up')
    """
    if not x.numel():
        return layer
    try:
        storage = x.untyped_storage()
        if whole is None:
            if storage.nbytes() == x.numel() * x.element_size():
                return layer
            begin = x.storage_offset()
        elif whole.untyped_storage()._cdata != storage._cdata or whole.numel() == x.numel():
            return layer
        else:
            begin = x.storage_offset() - whole.storage_offset()
    except (NotImplementedError, RuntimeError):  # a tensor without storage of its own
        return layer
    number, rest = divmod(begin, x.numel())
    return f'{layer}.{begin if rest else number}'
