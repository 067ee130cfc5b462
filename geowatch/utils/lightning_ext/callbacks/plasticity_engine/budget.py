"""
Keeps the monitor's share of the training time under a limit.
"""
import contextlib
import math
import re
import time

import torch

from ..plasticity_metrics._errors import PlasticityConfigError


class Budget:
    """
    What each metric has cost so far, and from which step on it may be measured again.

    A metric may go on once its cost so far and that of one more measurement
    fit into its part of the time so far. Nobody's part shrinks because another
    metric wants more, see :func:`fair_parts`. The first measurement is always
    made; what it has cost beyond the part is made up for afterwards.

    Args:
        budget (str | float): share of the training time, such as '2%' or 0.02
        free (float): seconds beside it that the metrics may cost together
        ahead (int): measurements that are made at the end in any case, and are paid for before

    Attributes:
        share (float): between 0 and 1

    Raises:
        PlasticityConfigError: if the share cannot be read or is not between 0 and 1

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.budget import Budget
        >>> budget = Budget('2%')
        >>> budget.share
        0.02
        >>> # After 100 steps of 0.1 seconds, each measurement costs 0.02 seconds
        >>> numbers = {'seconds': 10.25, 'spent': {'erank': 0.2}, 'counts': {'erank': 10}}
        >>> overhead, wait = budget.plan(numbers, steps=100, asked={'erank': 10})
        >>> round(overhead, 4), wait  # 2 % are reached by 0.22 seconds in 11
        (0.0195, {'erank': 8})
    """

    def __init__(self, budget, free=0., ahead=0):
        self.share = _share(budget)
        self._free = free
        self._ahead = ahead
        self._started = time.perf_counter()
        self._spent = {}
        self._counts = {}
        self._inside = 0.
        self._settle = lambda: None

    def start(self, device=None):
        """
        Note that training starts.

        Args:
            device (torch.device | None): whose work is waited for, so that
                what training has left to do there is not counted as ours
        """
        self._started = time.perf_counter()
        settle = None if device is None else getattr(getattr(torch, device.type, None), 'synchronize', None)
        if settle is not None and device.type != 'cpu':
            self._settle = settle

    @contextlib.contextmanager
    def spending(self, names):
        """ Add the time of a ``with`` block to the metrics; that of blocks inside only to theirs. """
        self._settle()
        outside, self._inside = self._inside, 0.
        start = time.perf_counter()
        try:
            yield
        finally:
            self._settle()
            took = time.perf_counter() - start
            self.add(names, took - self._inside)
            self._inside = outside + took

    def add(self, names, seconds):
        """ Note that the metrics have cost so much more, together. """
        for name in names:
            self._spent[name] = self._spent.get(name, 0.) + seconds / len(names)

    def count(self, names):
        """ Note that metrics have been measured once more. """
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + 1

    def numbers(self):
        """ What :func:`plan` needs, as plain values. """
        return {'seconds': time.perf_counter() - self._started, 'spent': self._spent, 'counts': self._counts}

    def plan(self, numbers, steps, asked):
        """
        Args:
            numbers (dict): see :func:`numbers`; those of one process, for all to come to the same plan
            steps (int): trained so far
            asked (Dict[str, float]): steps between two measurements of each metric, as the user wants it

        Returns:
            Tuple[float, Dict[str, int]]: the monitor's share of the time so
                far, and for each metric that was measured the steps until it may be again
        """
        seconds, spent = numbers['seconds'], numbers['spent']
        total = sum(spent.values())
        pace = max(seconds - total, 1e-9) / max(steps, 1)
        costs = {name: spent.get(name, 0.) / count for name, count in numbers['counts'].items() if name in asked}
        parts = fair_parts(self.share, {name: cost / (asked[name] * pace) for name, cost in costs.items()})
        free = self._free / max(len(costs), 1)
        # A part may be too small to divide by: then it is never.
        waits = {name: ((spent.get(name, 0.) + (1 + self._ahead) * cost - free) / max(parts[name], 1e-200)
                        - seconds) / pace
                 for name, cost in costs.items()}
        return total / seconds, {name: math.ceil(min(max(wait, 0), 1e15)) for name, wait in waits.items()}


def fair_parts(budget, needs):
    """
    Divide a budget: nobody gets less than an even part because another needs more.

    Args:
        budget (float): to be divided
        needs (Dict[str, float]): what each would use

    Returns:
        Dict[str, float]: parts that add up to the budget

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.budget import fair_parts
        >>> fair_parts(6., {'expensive': 100., 'cheap': 1., 'other': 3.})
        {'cheap': 1.0, 'other': 2.5, 'expensive': 2.5}
        >>> fair_parts(6., {'a': 1., 'b': 3.})  # what is left is shared evenly
        {'a': 2.0, 'b': 4.0}
    """
    parts, left = {}, budget
    for name in sorted(needs, key=needs.get):
        parts[name] = min(needs[name], left / (len(needs) - len(parts)))
        left -= parts[name]
    return {name: part + left / len(parts) for name, part in parts.items()}


def _share(budget):
    text = str(budget).strip()
    number = re.fullmatch(r'(\d*\.?\d+(?:e-?\d+)?)\s*(%?)', text)
    share = float(number[1]) / (100 if number[2] else 1) if number and not isinstance(budget, bool) else math.nan
    if not 0 < share < 1:
        raise PlasticityConfigError(
            f"Expected `budget` to be a share of the training time such as '2%' or 0.02, but got {budget!r}")
    return share
