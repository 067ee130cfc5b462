"""
Measurements as pandas DataFrames, for Python and notebooks.
"""
import os
import warnings

from .runs import MEASUREMENTS, ReportError, Run, load_run, load_runs
from .scalars import load_scalars
from .settings import compared_settings
from .words import in_order

MEASURED = ('run', 'folder', 'metric', 'layer', 'step', 'epoch', 'time', 'value', 'samples')
PLACES = ('run', 'folder', 'step', 'epoch', 'time')
# Whole numbers that can be missing, and columns that must have a type where there is no row.
TYPES = {'step': 'int64', 'epoch': 'Int64', 'samples': 'Int64', 'time': 'float64', 'value': 'float64'}


def load(runs, wide=False):
    """
    The measurements of runs as a table.

    Args:
        runs (str | PathLike | List[str | PathLike]): run folders, log folders or globs, as the report takes them
        wide (bool): one row per run and step, not one per measurement

    Returns:
        pandas.DataFrame: in long form the columns run, folder, metric, layer ('' for the network), step (-1 for the
            untrained network), epoch, time (seconds since 1970), value, samples; in wide form run, folder, step, epoch,
            time, one column per metric (of the network) and one per scalar of the loggers. In both then the settings:
            learning rate, batch size and optimizer where they are known, and all others in which the runs differ. What
            is not finite or not known is missing.

    Raises:
        ReportError: if nothing was measured in any of the folders
        ImportError: without pandas

    Example:
        >>> # xdoctest: +REQUIRES(module:pandas)
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report import load
        >>> import ubelt as ub
        >>> dpath = ub.Path.appdir('geowatch/tests/frames').delete().ensuredir()
        >>> line = '{"metric": "erank", "step": 9, "epoch": 0, "value": 4.0, "layers": {"fc": {"value": 4.0}}}'
        >>> _ = (dpath / 'plasticity.jsonl').write_text(line)
        >>> load(dpath)[['metric', 'layer', 'step', 'value']].values.tolist()
        [['erank', '', 9, 4.0], ['erank', 'fc', 9, 4.0]]
        >>> load(dpath, wide=True)[['step', 'erank']].values.tolist()
        [[9.0, 4.0]]
    """
    import_pandas()
    found = read(runs)
    return wide_frame(found) if wide else long_frame(found)


def read(runs):
    """
    Runs with what their loggers wrote; a warning names each folder that holds none.

    Args:
        runs (str | PathLike | List[str | PathLike]): folders or globs

    Returns:
        List[Run]: one at least

    Raises:
        ReportError: if there is none
    """
    found, missing = load_runs([runs] if isinstance(runs, (str, os.PathLike)) else list(runs))
    if not found:
        raise ReportError('\n'.join(missing) or 'Expected the folder of a run, or several, but got none')
    for line in missing:
        warnings.warn(line, stacklevel=3)
    for run in found:
        load_scalars(run)
    return found


def history(folder, run, metrics):
    """
    What a monitor has measured in a fit.

    Args:
        folder (Path | None): where its file is, if there is one
        run (str): which of the runs in that file
        metrics (Dict[str, List[Point]]): the outline that is kept in memory, for where there is no file

    Returns:
        pandas.DataFrame: in long form, as of :func:`load`
    """
    import_pandas()
    if not metrics:
        return long_frame([])
    found = load_run(folder, run) if folder and (folder / MEASUREMENTS).is_file() else None
    return long_frame([found or Run([], metrics, {}, [])])


def long_frame(runs):
    """ One row per measurement, of the network and of each layer. """
    columns = {name: [] for name in MEASURED}
    settings, lengths = _settings(runs, MEASURED), []
    for run in runs:
        before, folder = len(columns['value']), _folder(run)
        for metric in in_order([run]):
            for point in run.metrics[metric]:
                for layer, value in (('', point.value), *point.layers.items()):
                    row = (run.name, folder, metric, layer, point.step, point.epoch, point.time, value, point.samples)
                    for column, x in zip(columns.values(), row, strict=True):
                        column.append(x)
        lengths.append(len(columns['value']) - before)
    return _frame(columns, settings, lengths)


def wide_frame(runs):
    """ One row per run and step, of the network and of the loggers. """
    names = in_order(runs)
    scalars = dict.fromkeys(name for run in runs for name in run.scalars)
    heads = dict(zip(scalars, _apart(scalars, [*PLACES, *names], 'logged'), strict=True))
    rows, lengths = [], []
    for run in runs:
        own = {}
        for name, points in run.metrics.items():
            for point in points:
                row = own.setdefault(point.step, {'epoch': point.epoch, 'time': point.time})
                row[name] = point.value
        for name, values in run.scalars.items():
            for step, value in values.items():
                own.setdefault(step, {})[heads[name]] = value
        rows += [{'run': run.name, 'folder': _folder(run), 'step': step, **own[step]} for step in sorted(own)]
        lengths.append(len(own))
    columns = {name: [row.get(name) for row in rows] for name in [*PLACES, *names, *heads.values()]}
    frame = _frame(columns, _settings(runs, columns), lengths)
    return frame.astype({name: 'float64' for name in [*names, *heads.values()]})


def _frame(columns, settings, lengths):
    """ Columns that are there for each row, and others for each run. """
    for title, values in settings.items():
        columns[title] = [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]
    frame = import_pandas().DataFrame(columns)
    return frame.astype({name: kind for name, kind in TYPES.items() if name in frame})


def _settings(runs, taken):
    """ Title to one value per run; lists, such as betas, as texts, by which pandas can group. """
    settings, _ = compared_settings(runs) if runs else ({}, 0)
    return {head: [str(value) if isinstance(value, (list, tuple)) else value for value in values]
            for head, values in zip(_apart(settings, taken, 'setting'), settings.values(), strict=True)}


def _apart(names, taken, kind):
    """ Names of columns that differ from others. """
    heads, taken = [], set(taken)
    for name in names:
        while name in taken:
            name = f'{name} ({kind})'
        taken.add(name)
        heads.append(name)
    return heads


def _folder(run):
    return str(run.folders[-1]) if run.folders else ''


def import_pandas():
    """
    Returns:
        ModuleType: pandas, which nothing but DataFrames needs

    Raises:
        ImportError: with what to do
    """
    try:
        import pandas
    except ImportError as ex:
        raise ImportError(f'Expected pandas, which DataFrames need, but it is not there: pip install pandas ({ex})'
                          ) from None
    return pandas
