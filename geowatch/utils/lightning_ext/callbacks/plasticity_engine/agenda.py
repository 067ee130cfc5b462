"""
Which metrics are due, at most how often, and when the next can be.
"""
import math
import time

from .schedule import Poll, Schedule


class Agenda:
    """
    The schedules of all metrics of a fit.

    Args:
        intervals (Dict[str, int | str]): of each metric, none of them 'auto'
        early (Collection[str]): metrics that see all of an epoch, and so begin with it
        processes (int): how many train together

    Attributes:
        schedules (Dict[str, Schedule]): by metric

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.agenda import Agenda
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lightning import Moment
        >>> agenda = Agenda({'weight_mag': 2, 'erank': 'epoch'})
        >>> agenda.begin(Moment(1, epoch=0, is_last=False))
        >>> agenda.due(1), agenda.wake(['erank'], Moment(1, epoch=0, is_last=False), until_end=8)
        (['weight_mag'], 9)
    """

    def __init__(self, intervals, early=(), processes=1):
        self.schedules = {name: Schedule(interval, name in early) for name, interval in intervals.items()}
        self._processes = processes
        self._poll = Poll()
        self._clock = None  # the time that all processes know, for the next step

    def begin(self, moment):
        """ Note that a step begins, or goes on with a micro-batch. """
        now, self._clock = (time.monotonic() if self._processes == 1 else self._clock), None
        for schedule in self.schedules.values():
            schedule.begin(moment, now)

    def due(self, step, names=None):
        """
        Args:
            step (int):
            names (Collection[str] | None): to choose from; by default all

        Returns:
            List[str]: metrics
        """
        return [name for name, schedule in self.schedules.items()
                if (names is None or name in names) and schedule.is_due(step)]

    def missing(self, moment, names=None):
        """
        Args:
            moment (Moment): as if it were the last one of its epoch
            names (Collection[str] | None): to choose from; by default all

        Returns:
            List[str]: metrics that would have to be measured at it
        """
        return [name for name, schedule in self.schedules.items()
                if (names is None or name in names) and schedule.is_missing(moment)]

    def want(self, names, step):
        """ Make metrics due at this step, since somebody looks at them. """
        for name in names:
            self.schedules[name].want(step)

    def done(self, names, moment):
        """ Note that metrics are measured at this moment. """
        for name in names:
            self.schedules[name].done(moment)

    def look_at_training(self, names):
        """ Metrics that were seen in validation are due in training, as early as they can be. """
        for name in names:
            schedule = self.schedules[name]
            self.schedules[name] = Schedule(schedule.interval, early=True)

    def wait_no_longer(self, names):
        """ Metrics may be measured again, since this is the last chance. """
        for name in names:
            if name in self.schedules:
                self.schedules[name].not_before = 0

    def drop(self, name):
        """ Forget a metric. """
        self.schedules.pop(name, None)

    def wake(self, names, moment, until_end):
        """
        The first step after this one at which anything can be due.

        Args:
            names (Collection[str]): metrics that can be measured at a step
            moment (Moment): of the step that ends
            until_end (float): how many steps after it the next comes that may be the last one of the epoch

        Returns:
            float:
        """
        following = moment.step + 1
        if self._timed():
            return following
        wake = min((max(following, self.schedules[name].wake) for name in names), default=math.inf)
        if any(schedule.epoch != moment.epoch for schedule in self.schedules.values()):
            wake = min(wake, moment.step + until_end)
        return wake

    # --- durations, on the clock of one process --------------------------------

    def _timed(self):
        return [schedule for schedule in self.schedules.values() if schedule.seconds is not None]

    def asks_the_time(self, step):
        """ Whether the time is worth a message at this step, after which all processes know it. """
        return self._processes > 1 and bool(self._timed()) and self._poll.is_due(step)

    def set_the_clock(self, step, now):
        """ Note the time that all processes know. """
        if self._processes > 1:
            self._clock = now
            passed = [x for x in (schedule.progress(now) for schedule in self._timed()) if x is not None]
            if passed:
                self._poll.answer(step, max(passed))
                if max(passed) >= 1:
                    self._poll = Poll()

    # --- checkpoints -------------------------------------------------------------

    def state_dict(self):
        """ What a checkpoint needs: plain values. """
        now = time.monotonic()
        return {name: schedule.state_dict(now) for name, schedule in self.schedules.items()}

    def load_state_dict(self, state):
        """ Go on from a checkpoint, also from one with other metrics. """
        for name, own in state.items():
            if name in self.schedules and isinstance(own, dict):
                self.schedules[name].load_state_dict(own)
