"""
What a metric is, and the registry of all of them.
"""
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Sequence

from ._errors import PlasticityConfigError
from ._vocabulary import NOTES, OF_A_LAYER, SOURCES, Need
from ._words import Words

METRICS = {}
GROUPS = {
    'paper': 'what section 4 of "Loss of Plasticity in Deep Continual Learning" records, and gradients besides',
    'tuning': 'what speaks of learning rate and batch size',
    'units': 'how the units of a layer are used, beyond dead ones',
    'ranks': 'further numbers from the spectra of weights and features',
}
# How the network's value comes from its layers.
NETWORK = {
    'sum': 'the formula of the statistics, summed over the layers that are finite',
    'mean': 'the mean over the layers whose value is finite',
    'units': 'the mean over layers, weighted by their units',
}
EVERY = {'log': '`log_every_n_steps`', 'epoch': 'epoch'}


@dataclasses.dataclass(frozen=True)
class Metric:
    """
    A formula, and what it is computed from.

    Attributes:
        name (str): as users write it, and the tag under ``plasticity/``
        formula (Callable): takes the statistics of one layer in the order of
            `needs`, as NumPy arrays, and returns a number, or a dict with
            'value' and further columns of the record
        needs (Tuple[Need, ...]): statistics
        network (str): a key of NETWORK
        every (str): what the interval 'auto' means, a key of EVERY
        words (Words): for the report, the dashboard and the documentation
        group (str | None): a key of GROUPS
        along (str | None): the metric whose choice brings this one with it
        notes (Tuple[str, ...]): keys of NOTES, what else its lines say of the step

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> metric = METRICS['weight_mag']
        >>> metric.sources, metric.network, metric.every
        (('weights',), 'sum', 'log')
    """
    name: str
    formula: Callable
    needs: tuple[Need, ...]
    network: str
    every: str
    words: Words
    group: str | None = None
    along: str | None = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def sources(self):
        """ Names of the sources, each once. """
        return tuple(dict.fromkeys(need.source for need in self.needs))

    @functools.cached_property
    def sees_activations(self):
        """ Whether it is measured over a window of batches, instead of at a step. """
        return 'activations' in self.sources


def metric(*, needs: tuple[str, ...] | str, network: str = 'mean', every: str = 'epoch', words: Words | None = None,
           group: str | None = None, along: str | None = None, notes: tuple[str, ...] | str = ()) -> Callable:
    """
    Register a function as a metric, under its own name.

    Args:
        needs (Tuple[str, ...]): statistics such as 'weights.abs', in the order
            in which the function takes them; 'before.weights.abs' is the same
            at the metric's last measurement
        network (str): how the network's value comes from its layers: 'sum',
            the formula of the summed statistics, 'mean', or 'units', the mean
            weighted by the units of each layer
        every (str): what the interval 'auto' means: 'log' for each
            ``log_every_n_steps``, 'epoch' for once per epoch
        words (Words | None): how to speak of it; by default its name
        group (str | None): 'paper', 'tuning', 'units' or 'ranks'
        along (str | None): a metric whose choice brings this one with it
        notes (Tuple[str, ...]): what else its lines say of the step: 'lr', 'batch_examples'

    Returns:
        Callable: a decorator that returns the function as it is

    Raises:
        PlasticityConfigError: if a need is unknown, the name is taken, or an
            argument is none of the above

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS, metric
        >>> @metric(needs=('weights.squares', 'weights.count'), network='sum')
        >>> def doctest_rms(squares, count):
        >>>     return (squares / count) ** 0.5
        >>> METRICS.pop('doctest_rms').formula(8., 2.)
        2.0
    """
    def register(formula):
        name = getattr(formula, '__name__', repr(formula))  # a functools.partial has none
        if not re.fullmatch(r'\w+', name) or name == 'all' or name in GROUPS:
            raise PlasticityConfigError(
                f"Expected a metric's name of letters, digits and '_' that is no group, but got {name!r}")
        for what, value, known in (('network', network, NETWORK), ('every', every, EVERY), ('group', group, GROUPS)):
            if value not in known and not (what == 'group' and value is None):
                raise PlasticityConfigError(
                    f'Expected `{what}` of the metric {name!r} to be one of {", ".join(known)}, but got {value!r}')
        parsed = tuple(map(Need.parse, (needs,) if isinstance(needs, str) else needs))
        said = (notes,) if isinstance(notes, str) else tuple(notes)
        if unknown := [note for note in said if note not in NOTES]:
            raise PlasticityConfigError(
                f'Expected `notes` of the metric {name!r} to be of {", ".join(NOTES)}, but got {unknown[0]!r}')
        new = Metric(name, formula, parsed, network, every, words or Words(name), group, along, said)
        if not parsed:
            raise PlasticityConfigError(f'Expected the metric {name!r} to need at least one statistic')
        if new.sees_activations and len(new.sources) > 1:
            raise PlasticityConfigError(
                f'Expected the metric {name!r} to need activations, which are seen over many batches, or other '
                f'statistics, which are those of one step, but got both: {", ".join(new.sources)}')
        if network == 'units' and not new.sees_activations:
            raise PlasticityConfigError(f"Expected `network='units'` for activations only, but {name!r} has none")
        if network == 'sum' and (vectors := [need.field for need in parsed if need.field in OF_A_LAYER]):
            raise PlasticityConfigError(
                f"Expected `network='sum'` for statistics that are one number, but {name!r} needs "
                f"{', '.join(vectors)}, whose shapes differ: use 'mean' or 'units'")
        old = METRICS.get(name)
        if old is not None and (old.formula.__module__, old.formula.__qualname__) != (
                formula.__module__, formula.__qualname__):
            raise PlasticityConfigError(f'The name {name!r} is taken by a metric of {old.formula.__module__}')
        METRICS[name] = new
        return formula
    return register


def in_order(names: Iterable[str]) -> list[str]:
    """
    Sort metrics for people: groups one after the other, in each those of every log step first.

    Args:
        names (Iterable[str]): of METRICS

    Returns:
        List[str]:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._registry import in_order
        >>> in_order(['stable_rank', 'dead_units', 'grad_mag', 'weight_mag', 'erank'])
        ['weight_mag', 'grad_mag', 'dead_units', 'erank', 'stable_rank']
    """
    groups, sources = [*GROUPS, None], list(SOURCES)

    def place(name):
        one = METRICS[name]
        is_rare = one.every == 'epoch'
        return groups.index(one.group), is_rare, 0 if is_rare else sources.index(one.sources[0]), name

    return sorted(names, key=place)


def members(group: str) -> list[str]:
    """
    The metrics of a group.

    Args:
        group (str): a key of GROUPS, or 'all'

    Returns:
        List[str]: names, in the order of the registry

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import members
        >>> members('units')
        ['rare_units', 'sign_entropy']
    """
    return [name for name, one in METRICS.items() if group in ('all', one.group)]


def parse_metrics(metrics: str | list[str]) -> dict[str, str | None]:
    """
    Read a choice of metrics, each with its own interval or none.

    Args:
        metrics (str | List[str]): names or groups separated by commas, a list
            of them, or 'all'. Each may carry an interval after an '@'. A
            metric that is named itself keeps its interval beside its group's.

    Returns:
        Dict[str, str | None]: name to interval

    Raises:
        PlasticityConfigError: if a name is unknown, given twice, or none is given

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import parse_metrics
        >>> parse_metrics('weight_mag@1,erank')
        {'weight_mag': '1', 'erank': None}
        >>> parse_metrics('grad_mag@5')
        {'grad_mag': '5', 'grad_norm': '5'}
        >>> list(parse_metrics('paper'))
        ['weight_mag', 'grad_mag', 'grad_norm', 'dead_units', 'erank', 'feature_erank']
    """
    items = metrics.split(',') if isinstance(metrics, str) else metrics
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise PlasticityConfigError(
            f'Expected `metrics` to be names separated by commas or a list of names, but got {metrics!r}')
    named, of_groups, groups = {}, {}, [group for group in GROUPS if members(group)]
    for item in items:
        name, at, interval = (part.strip() for part in item.partition('@'))
        interval = interval if at else None
        if name == 'all' or name in groups:
            for member in members(name):
                of_groups[member] = of_groups.get(member) if interval is None else interval
        elif name in METRICS:
            if name in named:
                raise PlasticityConfigError(f'Plasticity metric {name!r} is given twice in {metrics!r}')
            named[name] = interval
        elif name or at:
            known = [*METRICS, *groups, 'all']
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise PlasticityConfigError(
                f'Unknown plasticity metric {name!r}. Did you mean {nearest[0]!r}? '
                f'Expected any of: {", ".join(METRICS)}, or a group: {", ".join(groups)}, all')
    for name, one in METRICS.items():
        if one.along in named and name not in named:
            named[name] = named[one.along]
    chosen = {**of_groups, **named}
    if not chosen:
        raise PlasticityConfigError(
            f'Expected at least one plasticity metric of: {", ".join(METRICS)}, or a group: {", ".join(groups)}, '
            f'all, but got {metrics!r}')
    return {name: chosen[name] for name in METRICS if name in chosen}
