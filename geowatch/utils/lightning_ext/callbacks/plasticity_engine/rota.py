"""
Which layers a measurement of spectra takes, where those of all would take too long: they take turns.
"""
import time
from collections.abc import Callable, Hashable

# What one measurement may take in any case.
SECONDS = 3.
# Multiplications a second, until it is known: the first guess for one core, and for a GPU.
_PACE = {'cpu': 1.5e10, 'cuda': 1e12}


def spectral_work(size: int, rows: float | None = None) -> float:
    """
    About how many multiplications the singular values of a matrix take.

    Args:
        size (int): of its smaller side
        rows (float | None): of its larger side; by default four times as many

    Returns:
        float: for half of its Gram matrix, and for the eigenvalues of that,
            which take 1.5 products of it with itself if it is of 2048 x 2048, 4 if of 256 x 256

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.rota import spectral_work
        >>> spectral_work(10), spectral_work(10, rows=0)
        (4000.0, 2000.0)
    """
    return size * size * ((4. * size if rows is None else rows) / 2 + 2 * size)


class Rota:
    """
    Plans which layers are measured: those whose last measurement is the oldest, as many as there is time for.

    All processes plan the same, from what they know of each other.

    Args:
        share (float): of the time since the last measurement that the next one may take, if that is more than SECONDS
        device (torch.device | str): where spectra are computed

    Attributes:
        pace (float): multiplications a second, as far as it is known

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.rota import Rota
        >>> rota, last = Rota(share=0.01, device='cpu'), {}
        >>> for step in range(3):
        >>>     taken = rota.plan({'a': 3e10, 'b': 3e10, 'c': 1e10}, lambda layer: last.get(layer, -1))
        >>>     last.update(dict.fromkeys(taken, step))
        >>>     print(taken)
        ['a', 'c']
        ['b', 'c']
        ['a', 'c']
    """

    def __init__(self, share, device):
        self.pace = _PACE.get(getattr(device, 'type', device), _PACE['cpu'])
        self._share = share
        self._began = None  # the time of the last measurement, which all processes know
        self._allowed = SECONDS
        self._work = 0.
        self._started = None

    def begin(self, now: float, pace: float):
        """ Note the time (in seconds) and the pace that all processes know: a measurement begins. """
        self._allowed = SECONDS if self._began is None else max(SECONDS, self._share * (now - self._began))
        self._began = now
        self.pace = pace
        self._work, self._started = 0., time.perf_counter()

    def plan(self, works: dict[Hashable, float], last: Callable) -> list[Hashable]:
        """
        Args:
            works (Dict[Hashable, float]): of each layer, see :func:`spectral_work`
            last (Callable[[Hashable], Any]): when a layer was last measured, the smallest of all has its turn

        Returns:
            List[Hashable]: the layers that are measured now, at least one
        """
        choice = self.choice(works, last)
        taken = {layer for layer in works if choice.takes(layer, works[layer])}
        self.also(sum(works[layer] for layer in taken))
        return [layer for layer in works if layer in taken]

    def choice(self, works: dict[Hashable, float], last: Callable) -> 'Choice':
        """ The same of layers of which not all are known: those that are not may have what is left of the time. """
        choice = Choice(self._allowed * self.pace)
        # Of those that have waited equally long by name, since processes may have them in another order.
        for layer in sorted(works, key=lambda layer: (last(layer), str(layer))):
            choice.takes(layer, works[layer])
        return choice

    def also(self, work: float):
        """ Note that so much more is computed in this measurement. """
        self._work += work

    def end(self):
        """ Note that it is over: that something else took its time counts only half. """
        if self._work:
            seconds = time.perf_counter() - self._started
            self.pace = max(self._work / max(seconds, 1e-9), self.pace / 2)
            self._work = 0.


class Choice:
    """
    One measurement's choice of layers, in the order in which it is asked.

    Args:
        left (float): multiplications that it may take
    """

    def __init__(self, left):
        self._left = left
        self._taken = {}

    def takes(self, layer: Hashable, work: float) -> bool:
        """ Whether a layer has its turn, to which it sticks. The first one always has. """
        if layer not in self._taken:
            self._taken[layer] = work <= self._left or not any(self._taken.values())
            if self._taken[layer]:
                self._left -= work
        return self._taken[layer]
