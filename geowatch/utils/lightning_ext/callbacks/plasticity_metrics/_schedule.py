"""
When a metric is due: 'epoch', a number of steps, or a duration.
"""
import time

from kwutil import util_time


class Schedule:
    """
    Decides at each optimizer step whether a metric is measured.

    Args:
        interval (int | str): a number of optimizer steps, 'epoch' (the last
            step of each epoch), or a duration such as '5 minutes'.

    Raises:
        ValueError: if the interval cannot be read or is not positive

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._schedule import Schedule
        >>> every = Schedule(3)
        >>> [every.is_due(step, last=step == 7) for step in range(8)]
        [False, False, True, False, False, True, False, False]
        >>> Schedule('epoch').is_due(6, last=True)
        True
        >>> Schedule('5 minutes').seconds
        300.0
    """

    def __init__(self, interval):
        self.interval = interval
        self.steps = self.seconds = None
        text = str(interval).strip()
        if text.lstrip('+-').isdigit():
            self.steps = int(text)
            valid = self.steps >= 1
        elif text == 'epoch':
            valid = True
        else:
            self.seconds = _seconds(text)
            valid = self.seconds is not None and 0 < self.seconds < float('inf')
        if not valid or isinstance(interval, bool):
            raise ValueError(
                "Expected an interval to be a positive number of steps, 'epoch', 'auto', "
                f"or a duration such as '5 minutes', but got {interval!r}")
        self.start_epoch()
        self._last_time = time.monotonic()

    def start_epoch(self):
        """ Note that nothing has been measured in this epoch yet. """
        self._measured = False

    def is_due(self, step, last=False):
        """
        Whether to measure at this step.

        An interval that would skip a whole epoch is cut short by the epoch's
        last step, so that short epochs log as well.

        Args:
            step (int): index of the optimizer step, from 0
            last (bool): True if it is the last one of the epoch

        Returns:
            bool
        """
        if self.steps is not None:
            due = (step + 1) % self.steps == 0
        elif self.seconds is not None:
            due = time.monotonic() - self._last_time >= self.seconds
        else:
            due = False
        due = due or (last and not self._measured)
        if due:
            self._measured = True
            self._last_time = time.monotonic()
        return due


def _seconds(text):
    if not text[:1].isdigit():
        return None  # kwutil reads '' as a second
    try:
        return util_time.timedelta.coerce(text).total_seconds()
    except Exception:  # it raises plain Exception for what it cannot read
        return None
