"""
The processes that train together: at most two collectives for what was measured at a step.

The first lets all processes know what each of them has, since ranks may have
seen different sites and a metric may have failed on one of them. The second
adds up all statistics in one buffer. On a single process there is neither.
"""
import json
import zlib

import torch
import torch.distributed as dist

from .sources.activations.sites import Site
from .statistics import Totals

# Bytes of a message in the first collective; only one with more than about a
# thousand sites needs a second round.
_MESSAGE = 1 << 14


class Processes:
    """
    Those of one trainer.

    Args:
        count (int): how many
        device (torch.device): where collectives run

    Attributes:
        count (int): how many
        rank (int): which of them this is

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes
        >>> processes = Processes(1, 'cpu')
        >>> processes.count, processes.rank, processes.exchange({'failed': ['erank']})
        (1, 0, [{'failed': ['erank']}])
    """

    def __init__(self, count: int, device: torch.device):
        self.count = count if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.count > 1 else 0
        self._device = device

    def exchange(self, message: dict) -> list[dict]:
        """
        Let all processes know each other's message. All of them have to call it.

        Args:
            message (dict): plain data, of this process

        Returns:
            List[dict]: the messages of all, in order of ranks
        """
        if self.count == 1:
            return [message]
        data = zlib.compress(json.dumps(message).encode())
        packets = self._gather(data, _MESSAGE)
        longest = max(map(_length, packets))
        if longest > _MESSAGE - 8:
            packets = self._gather(data, longest + 8)
        return [json.loads(zlib.decompress(packet[8:8 + _length(packet)])) for packet in packets]

    def _gather(self, data, size):
        packet = len(data).to_bytes(8, 'little') + data[:size - 8]
        mine = torch.frombuffer(bytearray(packet.ljust(size, b'\0')), dtype=torch.uint8).to(self._device)
        theirs = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(theirs, mine)
        return [x.cpu().numpy().tobytes() for x in theirs]

    def add_up(self, totals: list[Totals], layouts: list[list]) -> list[Totals]:
        """
        Sum statistics over all processes, in one buffer. All of them have to call it.

        Args:
            totals (List[Totals]): of this process
            layouts (List[List]): of all processes, see :func:`layout_of`

        Returns:
            List[Totals]: the sums, of what any process has, in the same order on all of them
        """
        if self.count == 1:
            return totals
        union = {}
        for layout in layouts:
            for index, source, field, key, shape in layout:
                key = Site(*key) if isinstance(key, list) else key
                union.setdefault((index, source, field, key), shape)
        if not union:
            return [{} for _ in totals]
        pieces = []
        for (index, source, field, key), shape in union.items():
            # A process that has seen nothing of it adds zero.
            own = totals[index].get((source, field), {}).get(key)
            own = torch.zeros(shape, device=self._device) if own is None else torch.as_tensor(own)
            pieces.append(own.detach().to(self._device, torch.float64).reshape(-1))
        buffer = torch.cat(pieces)
        dist.all_reduce(buffer)
        sums = [{} for _ in totals]
        split = buffer.split([len(x) for x in pieces])
        for ((index, source, field, key), shape), piece in zip(union.items(), split, strict=True):
            sums[index].setdefault((source, field), {})[key] = piece.view(shape)
        return sums


def _length(packet):
    return int.from_bytes(packet[:8], 'little')


def layout_of(totals: list[Totals]) -> list[list]:
    """
    What statistics look like, as plain data.

    Args:
        totals (List[Totals]):

    Returns:
        List[List]: of each statistic its index in `totals`, source, field, layer or site, and shape

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import layout_of
        >>> import torch
        >>> layout_of([{('weights', 'gram'): {'fc1': torch.eye(2)}, ('weights', 'count'): {'fc1': 4.}}])
        [[0, 'weights', 'gram', 'fc1', [2, 2]], [0, 'weights', 'count', 'fc1', []]]
    """
    return [[index, source, field, list(vars(key).values()) if isinstance(key, Site) else key,
             list(getattr(x, 'shape', ()))]
            for index, own in enumerate(totals) for (source, field), of in own.items() for key, x in of.items()]


def contradictions(layouts: list[list]) -> dict[tuple[str, str], str]:
    """
    Statistics of which processes have such as cannot be added.

    Args:
        layouts (List[List]): of all processes, see :func:`layout_of`

    Returns:
        Dict[Tuple[str, str], str]: source and field to what is wrong

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import contradictions
        >>> contradictions([[[0, 'weights', 'gram', 'fc1', [2, 2]]], [[0, 'weights', 'gram', 'fc1', [3, 3]]]])
        {('weights', 'gram'): "'fc1' has the shapes [2, 2] and [3, 3]"}
    """
    found, union = {}, {}
    for layout in layouts:
        for index, source, field, key, shape in layout:
            first = union.setdefault((index, source, field, str(key)), shape)
            if first != shape:
                found.setdefault((source, field), f'{key!r} has the shapes {first} and {shape}')
    return found
