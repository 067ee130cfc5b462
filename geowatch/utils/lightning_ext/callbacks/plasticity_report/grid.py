"""
Learning rate x batch size: which runs stand in which cell, what is measured there, and what that says.
"""
import collections
import dataclasses
import math

from .evidence import gather, last_level
from .foreign import readable
from .scalars import direction, find_scalar
from .words import describe

NAMED = ('learning rate', 'batch size')
SEEDS = {'seed', 'seed_everything', 'random_seed', 'random_state'}
# Grids side by side that a reader can compare, losses and accuracies to choose from.
MOST_FACETS, MOST_SCALARS = 6, 4
BROKEN, WEAK = ('diverged', 'collapsed'), ('slow', 'hardly moved')


@dataclasses.dataclass
class Quantity:
    """
    What cells are coloured by.

    Attributes:
        title (str): of the switch
        values (List[float]): one per run, nan where it has none
        text (Callable): a number in words
        better (int): 1 if more is better, -1 if less is, 0 if neither
    """
    title: str
    values: list
    text: object
    better: int = 0


@dataclasses.dataclass
class Facet:
    """
    One grid of several, in which no other setting differs.

    Attributes:
        label (str): the other settings, or nothing
        cells (Dict[Tuple[int, int], List[int]]): row and column to the runs there
        best (Tuple[int, int] | None): row and column
    """
    label: str
    cells: dict
    best: tuple | None


@dataclasses.dataclass
class Grid:
    """
    Attributes:
        titles (Tuple[str, str]): the settings along the columns and along the rows; nothing where there is one row
        columns (List[object]): values, in order
        rows (List[object]): values, in order
        facets (List[Facet]): the runs
        merged (List[str]): other settings, over which a cell is the mean
        quantities (List[Quantity]): losses and accuracies first
    """
    titles: tuple
    columns: list
    rows: list
    facets: list
    merged: list
    quantities: list


def distinct(values):
    """
    The values that there are, in order: numbers by size, then texts, then what is not there.

    Args:
        values (List[object]): of one setting

    Returns:
        List[object]: each once

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.grid import distinct
        >>> distinct([0.1, 'b', 1e-05, None, 0.1, 'a'])
        [1e-05, 0.1, 'a', 'b', None]
    """
    return sorted({str(value): value for value in values}.values(), key=lambda value: (
        value is None, not is_number(value), value if is_number(value) else 0, str(value)))


def is_number(value):
    """ Is a setting a number that has a place on an axis? """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def axes(table):
    """
    The settings that span the grid.

    Args:
        table (Table): of the runs

    Returns:
        List[str]: titles of two, or of one where only one differs: learning rate and batch size before all others
    """
    return _differing(table)[:2]


def _differing(table):
    """ Settings that group runs; a seed does not, nor a text of each run's own. """
    found, placed = [], _placed(table)
    for title, values in table.settings.items():
        own = distinct([values[i] for i in placed])
        if len(own) > 1 and title.rpartition('.')[2] not in SEEDS and (
                title in NAMED or all(map(is_number, own)) or len(own) < max(3, len(values))):
            found.append(title)
    return [title for title in NAMED if title in found] + [title for title in found if title not in NAMED]


def _placed(table):
    """ The runs that have a place on any axis: not those of which no setting is known. """
    return [i for i in range(len(table.runs)) if any(values[i] is not None for values in table.settings.values())]


def make_grid(table):
    """
    Put runs into the cells of the settings that differ.

    Args:
        table (Table): of the runs

    Returns:
        Grid | None: of one row where only one setting differs, None where none does
    """
    differing, runs = _differing(table), _placed(table)
    if not differing:
        return None
    x, y, others = differing[0], ''.join(differing[1:2]), differing[2:]
    along, down = table.settings[x], table.settings.get(y, [None] * len(table.runs))
    columns, rows = distinct([along[i] for i in runs]), distinct([down[i] for i in runs])
    labels = {i: ', '.join(f'{title} {setting_text(table.settings[title][i])}' for title in others) for i in runs}
    merged = others if len(set(labels.values())) > MOST_FACETS else []
    if merged:
        labels = dict.fromkeys(runs, '')
    facets = []
    for label in dict.fromkeys(labels.values()):
        cells = collections.defaultdict(list)
        for i in runs:
            if labels[i] == label:
                cells[rows.index(_same(rows, down[i])), columns.index(_same(columns, along[i]))].append(i)
        facets.append(Facet(label, dict(cells), _best(table, cells)))
    facets.sort(key=lambda facet: min(map(table.order.index, facet.cells.get(facet.best, runs))))
    return Grid((x, y), columns, rows, facets, merged, quantities(table))


def _same(values, value):
    """ Of the values the one that is written like this one. """
    return next(own for own in values if str(own) == str(value))


def _best(table, cells):
    """ The cell whose runs come first in the order of runs: with several seeds, on average. """
    places = {cell: sum(map(table.order.index, runs)) / len(runs) for cell, runs in cells.items()
              if majority(table, runs) not in BROKEN}
    return min(places, key=places.get, default=None)


def majority(table, runs):
    """ The verdict on a cell: that of most of its runs, of two equal counts the worse. """
    words = collections.Counter(table.verdicts[i].word for i in runs)
    return max(words, key=lambda word: (words[word], word in BROKEN, word in WEAK), default='')


def setting_text(value):
    """ A setting as a person writes it. """
    return '\u2013' if value is None else f'{value:g}' if isinstance(value, float) else readable(str(value), 40)


def number_text(value):
    """
    A number, short.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.grid import number_text
        >>> number_text(0.93451), number_text(12345.6), number_text(float('nan'))
        ('0.935', '12346', 'n/a')
    """
    if not math.isfinite(value):
        return 'n/a'
    return f'{value:.0f}' if 1000 <= abs(value) < 1e6 else f'{value:.3g}'


def time_text(seconds):
    """ So many seconds, minutes or hours. """
    if not math.isfinite(seconds):
        return 'n/a'
    unit, name = next(((unit, name) for unit, name in ((3600, 'h'), (60, 'min')) if seconds >= unit), (1, 's'))
    return f'{seconds / unit:.3g} {name}'


def quantities(table):
    """
    What the grid can show.

    Args:
        table (Table): of the runs

    Returns:
        List[Quantity]: of those that some run has: losses and accuracies, what the metrics ended at, time
    """
    runs = table.runs
    names = dict.fromkeys(name for run in runs for name in run.scalars if direction(name))
    # Of a name with the suffixes of Lightning one is enough.
    names = [name for name in names if name.removesuffix('_step').removesuffix('_epoch') == name
             or name.removesuffix('_step').removesuffix('_epoch') not in names]
    names = [*filter(None, [table.under]), *(name for name in names if name != table.under)][:MOST_SCALARS]
    found = [Quantity(name, [last_level(list((find_scalar(run, name) or {}).values())) for run in runs], number_text,
                      direction(name)) for name in names]
    found += [_over_fresh(runs, 'weight_mag', 'weights, times fresh'), _metric(runs, 'feature_erank'),
              _metric(runs, 'dead_units', -1), _metric(runs, 'update_ratio'),
              Quantity('time', [_seconds(run) for run in runs], time_text, -1)]
    return [quantity for quantity in found if any(map(math.isfinite, quantity.values))]


def _metric(runs, name, better=0):
    values = [last_level([point.value for point in run.metrics.get(name, [])]) for run in runs]
    return Quantity(describe(name).title, values, describe(name).text, better)


def _over_fresh(runs, name, title):
    starts = [one.fresh.get(name, math.nan) or math.nan for one in gather(runs)]
    values = [value / start for value, start in zip(_metric(runs, name).values, starts, strict=True)]
    return Quantity(title, values, lambda x: f'\u00d7{number_text(x)}')


def _seconds(run):
    times = [point.time for points in run.metrics.values() for point in points if math.isfinite(point.time)]
    return max(times) - min(times) if times and max(times) > min(times) else math.nan


def cell_value(quantity, runs):
    """ The mean over a cell's runs, nan where one is not finite. """
    return sum(quantity.values[i] for i in runs) / len(runs)


def limits(table, quantity):
    """
    Between which values colours change: those of runs that did not break, which would make all others alike.

    Args:
        table (Table): of the runs
        quantity (Quantity): of the grid

    Returns:
        Tuple[float, float, bool]: lowest, highest, and whether the scale is logarithmic
    """
    finite = [value for value in quantity.values if math.isfinite(value)]
    whole = [value for value, verdict in zip(quantity.values, table.verdicts, strict=True)
             if math.isfinite(value) and verdict.word not in BROKEN]
    values = (whole if len(set(whole)) > 1 else finite) or [0.]
    # An accuracy of one half stands halfway.
    log = quantity.better <= 0 and min(finite, default=0) > 0 and max(values) > 10 * min(values)
    return min(values), max(values), log


def shade(value, low, high, log):
    """
    Where a value stands on a scale of colours.

    Returns:
        float | None: from 0 to 1, None where it is not finite

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.grid import shade
        >>> shade(10., 1., 100., True), shade(7., 1., 5., False)
        (0.5, 1.0)
    """
    if not math.isfinite(value):
        return None
    if log:
        value, low, high = (math.log(max(x, 1e-300)) for x in (value, low, high))
    return min(1., max(0., (value - low) / (high - low))) if high > low else 0.5
