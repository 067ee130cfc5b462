"""
What fails is a fault of ours: it costs the metrics that need it, with one traceback, and not the run.
"""
import contextlib
import os
import traceback

from .say import say


def in_short(ex: Exception) -> str:
    """
    What has failed, where it is not worth a traceback.

    Args:
        ex (Exception): that was raised

    Returns:
        str:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.faults import in_short
        >>> in_short(RuntimeError('no such kernel'))
        'RuntimeError: no such kernel'
    """
    frames = traceback.extract_tb(ex.__traceback__)[-1:]
    place = ''.join(f' in {os.path.basename(frame.filename)}:{frame.lineno}' for frame in frames)
    return f'{type(ex).__name__}{place}: {str(ex).strip().partition(chr(10))[0][:200]}'


class Faults:
    """
    Metrics that have failed, and what is still to be said of them.

    Args:
        rank (int): of this process
        budget (Budget | None): which is told how long guarded blocks take

    Attributes:
        failed (Dict[str, str]): metrics that failed here, not known elsewhere
            yet, to what is still to be said

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.faults import Faults
        >>> faults = Faults()
        >>> with faults.guard(['erank']):
        >>>     raise RuntimeError('no convergence')  # xdoctest: +ELLIPSIS
        PlasticityMonitor: erank failed and will not be measured any more:
        Traceback (most recent call last):
        ...
        RuntimeError: no convergence
        <BLANKLINE>
        >>> list(faults.failed)
        ['erank']
    """

    def __init__(self, rank=0, budget=None):
        self.failed = {}
        self._rank = rank
        self._budget = budget

    @contextlib.contextmanager
    def guard(self, names):
        """ What fails in this context costs the metrics (List[str]), not the run. """
        with self.spending(names):
            try:
                yield
            except Exception:
                self.fail(names)

    def fail(self, names):
        """ Note what fails, inside an except block; names are a List[str]. """
        names = [name for name in dict.fromkeys(names) if name not in self.failed]
        if not names:
            return
        text = (f'PlasticityMonitor: {", ".join(names)} failed and will not be measured any more:\n'
                f'{traceback.format_exc()}')
        if self._rank == 0:
            say(text)
        # What fails on all processes is said once: others wait until they know.
        self.failed.update(dict.fromkeys(names, '' if self._rank == 0 else text))

    def say(self, said=()):
        """ Say what has not been said, but for some metrics of which others do. """
        for text in {text for name, text in self.failed.items() if text and name not in said}:
            say(text)
        self.failed = dict.fromkeys(self.failed, '')

    def spending(self, names):
        """ A context whose time the metrics have cost. """
        return contextlib.nullcontext() if self._budget is None else self._budget.spending(names)

    def spent(self, names, seconds):
        """ Note that the metrics have cost so much more, together. """
        if self._budget is not None:
            self._budget.add(names, seconds)
