"""
What the pictures and the page draw of runs: curves, layers, and names short enough to stand beside them.
"""
import math

from .findings import bin_means, running_mean
from .foreign import readable
from .scalars import find_scalar
from .words import describe

# What can be seen in a picture; longer curves become means of neighbours.
LINE_POINTS = 600
# The most that colours tell of a layer's change, as a power of two.
MOST_CHANGE = 4.0
# Layers that a reader can compare.
MOST_LAYERS = 12


def wants_log(curves):
    """
    Does a curve need a logarithmic axis?

    Args:
        curves (List[List[float]]): all that share the axis

    Returns:
        bool: True if all are positive and span more than a factor of 30

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.curves import wants_log
        >>> wants_log([[1., 2.], [100.]]), wants_log([[0., 100.]])
        (True, False)
    """
    # Of a noisy curve its course counts: one lucky batch should not flatten all else.
    values = [value for curve in curves for value in running_mean(curve) or curve if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def choose_x(runs, wanted='auto'):
    """
    The axis on which runs compare.

    Args:
        runs (List[Run]): of the report
        wanted (str): 'step', 'epoch' or 'auto'

    Returns:
        str: 'epoch' where it is asked for, or where an epoch has other numbers of steps in some runs; 'step' where a
            run names no epochs
    """
    lengths = [run.steps_per_epoch for run in runs]
    if wanted == 'step' or not all(lengths):
        return 'step'
    return 'epoch' if wanted == 'epoch' or max(lengths) > 1.05 * min(lengths) else 'step'


def metric_curve(run, name, x, points=LINE_POINTS):
    """
    One curve of a run.

    Args:
        run (Run): which may lack the metric
        name (str): of the metric
        x (str): 'step' or 'epoch'
        points (int): the most

    Returns:
        Tuple[List[float], List[float]]: both axes
    """
    measured = run.metrics.get(name, [])
    return _shortened(run, [p.step for p in measured], [p.value for p in measured], x, points)


def under_curve(run, name, x, points=LINE_POINTS):
    """ Like metric_curve, of a scalar of the run's loggers. """
    scalar = name and find_scalar(run, name) or {}
    return _shortened(run, list(scalar), list(scalar.values()), x, points)


def layer_curve(run, name, layer, x, points=LINE_POINTS):
    """ Like metric_curve, of one layer. """
    measured = [p for p in run.metrics.get(name, []) if layer in p.layers]
    return _shortened(run, [p.step for p in measured], [p.layers[layer] for p in measured], x, points)


def _shortened(run, steps, values, x, points):
    return _on(run, bin_means(steps, points), x), bin_means(values, points)


def _on(run, steps, x):
    return steps if x == 'step' else run.to_epochs(steps) or []


def differing_layers(table, name):
    """
    The layers in which runs end differently.

    Args:
        table (Table): of several runs
        name (str): of the metric

    Returns:
        Tuple[List[str], int]: MOST_LAYERS at most, in the order of the network, and how many layers there are
    """
    ends = {}
    for run in table.runs:
        last = {layer: value for point in run.metrics.get(name, []) for layer, value in point.layers.items()}
        for layer, value in last.items():
            ends.setdefault(layer, []).append(value)
    spreads = {layer: _spread(values, describe(name).percent) for layer, values in ends.items()}
    least = 0.02 if describe(name).percent else 0.05
    kept = sorted((layer for layer in ends if spreads[layer] > least), key=lambda layer: -spreads[layer])[:MOST_LAYERS]
    return [layer for layer in ends if layer in kept], len(ends)


def _spread(values, percent):
    """ Of what some runs end at: a difference of shares, or a share of the largest. """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        return math.inf if finite else 0.
    difference = max(values) - min(values)
    return difference if percent else difference / (max(map(abs, values)) or 1)


def layer_grid(run, name, x, columns=400):
    """
    The layers of a run over time.

    Args:
        run (Run): which may lack the metric
        name (str): of the metric
        x (str): 'step' or 'epoch'
        columns (int): the most measurements, evenly spread, first and last included

    Returns:
        Tuple[List[str], List[float], List[List[float]]]: names in network order, x axis, a row of values per layer
    """
    points = run.metrics.get(name, [])
    if len(points) > columns:
        points = [points[round(i * (len(points) - 1) / (columns - 1))] for i in range(columns)]
    layers = list(dict.fromkeys(layer for point in points for layer in point.layers))
    xs = _on(run, [p.step for p in points], x)
    return layers if xs else [], xs, [[p.layers.get(layer, math.nan) for p in points] for layer in layers]


def change_of(values):
    """
    A layer's values as powers of two of its first one above zero.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.curves import change_of
        >>> change_of([4.0, 8.0, 2.0, 0.0])
        [0.0, 1.0, -1.0, -4.0]
    """
    first = next((value for value in values if math.isfinite(value) and value > 0), math.nan)
    # What has collapsed to zero gets the last colour, not the one of a gap.
    return [math.nan if not math.isfinite(value) else
            max(-MOST_CHANGE, min(MOST_CHANGE, math.log2(value) - math.log2(first))) if value > 0 else -MOST_CHANGE
            for value in values]


def change_limit(rows):
    """ A symmetric limit of the colour scale: no less than 25 percent. """
    largest = max((abs(value) for row in rows for value in row if math.isfinite(value)), default=0)
    return max(0.32, largest)


def short_names(layers, most):
    """
    Names of layers to write beside a picture: long ones without what all begin with.

    Args:
        layers (List[str]): dotted names
        most (int): longest name; longer ones lose their middle

    Returns:
        List[str]: in the same order, no two alike

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.curves import short_names
        >>> short_names(['model.blocks.0.fc1', 'model.blocks.11.attention'], 10)
        ['0.fc1', '11.a\u2026tion']
        >>> short_names(['encoder.3.attention.key', 'encoder.4.attention.key', 'decoder.4.attention.key'], 13)
        ['enc.3.att.key', 'enc.4.att.key', 'dec.4.att.key']
    """
    if all(len(layer) <= most for layer in layers):
        return list(layers)
    parts = [layer.split('.') for layer in layers]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts) and len(parts) > 1:
        shared += 1
    parts = [p[shared:] for p in parts]
    if any(len('.'.join(p)) > most for p in parts):
        # Numbers tell layers apart, words hardly.
        parts = [[*(part if part.isdigit() else part[:3] for part in p[:-1]), p[-1]] for p in parts]
    names = [readable('.'.join(p), most) for p in parts]
    # What has lost its difference all the same is numbered.
    return [f'{name} {names[:i].count(name) + 1}' if names.count(name) > 1 else name for i, name in enumerate(names)]
