"""
When a metric is due: every so many steps, at the end of each epoch, or every so much time.
"""
import math

from ._errors import PlasticityConfigError


class Schedule:
    """
    Keeps account of when one metric is to be measured.

    A measurement is owed from the step on at which it falls due until it is
    made, so that what has to wait, as activations for the next validation,
    is not lost.

    Args:
        interval (int | str): a number of optimizer steps, 'epoch' (the last
            step of each epoch), or a duration such as '5 minutes'. An epoch
            that the interval would skip is measured at its last step.

    Attributes:
        owed (bool): whether a measurement is due and not made yet
        measured (bool): whether one was made in this epoch
        not_before (int): step before which none falls due, to keep to a budget
        seconds (float | None): the duration, if that is what was given

    Raises:
        PlasticityConfigError: if the interval cannot be read or is not positive

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._schedule import Schedule
        >>> every, steps = Schedule(3), []
        >>> for step in range(8):
        >>>     every.tick(step, last=step == 7)
        >>>     if every.owed:
        >>>         steps.append(step)
        >>>         every.done()
        >>> steps
        [2, 5]
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
            valid = self.seconds is not None and 0 < self.seconds < math.inf
        if not valid or isinstance(interval, bool):
            raise PlasticityConfigError(
                "Expected an interval to be a positive number of steps, 'epoch', 'auto', "
                f"or a duration such as '5 minutes', but got {interval!r}")
        self.owed = self.measured = False
        self.not_before = 0
        self.since = None
        self._now = None
        self._elapsed = 0.  # since the last measurement, before a checkpoint
        self._step = self._done_step = None

    def start_epoch(self):
        """ Note that nothing has been measured in this epoch yet. """
        self.measured = False

    def tick(self, step, last=False, now=None):
        """
        Note that a step begins, or goes on with a micro-batch; see `owed` for the outcome.

        Args:
            step (int): index of the optimizer step, from 0
            last (bool): True if it is the last one of the epoch
            now (float | None): seconds on a clock that all processes share;
                None if this is no moment to compare it
        """
        if step == self._done_step or step < self.not_before:
            return
        self._step = step
        if self.steps is not None:
            due = (step + 1) % self.steps == 0
        elif self.seconds is not None and now is not None:
            if self.since is None:
                self.since = now - self._elapsed
            self._now = now
            due = now - self.since >= self.seconds
        else:
            due = False
        if due or (last and not self.measured):
            self.owed = True

    def next_due(self, step):
        """ The first step from `step` on that a number of steps makes due; never for other intervals. """
        if self.steps is None:
            return math.inf
        step = max(step, self.not_before)
        return step + -(step + 1) % self.steps

    def done(self):
        """ Note that the measurement is made. """
        self.owed, self.measured, self._done_step = False, True, self._step
        # Of a clock that all processes share, they have to know the same time.
        self.since = self._now

    def state_dict(self, now=None):
        """ What a checkpoint needs: plain values. """
        elapsed = self._elapsed if self.since is None or now is None else now - self.since
        return {'owed': self.owed, 'measured': self.measured, 'elapsed': elapsed}

    def load_state_dict(self, state):
        """ Go on from a checkpoint, also from one with other keys. """
        self.owed = bool(state.get('owed', False))
        self.measured = bool(state.get('measured', False))
        elapsed = state.get('elapsed')
        if isinstance(elapsed, (int, float)) and math.isfinite(elapsed):
            self._elapsed = elapsed


def _seconds(text):
    from kwutil import util_time
    if not text[:1].isdigit() or not text[-1:].isalpha():
        return None  # kwutil reads '' and a bare number as seconds
    try:
        return util_time.timedelta.coerce(text).total_seconds()
    except Exception:  # it raises plain Exception for what it cannot read
        return None


class Poll:
    """
    When to ask all processes next how far they are.

    Each answer costs a collective, so that the next question comes when, at
    the pace so far, half of what is missing is done, and at once where that is
    less than a step. All processes compute the same from the same answers.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._schedule import Poll
        >>> poll, asked = Poll(), []
        >>> for step in range(100):
        >>>     if poll.is_due(step):
        >>>         asked.append(step)
        >>>         poll.answer(step, progress=step / 80)
        >>> asked[:9]
        [0, 1, 40, 60, 70, 75, 77, 78, 79]
    """

    def __init__(self):
        self._next = 0
        self._start = None

    def is_due(self, step):
        """ Whether to ask at this step (int). """
        return step >= self._next

    def answer(self, step, progress):
        """
        Args:
            step (int): at which all were asked
            progress (float): how much is done, 1 for all
        """
        if self._start is None:
            self._start = step
        steps = step - self._start
        left = (1 - progress) * steps / progress if progress > 0 else 0
        self._next = step + max(1, int(left / 2))
