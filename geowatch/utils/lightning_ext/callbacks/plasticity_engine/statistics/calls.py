"""
Statistics of calls of activation functions, which add up over calls, batches and processes.
"""
import math
from collections.abc import Callable, Collection, Hashable

import torch

from . import CallStatistic
from .rows import Rows
from .sums import double, nonfinite

# How close to a saturated value counts as saturated, for smooth functions.
EPSILON = 1e-6
# Positions of a channel: on a CPU 7 x 7 of 32 images are reduced 9 times as fast the
# other way, 16 x 16 and more are not.
_FEW = 256


class Call:
    """
    One call of an activation function, and what is computed of it for several statistics.

    Args:
        site (Hashable): where it was made, see :class:`.sites.Site`
        output (Tensor): what the function returned, of any shape
        axis (int): of the units in `output`
        values (Tuple[float, ...]): outputs at which a unit is dead
        level (float): the output above which the input is positive

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call
        >>> import torch
        >>> call = Call('fc1', torch.tensor([[[1., 2.], [3., 4.]], [[5., 0.], [7., 6.]]]), 1, (0.,))
        >>> call.units, call.samples, [x.tolist() for x in call.extremes()]
        (2, 4, [[5.0, 7.0], [0.0, 3.0]])
    """

    def __init__(self, site: Hashable, output: torch.Tensor, axis: int, values: tuple[float, ...] = (),
                 level: float = 0.):
        self.site = site
        self.output = output
        self.axis = axis % output.ndim
        self.values = values
        self.level = level
        self.units = output.shape[self.axis]
        self.samples = output.numel() // max(self.units, 1)
        self.others = [dim for dim in range(output.ndim) if dim != self.axis]
        self.is_part = getattr(site, 'offset', None) is not None
        self._extremes = self._nonfinite = None

    def extremes(self):
        """ Highest and lowest output of each unit, Tensors of shape (units,), nan where one is. """
        if self._extremes is None:
            output, axis = self.output, self.axis
            if not self.others:
                high = low = output.clone()  # which may be changed in place before it is looked at
            elif axis and output.is_cpu and output.is_contiguous() and 1 < math.prod(output.shape[axis + 1:]) < _FEW:
                # A reduction of few neighbours is not vectorized there, one over examples is.
                samples = output.flatten(0, axis - 1).flatten(2)
                high, low = samples.amax(0).amax(1), samples.amin(0).amin(1)
            else:
                high, low = output.amax(self.others), output.amin(self.others)
            self._extremes = high.float(), low.float()
        return self._extremes

    def nonfinite(self):
        """ How many numbers are not finite: a number, or a 0-d Tensor. """
        if self._nonfinite is None:
            self._nonfinite = 0. if self._seems_finite() else nonfinite(self.output)
        return self._nonfinite

    def _seems_finite(self):
        # To see a sum costs nothing on a CPU, where to count each time would.
        if not self.output.is_cpu:
            return False
        return math.isfinite(self.output.sum(dtype=torch.float32) if self._extremes is None
                             else torch.dot(*self._extremes))


class Samples(CallStatistic):
    """ Fields 'samples' and 'nonfinite', 0-d. """
    fields = ('samples', 'nonfinite')

    def add(self, own, call):
        """ See :class:`.CallStatistic`. """
        own['samples'] = own.get('samples', 0.) + call.samples
        own['nonfinite'] = own.get('nonfinite', 0.) + call.nonfinite()


class Away(CallStatistic):
    """ Field 'away' of shape (values, units), of functions with saturated values. """
    fields = ('away',)

    def __init__(self):
        self._waiting = {}  # values and device to calls: site, its fields, highest and lowest outputs

    def add(self, own, call):
        """ See :class:`.CallStatistic`. """
        if call.values:
            self._waiting.setdefault((call.values, call.output.device), []).append((call.site, own, *call.extremes()))

    def end_batch(self, own, site):
        """ See :class:`.CallStatistic`: few operations for all units of a network, as the first site asks. """
        for key in list(self._waiting):
            values, _ = key
            _, owns, *extremes = zip(*self._waiting[key], strict=True)
            high, low = map(torch.cat, extremes)
            # How many calls had a sample away from the value: a sum, so that batches and
            # processes add up, where a minimum would not. NaN passes neither comparison.
            away = torch.stack([~((high <= value + EPSILON) & (low >= value - EPSILON)) for value in values]).float()
            del self._waiting[key]  # what fails before fails at each site
            for fields, part in zip(owns, away.split([len(x) for x in extremes[0]], 1), strict=True):
                _add(fields, 'away', part)

    def forget(self, site):
        """ See :class:`.CallStatistic`. """
        self._waiting = {key: left for key, calls in self._waiting.items()
                         if (left := [call for call in calls if call[0] != site])}

    finish = end_batch


class Positive(CallStatistic):
    """ Field 'positive' of shape (units,). """
    fields = ('positive',)

    def add(self, own, call):
        """ See :class:`.CallStatistic`. """
        # On a CPU the sum of a sign takes a third of the time of that of a comparison.
        on = call.output > call.level if call.level else torch.sign(call.output).clamp_(min=0)
        if call.others:
            # float32 counts to 2^24, half precision hardly.
            on = on.sum(call.others, dtype=torch.float32 if call.samples < 1 << 24 else torch.int64)
        _add(own, 'positive', double(on))


def _add(own, field, tensor):
    if field in own:
        own[field] += tensor
    else:
        own[field] = tensor


def makers_of(fields: Collection[str], wanted_rows: Callable[[int], int],
              takes: Callable = lambda site, units, rows: True) -> list[CallStatistic]:
    """
    Who makes some fields: 'samples' and 'nonfinite' always.

    Args:
        fields (Collection[str]): additive ones
        wanted_rows (Callable[[int], int]): of the number of units, for :class:`.rows.Rows`
        takes (Callable[[Site, int, int], bool]): the same

    Returns:
        List[CallStatistic]: in an order in which nothing is computed twice

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import makers_of
        >>> [type(maker).__name__ for maker in makers_of(['away', 'gram'], lambda units: 8 * units)]
        ['Away', 'Rows', 'Samples']
    """
    makers = [Away(), Positive(), Rows(wanted_rows, fields, takes), Samples()]
    return [maker for maker in makers if maker.fields == Samples.fields or set(maker.fields) & set(fields)]
