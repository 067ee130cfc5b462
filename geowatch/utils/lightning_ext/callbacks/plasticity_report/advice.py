"""
What the grid says in words: the best, where too much and too little begin, what to try next and how.
"""
import dataclasses
import math
import shlex

from .grid import WEAK, cell_value, is_number, majority, setting_text
from .settings import COMMON_SETTINGS, find_key, read_settings
from .verdicts import larger_batch


@dataclasses.dataclass
class Advice:
    """
    Attributes:
        text (str): a sentence
        commands (List[str]): that do it, to paste into a shell
    """
    text: str
    commands: list = dataclasses.field(default_factory=list)


def advise(table, grid):
    """
    Read the grid.

    Args:
        table (Table): of the runs
        grid (Grid): of the same

    Returns:
        List[Advice]: the most important first
    """
    found = []
    for facet in grid.facets:
        own = [_best(table, grid, facet), *_bounds(table, grid, facet), *_next(table, grid, facet)]
        if facet.label:
            # One of several grids: what it says is read as one.
            own = [Advice(f'{facet.label}: {" ".join(advice.text for advice in own)}',
                          [line for advice in own for line in advice.commands])]
        found += own
    if grid.merged:
        found.append(Advice(f'Each cell is the mean over all runs in it, whatever their {_and(grid.merged)}.'))
    text = larger_batch(table.runs)
    return found + ([Advice(text)] if text else [])


def _best(table, grid, facet):
    if facet.best is None:
        return Advice('No run of the grid learns: all of them broke.')
    runs = facet.cells[facet.best]
    row, column = facet.best
    places = zip(grid.titles, (grid.columns[column], grid.rows[row]), strict=True)
    place = ', '.join(f'{title} {setting_text(value)}' for title, value in places if title)
    judged = next((q for q in grid.quantities if q.better and q.title == table.under), None)
    value = f' with {judged.title} {judged.text(cell_value(judged, runs))}' if judged else ''
    several = f' (mean of {len(runs)} runs)' if len(runs) > 1 else ''
    word = majority(table, runs)
    count = sum(table.verdicts[i].word == word for i in runs)
    how = 'it is' if count == len(runs) else f'{count} of {len(runs)} {"is" if count == 1 else "are"}'
    return Advice(f'Best: {place}{value}{several}.' + (f' Yet even there {how} {word}.' if word in WEAK else ''))


def _bounds(table, grid, facet):
    """ Where too high and too low begin, as verdicts have it: from one end of the grid on. """
    if not all(map(is_number, grid.columns)) or not any(verdict.word for verdict in table.verdicts):
        return
    verdicts = {}
    for (row, column), runs in facet.cells.items():
        rates = [table.verdicts[i].rate for i in runs]
        verdicts.setdefault(row, {})[column] = max(rates, key=rates.count)
    for end, where in (('high', 'from {} on'), ('low', 'up to {}')):
        places = {}
        for row, own in sorted(verdicts.items()):
            column = _reach(sorted(own.items(), reverse=end == 'high'), f'too {end}')
            places.setdefault(column, []).append(setting_text(grid.rows[row]))
        texts = [where.format(setting_text(grid.columns[column])) for column in places if column is not None]
        if len(places) > 1:
            rows = [own for column, own in places.items() if column is not None]
            texts = [f'{text} at {"" if k else grid.titles[1] + " "}{_and(own)}'
                     for k, (text, own) in enumerate(zip(texts, rows, strict=True))]
        x = grid.titles[0]
        yield Advice(f'{x[:1].upper()}{x[1:]} too {end}: {", ".join(texts)}.' if texts else
                     f'No {x} of these is too {end}.')


def _reach(cells, rate):
    """ The last of the columns, from one end, up to which all verdicts say this of the learning rate. """
    reached = None
    for column, own in cells:
        if own != rate:
            break
        reached = column
    return reached


def _next(table, grid, facet):
    """ Beyond the edge that the best lies at, else between it and its neighbours. """
    row, column = facet.best or (min(row for row, _ in facet.cells), 0)
    runs = facet.cells.get((row, column)) or next(iter(facet.cells.values()))
    x, y = grid.titles
    tries, at_edge, numbers = [], [], False
    for title, values, k, way in ((x, grid.columns, column, _beside), (y, grid.rows, row, _twice)):
        if len(values) > 1 and all(is_number(value) and value > 0 for value in values):
            numbers = True
            if facet.best is None:
                tries += [(title, values[0] / 10)] if title == x and values[0] > 1e-300 else []
                continue
            edge = {0: 'lowest', len(values) - 1: 'highest'}.get(k)
            at_edge += [f'the {edge} {title}'] if edge else []
            tries += [(title, value) for value in way(values, k)]
    if numbers and facet.best is not None:
        where = f'at the edge of the grid: it has {_and(at_edge)}' if at_edge else 'inside the grid'
        yield Advice(f'The best lies {where}.')
    if tries:
        here = {x: grid.columns[column]} | ({y: grid.rows[row]} if y else {})
        texts = [f'{title} {setting_text(value)}' for title, value in tries]
        commands = [command(table.runs[runs[0]], {**here, title: value}) for title, value in tries]
        yield Advice(f'Try next, with all else as there: {_and(texts, "or")}.', [line for line in commands if line])


def _beside(values, k):
    """
    Two values to try around one, or one beyond the end, by the steps of the grid.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.advice import _beside
        >>> _beside([0.01, 0.1, 1.0], 1), _beside([0.01, 0.1, 1.0], 2)
        ([0.03, 0.3], [10.0])
    """
    logs = list(map(math.log, values))
    if k in (0, len(values) - 1):
        found = [2 * logs[k] - logs[1 if k == 0 else -2]]
    else:
        found = [(logs[k] + other) / 2 for other in (logs[k - 1], logs[k + 1])]
    return [_handy(math.exp(x), values) for x in found if abs(x) < 690]  # as floats hold


def _twice(values, k):
    """ Of a batch: twice or half of it beyond the end, in whole numbers, and nothing in between. """
    ends = ([values[k] / 2] if k == 0 else []) + ([values[k] * 2] if k == len(values) - 1 else [])
    whole = all(float(value).is_integer() for value in values)
    return [int(value) if whole else value for value in ends if 0 < value < math.inf and (value >= 1 or not whole)]


def _handy(value, taken):
    """ A number near it that people write, unless it is among some. """
    power = 10. ** math.floor(math.log10(value))
    near = min((float(f'{digit * power:.1g}') for digit in (1, 2, 3, 5, 7, 10)), key=lambda x: abs(math.log(x / value)))
    return float(f'{value:.3g}') if near in taken else near


def _and(texts, word='and'):
    texts = list(map(str, texts))
    return texts[0] if len(texts) == 1 else f'{", ".join(texts[:-1])} {word} {texts[-1]}'


def command(run, changes):
    """
    The command that trains like a run, with other settings.

    Args:
        run (Run): whose log folder has the config.yaml of its command line
        changes (Dict[str, object]): title of a setting to its value

    Returns:
        str: one line for a POSIX shell, nothing where it is not known how the run was started

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.advice import command
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import Run
        >>> import ubelt as ub
        >>> dpath = ub.Path.appdir('geowatch/tests/command').ensuredir()
        >>> _ = (dpath / 'config.yaml').write_text('{model: {class_path: geowatch.tasks.A}, optimizer: {lr: 0.1}}')
        >>> command(Run([dpath], {}, {}, []), {'learning rate': 0.03}).replace(str(dpath), 'run')
        'geowatch fit --config=run/config.yaml --optimizer.lr=0.03'
    """
    config = run.folders[-1] / 'config.yaml'
    # Not of hparams.yaml too: what a network calls its settings is no flag.
    settings, _ = read_settings(config.parent, (config.name,))
    keys = [find_key(settings, COMMON_SETTINGS.get(title, (title,))) for title in changes]
    flags = [f'--{key}={setting_text(value)}' for key, value in zip(keys, changes.values(), strict=True)]
    line = shlex.join(['geowatch', 'fit', f'--config={config}', *flags])
    known = str(settings.get('model.class_path', '')).startswith('geowatch.') and all(keys)
    return line if known and line.isprintable() else ''
