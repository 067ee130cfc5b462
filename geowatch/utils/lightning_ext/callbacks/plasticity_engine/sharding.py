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
    return hasattr(tensor, 'placements') and hasattr(tensor, 'to_local')


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
    """
    What this process holds of a tensor, never gathered, and its share.

    Sums over all processes of ``share * sum over part`` are those of the whole
    tensor: a part that k processes hold alike has a share of 1 / k.

    Args:
        tensor (Tensor): a plain one, a DTensor, or a sparse one

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
    for size, placement in zip(getattr(getattr(tensor, 'device_mesh', None), 'shape', ()),
                               getattr(tensor, 'placements', ()), strict=True):
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
    if not is_sharded(matrix):
        part, share = local_part(matrix)
        part = part.flatten(1)
        return part, share, 'rows' if part.shape[0] < part.shape[1] else 'columns'
    from torch.distributed.tensor import Replicate, Shard
    side = 'rows' if matrix.shape[0] < matrix.numel() // matrix.shape[0] else 'columns'
    axis = 1 if side == 'rows' else 0
    wanted = [placement if placement.is_replicate() or placement.dim % matrix.ndim == axis else Shard(axis)
              for placement in matrix.placements]
    if wanted != list(matrix.placements):
        # What is sharded twice along one axis is gathered along it once: torch mixes up the rows of
        # different columns otherwise.
        once = [placement if placement.is_replicate() or type(placement) is Shard else Replicate()
                for placement in matrix.placements]
        matrix = matrix.detach().redistribute(placements=once).redistribute(placements=wanted)
    part, share = local_part(matrix)
    return part.flatten(1), share, side
