"""
When a metric is due: every so many steps, at the end of each epoch, or every so much time.
"""
import math
import re

from ..plasticity_metrics._errors import PlasticityConfigError

# Seconds, by what people write. Not months and years, whose length is not one number, and of which m could be one.
_UNITS = {name: seconds for seconds, names in {
    1e-3: 'ms millisecond milliseconds', 1.: 's sec secs second seconds', 60.: 'm min mins minute minutes',
    3600.: 'h hr hrs hour hours', 86400.: 'd day days', 604800.: 'w week weeks'}.items() for name in names.split()}
_DURATION = re.compile(r'(\d+(?:\.\d+)?(?:e-?\d+)?) *([a-z]+)')

class Schedule:
    """
    Keeps account of when one metric is to be measured.

    Three numbers do: the step from which on it is due, the epoch in which it
    was last measured, and the step before which it may not be. What is due
    stays due until it is measured, so that what has to wait, as activations
    for the next validation, is not lost.

    Args:
        interval (int | str): a number of optimizer steps, 'epoch' (the last
            step of each epoch), or a duration such as '5 minutes', '5m' or
            '1 hour 30 minutes'. An epoch that the interval would skip is
            measured at its last step.
        early (bool): if True, once per epoch is due at its first step, for
            what is seen over all of it

    Attributes:
        steps (int | None): the number of steps, if that is what was given
        seconds (float | None): the duration, if that is what was given
        next (float): the step from which on it is due
        epoch (int | None): in which it was last measured
        not_before (int): step before which it is not due, to keep to a budget

    Raises:
        PlasticityConfigError: if the interval cannot be read or is not positive

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lightning import Moment
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.schedule import Schedule
        >>> every, steps = Schedule(3), []
        >>> for step in range(8):
        >>>     moment = Moment(step, epoch=0, is_last=step == 7)
        >>>     every.begin(moment)
        >>>     if every.is_due(step):
        >>>         steps.append(step)
        >>>         every.done(moment)
        >>> steps
        [2, 5]
        >>> Schedule('5 minutes').seconds
        300.0
    """

    def __init__(self, interval, early=False):
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
                f"or a duration such as '5 minutes' or '2 days', but got {interval!r}")
        self.next = math.inf if self.steps is None else self.steps - 1
        self.epoch = None
        self.not_before = 0
        self._is_early = early and text == 'epoch'
        self._left = self.seconds  # of the duration, when the clock starts
        self._deadline = None      # on the clock
        self._now = None

    def begin(self, moment, now=None):
        """
        Note that a step begins, or goes on with a micro-batch.

        Args:
            moment (Moment): of the step
            now (float | None): seconds on a clock that all processes share;
                None if this is no moment to compare it
        """
        if moment.step < self.not_before:
            return
        due = (moment.is_last or self._is_early) and moment.epoch != self.epoch
        if self.seconds is not None and now is not None:
            self._now = now
            if self._deadline is None:
                self._deadline = now + self._left
            due |= now >= self._deadline
        if due:
            self.next = min(self.next, moment.step)

    def is_due(self, step):
        """ Whether it is due at this step (int). """
        return step >= self.next and step >= self.not_before

    def is_missing(self, moment):
        """ Whether it would have to be measured at this moment if it were the last one of its epoch. """
        return moment.step >= self.not_before and (moment.epoch != self.epoch or moment.step >= self.next)

    def want(self, step):
        """ Make it due at this step (int), since somebody looks at it. """
        self.next = min(self.next, step)

    @property
    def wake(self):
        """ The first step at which it can be due without anything new. """
        return max(self.next, self.not_before)

    def done(self, moment):
        """ Note that it is measured at this moment. """
        self.epoch = moment.epoch
        self.next = math.inf if self.steps is None else self._multiple(moment.step + 1)
        # Of a clock that all processes share, they have to know the same time.
        self._deadline = None if self._now is None else self._now + self.seconds

    def wait(self, step):
        """ Not before this step (int). """
        self.not_before = step
        if self.steps is not None and self.next < step:
            self.next = self._multiple(step)

    def _multiple(self, step):
        return step + -(step + 1) % self.steps

    def progress(self, now):
        """ How much of the duration is over at a time, at most 1; None before it begins. """
        return None if self._deadline is None else min(1 - (self._deadline - now) / self.seconds, 1.)

    def state_dict(self, now=None):
        """ What a checkpoint needs: plain values. """
        left = self._left if self._deadline is None or now is None else self._deadline - now
        return {'next': None if self.next == math.inf else self.next, 'epoch': self.epoch, 'left': left}

    def load_state_dict(self, state):
        """ Go on from a checkpoint, also from one with other keys. """
        following, epoch, left = state.get('next'), state.get('epoch'), state.get('left')
        if _is_whole(following):
            self.next = following
        if _is_whole(epoch):
            self.epoch = epoch
        if self.seconds is not None and isinstance(left, float) and math.isfinite(left):
            self._left = left


def _is_whole(number):
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _seconds(text):
    # Not by kwutil, which takes '5m' for five months and '1 hour 5 minutes' for 300 hours.
    text = text.lower()
    parts = _DURATION.findall(text)
    if not re.fullmatch(rf'({_DURATION.pattern}[ ,]*)+', text) or not all(unit in _UNITS for _, unit in parts):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


class Poll:
    """
    When to ask all processes next how far they are.

    Each answer costs a collective, so that the next question comes when, at
    the pace so far, half of what is missing is done, and at once where that is
    less than a step. All processes compute the same from the same answers.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.schedule import Poll
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
