"""
Sums of absolute values and of squares, with each tensor read once.
"""
import torch

from ._weights import local_part

# Two passes over a chunk that stays in the cache cost one read of memory;
# 64 Ki to 256 Ki numbers are equally fast.
_CHUNK = 1 << 17


def sums(tensors, shares_of_counts, squares=False):
    """
    Sums over each tensor, in float64.

    Args:
        tensors (Dict[str, Tensor]): real floating point, any shape and layout
        shares_of_counts (dict): a cache of the caller's, see below
        squares (bool): if True, sum squares as well

    Returns:
        Dict[str, Dict[str, Tensor]]: for each tensor 0-d 'count', 'abs' and
            if asked for 'squares', of the part that this process holds.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._sums import sums
        >>> import torch
        >>> stats = sums({'a': torch.tensor([[1., -3.]])}, {}, squares=True)
        >>> {key: float(x) for key, x in stats['a'].items()}
        {'count': 2.0, 'abs': 4.0, 'squares': 10.0}
    """
    if not tensors:
        return {}
    parts, shares, counts = [], [], []
    for tensor in tensors.values():
        part, share = local_part(tensor)
        parts.append(part)
        shares.append(share)
        counts.append(tensor.numel() * share / _processes(tensor))
    fields = ['abs', 'squares'] if squares else ['abs']
    rows = _sums_on_cpu(parts, squares) if parts[0].device.type == 'cpu' else _sums_on_device(parts, squares)
    # Made once, since a copy to the device has to wait for it.
    key = tuple(shares), tuple(counts), rows.device
    if key not in shares_of_counts:
        shares_of_counts.clear()
        shares_of_counts[key] = torch.tensor([shares, counts], dtype=torch.float64).to(rows.device)
    share, count = shares_of_counts[key]
    rows = rows * share
    return {name: {'count': n, **dict(zip(fields, row, strict=True))}
            for name, n, row in zip(tensors, count, rows.unbind(1), strict=True)}


def _processes(tensor):
    """ How many parts with a share of 1 the tensor has: its count is split among them. """
    split = 1
    for size, placement in zip(getattr(getattr(tensor, 'device_mesh', None), 'shape', ()),
                               getattr(tensor, 'placements', ()), strict=True):
        split *= 1 if placement.is_replicate() else size
    return split


def _sums_on_cpu(parts, squares):
    rows = []
    buffers = {}
    for part in parts:
        flat = _flat(part)
        # Half precision would overflow and round: it is read as float32.
        dtype = part.dtype if part.dtype is torch.float64 else torch.float32
        if dtype not in buffers:
            buffers[dtype] = torch.empty(min(_CHUNK, max(p.numel() for p in parts)), dtype=dtype)
        chunks = []
        for chunk in flat.split(_CHUNK):
            buffer = buffers[dtype][:chunk.numel()]
            if chunk.dtype is not dtype:
                chunk = buffer.copy_(chunk)
            square = torch.dot(chunk, chunk) if squares else None
            total = torch.abs(chunk, out=buffer).sum()
            chunks.append(torch.stack([total, square]) if squares else total[None])
        rows.append(torch.stack(chunks).double().sum(dim=0) if chunks
                    else torch.zeros(1 + squares, dtype=torch.float64))
    return torch.stack(rows, dim=1)


def _sums_on_device(parts, squares):
    """ A few kernels for all tensors of one type. """
    rows = []
    for order in (1, 2)[:1 + squares]:
        norms = [None] * len(parts)
        for dtype in {part.dtype for part in parts}:
            where = [i for i, part in enumerate(parts) if part.dtype is dtype]
            wide = dtype if dtype is torch.float64 else torch.float32
            for i, norm in zip(where, torch._foreach_norm([parts[i] for i in where], order, dtype=wide), strict=True):
                norms[i] = norm.double()
        norms = torch.stack(norms)
        rows.append(norms if order == 1 else norms.square())
    return torch.stack(rows)


def _flat(tensor):
    """ All numbers in one dimension, in the order of memory, so that channels-last is not copied. """
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)
