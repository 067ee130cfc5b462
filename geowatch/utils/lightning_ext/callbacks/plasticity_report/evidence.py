"""
What runs show beside the fresh network and beside each other: the numbers that verdicts are made of.
"""
import dataclasses
import math
import statistics

from .scalars import direction, find_scalar, is_validation

# Where one of these is not a number, the weights or what passes through them are none.
VITAL = ('weight_mag', 'erank', 'feature_erank', 'grad_mag', 'grad_norm')
# A network has lost what is below these shares of its start, or when so many more of all units are dead.
RANK_LEFT, GRADIENT_LEFT, DEAD_MORE = 0.3, 1e-3, 0.5
# One whose weights and their ranks changed by less has hardly moved, or one whose steps together are so short.
WEIGHTS_MOVED, RANK_MOVED, TRAVELLED = 0.04, 0.008, 0.5


@dataclasses.dataclass
class Evidence:
    """
    The metrics of one run. What is not known is nan, which no rule takes for true.

    Attributes:
        run (Run): the run
        fresh (Dict[str, float]): metric to its value in the untrained network
        end (Dict[str, float]): metric to its last value
        travel (float): sizes of all steps of the optimizer together, over the size of the weights
    """
    run: object
    fresh: dict
    end: dict
    travel: float

    def ratio(self, name):
        """ The end of a metric, as a share of its value in the untrained network. """
        fresh = self.fresh.get(name, math.nan)
        return self.end.get(name, math.nan) / fresh if fresh > 0 else math.nan

    def not_finite(self):
        """ What is not a number at the end, and from which step on. """
        found = {}
        for name in VITAL:
            points = self.run.metrics.get(name, [])
            step = since({point.step: point.value for point in points}, lambda x: not math.isfinite(x))
            # One gradient that overflows is what a GradScaler looks for.
            if step is not None and not (name.startswith('grad') and len(points) > 1 and step == points[-1].step):
                found[name] = step
        return found

    def lost(self):
        """ What is lost at the end, and from which step on. """
        rules = {
            'grad_mag': lambda x, fresh: x <= GRADIENT_LEFT * fresh,
            'feature_erank': lambda x, fresh: x < RANK_LEFT * fresh,
            'dead_units': lambda x, fresh: x - fresh > DEAD_MORE,
        }
        found = {name: since({point.step: point.value for point in self.run.metrics.get(name, [])},
                             lambda x, name=name, rule=rule: rule(x, self.fresh[name])) for name, rule in rules.items()}
        return {name: step for name, step in found.items() if step is not None}

    def is_still(self):
        """ Has it hardly moved? """
        weights, ranks = (abs(self.ratio(name) - 1) for name in ('weight_mag', 'erank'))
        return (self.travel < TRAVELLED or weights <= WEIGHTS_MOVED and ranks <= RANK_MOVED
                or math.isnan(ranks) and weights <= RANK_MOVED)

    def distance(self):
        """ How far it has moved; inf where that is not known, or where what is lost may hide it. """
        known = [abs(self.ratio(name) - 1) for name in ('weight_mag', 'erank') if name in self.end]
        known = [x for x in [*known, self.travel] if math.isfinite(x)]
        return max(known) if known and not self.lost() else math.inf


@dataclasses.dataclass
class Scores:
    """
    One scalar of all runs, and of the untrained network.

    Attributes:
        name (str): as it was logged
        curves (List[Dict[int, float]]): of each run, step to value
        ends (List[float]): of each run the mean over the last tenth, nan where it has none
        start (float): of the untrained network, as well as it is known
        is_start_known (bool): it is of a run that hardly moved; else runs may have won more than it tells
    """
    name: str
    curves: list
    ends: list
    start: float
    is_start_known: bool

    @property
    def sign(self):
        return direction(self.name)

    @property
    def best(self):
        return self.sign * max((self.sign * end for end in self.ends if math.isfinite(end)), default=math.nan)

    @property
    def limit(self):
        """ With what share of the best gain a run has learned. A loss of training is of a few batches. """
        return 0.9 if self.sign > 0 or is_validation(self.name) else 0.8

    def won(self):
        """ What the best run has won, as a share of where it began or ended. """
        return self.sign * (self.best - self.start) / max(abs(self.best), abs(self.start), 1e-300)

    def gain(self, i):
        """ What a run has won over the untrained network, as a share of what the best one has. """
        most = self.sign * (self.best - self.start)
        own = self.sign * (self.ends[i] - self.start) if math.isfinite(self.ends[i]) else -math.inf
        return own / most if most > 0 and self.curves[i] else math.nan

    def is_worse(self, i):
        """ By more than a tenth than the best run; also where it is not a number. """
        return not abs(self.ends[i] - self.best) <= 0.1 * abs(self.best)

    def progress(self, i):
        """ From the median of the first half, at which an early jump is forgotten, to the end. """
        values = list(self.curves[i].values())
        early = values[:(len(values) + 1) // 2]
        middle, end = statistics.median(early) if early else math.nan, self.ends[i]
        return self.sign * (end - middle) / max(abs(middle), abs(end), 1e-300)


def gather(runs):
    """
    Compare the metrics of each run with those of the untrained network.

    Args:
        runs (List[Run]): any

    Returns:
        List[Evidence]: of each run
    """
    found = []
    for run in runs:
        steps = [point.value for point in run.metrics.get('update_ratio', []) if math.isfinite(point.value)]
        found.append(Evidence(
            run, {name: _fresh(runs, run, name) for name in run.metrics},
            {name: points[-1].value for name, points in run.metrics.items()},
            _mean(steps) * (run.last_step + 1)))
    return found


def last_level(values):
    """
    Where a curve ended: the mean of its last tenth.

    Args:
        values (List[float]): in order

    Returns:
        float: nan where there is none, or where one of them is not finite

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.evidence import last_level
        >>> last_level([5.] * 18 + [1., 3.]), last_level([1., float('nan')])
        (2.0, nan)
    """
    return _mean(values[-max(1, len(values) // 10):])


def _mean(values):
    return sum(values) / len(values) if values else math.nan


def _fresh(runs, run, name):
    """ A metric of the untrained network: of this run, or else the earliest of those with the same layers. """
    first = run.metrics[name][0]
    if first.step < 0:
        return first.value
    firsts = [other.metrics[name][0] for other in runs if name in other.metrics]
    firsts = [point for point in firsts if point.layers.keys() == first.layers.keys()]
    earliest = min(point.step for point in firsts)
    # One of a later epoch is no start: the run was resumed from elsewhere, or is measured too rarely.
    values = [point.value for point in firsts if point.step == earliest and not point.epoch
              and math.isfinite(point.value)]
    known = [statistics.median(values)] if values else []
    # Of few examples, so that the true one is higher.
    known += [run.small_start[name].value] if name in run.small_start else []
    return max(known, default=math.nan)


def compare(runs, found, name):
    """
    Compare a scalar of all runs.

    Args:
        runs (List[Run]): with their scalars
        found (List[Evidence]): of them
        name (str | None): of the scalar

    Returns:
        Scores | None: None where its name does not say what is better, or no run has it
    """
    curves = [name and find_scalar(run, name) or {} for run in runs]
    if not any(curves) or not direction(name):
        return None
    courses = [list(curve.values()) for curve in curves]
    ends = [last_level(own) for own in courses]
    # The untrained network has no score of its own: the run that moves least is nearest to it.
    firsts = [(one.distance(), own[0], one.is_still()) for one, own in zip(found, courses, strict=True) if own]
    _, start, is_known = min((own for own in firsts if math.isfinite(own[1])), default=(0., math.nan, False))
    if direction(name) > 0:
        # What a score falls to is where it began, which cannot be said of a loss.
        start = min([start, *(end for end in ends if math.isfinite(end))])
    return Scores(name, curves, ends, start, is_known)


def since(curve, holds):
    """
    Args:
        curve (Dict[int, float]): step to value
        holds (Callable[[float], bool]): what is looked for

    Returns:
        int | None: the first step from which on it holds to the end
    """
    found = None
    for step in reversed(curve):
        if not holds(curve[step]):
            break
        found = step
    return found
