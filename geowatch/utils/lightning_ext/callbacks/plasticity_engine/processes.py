"""
The processes that train together: at most two collectives for what was measured at a step.

The first lets all processes know what each of them has, since ranks may have
seen different sites and a metric may have failed on one of them. The second
adds up all statistics. On a single process there is neither.

Each goes through a buffer that is there from the start, and in as many rounds
as it takes, which all processes know. So a process that runs out of memory, or
fails otherwise, still takes part, and tells the others.
"""
import itertools
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .sources.activations.sites import Site
from .statistics import Totals
from .statistics.spectrum import made

# Bytes of a message in one round; only one with more than about a thousand sites needs another.
_MESSAGE = 1 << 14
# Numbers of a sum in one round: 4 MB.
_NUMBERS = 1 << 19
# Statistics that are the same for each part of the units.
_OF_SAMPLES = {'samples', 'rows'}


class Processes:
    """
    Those of one trainer.

    Args:
        count (int): how many
        device (torch.device): where collectives run
        replica (Tuple[int, int] | None): which part of the data this one has,
            of how many; by default each has its own

    Attributes:
        count (int): how many
        rank (int): which of them this is
        holding (int): how many have a layer, where stages of a pipeline have layers of their own; else all
        holders (Dict[str, int]): name to how many have it, of what not all of them have
        replica (int): which part of the data it has
        replicas (int): of how many

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes
        >>> processes = Processes(1, 'cpu')
        >>> processes.count, processes.rank, processes.exchange({'failed': ['erank']})
        (1, 0, [{'failed': ['erank']}])
    """

    def __init__(self, count: int, device: torch.device, replica: tuple[int, int] | None = None):
        self.count = count if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.count > 1 else 0
        self.replica, self.replicas = replica if replica is not None and self.count > 1 else (self.rank, self.count)
        self.holding, self.holders = self.count, {}
        if self.count > 1:
            self._mine = torch.zeros(_MESSAGE, dtype=torch.uint8, device=device)
            self._theirs = [torch.zeros_like(self._mine) for _ in range(self.count)]
            self._numbers = torch.zeros(_NUMBERS, dtype=torch.float64, device=device)

    def meet(self, names: Iterable[str]) -> set[str]:
        """
        Learn which layers each process has. All of them have to call it.

        Args:
            names (Iterable[str]): of the layers of this process

        Returns:
            Set[str]: of all of them
        """
        counts = Counter(itertools.chain.from_iterable(
            message['names'] for message in self.exchange({'names': sorted(set(names))}, lambda: {'names': []})))
        self.holders = {name: count for name, count in counts.items() if count < self.count}
        self.holding = min(self.holders.values(), default=self.count)
        self.replicas = min(self.replicas, self.holding)
        return set(counts)

    def share_of(self, layer: str, is_sharded: bool) -> float:
        """
        By what to multiply statistics of a layer on each process that has it, so that the sum is that of the layer.

        Args:
            layer (str): its name
            is_sharded (bool): whether they are already shares among all processes

        Returns:
            float: 1. for a layer in shards that all processes have
        """
        return (self.count if is_sharded else 1) / self.holders.get(layer, self.count)

    def exchange(self, message: dict, otherwise: Callable | None = None) -> list[dict]:
        """
        Let all processes know each other's message. All of them have to call it.

        Args:
            message (dict): plain data, of this process
            otherwise (Callable | None): makes the message that is sent if this
                one cannot be, inside an except block; by default the error is raised

        Returns:
            List[dict]: the messages of all, in order of ranks
        """
        if self.count == 1:
            return [message]
        try:
            data = zlib.compress(json.dumps(message).encode())
        except Exception:
            if otherwise is None:
                raise
            data = zlib.compress(json.dumps(otherwise()).encode())
        data = len(data).to_bytes(8, 'little') + data
        found = [b''] * self.count
        for start in itertools.count(0, _MESSAGE):
            part = data[start:start + _MESSAGE]
            self._mine[:len(part)] = torch.frombuffer(bytearray(part or b'\0'), dtype=torch.uint8)[:len(part)]
            dist.all_gather(self._theirs, self._mine)
            found = [x + y.cpu().numpy().tobytes() for x, y in zip(found, self._theirs, strict=True)]
            ends = [8 + int.from_bytes(x[:8], 'little') for x in found]
            if start + _MESSAGE >= max(ends):
                return [json.loads(zlib.decompress(x[8:end])) for x, end in zip(found, ends, strict=True)]

    def add_up(self, totals: list[Totals], layouts: list[list], on_error: Callable | None = None,
               replicas: list[int] | None = None,
               whole: Callable | None = None) -> tuple[list[Totals], set[tuple[str, str]]]:
        """
        Sum statistics over all processes. All of them have to call it.

        Args:
            totals (List[Totals]): of this process
            layouts (List[List]): of all processes, see :func:`layout_of`
            on_error (Callable | None): called with source and field, inside
                an except block, where one cannot be added on this process;
                by default the error is raised
            replicas (List[int] | None): which part of the data each process has; by default each has its own
            whole (Callable | None): called with source, field and sum as soon
                as it is whole; gives the field and what is kept of it

        Returns:
            Tuple[List[Totals], Set[Tuple[str, str]]]: the sums, of what any
                process has, in the same order on all of them; and source and
                field of those that could not be added on some process
        """
        if self.count == 1:
            return totals, set()
        union, givers = {}, {}
        for rank, layout in enumerate(layouts):
            for index, source, field, key, shape in layout:
                key = _key_of(key)
                union.setdefault((index, source, field, key), _whole(key, shape))
                part = _part(field, key, rank, rank if replicas is None else replicas[rank])
                givers.setdefault((index, source, field, key, part), (rank, getattr(key, 'offset', None)))
        mine = {part[:-1]: offset for part, (rank, offset) in givers.items() if rank == self.rank}
        sums = [{} for _ in totals]
        if not union:
            return sums, set()
        pairs = list(dict.fromkeys((source, field) for _, source, field, _ in union))
        addends = [_Addend(totals[name[0]].get(name[1:3], {}).get(name[3]) if name in mine else None, shape,
                           *name[1:3], whole, mine.get(name)) for name, shape in union.items()]
        owners = [pairs.index((source, field)) for _, source, field, _ in union]
        failed, flags = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.float64)

        def each(method, pieces, buffer):
            for which, there, here in pieces:
                if which < len(addends):
                    try:
                        method(addends[which], buffer[there], here)
                    except Exception:
                        if on_error is None:
                            raise
                        failed[owners[which]] = 1
                        on_error(*pairs[owners[which]])
                # Last of all, how many processes could not add something: by then each of them knows.
                elif method is _Addend.give:
                    buffer[there] = failed[here]
                else:
                    flags[here] = buffer[there]
        for pieces in _rounds([*(addend.size for addend in addends), len(pairs)]):
            buffer = self._numbers[:pieces[-1][1].stop]
            buffer.zero_()
            each(_Addend.give, pieces, buffer)
            dist.all_reduce(buffer)
            each(_Addend.take, pieces, buffer)
        # What fails here after the last round, the others hear with the next message.
        lost = {pair for pair, *counts in zip(pairs, flags.tolist(), failed.tolist(), strict=True) if any(counts)}
        for (index, source, field, key), addend in zip(union, addends, strict=True):
            if (source, field) not in lost:
                sums[index].setdefault((source, addend.field), {})[key] = addend.total
        return sums, lost


class _Addend:
    """ One statistic, which is added up piece by piece; what this process has not seen is zero. """

    def __init__(self, own, shape, source, field, whole, offset=None):
        self.field = field
        self._offset = offset
        self.size = math.prod(shape)
        self.total = None
        self._own = own
        self._shape = shape
        self._source = source
        self._whole = whole
        if not self.size:
            self._finish(torch.zeros(shape, dtype=torch.float64))

    def give(self, buffer, here):
        if here.start == 0 and self._own is not None:
            own, self._own = self._own, None
            own = made(own)
            # A third of a count is no float32.
            own = own.detach() if isinstance(own, torch.Tensor) else torch.tensor(own, dtype=torch.float64)
            if own.ndim and own.shape[-1] != self._shape[-1]:
                own = F.pad(own, (self._offset, self._shape[-1] - self._offset - own.shape[-1]))
            self._own = own
        if self._own is not None:
            buffer.copy_(self._own.reshape(-1)[here])

    def take(self, buffer, here):
        if self.total is None:
            self.total = torch.empty(self.size, dtype=torch.float64, device=buffer.device)
        self.total[here] = buffer
        if here.stop == self.size:
            self._own = None
            self._finish(self.total.view(self._shape))

    def _finish(self, total):
        self.field, self.total = (self.field, total) if self._whole is None else self._whole(
            self._source, self.field, total)


def _rounds(sizes):
    """
    Cut numbers one after the other into rounds: which of them, where in the buffer, where in itself.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine import processes
        >>> [(which, there.stop, here.stop) for which, there, here in next(processes._rounds([3, 1]))]
        [(0, 3, 3), (1, 4, 1)]
    """
    pieces, place = [], 0
    for which, size in enumerate(sizes):
        start = 0
        while start < size:
            length = min(size - start, _NUMBERS - place)
            pieces.append((which, slice(place, place + length), slice(start, start + length)))
            start, place = start + length, place + length
            if place == _NUMBERS:
                yield pieces
                pieces, place = [], 0
    if pieces:
        yield pieces


def _key_of(key):
    return Site(*key) if isinstance(key, list) else key


def _whole(key, shape):
    """ The shape of a statistic of all units, which are its last dimension. """
    return [*shape[:-1], key.units] if shape and getattr(key, 'offset', None) is not None else shape


def _part(field, key, rank, replica):
    """
    What a process adds: of those that have the same units of the same samples, one does.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine import processes
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import Site
        >>> site = Site('act', 'relu', 'fc', units=8, offset=4)
        >>> [processes._part(field, site, rank=1, replica=0) for field in ('away', 'samples')]
        [(0, (), 4), (0, (), None)]
    """
    if not isinstance(key, Site):
        return rank
    return replica, tuple(key.samples), None if field in _OF_SAMPLES else key.offset


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
            shape = _whole(_key_of(key), shape)
            first = union.setdefault((index, source, field, _key_of(key)), shape)
            if first != shape:
                found.setdefault((source, field), f'{key!r} has the shapes {first} and {shape}')
    return found
