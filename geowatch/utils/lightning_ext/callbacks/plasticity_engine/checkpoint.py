"""
What a run that goes on needs of the one before: plain values in a checkpoint.
"""
import math
import time

import torch

from .memory import Memory


class Saved:
    """
    What a checkpoint holds of a fit.

    Args:
        fit (Fit): whose agenda, publisher, sinks and steps it uses

    Attributes:
        content (dict): of the checkpoint from which the run goes on, which may be of another version; empty without one
    """

    def __init__(self, fit):
        self.content = {}
        self._fit = fit

    def make(self):
        """ What to write into a checkpoint now: plain values. """
        fit = self._fit
        schedules = fit.agenda.state_dict()
        for window in fit.looks.windows:
            if not window.start and window is not fit.activations.held:
                for name in window.metrics:
                    schedules[name].update(next=0, epoch=None)  # due again, since what it has seen is not saved
        return {'version': 2, 'time': time.time(), 'schedules': schedules, 'sources': fit.steps.state_dict(),
                'memory': fit.publisher.memory.state_dict(), 'run': fit.run,
                'watched': {tag: float(x) for tag, x in fit.sinks.watched.items()}}

    def restore(self):
        """ Go on from the checkpoint, if there is one: what cannot be read is left alone. """
        fit = self._fit
        schedules, watched, run = (self.content.get(key) for key in ('schedules', 'watched', 'run'))
        if isinstance(schedules, dict):
            fit.agenda.load_state_dict(schedules)
        if isinstance(watched, dict):
            fit.sinks.watched.update({tag: torch.tensor(x) for tag, x in watched.items() if isinstance(x, float)})
        if isinstance(run, str):
            fit.run = run
        fit.publisher.memory = Memory(self.content.get('memory'))

    def drop_lines_after(self, is_stale):
        """ A run that goes on measures what came after the checkpoint once more: is_stale tells of a row (dict). """
        if self._fit.trainer.ckpt_path:
            saved = self.content.get('time')
            saved = saved if isinstance(saved, (int, float)) else -math.inf
            self._fit.sinks.drop(lambda row: row['time'] > saved and is_stale(row))
