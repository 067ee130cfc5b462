"""
Activations of which each process has a part.

Under tensor parallelism a tensor is a DTensor, or the local part of one. What
it is the part of tells the DTensor, so that those methods of it have to be
seen that make a local tensor of one, and back: torch tells no mode of them.
"""
import functools
import math
import sys
from typing import NamedTuple

from .axes import Place

# What makes a DTensor of another or of a local tensor, or the other way round.
_CONVERSIONS = ('from_local', 'to_local', 'redistribute', 'full_tensor')
_listening = {}  # id of a function to itself
_of_torch = {}   # name of a method to what it was


class Shards(NamedTuple):
    """
    Which part of a tensor this process has.

    Attributes:
        offset (int | None): its first unit; None if it has all
        own (int): how many units it has
        units (int): how many there are on all processes
        samples (Tuple[int, ...]): which part of the samples of a batch

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sharded import Shards
        >>> Shards(offset=8, own=4, units=12).of(2)  # of one half of them, as the gates of a GLU
        Shards(offset=4, own=2, units=6, samples=())
    """
    offset: int | None = None
    own: int = 0
    units: int = 0
    samples: tuple = ()

    def of(self, own):
        """ The Shards of a tensor that has another number of units (int) here, as on each other process. """
        if self.offset is None or own == self.own:
            return self
        numbers = [x * own / self.own for x in (self.offset, self.units)]
        if not own or any(x % 1 for x in numbers):
            raise ValueError(f'Expected some of each of the {self.own} units that this process has, but got {own}')
        return Shards(int(numbers[0]), own, int(numbers[1]), self.samples)


def is_summand(tensor) -> bool:
    """ Whether a DTensor is the sum of what processes have. """
    return any(placement.is_partial() for placement in tensor.placements)


def shards_of(tensor, place: Place, matrices: Place = ()) -> Shards | None:
    """
    Which part of a DTensor this process has.

    Args:
        tensor (DTensor):
        place (Place): of its units
        matrices (Place): of the matrices of its layer, if that has several

    Returns:
        Shards | None: None if it has all

    Raises:
        ValueError: if it is no part that could be joined with those of others
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    placements, mesh = tensor.placements, tensor.device_mesh
    axes = [placement.dim % tensor.ndim if placement.is_shard() and size > 1 else None
            for placement, size in zip(placements, mesh.shape, strict=True)]
    own = [part for part in place if part.axis in axes]
    samples = tuple(i for i, axis in zip(mesh.get_coordinate(), axes, strict=True)
                    if axis is not None and axis not in {part.axis for part in own})
    if is_summand(tensor) or any(part.axis in axes for part in matrices):
        raise ValueError(f'Expected processes to have units or samples, but got {placements}')
    if not own:
        return Shards(samples=samples) if samples else None
    if own != [place[0]] or own[0].size != tensor.shape[own[0].axis]:
        raise ValueError(f'Expected processes to have units that are neighbours, but got {placements}')
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    axis, others = own[0].axis, math.prod(part.size for part in place[1:])
    return Shards(offsets[axis] * others, shape[axis] * others, tensor.shape[axis] * others, samples)


class Conversions:
    """
    A function that is called with each conversion between DTensors and local tensors.

    Args:
        converted (Callable): called with the name of the method, source and result
    """

    def __init__(self, converted):
        self._converted = converted

    def attach(self):
        """ Call it from now on, if there can be any. """
        dtensor = getattr(sys.modules.get('torch.distributed.tensor'), 'DTensor', None)
        if dtensor is None:
            return
        _listening[id(self)] = self._converted
        for name in _CONVERSIONS:
            if name not in _of_torch:
                _of_torch[name] = method = vars(dtensor)[name]
                setattr(dtensor, name, staticmethod(_telling(name, method.__func__))
                        if isinstance(method, staticmethod) else _telling(name, method))

    def detach(self):
        """ Call it no more. """
        _listening.pop(id(self), None)
        if not _listening and _of_torch:
            dtensor = sys.modules['torch.distributed.tensor'].DTensor
            for name in list(_of_torch):
                setattr(dtensor, name, _of_torch[name])
                del _of_torch[name]


def _telling(name, method):
    @functools.wraps(method)
    def telling(source, *args, **kwargs):
        output = method(source, *args, **kwargs)
        for converted in list(_listening.values()):
            converted(name, source, output)
        return output
    return telling
