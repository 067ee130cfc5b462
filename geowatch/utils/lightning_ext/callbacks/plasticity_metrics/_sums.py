"""
Sums of absolute values and of squares, with each tensor read once.
"""
import math

import torch

from ._weights import local_part

# Two passes over a chunk that stays in the cache: 1.8 reads of memory for the
# absolute values of 512 Ki numbers at a time, 1.9 for 256 Ki, 2.8 for 64 Ki. In one
# pass, torch.linalg.vector_norm takes 5.8.
_CHUNK = 1 << 19


def sums(tensors, shares_of_counts, squares=False):
    """
    Sums over each tensor, in float64.

    Args:
        tensors (Dict[str, Tensor]): real floating point, any shape and layout
        shares_of_counts (dict): a cache of the caller's, see below
        squares (bool): if True, sum squares as well

    Returns:
        Dict[str, Dict[str, Tensor]]: for each tensor 0-d 'count', 'abs', if
            asked for 'squares', and 'nonfinite', the share of numbers that are
            not finite, of the part that this process holds.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._sums import sums
        >>> import torch
        >>> stats = sums({'a': torch.tensor([[1., -3.]])}, {}, squares=True)
        >>> {key: float(x) for key, x in stats['a'].items()}
        {'count': 2.0, 'abs': 4.0, 'squares': 10.0, 'nonfinite': 0.0}
    """
    if not tensors:
        return {}
    parts, shares, counts = [], [], []
    for tensor in tensors.values():
        part, share = local_part(tensor)
        parts.append(part)
        shares.append(share)
        counts.append(tensor.numel() * share / _processes(tensor))
    fields = ['abs', 'squares', 'nonfinite'] if squares else ['abs', 'nonfinite']
    rows = _sums_on_cpu(parts, squares) if parts[0].device.type == 'cpu' else _sums_on_device(parts, squares)
    # Made once, since a copy to the device has to wait for it.
    key = tuple(shares), tuple(counts), rows.device
    if key not in shares_of_counts:
        shares_of_counts.clear()
        per_number = [share / tensor.numel() for share, tensor in zip(shares, tensors.values(), strict=True)]
        shares_of_counts[key] = torch.tensor([counts, *[shares] * (len(fields) - 1), per_number],
                                             dtype=torch.float64).to(rows.device)
    factors = shares_of_counts[key]
    # Few calls of torch for many tensors: one for each field.
    columns = [column.unbind() for column in (factors[0], *(rows * factors[1:]))]
    return {name: dict(zip(('count', *fields), own, strict=True))
            for name, *own in zip(tensors, *columns, strict=True)}


def _processes(tensor):
    """ How many parts with a share of 1 the tensor has: its count is split among them. """
    split = 1
    for size, placement in zip(getattr(getattr(tensor, 'device_mesh', None), 'shape', ()),
                               getattr(tensor, 'placements', ()), strict=True):
        split *= 1 if placement.is_replicate() else size
    return split


def _sums_on_cpu(parts, squares):
    absolute, square, owners = [], [], []
    buffers = {}
    for owner, part in enumerate(parts):
        # Half precision would overflow and round: it is read as float32.
        dtype = part.dtype if part.dtype is torch.float64 else torch.float32
        if dtype not in buffers:
            buffers[dtype] = torch.empty(min(_CHUNK, max(p.numel() for p in parts)), dtype=dtype)
        flat = _flat(part)
        for chunk in flat.split(_CHUNK) if flat.numel() > _CHUNK else (flat,):
            buffer = buffers[dtype][:chunk.numel()]
            if chunk.dtype is not dtype:
                chunk = buffer.copy_(chunk)
            if squares:
                square.append(torch.dot(chunk, chunk))
            # No kernel of torch sums absolute values as fast as these two do.
            absolute.append(torch.abs(chunk, out=buffer).sum())
            owners.append(owner)
    chunks = torch.stack([torch.stack(each) for each in ([absolute, square] if squares else [absolute])]).double()
    rows = chunks.new_zeros(len(chunks), len(parts)).index_add_(1, torch.tensor(owners), chunks)
    bad = rows.new_zeros(len(parts))
    # To look at the sum costs nothing here, to count each time would.
    if not math.isfinite(rows[0].sum()):
        bad = torch.stack([nonfinite(part) for part in parts])
    return torch.cat([rows, bad[None]])


def _sums_on_device(parts, squares):
    """ A few kernels for all tensors of one type. """
    rows = []
    for order in (1, 2)[:1 + squares]:
        norms = [None] * len(parts)
        for dtype in {part.dtype for part in parts}:
            where = [i for i, part in enumerate(parts) if part.dtype is dtype]
            wide = dtype if dtype is torch.float64 else torch.float32
            for i, norm in zip(where, torch._foreach_norm([parts[i] for i in where], order, dtype=wide), strict=True):
                norms[i] = double(norm)
        norms = torch.stack(norms)
        rows.append(norms if order == 1 else norms.square())
    # Whether it is worth to count, only the host could tell: two kernels a tensor.
    return torch.stack([*rows, torch.stack([nonfinite(part) for part in parts])])


def nonfinite(tensor):
    """
    How many numbers are not finite, with little memory and no wait for the device.

    Args:
        tensor (Tensor): real floating point

    Returns:
        Tensor: 0-d float64

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._sums import nonfinite
        >>> import torch
        >>> nonfinite(torch.tensor([[1., float('nan')], [float('inf'), 0.]])).item()
        2.0
    """
    chunks = _flat(tensor).split(1 << 22)
    if tensor.element_size() == 1:  # float8 knows no difference
        chunks = [chunk.float() for chunk in chunks]
    # Only of a finite number the difference to itself is 0.
    counts = [torch.count_nonzero(chunk - chunk) for chunk in chunks]
    return double(torch.stack(counts).sum())


def double(tensor):
    """
    A number as float64, on the CPU where the device has none.

    Args:
        tensor (Tensor):

    Returns:
        Tensor:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._sums import double
        >>> import torch
        >>> double(torch.tensor(2)).dtype
        torch.float64
    """
    return (tensor.cpu() if tensor.device.type == 'mps' else tensor).double()


def _flat(tensor):
    """ All numbers in one dimension, in the order of memory, so that channels-last is not copied. """
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)
