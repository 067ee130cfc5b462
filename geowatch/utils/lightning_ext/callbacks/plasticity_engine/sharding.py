"""
The part of a tensor that this process holds, so that sums over parts are those of the whole.
"""
import torch
import torch.distributed as dist


def is_sharded(tensor: torch.Tensor | None) -> bool:
    """
    Whether other processes hold parts of the tensor.

    Args:
        tensor (Tensor | None):

    Returns:
        bool: True for a DTensor, as FSDP2 and tensor parallelism make them

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import is_sharded
        >>> import torch
        >>> is_sharded(torch.ones(2))
        False
    """
    tensor = getattr(tensor, 'whole', tensor)
    return hasattr(tensor, 'placements') and hasattr(tensor, 'to_local')


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
        whole (Tensor): plain, or a DTensor
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
        """ A Tensor; this Slice itself where processes hold different matrices of the whole. """
        if any(placement.is_shard(0) for placement in getattr(self.whole, 'placements', ())):
            return self
        return matrix_of(self.whole.detach()[self._index])

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


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
    """
    What this process holds of a tensor, never gathered, and its share.

    Sums over all processes of ``share * sum over part`` are those of the whole
    tensor: a part that k processes hold alike has a share of 1 / k.

    Args:
        tensor (Tensor | Slice | Weight): a plain one, a DTensor, or a sparse one

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
    if isinstance(tensor, Slice):
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
    split = 1  # parts with the same share
    whole = getattr(tensor, 'whole', tensor)
    for size, placement in zip(getattr(getattr(whole, 'device_mesh', None), 'shape', ()),
                               getattr(whole, 'placements', ()), strict=True):
        split *= 1 if placement.is_replicate() else size
    return tensor.numel() * share / split


def part_for_gram(matrix: torch.Tensor) -> tuple[torch.Tensor, float, str]:
    """
    The part of a matrix whose Gram matrix of the smaller side adds up over processes.

    Column shards add up to A A^T, row shards to A^T A. A matrix that is
    sharded along the side that its Gram matrix needs whole is sharded anew
    along the other one, so that no process ever holds more than its share and
    the Gram matrix is the smaller one.

    Args:
        matrix (Tensor): of two or more dimensions, a convolution kernel is (out, in * kh * kw)

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
    if is_sharded(matrix) and not isinstance(matrix, Slice):
        matrix = _with_shards(matrix, 1 if side == 'rows' else 0)
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
