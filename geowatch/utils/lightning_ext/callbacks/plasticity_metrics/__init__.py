"""
What is measured: one file per metric. This file is the registry.
"""
import difflib

from ._errors import PlasticityConfigError
from ._metric import Metric, Result, column, finite_mean, ratio_of_sums
from ._saturation import register_activation
from ._spectrum import effective_rank
from .dead_units import DeadUnits
from .erank import ERank
from .feature_erank import FeatureERank
from .grad_mag import GradMag
from .weight_mag import WeightMag

__all__ = ['METRICS', 'Metric', 'PlasticityConfigError', 'Result', 'column', 'effective_rank', 'finite_mean',
           'parse_metrics', 'ratio_of_sums', 'register_activation']

METRICS = {cls.name: cls for cls in (WeightMag, GradMag, DeadUnits, ERank, FeatureERank)}


def parse_metrics(metrics):
    """
    Read a choice of metrics, each with its own interval or none.

    Args:
        metrics (str | List[str]): names separated by commas, a list of names,
            or 'all'. A name may carry an interval after an '@'.

    Returns:
        Dict[str, str | None]: name to interval

    Raises:
        PlasticityConfigError: if a name is unknown, given twice, or none is given

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import parse_metrics
        >>> parse_metrics('weight_mag@1,erank')
        {'weight_mag': '1', 'erank': None}
        >>> list(parse_metrics('all'))
        ['weight_mag', 'grad_mag', 'dead_units', 'erank', 'feature_erank']
    """
    items = metrics.split(',') if isinstance(metrics, str) else metrics
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise PlasticityConfigError(
            f'Expected `metrics` to be names separated by commas or a list of names, but got {metrics!r}')
    chosen = {}
    for item in items:
        name, at, interval = (part.strip() for part in item.partition('@'))
        if not name and not at:
            continue
        if name == 'all':
            names = list(METRICS)
        elif name in METRICS:
            names = [name]
        else:
            nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)
            raise PlasticityConfigError(
                f'Unknown plasticity metric {name!r}. Did you mean {nearest[0]!r}? '
                f'Expected any of: {", ".join(METRICS)}, or all')
        for name in names:
            if name in chosen and len(names) == 1:
                raise PlasticityConfigError(f'Plasticity metric {name!r} is given twice in {metrics!r}')
            chosen[name] = interval if at else chosen.get(name)
    if not chosen:
        raise PlasticityConfigError(
            f'Expected at least one plasticity metric of: {", ".join(METRICS)}, or all, but got {metrics!r}')
    return chosen
