"""
The message at fit start: what is watched, and what is not and why.
"""
from .sources.activations.modules import fused_modules
from .sources.weights import SMALL, Weight, walk, wanted

_SHOWN = 6  # reasons; a large model may have hundreds
_NAMED = 3  # modules of one reason


def describe(contents, metrics, schedules, wants, looks, reason):
    """
    One message on what is measured.

    Args:
        contents (Contents): of the model
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
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> _ = model[1].requires_grad_(False)
        >>> metrics, schedules = {'erank': METRICS['erank']}, {'erank': Schedule('epoch')}
        >>> describe(Contents(model), metrics, schedules, lambda layer: True, '', None)
        'PlasticityMonitor: erank (every epoch); 1 weight. Not watched: 1 weight: frozen (1)'
    """
    found = list(walk(contents))
    weights = {layer: weight for layer, weight, why in found if why is None}
    asked = len(wanted(weights, wants))
    sees = any(metric.sees_activations for metric in metrics.values())
    watched = ', '.join(f'{name} ({_every(schedule)})' for name, schedule in schedules.items())
    said = [watched or 'nothing', _count(asked), *([f'activations in {looks}'] if sees else [])]
    whys = {}
    for layer, _, why in found:
        if why not in (None, SMALL):
            whys.setdefault(why, []).append(layer)
    without = [f'{_count(len(layers))}: {why} ({_some(_roots(layers, weights))})' for why, layers in whys.items()]
    mixed = sum(weight.parameter is None for weight in weights.values() if isinstance(weight, Weight))
    if mixed and any({'gradients', 'pieces'} & set(metric.sources) for metric in metrics.values()):
        without.append(f'{_count(mixed)}: no gradient, as several parameters make it')
    if sees:
        without += grouped(fused_modules(contents.model))
    if reason:
        without.append(reason)
    if asked < len(weights):
        without.append(f'{_count(len(weights) - asked)}: outside of `layers`')
    if len(without) > _SHOWN:
        without[_SHOWN:] = [f'and {len(without) - _SHOWN} more']
    return f'PlasticityMonitor: {"; ".join(said)}' + (f'. Not watched: {"; ".join(without)}' if without else '')


def grouped(reasons):
    """
    Modules whose activations are not seen, by the reason.

    Args:
        reasons (Dict[str, str]): by the path of a module

    Returns:
        List[str]: a text for each reason

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.message import grouped
        >>> grouped({'a': 'LSTM is one fused kernel', 'b': 'LSTM is one fused kernel'})
        ['activations inside a, b: LSTM is one fused kernel']
    """
    paths = {}
    for path, why in reasons.items():
        paths.setdefault(why, []).append(path or 'the step')
    return [f'activations inside {_some(own)}: {why}' for why, own in paths.items()]


def _roots(layers, weights):
    """ The largest modules that hold some layers and no weight that is measured, such as a teacher. """
    roots = {}
    for layer in layers:
        parts = layer.split('.')
        root = next((root for root in ('.'.join(parts[:i]) for i in range(1, len(parts)))
                     if not any(name == root or name.startswith(f'{root}.') for name in weights)), layer)
        roots[root] = None
    return list(roots)


def _some(names):
    return ', '.join(names[:_NAMED]) + (f' and {len(names) - _NAMED} more' if len(names) > _NAMED else '')


def why_missing(metrics, has_stepped, why_not_seen, why_not=lambda metric: None):
    """
    One message on what was never measured.

    Args:
        metrics (List[Metric]): at least one
        has_stepped (bool): whether any optimizer step was made
        why_not_seen (str | None): why there were no activations to measure
        why_not (Callable[[Metric], str | None]): what the sources of a metric say themselves

    Returns:
        str: a line

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.message import why_missing
        >>> why_missing([METRICS['dead_units']], True, 'no validation ran')
        'PlasticityMonitor: asked for and never measured: dead_units (no validation ran)'
    """
    whys = {}
    for metric in metrics:
        whys.setdefault(why_not(metric) or _why(metric, has_stepped, why_not_seen), []).append(metric.name)
    said = '; '.join(f'{", ".join(names)} ({why})' for why, names in whys.items())
    return f'PlasticityMonitor: asked for and never measured: {said}'


def _why(metric, has_stepped, why_not_seen):
    if not has_stepped:
        return 'no optimizer step was made'
    if metric.sees_activations:
        return why_not_seen or 'no activation of a watched layer was seen'
    if set(metric.sources) == {'weights'}:
        return 'there was none of the watched weights'
    return ('no optimizer stepped with a finite gradient of a watched weight at a step at which it was due, or nobody '
            'could know before that the step would be the last')


def _every(schedule):
    if schedule.steps:
        return 'every step' if schedule.steps == 1 else f'every {schedule.steps} steps'
    return f'every {schedule.interval}'


def _count(weights):
    return '1 weight' if weights == 1 else f'{weights} weights'
