"""
What the loggers of a run wrote beside the measurements: losses and accuracies.
"""
import csv
import re

from .foreign import readable, whole
from .runs import ReportError

# Words in names of scalars. An abbreviation stands alone: `mae` is an error, and `maes` is none.
LOSSES = frozenset('loss losses error err mse rmse rmsle mae mape smape wape mase crps nll nelbo bce ce perplexity ppl '
                   'bpd bpc wer cer eer ade fde fid lpips kl brier ece huber cost regret divergence distance'.split())
SCORES = frozenset('acc accuracy acc1 acc5 top1 top5 f1 fbeta auc auroc auprc ap map map50 iou miou jaccard dice r2 '
                   'precision recall sensitivity specificity kappa mcc ndcg mrr bleu rouge psnr ssim reward return '
                   'score elbo pearson spearman nmi ari pck meteor cider'.split())
OF_TRAINING = frozenset('train training total batch running mean avg epoch step'.split())
VALIDATION = frozenset('val valid validation dev eval evaluation test'.split())


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
    The scalar to draw under each metric, and to judge runs by.

    Args:
        runs (List[Run]): with their scalars
        wanted (str): a name, 'auto' for one of validation where there is one and else for the training loss, 'none'

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
    return score_name(runs) or next((name for name in names if 'acc' in name.lower()), None)


def direction(name):
    """
    Whether a scalar is better when it is larger, as its name says.

    Args:
        name (str): as it was logged

    Returns:
        int: 1 for an accuracy, -1 for a loss, 0 where the name does not tell

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.scalars import direction
        >>> direction('val/top1_acc'), direction('valLoss'), direction('error_of_map'), direction('lr')
        (1, -1, -1, 0)
    """
    # Of mIoU the capitals are no beginnings of words.
    words = _words_of(name) | _words_of(name.lower())
    # The loss of an accuracy is a loss.
    return -1 if words & LOSSES else 1 if words & SCORES else 0


def _words_of(name):
    """ Of val/loss as of valLoss. """
    return set(re.findall(r'[a-z]+\d*', re.sub(r'([a-z\d])([A-Z])', r'\1_\2', name).lower()))


def is_validation(name):
    """
    Whether a scalar is of validation, as its name says.

    Args:
        name (str): as it was logged

    Returns:
        bool:
    """
    return bool(_words_of(name) & VALIDATION)


def score_name(runs):
    """
    The scalar that runs are judged by: what was measured in validation, a score before a loss; or a training loss.

    Args:
        runs (List[Run]): with their scalars

    Returns:
        str | None: a name that at least one run has, None where there is neither
    """
    names = list(dict.fromkeys(name for run in runs for name in run.scalars))
    validated = [name for name in names if direction(name) and is_validation(name)]
    # An accuracy is what most want, and what comes as the mean of an epoch before what comes of a step.
    validated.sort(key=lambda name: (-direction(name), 'acc' not in name.lower(), name.endswith('_step')))
    return next(iter(validated), None) or loss_name(runs)


def loss_name(runs):
    """
    The loss as a whole: of training, or else of validation.

    Args:
        runs (List[Run]): with their scalars

    Returns:
        str | None: a name that at least one run has, None where there is none
    """
    names = dict.fromkeys(name for run in runs for name in run.scalars)
    # One term of several, such as that of a discriminator, may go up where all is well.
    losses = [name for name in names if direction(name) < 0 and not _words_of(name) - LOSSES - OF_TRAINING - VALIDATION]
    return min(losses, key=lambda name: (is_validation(name), 'loss' not in name.lower()), default=None)


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
