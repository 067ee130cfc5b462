"""
The message at fit start: what is watched, and what is not and why.
"""
from collections import Counter

from .sources.activations.modules import fused_modules
from .sources.weights import weights_of, why_not_a_weight

_SHOWN = 6  # reasons; a large model may have hundreds


def describe(model, metrics, schedules, wants, looks, reason):
    """
    One message on what is measured.

    Args:
        model (torch.nn.Module):
        metrics (Dict[str, Metric]): those that are measured
        schedules (Dict[str, Schedule]): of each metric
        wants (Callable[[str], bool]): of the name of a layer
        looks (str): where activations are seen and how many examples, for the reader
        reason (str | None): why activations are not, or not quite, seen

    Returns:
        str: a line

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.message import describe
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.schedule import Schedule
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> _ = model[1].requires_grad_(False)
        >>> metrics, schedules = {'erank': METRICS['erank']}, {'erank': Schedule('epoch')}
        >>> describe(model, metrics, schedules, lambda layer: True, '', None)
        'PlasticityMonitor: erank (every epoch); 1 weight. Not watched: 1 weight: frozen'
    """
    weights = weights_of(model)
    wanted = sum(map(wants, weights))
    sees = any(metric.sees_activations for metric in metrics.values())
    watched = ', '.join(f'{name} ({_every(schedule)})' for name, schedule in schedules.items())
    parts = [watched or 'nothing', _count(wanted), *([f'activations in {looks}'] if sees else [])]
    whys = Counter(why_not_a_weight(param) for param in model.parameters())
    without = [f'{_count(count)}: {why}' for why, count in whys.items() if why not in (None, 'biases and scales')]
    if sees:
        without += [f'activations inside {path}: {why}' for path, why in fused_modules(model).items()]
    if reason:
        without.append(reason)
    if wanted < len(weights):
        without.append(f'{_count(len(weights) - wanted)}: outside of `layers`')
    if len(without) > _SHOWN:
        without[_SHOWN:] = [f'and {len(without) - _SHOWN} more']
    return f'PlasticityMonitor: {"; ".join(parts)}' + (f'. Not watched: {"; ".join(without)}' if without else '')


def why_missing(metrics, has_stepped, has_looked):
    """
    One message on what was never measured.

    Args:
        metrics (List[Metric]): at least one
        has_stepped (bool): whether any optimizer step was made
        has_looked (bool): whether there was a look for activations

    Returns:
        str: a line

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.message import why_missing
        >>> why_missing([METRICS['dead_units']], has_stepped=True, has_looked=False)
        'PlasticityMonitor: asked for and never measured: dead_units (no validation ran)'
    """
    whys = {}
    for metric in metrics:
        whys.setdefault(_why(metric, has_stepped, has_looked), []).append(metric.name)
    said = '; '.join(f'{", ".join(names)} ({why})' for why, names in whys.items())
    return f'PlasticityMonitor: asked for and never measured: {said}'


def _why(metric, has_stepped, has_looked):
    if not has_stepped:
        return 'no optimizer step was made'
    if metric.sees_activations:
        return 'no activation of a watched layer was seen' if has_looked else 'no validation ran'
    if set(metric.sources) == {'weights'}:
        return 'there was none of the watched weights'
    return ('no optimizer stepped with a gradient of a watched weight at a step at which it was due, or nobody could '
            'know before that the step would be the last')


def _every(schedule):
    if schedule.steps:
        return 'every step' if schedule.steps == 1 else f'every {schedule.steps} steps'
    return f'every {schedule.interval}'


def _count(weights):
    return '1 weight' if weights == 1 else f'{weights} weights'
