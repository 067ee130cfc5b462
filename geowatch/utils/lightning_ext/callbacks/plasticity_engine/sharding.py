"""
The part of a tensor that this process holds, so that sums over parts are those of the whole.
"""
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


def is_sharded(tensor: torch.Tensor | None) -> bool:
    """
    Whether other processes hold parts of the tensor.

    Args:
        tensor (Tensor | None):

    Returns:
        bool: True for a DTensor, as FSDP2 and tensor parallelism make them,
            and for what has a Place in a flat buffer

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import is_sharded
        >>> import torch
        >>> is_sharded(torch.ones(2))
        False
    """
    tensor = getattr(tensor, 'whole', tensor)
    return hasattr(tensor, 'place') or hasattr(tensor, 'placements') and hasattr(tensor, 'to_local')


def matrix_of(entry: torch.Tensor) -> torch.Tensor:
    """
    An entry of a tensor that holds several matrices, as a matrix.

    Args:
        entry (Tensor): (out, in), a convolution kernel, or features in a grid (height, width, features)

    Returns:
        Tensor: of shape (out, in), (out, in * kh * kw) or (height * width, features)

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import matrix_of
        >>> import torch
        >>> [tuple(matrix_of(torch.ones(shape)).shape) for shape in [(4, 5), (1, 4, 5), (2, 3, 5), (2, 3, 3, 3)]]
        [(4, 5), (4, 5), (6, 5), (2, 27)]
    """
    while entry.ndim > 2 and 1 in entry.shape:
        entry = entry.squeeze(list(entry.shape).index(1))
    return entry if entry.ndim == 2 else entry.flatten(0, 1) if entry.ndim == 3 else entry.flatten(1)


class Slice:
    """
    One matrix of a tensor that holds several, which stands where a tensor does.

    Args:
        whole (Tensor | Stretch): plain, a DTensor, or a Stretch
        index (int): in its first dimension

    Attributes:
        shape (torch.Size): of the matrix

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import Slice
        >>> import torch
        >>> Slice(torch.arange(8).reshape(2, 2, 2), 1).detach().tolist()
        [[4, 5], [6, 7]]
    """

    layout = torch.strided

    def __init__(self, whole, index):
        self.whole = whole
        self.shape = matrix_of(torch.empty(whole.shape[1:], device='meta')).shape
        self._index = index

    def detach(self):
        """ A Tensor, or a Stretch of one; this Slice itself where processes hold different matrices of the whole. """
        if any(placement.is_shard(0) for placement in getattr(self.whole, 'placements', ())):
            return self
        whole = self.whole.detach()
        if isinstance(whole, Stretch):
            return whole.entry(self._index, self.shape)
        return matrix_of(whole[self._index])

    def numel(self):
        """ How many numbers (int). """
        return self.shape.numel()

    def local_part(self):
        """ See :func:`local_part`: all of the matrix, or nothing of it. """
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
        whole = _with_shards(self.whole, 0)
        _, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
        part, share = local_part(whole)
        own = self._index - offset[0]
        if 0 <= own < len(part):
            return matrix_of(part[own]), share
        rows, columns = self.shape
        return part.new_empty((rows, 0) if rows < columns else (0, columns)), share


class Place(NamedTuple):
    """
    Which numbers of a tensor a process has, in the order of memory.

    Attributes:
        shape (torch.Size): of the tensor
        start (int): the first number that this process has
        end (int): the one after its last
        rank (int): of this process among those that share the tensor
        count (int): of them
        group (ProcessGroup | None): they; None for a process on its own
        cuts (Tuple[int, ...] | None): where inside the tensor others go on; None if only they know
        strides (Tuple[int, ...] | None): of a tensor that is not contiguous

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import Place
        >>> import torch
        >>> # The second of two processes: a buffer of 8 numbers, and in it from the fourth one on a tensor of 4.
        >>> place = Place.in_buffer(torch.Size([2, 2]), offset=3, size=4, rank=1, count=2)
        >>> place.start, place.end, place.cuts
        (1, 4, (1,))
    """
    shape: torch.Size
    start: int
    end: int
    rank: int = 0
    count: int = 1
    group: Any = None
    cuts: tuple[int, ...] | None = ()
    strides: tuple[int, ...] | None = None

    @classmethod
    def in_buffer(cls, shape, offset, size, rank, count, group=None, strides=None):
        """ Of a tensor from a number on in a buffer that processes have cut into parts of one size. """
        numbers = math.prod(shape)
        edges = [min(max(size * index - offset, 0), numbers) for index in range(count + 1)]
        cuts = tuple(edge for edge in dict.fromkeys(edges) if 0 < edge < numbers)
        return cls(torch.Size(shape), edges[rank], edges[rank + 1], rank, count, group, cuts, strides)

    def entry(self, index, shape):
        """ The Place of one entry of the first dimension, which has a shape. """
        numbers = math.prod(shape)
        start, end = (min(max(edge - index * numbers, 0), numbers) for edge in (self.start, self.end))
        cuts = self.cuts and tuple(cut for cut in (cut - index * numbers for cut in self.cuts) if 0 < cut < numbers)
        return self._replace(shape=shape, start=start, end=end, cuts=cuts)


class Stretch:
    """
    The numbers of a tensor that this process has, which stand where a tensor does.

    Args:
        part (Tensor): 1-d, and empty where there is none of the tensor here
        place (Place): of the part in the tensor

    Attributes:
        shape (torch.Size): of the tensor

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import Place, Stretch, local_part
        >>> import torch
        >>> whole = torch.arange(12.).reshape(3, 4)
        >>> stretch = Stretch(whole.flatten()[4:], Place(whole.shape, 4, 12, rank=1, count=2, cuts=(4,)))
        >>> stretch.shape, local_part(stretch)[0].tolist()
        (torch.Size([3, 4]), [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
        >>> stretch.lines(0).tolist()  # of whole rows, which nobody has to gather
        [[4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]
    """

    layout = torch.strided

    def __init__(self, part, place):
        self.part = part
        self.place = place
        self.shape = place.shape

    def detach(self):
        """ This Stretch. """
        return self

    def numel(self):
        """ How many numbers the tensor has (int). """
        return self.shape.numel()

    def local_part(self):
        """ See :func:`local_part`. """
        return self.part, self.place.count / (dist.get_world_size() if self.place.group is not None else 1)

    def entry(self, index, shape):
        """ What this process has of one entry of the first dimension, as a Stretch of another shape. """
        place = self.place.entry(index, shape)
        first = max(index * math.prod(shape) - self.place.start, 0)
        return Stretch(self.part[first:first + place.end - place.start], place)

    def lines(self, axis):
        """
        This process's part of the tensor as a matrix, which has whole rows or whole columns.

        It is gathered if that is not how it lies, for which all processes that
        share it have to come here.

        Args:
            axis (int): 0 for rows, 1 for columns

        Returns:
            Tensor: 2-d
        """
        rows, place = self.shape[0], self.place
        width = self.numel() // rows
        if place.cuts == ():  # one process has all of it, and the others nothing
            whole = self.part.as_strided(self.shape, place.strides) if len(self.part) and place.strides else self.part
            return whole.reshape((rows, -1) if len(self.part) else (0, width) if axis == 0 else (rows, 0))
        if place.cuts and axis == 0 and not place.strides and all(cut % width == 0 for cut in place.cuts):
            return self.part.view(-1, width)
        return self.gather().flatten(1).tensor_split(place.count, dim=axis)[place.rank]

    def gather(self):
        """ The whole Tensor, for which all processes that share it have to come here. """
        place, part = self.place, self.part.float() if self.part.element_size() < 4 else self.part
        # What is offloaded to the host is not where its processes talk to each other.
        device = 'cuda' if dist.get_backend(place.group) == 'nccl' else part.device
        whole = torch.zeros(self.numel(), dtype=part.dtype, device=device)
        whole[place.start:place.end] = part
        dist.all_reduce(whole, group=place.group)
        whole = whole.to(self.part.dtype)
        return whole.as_strided(self.shape, place.strides) if place.strides else whole.view(self.shape)


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
    """
    What this process holds of a tensor, never gathered, and its share.

    Sums over all processes of ``share * sum over part`` are those of the whole
    tensor: a part that k processes hold alike has a share of 1 / k.

    Args:
        tensor (Tensor | Slice | Stretch | Weight): a plain one, a DTensor, or a sparse one

    Returns:
        Tuple[Tensor, float]: part and share. Of a sparse tensor the part is
            its coalesced values.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import local_part
        >>> import torch
        >>> part, share = local_part(torch.ones(2, 3))
        >>> tuple(part.shape), share
        ((2, 3), 1.0)
    """
    tensor, share = tensor.detach(), 1.
    if isinstance(tensor, (Slice, Stretch)):
        return tensor.local_part()
    if is_sharded(tensor):
        mesh = tensor.device_mesh
        # Of a mesh of some processes, as for tensor parallelism, there are several alike.
        share = mesh.size() / dist.get_world_size()
        for size, placement in zip(mesh.shape, tensor.placements, strict=True):
            share /= size if placement.is_replicate() else 1
        tensor = tensor.to_local()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return tensor, share


def count_of(tensor: torch.Tensor, share: float) -> float:
    """
    How many numbers this process adds to the count of a tensor: all of them over all processes.

    Args:
        tensor (Tensor): the whole one
        share (float): of its part, see :func:`local_part`

    Returns:
        float:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import count_of
        >>> import torch
        >>> count_of(torch.ones(2, 3), 1.)
        6.0
    """
    whole = getattr(tensor, 'whole', tensor)
    split = whole.place.count if hasattr(whole, 'place') else 1  # parts with the same share
    for size, placement in zip(getattr(getattr(whole, 'device_mesh', None), 'shape', ()),
                               getattr(whole, 'placements', ()), strict=True):
        split *= 1 if placement.is_replicate() else size
    return tensor.numel() * share / split


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """
    All of a tensor, for which all processes that share it have to come here.

    Args:
        tensor (Tensor | Stretch | Flattened): a plain one is returned as it is

    Returns:
        Tensor: plain

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import whole_of
        >>> import torch
        >>> whole_of(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    if not is_sharded(tensor):
        return tensor
    tensor = tensor.detach()
    return tensor.gather() if isinstance(tensor, Stretch) else tensor.full_tensor()


def sharded_like(whole: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """
    A tensor that all processes have, as one in the layout of another of its shape.

    Args:
        whole (Tensor): plain
        other (Tensor | Flattened): in whatever layout

    Returns:
        Tensor | Stretch: plain if the other is

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import Place, Stretch, sharded_like
        >>> import torch
        >>> other = Stretch(torch.zeros(2), Place(torch.Size([2, 2]), 1, 3, rank=0, count=2))
        >>> sharded_like(torch.tensor([[1., 2.], [3., 4.]]), other).part.tolist()
        [2.0, 3.0]
    """
    if hasattr(other, 'place'):
        place = other.place
        if place.strides:
            whole = torch.empty_strided(whole.shape, place.strides, dtype=whole.dtype, device=whole.device).copy_(whole)
            return Stretch(whole.as_strided((whole.numel(),), (1,))[place.start:place.end], place)
        return Stretch(whole.flatten()[place.start:place.end], place)
    if not is_sharded(other):
        return whole
    from torch.distributed.tensor import DTensor, Replicate
    copies = [Replicate()] * other.device_mesh.ndim
    return DTensor.from_local(whole, other.device_mesh, copies, run_check=False).redistribute(
        placements=other.placements)


def part_for_gram(matrix: torch.Tensor) -> tuple[torch.Tensor, float, str]:
    """
    The part of a matrix whose Gram matrix of the smaller side adds up over processes.

    Column shards add up to A A^T, row shards to A^T A. A matrix that is
    sharded along the side that its Gram matrix needs whole is sharded anew
    along the other one, so that no process ever holds more than its share and
    the Gram matrix is the smaller one. One that lies in a flat buffer is
    gathered for that, unless each process has whole rows, or one has all.

    Args:
        matrix (Tensor | Slice | Stretch): of two or more dimensions, a convolution kernel is (out, in * kh * kw)

    Returns:
        Tuple[Tensor, float, str]: 2-d part, its share, and the side: 'rows'
            for A A^T, 'columns' for A^T A

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import part_for_gram
        >>> import torch
        >>> part, share, side = part_for_gram(torch.ones(2, 3, 2, 2))
        >>> tuple(part.shape), share, side
        ((2, 12), 1.0, 'rows')
    """
    matrix = matrix.detach()
    side = 'rows' if matrix.shape[0] < matrix.numel() // matrix.shape[0] else 'columns'
    axis = 1 if side == 'rows' else 0
    if isinstance(matrix, Stretch):
        return matrix.lines(axis), matrix.local_part()[1], side
    if is_sharded(matrix) and not isinstance(matrix, Slice):
        matrix = _with_shards(matrix, axis)
    part, share = local_part(matrix)
    return part.flatten(1), share, side


def _with_shards(tensor, axis):
    """ A DTensor whose shards are along one axis only. """
    from torch.distributed.tensor import Replicate, Shard
    wanted = [placement if placement.is_replicate() or placement.dim % tensor.ndim == axis else Shard(axis)
              for placement in tensor.placements]
    if wanted != list(tensor.placements):
        # What is sharded twice along one axis is gathered along it once: torch mixes up the rows of
        # different columns otherwise.
        once = [placement if placement.is_replicate() or type(placement) is Shard else Replicate()
                for placement in tensor.placements]
        tensor = tensor.detach().redistribute(placements=once).redistribute(placements=wanted)
    return tensor
