"""
Sums of absolute values and of squares, with each tensor read once.
"""
import math
from collections.abc import Collection, Hashable

import torch

from ..sharding import count_of, local_part

# Two passes over a chunk that stays in the cache: 1.8 reads of memory for the
# absolute values of 512 Ki numbers at a time, 1.9 for 256 Ki, 2.8 for 64 Ki. In one
# pass, torch.linalg.vector_norm takes 5.8.
_CHUNK = 1 << 19
_ORDERS = {'abs': 1, 'squares': 2}


def sums(tensors: dict[Hashable, torch.Tensor], fields: Collection[str]) -> dict[str, dict]:
    """
    Sums over each tensor, in float64.

    Args:
        tensors (Dict[str, Tensor]): real floating point, any shape and layout
        fields (Collection[str]): of 'count', 'abs', 'squares', and
            'nonfinite', the number of numbers that are not finite

    Returns:
        Dict[str, Dict[str, Tensor | float]]: for each field and tensor a
            number, of the part that this process holds

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.sums import sums
        >>> import torch
        >>> stats = sums({'a': torch.tensor([[1., -3.]])}, ['count', 'abs', 'squares', 'nonfinite'])
        >>> {field: float(own['a']) for field, own in stats.items()}
        {'count': 2.0, 'abs': 4.0, 'squares': 10.0, 'nonfinite': 0.0}
    """
    if not tensors:
        return {}
    parts, shares = zip(*map(local_part, tensors.values()), strict=True)
    read = [field for field in ('abs', 'squares', 'nonfinite') if field in fields]
    found = {field: [None] * len(parts) for field in read}
    # A network may be spread over several devices, and multi-tensor kernels take tensors of one type.
    kinds = [(part.device, None if part.is_cpu else part.dtype) for part in parts] if read else []
    for kind in dict.fromkeys(kinds):
        where = [i for i, own in enumerate(kinds) if own == kind]
        function = _sums_on_cpu if kind[0].type == 'cpu' else _sums_on_device
        for field, row in zip(read, function([parts[i] for i in where], read), strict=True):
            # Few calls of torch for many tensors: one for each field.
            for i, x in zip(where, row.unbind(), strict=True):
                found[field][i] = x if shares[i] == 1 else x * shares[i]
    if 'count' in fields:
        found['count'] = [count_of(tensor, share) for tensor, share in zip(tensors.values(), shares, strict=True)]
    return {field: dict(zip(tensors, found[field], strict=True)) for field in fields}


def _sums_on_cpu(parts, read):
    orders = [field for field in read if field in _ORDERS]
    rows = _chunked(parts, orders) if orders else torch.zeros(0, len(parts), dtype=torch.float64)
    if 'nonfinite' not in read:
        return rows
    bad = rows.new_zeros(len(parts))
    # To look at the sum costs nothing here, to count each time would.
    if not orders or not math.isfinite(rows[0].sum()):
        bad = torch.stack([nonfinite(part) for part in parts])
    return torch.cat([rows, bad[None]])


def _chunked(parts, orders):
    found, owners, buffers = {order: [] for order in orders}, [], {}
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
            if 'squares' in found:
                found['squares'].append(torch.dot(chunk, chunk))
            if 'abs' in found:
                # No kernel of torch sums absolute values as fast as these two do.
                found['abs'].append(torch.abs(chunk, out=buffer).sum())
            owners.append(owner)
    chunks = torch.stack([torch.stack(found[order]) for order in orders]).double()
    return chunks.new_zeros(len(chunks), len(parts)).index_add_(1, torch.tensor(owners), chunks)


def _sums_on_device(parts, read):
    """ A few kernels for all tensors, which are of one type. """
    wide, rows = torch.float64 if parts[0].dtype is torch.float64 else torch.float32, []
    for field, order in _ORDERS.items():
        if field in read:
            norms = double(torch.stack(torch._foreach_norm(parts, order, dtype=wide)))
            rows.append(norms if order == 1 else norms.square())
    if 'nonfinite' in read:
        # Whether it is worth to count, only the host could tell: two kernels a tensor.
        rows.append(torch.stack([nonfinite(part) for part in parts]))
    return torch.stack(rows)


def nonfinite(tensor: torch.Tensor) -> torch.Tensor:
    """
    How many numbers are not finite, with little memory and no wait for the device.

    Args:
        tensor (Tensor): real floating point

    Returns:
        Tensor: 0-d float64

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.sums import nonfinite
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


def double(tensor: torch.Tensor) -> torch.Tensor:
    """
    A number as float64, on the CPU where the device has none.

    Args:
        tensor (Tensor):

    Returns:
        Tensor:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.sums import double
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
