"""
Rows of the feature matrix of each layer: an even choice of its examples and positions, and their Gram matrix.
"""
import functools

import torch

from . import CallStatistic
from .spectrum import gram
from .sums import double

# Units of which a Gram matrix is made: 32 MB. Of a wider layer a fixed random choice.
MAX_UNITS = 1 << 11
# Rows that wait for each other, since few rows cost as much to add as many.
_WAITING = 256
# The golden ratio times 2^32: its multiples are as even as numbers modulo 2^32 can be.
_GOLDEN = 2654435769


def strata(count: int, chosen: int, offset: int, device: torch.device) -> torch.Tensor:
    """
    Places that are evenly spread: one in each of as many equal parts, at changing places in them.

    A layer's rows are examples one after the other, each with its positions,
    so that as many parts as examples give one position of each, and not always
    the same one.

    Args:
        count (int): of places
        chosen (int): at most `count`
        offset (int): how many were chosen before, so that the places go on changing
        device (torch.device):

    Returns:
        Tensor: integers of shape (chosen,), rising

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.rows import strata
        >>> strata(40, 4, 0, 'cpu').tolist(), strata(4, 4, 7, 'cpu').tolist()
        ([0, 16, 22, 38], [0, 1, 2, 3])
    """
    index = torch.arange(chosen, device=device)
    if chosen == count:
        return index
    first, following = index * count // chosen, (index + 1) * count // chosen
    within = ((index + offset) * _GOLDEN % (1 << 32)) >> 16
    return first + ((following - first) * within >> 16)


class _Chosen:
    """ The rows of one site in one batch: all, or at least `quota`, evenly spread over its calls. """

    def __init__(self, quota, offset):
        self.quota = quota
        self.offset = offset
        self.parts = []
        self.seen = 0
        self.stride = 1

    def add(self, call, units):
        self.seen += call.samples
        while self.seen > 2 * self.quota * self.stride:
            self.stride *= 2
            if self.parts:
                rows = torch.cat(self.parts)
                self.parts = [rows[strata(len(rows), -(-len(rows) // 2), self.offset, rows.device)]]
        chosen = -(-call.samples // self.stride)
        self.parts.append(_take(call, chosen, self.offset, units))

    def rows(self):
        rows = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        if len(rows) > self.quota:
            rows = rows[strata(len(rows), self.quota, self.offset, rows.device)]
        return rows


def _take(call, chosen, offset, units):
    """ A copy of some rows, since the network may change its own in place. """
    output = call.output
    if chosen == call.samples:
        # Images have their units first, where neighbours are copied together.
        rows = output.movedim(call.axis, 0).reshape(call.units, call.samples).mT.clone()
    else:
        # Row by row: to flatten an image with channels first would copy all of it.
        features = output.movedim(call.axis, -1)
        place, index = strata(call.samples, chosen, offset, output.device), []
        for size in reversed(features.shape[:-1]):
            index.insert(0, place % size)
            place = place // size
        rows = features[tuple(index)]
    return rows if units == call.units else rows[:, _choice(call.units, units, rows.device)]


@functools.lru_cache(maxsize=64)  # what is new on a device is waited for there
def _choice(units, most, device):
    """ The same choice on every batch, process and run, without touching the generators of the run. """
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(units, generator=generator)[:most].sort().values.to(device)


class Rows(CallStatistic):
    """
    Fields 'gram' (d, d), 'sum' (d,) and 'rows', of at most so many rows per site.

    Args:
        wanted (Callable[[int], int]): rows that a site with so many units may have in all
        fields (Collection[str]): those that are needed; a sum is made only then
        takes (Callable[[Site, int, int], bool]): whether rows of a site are wanted, of so many units, and of so many
            rows; by default of each

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.rows import Rows
        >>> import torch
        >>> rows, own = Rows(lambda units: 10, ['gram', 'sum']), {}
        >>> for _ in range(4):
        >>>     rows.begin_batch(0.25)
        >>>     rows.add(own, Call('fc1', torch.ones(50, 3), 1))
        >>>     rows.end_batch(own, 'fc1')
        >>> rows.finish(own, 'fc1')
        >>> own['rows'], own['gram'][2].tolist(), own['sum'].tolist()
        (10.0, [10.0, 10.0, 10.0], [10.0, 10.0, 10.0])
    """
    fields = ('gram', 'sum', 'rows')

    def __init__(self, wanted, fields, takes=lambda site, units, rows: True):
        self._wanted = wanted
        self._fields = fields
        self._takes = takes
        self._share = 0.    # of all that will be seen, up to this batch
        self._chosen = {}   # site to the rows of this batch
        self._waiting = {}  # site to rows that are not in the Gram matrix yet

    def begin_batch(self, share):
        """ See :class:`.CallStatistic`. """
        self._share = min(self._share + share, 1.)

    def add(self, own, call):
        """ See :class:`.CallStatistic`. """
        if call.is_part:  # products of units of different processes are missing
            return
        units = min(call.units, MAX_UNITS)
        if call.site not in self._chosen:
            if not self._takes(call.site, units, self._wanted(units)):
                return
            taken = int(own.setdefault('rows', 0.))
            quota = round(self._wanted(units) * self._share) - taken
            if quota < 1:
                return
            self._chosen[call.site] = _Chosen(quota, taken)
        self._chosen[call.site].add(call, units)

    def end_batch(self, own, site):
        """ See :class:`.CallStatistic`. """
        chosen = self._chosen.pop(site, None)
        if chosen is not None:
            rows = chosen.rows()
            own['rows'] += len(rows)
            waiting = self._waiting.setdefault(site, [])
            waiting.append(rows)
            if sum(map(len, waiting)) >= max(_WAITING, rows.shape[1] // 2):
                self._flush(own, site)

    def forget(self, site):
        """ See :class:`.CallStatistic`. """
        self._chosen.pop(site, None)
        self._waiting.pop(site, None)

    def finish(self, own, site):
        """ See :class:`.CallStatistic`. """
        self.end_batch(own, site)
        if site in self._waiting:
            self._flush(own, site)

    def _flush(self, own, site):
        waiting = self._waiting.pop(site)
        rows = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
        own['gram'] = gram(rows, 'columns', own.get('gram'))
        if 'sum' in self._fields:
            own['sum'] = own.get('sum', 0.) + double(rows).sum(0)
