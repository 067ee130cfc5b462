"""
What a run shows beside the fresh network and the other runs: the numbers that verdicts are made of.
"""
import dataclasses
import math
import statistics

from .scalars import direction, find_scalar, loss_name, score_name

# Where one of these is not a number, the weights or what passes through them are none.
VITAL = ('weight_mag', 'erank', 'feature_erank', 'grad_mag', 'grad_norm')


@dataclasses.dataclass
class Evidence:
    """
    Numbers are nan where they are not known.

    Attributes:
        broke (Tuple[str, int] | None): what is not a number from which step to the end
        ratio (Dict[str, float]): metric to its end, as a share of its value in the fresh network
        end (Dict[str, float]): metric to its end
        rise (float): in the share of dead units
        travel (float): size of all steps of the optimizer over the size of the weights
        loss (float): of training, at the end as a share of that of the fresh network
        score (float): of the scalar that runs are judged by, at the end
        gain (float): what its score has won over the fresh network, of what the best run has won
        won (float): the same as a share of the fresh network's score
    """
    broke: tuple | None
    ratio: dict
    end: dict
    rise: float
    travel: float
    loss: float = math.nan
    score: float = math.nan
    gain: float = math.nan
    won: float = math.nan


def gather(runs, under=None):
    """
    Compare each run with the fresh network, and its score with those of the others.

    Args:
        runs (List[Run]): with their scalars
        under (str | None): the loss or metric to judge by; None takes one of validation, or else the training loss

    Returns:
        Tuple[List[Evidence], str | None]: of each run; and what the scores are of
    """
    fresh = [{name: _fresh(runs, run, name) for name in run.metrics} for run in runs]
    found = [_of_metrics(run, own) for run, own in zip(runs, fresh, strict=True)]
    losses, _ = _courses(runs, loss_name(runs))
    start = _fresh_score(losses, found, -1)
    for one, course in zip(found, losses, strict=True):
        one.loss = course[-1] / start if course and start else math.nan
    name = under if under and direction(under) else score_name(runs)
    scores, sign = _courses(runs, name)
    start = _fresh_score(scores, found, sign)
    ends = [course[-1] if course else math.nan for course in scores]
    most = max((sign * (end - start) for end in ends if math.isfinite(end)), default=math.nan)
    for one, end in zip(found, ends, strict=True):
        one.score = end
        if math.isfinite(start):
            won = sign * (end - start) if math.isfinite(end) else -math.inf
            one.won = won / abs(start) if start else won
            one.gain = won / most if most > 0 else 0.
    return found, name


def _of_metrics(run, fresh):
    end = {name: points[-1].value for name, points in run.metrics.items()}
    ratio = {name: end[name] / fresh[name] if fresh[name] else math.nan for name in end}
    dead = [point.value for point in run.metrics.get('dead_units', []) if math.isfinite(point.value)]
    steps = [point.value for point in run.metrics.get('update_ratio', []) if math.isfinite(point.value)]
    travel = statistics.fmean(steps) * (run.last_step + 1) if steps else math.nan
    return Evidence(_broke(run), ratio, end, dead[-1] - dead[0] if dead else math.nan, travel)


def _broke(run):
    """ The first of what is not a number to the end, and from which step. """
    curves = {name: {p.step: p.value for p in run.metrics[name]} for name in VITAL if name in run.metrics}
    name = loss_name([run])
    curves.update({name: run.scalars[name]} if name else {})
    broken = {}
    for name, curve in curves.items():
        for step in reversed(curve):
            if math.isfinite(curve[step]):
                break
            broken[name] = step
    return min(broken.items(), key=lambda item: item[1], default=None)


def _fresh(runs, run, name):
    """ A metric of the untrained network: of this run, or else the earliest of those with the same layers. """
    first = run.metrics[name][0]
    if first.step < 0:
        return first.value
    alike = [other.metrics[name][0] for other in runs if name in other.metrics
             and other.metrics[name][0].layers.keys() == first.layers.keys()]
    least = min(point.step for point in alike)
    values = [point.value for point in alike if point.step == least and math.isfinite(point.value)]
    known = [statistics.median(values)] if values else []
    # Of few examples, so that the true one is higher.
    known += [run.small_start[name].value] if name in run.small_start else []
    return max(known, default=math.nan)


def _courses(runs, name):
    """ A scalar of each run, with the mean of its last tenth as its end, and its direction. """
    courses = []
    for run in runs:
        values = list((name and find_scalar(run, name) or {}).values())
        last = values[-max(1, len(values) // 10):]
        courses.append([*values[:-1], statistics.fmean(last)] if values else [])
    return courses, direction(name) if name else 0


def _fresh_score(courses, found, sign):
    """ Of the untrained network: the first score of the run that moved least, or a worse one that is no worse luck. """
    known = [(one.travel, course[0]) for one, course in zip(found, courses, strict=True)
             if course and math.isfinite(course[0])]
    if not known:
        return math.nan
    start = min(known, key=lambda item: (math.isnan(item[0]), item[0]))[1]
    if sign > 0:
        # What a score falls to is where it began, which is not so of a loss.
        start = min([start, *(x for course in courses for x in course if math.isfinite(x))])
    return start
