"""
Brings together what several processes have measured: at most two collectives.

The first lets all processes know what each of them has, since ranks may have
seen different sites and a metric may have failed on one of them. The second
adds up all statistics in one buffer. On a single process there is neither.
"""
import json
import zlib

import torch
import torch.distributed as dist

from ._activations import Site

# Bytes of a message in the first collective; only one with more than about a
# thousand sites needs a second round.
_MESSAGE = 1 << 14


def processes():
    """
    How many processes train together.

    Returns:
        int: 1 without torch.distributed

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._reduce import processes
        >>> processes()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """
    Which of the processes this is.

    Returns:
        int: 0 without torch.distributed

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._reduce import rank
        >>> rank()
        0
    """
    return dist.get_rank() if processes() > 1 else 0


def exchange(message, device):
    """
    Let all processes know each other's message. All of them have to call it.

    Args:
        message (dict): plain data, of this process
        device (torch.device): where collectives run

    Returns:
        List[dict]: the messages of all, in order of ranks

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._reduce import exchange
        >>> exchange({'failed': ['erank']}, 'cpu')
        [{'failed': ['erank']}]
    """
    if processes() == 1:
        return [message]
    data = zlib.compress(json.dumps(message).encode())
    packets = _gather(data, _MESSAGE, device)
    longest = max(map(_length, packets))
    if longest > _MESSAGE - 8:
        packets = _gather(data, longest + 8, device)
    return [json.loads(zlib.decompress(packet[8:8 + _length(packet)])) for packet in packets]


def _length(packet):
    return int.from_bytes(packet[:8], 'little')


def _gather(data, size, device):
    packet = len(data).to_bytes(8, 'little') + data[:size - 8]
    mine = torch.frombuffer(bytearray(packet.ljust(size, b'\0')), dtype=torch.uint8).to(device)
    theirs = [torch.empty_like(mine) for _ in range(processes())]
    dist.all_gather(theirs, mine)
    return [x.cpu().numpy().tobytes() for x in theirs]


def layout_of(stats):
    """
    What the statistics of one metric look like, as plain data.

    Args:
        stats (Dict[str | Site, Dict[str, Tensor]]):

    Returns:
        List[Tuple[str | List, Dict[str, List[int]]]]: key and the shape of each field

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._reduce import layout_of
        >>> import torch
        >>> layout_of({'fc1': {'gram': torch.eye(2)}})
        [('fc1', {'gram': [2, 2]})]
    """
    return [(list(vars(key).values()) if isinstance(key, Site) else key,
             {field: list(x.shape) for field, x in own.items()}) for key, own in stats.items()]


def contradictions(layouts):
    """
    Metrics of which processes have statistics that cannot be added.

    Args:
        layouts (List[Dict[str, List]]): of all processes, by metric, see :func:`layout_of`

    Returns:
        Dict[str, str]: name of the metric to what is wrong

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._reduce import contradictions
        >>> contradictions([{'erank': [('fc1', {'gram': [2, 2]})]}, {'erank': [('fc1', {'gram': [3, 3]})]}])
        {'erank': "'fc1' has the shapes {'gram': [2, 2]} and {'gram': [3, 3]}"}
    """
    found, union = {}, {}
    for layout in layouts:
        for metric, sites in layout.items():
            for key, fields in sites:
                first = union.setdefault((metric, str(key)), fields)
                if first != fields:
                    found.setdefault(metric, f'{key!r} has the shapes {first} and {fields}')
    return found


def add_up(stats, layouts, device):
    """
    Sum statistics over all processes, in one buffer. All of them have to call it.

    Args:
        stats (Dict[str, Dict[str | Site, Dict[str, Tensor]]]): of this process, by metric
        layouts (List[Dict[str, List]]): of all processes, by metric, see :func:`layout_of`
        device (torch.device): where collectives run

    Returns:
        Dict[str, Dict[str | Site, Dict[str, Tensor]]]: the sums, of what any
            process has, in the same order on all of them

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._reduce import add_up, layout_of
        >>> import torch
        >>> stats = {'erank': {'fc1': {'gram': torch.eye(2)}}}
        >>> add_up(stats, [{'erank': layout_of(stats['erank'])}], 'cpu') == stats
        True
    """
    if processes() == 1:
        return stats
    union = {}
    for layout in layouts:
        for metric, sites in layout.items():
            for key, fields in sites:
                key = Site(*key) if isinstance(key, list) else key
                union.setdefault((metric, key), fields)
    if not union:
        return {metric: {} for metric in stats}
    pieces, shapes = [], []
    for (metric, key), fields in union.items():
        own = stats.get(metric, {}).get(key, {})
        for field, shape in fields.items():
            # A process that has seen nothing of it adds zero.
            piece = own.get(field)
            piece = torch.zeros(shape, dtype=torch.float64, device=device) if piece is None else piece
            pieces.append(piece.detach().to(device, torch.float64).reshape(-1))
            shapes.append((metric, key, field, shape))
    buffer = torch.cat(pieces)
    dist.all_reduce(buffer)
    total = {metric: {} for metric in stats}
    for (metric, key, field, shape), piece in zip(shapes, buffer.split([len(x) for x in pieces]), strict=True):
        total.setdefault(metric, {}).setdefault(key, {})[field] = piece.view(shape)
    return total


def to_host(results):
    """
    The one transfer from the device: value and columns of each tag as numbers.
    """
    tensors = []
    for _, result in results.values():
        tensors += [result.value, *(x for x in result.columns.values() if isinstance(x, torch.Tensor))]
    flat = torch.cat([x.reshape(-1).double() for x in _on_one_device(tensors)])
    numbers = iter(flat.tolist())
    columns = {}
    for tag, (_, result) in results.items():
        value = next(numbers)
        columns[tag] = value, {
            key: [next(numbers) for _ in range(len(x))] if isinstance(x, torch.Tensor) else x
            for key, x in result.columns.items()}
    return columns


def _on_one_device(tensors):
    # Some are on the CPU where a device has no float64.
    devices = {x.device for x in tensors}
    return tensors if len(devices) == 1 else [x.cpu() for x in tensors]
