"""
Reads the measurements of runs from disk, and puts runs together from their parts.

Everything here takes files as they are: of a run that still writes, that
crashed in the middle of a line, or that was resumed from an older checkpoint.
"""
import dataclasses
import glob
import json
import math
import re
from pathlib import Path

from .foreign import finite, readable, whole
from .settings import NUMBER, read_settings
from .words import METRICS, is_rank_of_features, learn

MEASUREMENTS = 'plasticity.jsonl'
# Of a run, beyond those that we know: each has its pictures.
MOST_OWN = 30
# Parts of a path that say nothing about a run.
GENERIC = re.compile(r'lightning_logs|version_\d+')


class ReportError(Exception):
    """ What the user should read as one line. """


@dataclasses.dataclass
class Point:
    """ One measurement of one metric. """
    step: int
    epoch: int | None
    value: float
    samples: int | None
    layers: dict
    time: float = math.nan


@dataclasses.dataclass
class Run:
    """
    One run, put together from its parts.

    Attributes:
        folders (List[Path]): log folders, in the order in which they were written
        metrics (Dict[str, List[Point]]): measurements by metric, in order of steps
        scalars (Dict[str, Dict[int, float]]): what its loggers hold, name to step to value
        settings (Dict[str, object]): from config.yaml and hparams.yaml, flat
        notes (List[str]): what was odd about its files
        name (str): unique among the runs of a report
        small_start (Dict[str, Point]): ranks of the untrained network on few examples: the true ones are higher
    """
    folders: list
    metrics: dict
    settings: dict
    notes: list
    scalars: dict = dataclasses.field(default_factory=dict)
    name: str = ''
    small_start: dict = dataclasses.field(default_factory=dict)

    @property
    def last_step(self):
        return max(points[-1].step for points in self.metrics.values())

    @property
    def epochs(self):
        """ The epochs that were measured, first and last, or None. """
        known = [p.epoch for points in self.metrics.values() for p in points if p.epoch is not None]
        return (min(known), max(known)) if known else None

    @property
    def steps_per_epoch(self):
        """ Exact where the last step of any epoch was measured, None where no line names an epoch. """
        return max(((p.step + 1) / (p.epoch + 1) for points in self.metrics.values()
                    for p in points if p.epoch is not None), default=None)

    def to_epochs(self, steps):
        """ Steps as epochs gone by, or None where that is not known. """
        per_epoch = self.steps_per_epoch
        return per_epoch and [(step + 1) / per_epoch for step in steps]


def load_runs(patterns):
    """
    Read all runs under some folders.

    Args:
        patterns (List[str]): run folders, log folders or globs

    Returns:
        Tuple[List[Run], List[str]]: the runs, and a line on each pattern that gives none

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import load_runs
        >>> import ubelt as ub
        >>> dpath = ub.Path.appdir('geowatch/tests/load_runs').delete().ensuredir()
        >>> for name in 'ab':
        >>>     line = '{"metric": "erank", "step": 9, "epoch": 0, "value": 4.0, "layers": {}}'
        >>>     ((dpath / name).ensuredir() / 'plasticity.jsonl').write_text(line)
        >>> runs, missing = load_runs([dpath / '*', dpath / 'c'])
        >>> [run.name for run in runs], len(missing)
        (['a', 'b'], 1)
    """
    parts, missing = {}, []
    for pattern in map(str, patterns):
        path = Path(pattern).expanduser()
        found = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
        folders = sorted({folder.resolve() for match in found for folder in _log_folders(match)}, key=_natural)
        for folder in folders:
            if folder not in parts:
                try:
                    parts[folder] = _load_parts(folder)
                except OSError as ex:
                    parts[folder] = []
                    missing.append(f'{folder / MEASUREMENTS}: it could not be read ({ex.strerror}) and is left out')
        if not found:
            missing.append(f'{pattern}: no such file or folder')
        elif not folders:
            missing.append(f'{pattern}: no {MEASUREMENTS} in it. Was PlasticityMonitor among the callbacks?')
        elif not any(parts[folder] for folder in folders):
            missing.append(f'{pattern}: {MEASUREMENTS} holds no measurement yet')
    runs, of_id = [], {}
    for part in (part for own in parts.values() for part in own):
        if part.run in of_id:
            of_id[part.run].append(part)
            continue
        if runs and _goes_on(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
        if part.run is not None:
            of_id[part.run] = runs[-1]
    runs = [_join(parts) for parts in runs]
    for run, name in zip(runs, _names([run.folders[0] for run in runs]), strict=True):
        run.name = readable(name)
    return runs, missing


def load_run(folder, run):
    """
    Read what one folder has of one run.

    Args:
        folder (Path): with a file of measurements
        run (str): as its lines say

    Returns:
        Run | None: None where it has none
    """
    part = next((part for part in _load_parts(folder) if part.run == run), None)
    return part and dataclasses.replace(_join([part]), name=readable(folder.name))


def _log_folders(path):
    if path.is_file():
        return [path.parent] if path.name == MEASUREMENTS else []
    return [fpath.parent for fpath in path.rglob(MEASUREMENTS) if fpath.is_file()]


def _natural(path):
    """ version_10 comes after version_9, lr0.1 after lr0.02, and lr1e-05 before both. """
    parts = re.split(f'({NUMBER})', str(path))
    return [float(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


# --- measurements ---------------------------------------------------------


@dataclasses.dataclass
class _Part:
    folder: Path
    run: str | None  # as its lines say, None where they are older
    rows: list
    settings: dict
    notes: list

    @property
    def first_epoch(self):
        return min((row['epoch'] for row in self.rows if row['epoch'] is not None), default=0)


def _load_parts(folder):
    """ What a folder has of each run that has written there. """
    rows, notes = _read_measurements(folder / MEASUREMENTS)
    if not rows:
        return []
    settings, odd = read_settings(folder)
    parts = [_Part(folder, run, own, settings, notes + odd) for run, own in _by_run(rows)]
    if len(parts) > 1:
        for part in parts:
            part.notes = [*part.notes, f'{len(parts)} runs have written to one {MEASUREMENTS}: settings and losses '
                                       'beside it may be of another of them']
    return parts


def _by_run(rows):
    """
    Rows of one file by the runs that they are of.

    Older lines do not say it. Among these another run begins where a metric
    begins again at the very first step, as in no run that goes on.
    """
    runs, old, metrics, first, last = {}, 0, set(), math.inf, -math.inf
    for row in rows:
        run = row.pop('run')
        if run is None:
            if row['metric'] in metrics and row['step'] <= first < last:
                old, metrics, first, last = old + 1, set(), math.inf, -math.inf
            metrics.add(row['metric'])
            first, last = min(first, row['step']), max(last, row['step'])
        runs.setdefault((run, old if run is None else None), []).append(row)
    return [(run, own) for (run, _), own in runs.items()]


def _read_measurements(fpath):
    rows, bad, notes = [], [], []
    number, line = 0, ''
    with open(fpath, encoding='utf-8', errors='replace', newline='\n') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = _checked(json.loads(line))
                # Of lines that are nested too deep for the parser, too.
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    bad.append(number)
                else:
                    rows += [row] if row else []
    # A complete line ends in a newline, so that a half-written one can only be the last.
    if bad and bad[-1] == number and not line.endswith('\n'):
        bad.pop()
        notes.append('the last line is half-written: the run was going on, or was killed')
    if bad:
        some = ', '.join(map(str, bad[:3])) + (', ...' if len(bad) > 3 else '')
        notes.append(f'unreadable lines in {fpath.name} are left out: {some} ({len(bad)} in all)')
    return rows, notes


def _checked(row):
    """ The fields of a line in their types, or None for a line about something else. """
    if not isinstance(row, dict):
        raise TypeError
    if 'metric' not in row:
        return None
    metric, epoch, samples = readable(str(row['metric'])), row.get('epoch'), row.get('samples')
    checked = {
        'metric': metric, 'run': row.get('run') and readable(str(row['run'])),
        'step': whole(row['step'], least=-1),  # of the untrained network
        'epoch': None if epoch is None else whole(epoch),
        'samples': None if samples is None else whole(samples),
        'value': finite(row['value']), 'time': finite(row.get('time')),
        'layers': {readable(name): finite(layer['value']) for name, layer in (row.get('layers') or {}).items()
                   if 'value' in layer},
    }
    if isinstance(row.get('words'), dict):
        learn(metric, row['words'])
    return checked


def _goes_on(before, part):
    """ Is this the log folder that Lightning made when the run before was resumed? """
    return (part.folder != before.folder and part.folder.parent == before.folder.parent
            and part.first_epoch > before.first_epoch and part.settings == before.settings)


def _join(parts):
    notes = [note for part in parts for note in part.notes]
    if len(parts) > 1:
        notes.append(f'put together from {len(parts)} log folders: ' + ', '.join(p.folder.name for p in parts))
    metrics, rewound = {}, []
    for row in (row for part in parts for row in part.rows):
        own = metrics.setdefault(row.pop('metric'), {})
        step = row['step']
        if own and step <= next(reversed(own)):
            # The run was resumed from before: what it had done after that did not happen.
            rewound.append(step)
            for points in metrics.values():
                while points and next(reversed(points)) > step:
                    points.popitem()
        own[step] = Point(**row)
    few = {name: points.pop(-1) for name, points in sorted(metrics.items()) if _has_small_start(name, points)}
    if few:
        notes.append(f'{", ".join(few)} of the untrained network had far fewer examples than later, so that it is '
                     'left out (num_sanity_val_steps=-1 gives it as many)')
    own = [name for name in metrics if name not in METRICS]
    if len(own) > MOST_OWN:
        notes.append(f'{len(own) - MOST_OWN} metrics of your own beyond the first {MOST_OWN} are left out')
        metrics = {name: points for name, points in metrics.items() if name not in own[MOST_OWN:]}
    if rewound:
        notes.append(f'steps begin again at {min(rewound)} (a resume?): later lines stand for earlier ones')
    if not parts[0].settings:
        notes.append('no settings found (config.yaml, or hparams.yaml of self.save_hyperparameters())')
    metrics = {name: list(points.values()) for name, points in metrics.items() if points}
    return Run([part.folder for part in parts], metrics, parts[-1].settings, notes, small_start=few)


def _has_small_start(name, points):
    """ The rank of few examples is small whatever the network is: it is no start to compare with. """
    if not is_rank_of_features(name) or len(points) < 2 or -1 not in points:
        return False
    start, later = (point.samples for point in list(points.values())[:2])
    return start and later and start < 0.5 * later


# --- names ----------------------------------------------------------------


def _names(folders):
    """ The parts of the paths that tell the runs apart, without generic ones where that is enough. """
    depth = max((len(folder.parts) for folder in folders), default=0)
    columns = [[folder.parts[i] if i < len(folder.parts) else '' for folder in folders] for i in range(depth)]
    shared = [len(set(column)) == 1 for column in columns]
    if len(set(folders)) == 1:
        telling = [part for part in folders[0].parts if not GENERIC.fullmatch(part)]
        return [telling[-1]] if len(folders) == 1 else [f'{telling[-1]} ({i})' for i in range(1, len(folders) + 1)]
    every = [[part for i, part in enumerate(folder.parts) if not shared[i]] for folder in folders]
    telling = [[part for part in parts if not GENERIC.fullmatch(part)] for parts in every]
    best = telling if all(telling) and len(set(map(tuple, telling))) == len(set(folders)) else every
    names = ['/'.join(parts) or folder.name for parts, folder in zip(best, folders, strict=True)]
    # Several runs may have written to one file.
    return [f'{name} ({names[:i].count(name) + 1})' if names.count(name) > 1 else name
            for i, name in enumerate(names)]
