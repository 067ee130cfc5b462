"""
Parameters that a strategy keeps in flat buffers, of which each process has a part: FSDP1, DeepSpeed's ZeRO.

All that is private in these two is here.
"""
import itertools
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ..sharding import Place, Stretch


class Flattened:
    """
    A parameter in a flat buffer, which stands where a parameter does.

    Args:
        parameter (nn.Parameter): which optimizers know: its own, or the buffer
        place (Place): of what this process has of it
        read (Callable[[], Tensor]): gives that, 1-d
        read_gradient (Callable[[], Tensor | None]): the same of its gradient

    Attributes:
        shape (torch.Size): of the whole
        requires_grad (bool):

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import Place
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.flat import Flattened
        >>> import torch
        >>> buffer = torch.nn.Parameter(torch.arange(4.))
        >>> weight = Flattened(buffer, Place(torch.Size([2, 4]), 4, 8, rank=1, count=2), lambda: buffer, lambda: None)
        >>> weight.numel(), weight.detach().shape, weight.detach().part.tolist(), weight.grad
        (8, torch.Size([2, 4]), [0.0, 1.0, 2.0, 3.0], None)
    """

    layout = torch.strided
    is_meta = False

    def __init__(self, parameter, place, read, read_gradient):
        self.parameter = parameter
        self.place = place
        self.shape = place.shape
        self.ndim = len(place.shape)
        self.requires_grad = parameter.requires_grad
        self._read = read
        self._read_gradient = read_gradient

    def __len__(self):
        return self.shape[0]

    def is_floating_point(self):
        """ Whether its numbers are real (bool). """
        return self.parameter.is_floating_point()

    def numel(self):
        """ How many numbers the whole has (int). """
        return self.shape.numel()

    def detach(self):
        """ The Stretch of it that this process has. """
        return Stretch(self._read().detach(), self.place)

    @property
    def grad(self):
        """ The Stretch of its gradient, None without one, on all processes alike. """
        gradient = self._read_gradient()
        return None if gradient is None else Stretch(gradient.detach(), self.place)


def parameters_in(modules: list[nn.Module]) -> dict[nn.Module, dict[str, nn.Parameter | Flattened]]:
    """
    The parameters of each module of a model, as optimizers step with them.

    Args:
        modules (List[nn.Module]): all of them, the model first

    Returns:
        Dict[nn.Module, Dict[str, Parameter | Flattened]]: those of a module
            itself, by what it calls them

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.flat import parameters_in
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
        >>> parameters_in([net, net[0]])[net[0]]['weight'] is net[0].weight
        True
    """
    flat = {}
    if any(vars(module).get('_is_fsdp_managed_module') for module in modules):
        # Of what wraps a LightningModule only its trainer knows.
        outer = getattr(getattr(modules[0], '_trainer', None), 'model', None) or modules[0]
        handles = [handle for module in outer.modules() if (handle := vars(module).get('_handle')) is not None
                   and hasattr(handle, 'flat_param')]
        for handle in handles:
            for (module, name), param in _of_fsdp(handle).items():
                flat.setdefault(module, {})[name] = param

    known, found = {}, {}  # id of a parameter to what stands for it, so that a tied one is one
    for module in modules:
        found[module] = own = {}
        for name, param in module._parameters.items():
            # While it runs FSDP1 has other tensors in the place of parameters.
            if param is not None and not getattr(param, '_is_flat_param', False):
                own[name] = known.setdefault(id(param), _of_deepspeed(param))
        own.update(flat.get(module, {}))
    return found


def is_flat(param: nn.Parameter | Flattened) -> bool:
    """
    Whether a parameter lies in a flat buffer.

    Args:
        param (nn.Parameter | Flattened): as :func:`parameters_in` gives it

    Returns:
        bool:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.flat import is_flat
        >>> import torch
        >>> is_flat(torch.nn.Parameter(torch.ones(2, 2)))
        False
    """
    return isinstance(param, Flattened) or getattr(param, '_fsdp_flattened', False)


def stepped_by(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """
    The parameters that optimizers change.

    Args:
        optimizers (Iterable[Optimizer]): of torch, or what DeepSpeed makes of
            one, which has flat copies of parameters itself

    Returns:
        Set[int]: their ids

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.flat import stepped_by
        >>> import torch
        >>> net = torch.nn.Linear(2, 3)
        >>> stepped_by([torch.optim.SGD(net.parameters())]) == {id(net.weight), id(net.bias)}
        True
    """
    return {id(param) for optimizer in optimizers for params in _groups_of(optimizer) for param in params}


def _groups_of(optimizer):
    for name in ('bit16_groups', 'fp16_groups', 'bf16_groups'):
        if groups := getattr(optimizer, name, None):
            return groups
    return [group['params'] for group in getattr(optimizer, 'param_groups', ())]


def calls_torch(package: str) -> bool:
    """
    Whether a call of torch that we are told of comes from some package: ZeRO 3 detaches what modules hand on.

    Args:
        package (str): how the names of its modules begin

    Returns:
        bool:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.flat import calls_torch
        >>> calls_torch('deepspeed.')
        False
    """
    ours, frame = __name__.rpartition('.sources.')[0], sys._getframe(1)
    while frame is not None and frame.f_globals.get('__name__', '').startswith((ours, 'torch.')):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get('__name__', '').startswith(package)


# --- FSDP1 -------------------------------------------------------------------

def _of_fsdp(handle):
    """ By module and name, the Flattened of each parameter in a buffer of FSDP1; a tied one has several names. """
    flat, size = handle.flat_param, handle.flat_param._sharded_size.numel()
    rank, count = (handle.rank, handle.world_size) if handle.uses_sharded_strategy else (0, 1)
    ends = itertools.accumulate(flat._numels_with_padding)
    offsets = [end - length for end, length, is_padding in zip(
        ends, flat._numels_with_padding, flat._is_padding_mask, strict=True) if not is_padding]
    found = {}
    for index, (info, offset) in enumerate(zip(flat._param_infos, offsets, strict=True)):
        place = Place.in_buffer(flat._shapes[index], offset, size, rank, count, handle.process_group,
                                None if flat._contiguities[index] else tuple(flat._strides[index]))
        first = max(offset - rank * size, 0)
        own = slice(first, first + place.end - place.start)
        param = flat if flat._params is None else flat._params[index]
        found[info.module, info.param_name] = Flattened(
            param, place, lambda own=own: getattr(flat, '_local_shard', flat)[own],
            lambda own=own, param=param: _gradient_of_fsdp(handle, param, own))
    for info in flat._shared_param_infos:
        found[info.module, info.param_name] = found[info.prim_module, info.prim_param_name]
    return found


def _gradient_of_fsdp(handle, param, own):
    """ One of its buffer for all: FSDP1 takes zeros for what has no gradient beside others that have. """
    flat, gradient = handle.flat_param, handle.sharded_grad
    if gradient is not None and gradient.numel() != flat._sharded_size.numel():
        raise RuntimeError('FSDP1 keeps the gradients of micro-batches whole until the last one, so that no process '
                           'has its part of the sum before')
    if gradient is None or param is flat:
        return None if gradient is None else gradient[own]
    here = [other for other, info in zip(flat._params, flat._shard_param_infos, strict=True) if info.in_shard]
    # That of the buffer stays where those of the parameters have been set to None.
    if here and all(other.grad is None for other in here):
        return None
    return gradient[own] if own.stop == own.start else (
        torch.zeros_like(gradient[own]) if param.grad is None else param.grad.flatten())


# --- DeepSpeed ---------------------------------------------------------------

def _of_deepspeed(param):
    """ A Flattened of what ZeRO keeps in parts, or whose gradient it does; anything else as it is. """
    if hasattr(param, 'ds_tensor'):
        return _of_zero_3(param)
    return _of_zero_1(param) if hasattr(param, '_hp_mapping') else param


def _of_zero_3(param):
    """ Each process has a part of the parameter: `ds_tensor`, padded at the end. """
    group = param.ds_process_group
    place = Place.in_buffer(param.ds_shape, 0, param.ds_tensor.ds_numel, dist.get_rank(group),
                            dist.get_world_size(group), group)
    length = place.end - place.start

    def gradient():
        from deepspeed.utils import safe_get_local_grad
        found = safe_get_local_grad(param) if hasattr(param, '_z3_optimizer') else None
        return None if found is None else found.flatten()[:length]
    return Flattened(param, place, lambda: param.ds_tensor.flatten()[:length], gradient)


def _of_zero_1(param):
    """ Each process has the whole, and a part of the gradient, where it steps. """
    fragment = param._hp_mapping
    start, length = (0, 0) if fragment is None else (
        fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel)
    group = param._dp_group
    place = Place(param.shape, start, start + length, dist.get_rank(group), dist.get_world_size(group), group,
                  cuts=None)

    def gradient():
        if fragment is None:
            return param.new_zeros(0)
        try:
            found = fragment.get_lp_grad_fragment(param._index_in_param_group).flatten()
        except ValueError:  # before a backward pass, and after the step
            return None
        return found[start:start + length] if found.numel() == param.numel() else found
    return Flattened(param, place, lambda: param.flatten()[start:start + length], gradient)
