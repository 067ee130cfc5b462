"""
What the report says about each metric: its words come from the registry, those of a user's own from its run.
"""
import dataclasses
import math

from ..plasticity_metrics import METRICS, Words, members
from .foreign import finite, readable

CAVEAT = (
    'These numbers are correlates of a lost ability to learn, neither its cause nor a proof. A verdict compares a run '
    'with the untrained network, the other runs and the loss; what else is named here is worth a look, and no more.')
# The five panels of the picture of all: what the paper records.
PANELS = tuple(name for name in members('paper') if METRICS[name].along is None)
_LEARNED = {}  # words of metrics that runs have brought along


def learn(metric, words):
    """
    Take words that stand beside the first line of a metric, so that a user's own is judged like ours.

    Args:
        metric (str): its name
        words (dict): as in plasticity.jsonl; what is odd in it is left out

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.words import describe, learn
        >>> learn('doctest', {'title': 'Mine', 'rises': 0.5, 'why': 3})
        >>> describe('doctest').rule
        'rises by 50 percentage points'
    """
    types = {field.name: field.type for field in dataclasses.fields(Words)}
    kept = {key: readable(x) if isinstance(x, str) else x for key, x in words.items()
            if key in types and _fits(x, types[key])}
    _LEARNED[metric] = Words(**{**kept, 'title': kept.get('title') or metric})


def _fits(x, kind):
    if isinstance(x, bool) or kind is bool:
        return kind is bool and isinstance(x, bool)
    return isinstance(x, str) if kind is str else isinstance(x, (int, float)) and math.isfinite(finite(x))


def describe(metric):
    """
    Words for a metric, also for one that a user has added.

    Args:
        metric (str): its name in plasticity.jsonl

    Returns:
        Words: how to speak of it

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.words import describe
        >>> describe('erank').title, describe('my_metric').title
        ('Effective rank of weights', 'my_metric')
    """
    return METRICS[metric].words if metric in METRICS else _LEARNED.get(metric) or Words(metric)


def is_rank_of_features(metric):
    """
    Whether a metric comes from the spectrum of features, and so depends on the number of examples.

    Args:
        metric (str): its name

    Returns:
        bool:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.words import is_rank_of_features
        >>> is_rank_of_features('srank99'), is_rank_of_features('erank'), is_rank_of_features('dead_units')
        (True, False, False)
    """
    return metric in METRICS and any(
        need.source == 'activations' and 'spectrum' in need.field for need in METRICS[metric].needs)


def in_order(runs):
    """
    All metrics of some runs, those of the paper first.

    Args:
        runs (List[Run]): the runs of the report

    Returns:
        List[str]: names of metrics
    """
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    return [name for name in METRICS if name in names] + [name for name in names if name not in METRICS]
