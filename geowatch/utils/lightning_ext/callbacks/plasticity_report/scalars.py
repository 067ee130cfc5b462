"""
What the loggers of a run wrote beside the measurements: losses and accuracies.
"""
import csv

from .foreign import readable, whole
from .runs import ReportError


def load_scalars(run):
    """
    Fill ``run.scalars`` from TensorBoard event files and metrics.csv.

    Args:
        run (Run): as load_runs returns it; its notes say what could not be read
    """
    for folder in run.folders:
        parts = [_read_csv(fpath, run.notes) for fpath in _near(folder, 'metrics.csv')]
        parts += [_read_events(path, run.notes)
                  for path in sorted({fpath.parent for fpath in _near(folder, 'events.out.tfevents.*')})]
        for scalars in parts:
            for name, values in scalars.items():
                # As in _join: what comes later stands for what came before.
                own = run.scalars.setdefault(name, {})
                for step in [s for s in own if s >= min(values)]:
                    del own[step]
                own.update(values)
    run.scalars = {name: dict(sorted(values.items())) for name, values in run.scalars.items()}


def _near(folder, pattern):
    """ In the log folder itself, or else below it: a second logger has a folder of its own. """
    return (sorted(fpath for fpath in folder.glob(pattern) if fpath.is_file())
            or sorted(fpath for fpath in folder.rglob(pattern) if fpath.is_file()))


def _wanted(name):
    return name not in ('epoch', 'step', 'hp_metric') and not name.startswith(('plasticity/', 'plasticity_layers/'))


def _read_events(folder, notes):
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        notes.append('tensorboard is not installed, so that its event files are not read')
        return {}
    try:
        events = EventAccumulator(str(folder), size_guidance={'scalars': 0})
        events.Reload()
        return {readable(name): {event.step: event.value for event in events.Scalars(name)}
                for name in events.Tags()['scalars'] if _wanted(name)}
    except Exception as ex:
        notes.append(f'the TensorBoard files could not be read ({type(ex).__name__})')
        return {}


def _read_csv(fpath, notes):
    scalars = {}
    try:
        with open(fpath, encoding='utf-8', errors='replace', newline='') as file:
            for row in csv.DictReader(line.replace('\0', '') for line in file):
                try:
                    step = whole(row['step'], least=-1)
                    numbers = {name: float(text) for name, text in row.items() if name and text and _wanted(name)}
                except (KeyError, ValueError, TypeError):
                    continue
                for name, value in numbers.items():
                    scalars.setdefault(readable(name), {})[step] = value
    except (OSError, csv.Error) as ex:
        notes.append(f'the rest of {fpath.name} could not be read ({ex}) and is left out')
    return scalars


def choose_under(runs, wanted):
    """
    The scalar to draw under each metric.

    Args:
        runs (List[Run]): with their scalars
        wanted (str): a name, 'auto' for a loss where there is one, 'none'

    Returns:
        str | None: a name that at least one run has

    Raises:
        ReportError: if a name was asked for that no run has
    """
    names = list(dict.fromkeys(name for run in runs for name in run.scalars))
    if wanted == 'none':
        return None
    if wanted != 'auto':
        if not any(find_scalar(run, wanted) for run in runs):
            raise ReportError(f'--under={wanted}: no run has it. There is: {", ".join(sorted(names)) or "nothing"}')
        return wanted
    likely = ['train_loss', 'loss', 'train/loss', 'val_loss', 'val/loss', 'train_acc', 'val_acc']
    likely += [name for name in names if 'loss' in name.lower()] + [name for name in names if 'acc' in name.lower()]
    return next((name for name in likely if any(find_scalar(run, name) for run in runs)), None)


def find_scalar(run, name):
    """
    A scalar by the name that it was logged with, or with Lightning's suffixes.

    Args:
        run (Run): with its scalars
        name (str): as in ``self.log(name, ...)``

    Returns:
        Dict[int, float] | None: step to value
    """
    return next((run.scalars[key] for key in (name, f'{name}_step', f'{name}_epoch') if key in run.scalars), None)
