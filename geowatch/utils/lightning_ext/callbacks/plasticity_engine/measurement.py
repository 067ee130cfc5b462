"""
From statistics to numbers: spectra on the device, one transfer to the host, formulas.

Pure functions, which know neither a trainer nor other processes.
"""
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable

import numpy as np
import torch

from ..plasticity_metrics import Metric
from ..plasticity_metrics._vocabulary import LEFT_OUT, MADE_OF, OF_NOTES, additive_fields
from .lightning import Moment
from .sources.activations.sites import Site, site_names
from .statistics import Totals
from .statistics.noise import noise_of
from .statistics.spectrum import centred, made, singular_values, spectra

Key = tuple[str, str]  # source and field
Numbers = dict[Key, dict[str, np.ndarray | float]]  # Totals on the host, by the names of layers
# What tells the share of numbers that are not finite, by source.
_OF_SHARE = {'activations': ('nonfinite', 'samples', 'units')}
# Fields that are made of Gram matrices.
SPECTRA = ('spectrum', 'centred_spectrum')


@dataclasses.dataclass
class Reading:
    """
    What was collected for some metrics, until it is numbers.

    Attributes:
        metrics (List[str]): what it is for
        moment (Moment): which the line will name
        whole (Totals): statistics that are the same on all processes
        parts (Totals): statistics of which each process has its part
        window (Window | None): in which activations were seen
        final (bool): whether it is measured as it is, if processes have seen
            enough or not
        examples (int | None): seen by all processes
        notes (Dict[str, Any]): what lines say of the step besides, a key of NOTES to plain data
    """
    metrics: list[str]
    moment: Moment
    whole: Totals = dataclasses.field(default_factory=dict)
    parts: Totals = dataclasses.field(default_factory=dict)
    window: object = None
    final: bool = True
    examples: int | None = None
    notes: dict = dataclasses.field(default_factory=dict)

    def has(self, metric: Metric) -> bool:
        """ Whether this process has seen anything of all that a Metric needs now. """
        return all(self.whole.get(key) or self.parts.get(key) for key in additive_keys([metric], support=False))

    def settled(self, metrics: dict[str, Metric]) -> 'Reading':
        """ The same for some metrics, by name, of nothing that may change: what is yet to be made is made now. """
        keys = additive_keys(metrics.values())
        whole, parts = ({key: {layer: made(x) for layer, x in own[key].items()} for key in keys if key in own}
                        for own in (self.whole, self.parts))
        return dataclasses.replace(self, metrics=list(metrics), whole=whole, parts=parts)


def additive_keys(metrics: Iterable[Metric], support: bool = True) -> list[Key]:
    """
    The additive statistics that some metrics need together.

    Args:
        metrics (Iterable[Metric]):
        support (bool): whether to add what tells the share of numbers that
            are not finite

    Returns:
        List[Tuple[str, str]]: source and field, each once

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import additive_keys
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> additive_keys([METRICS['erank'], METRICS['stable_rank']])
        [('weights', 'gram'), ('weights', 'nonfinite'), ('weights', 'count')]
    """
    return list(dict.fromkeys((source, part) for source, field in needed_keys(metrics, support)
                              for part in additive_fields(field)))


def needed_keys(metrics: Iterable[Metric], support: bool = True) -> list[Key]:
    """ The same with the fields that are made of others: what the formulas take. """
    metrics = list(metrics)
    keys = [(need.source, need.field) for metric in metrics for need in metric.needs]
    if support:
        keys += [(source, field) for metric in metrics for source in metric.sources
                 for field in (*_OF_SHARE.get(source, ('nonfinite', 'count')), LEFT_OUT.get(source)) if field]
        keys += [OF_NOTES[note] for metric in metrics for note in metric.notes if note in OF_NOTES]
    return list(dict.fromkeys(keys))


def needing(metrics: dict[str, Metric], source: str, fields: Collection[str]) -> list[str]:
    """
    Those of some metrics that need any of some additive fields of a source.

    Args:
        metrics (Dict[str, Metric]): by name
        source (str): a key of SOURCES
        fields (Collection[str]): additive ones

    Returns:
        List[str]: names

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import needing
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> needing(METRICS, 'weights', ['gram'])
        ['erank', 'spectral_norm', 'stable_rank']
    """
    keys = {(source, field) for field in fields}
    return [name for name, metric in metrics.items() if source in metric.sources
            and not keys.isdisjoint(additive_keys([metric]))]


def derive(totals: Totals, keys: list[Key], guard: Callable) -> Totals:
    """
    Make the fields that formulas take, and give sites their names.

    Args:
        totals (Totals): additive statistics, of all processes
        keys (List[Tuple[str, str]]): source and field
        guard (Callable): guard(source, field) is a context in which a failure stays

    Returns:
        Dict[Tuple[str, str], Dict[str, Tensor | float]]: of each layer

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import derive
        >>> import contextlib
        >>> import torch
        >>> totals = {('weights', 'gram'): {'fc1': torch.diag(torch.tensor([4., 9.])).double()}}
        >>> table = derive(totals, [('weights', 'spectrum')], lambda *args: contextlib.nullcontext())
        >>> table['weights', 'spectrum']['fc1'].tolist()
        [2.0, 3.0]
    """
    names = site_names(dict.fromkeys(site for own in totals.values() for site in own if isinstance(site, Site)))
    tables = {}
    for source, field in keys:
        with guard(source, field):
            if field == 'units':
                own = {site: float(site.units) for site in names}
            elif field == 'spectrum':
                grams = totals.get((source, 'gram'), {})
                ready = totals.get((source, field), {})
                own = {**ready, **dict(zip(grams, spectra(list(grams.values())), strict=True))}
            elif field == 'centred_spectrum':
                grams, sums, rows = (totals.get((source, part), {}) for part in additive_fields(field))
                own = dict(zip(grams, spectra([centred(grams[x], sums[x], rows[x]) for x in grams]), strict=True))
            elif source == 'pieces' and field in MADE_OF:
                parts = [totals.get((source, part), {}) for part in additive_fields(field)]
                own = {layer: noise_of(field, *(part[layer] for part in parts)) for layer in parts[0]
                       if all(layer in part for part in parts)}
            else:
                own = totals.get((source, field), {})
            tables[source, field] = {names.get(site, site): x for site, x in own.items()}
    return tables


def spectrum_of(source: str, field: str, total: torch.Tensor) -> tuple[str, torch.Tensor]:
    """
    What is kept of a sum over all processes: of the Gram matrix of a weight, which may be large, its singular values.

    Args:
        source (str): a key of SOURCES
        field (str): an additive one
        total (Tensor):

    Returns:
        Tuple[str, Tensor]: field and what is kept

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import spectrum_of
        >>> import torch
        >>> field, values = spectrum_of('weights', 'gram', torch.diag(torch.tensor([4., 9.])).double())
        >>> field, values.tolist()
        ('spectrum', [2.0, 3.0])
    """
    # That of activations may be needed as it is, to be centred.
    return (field, total) if field != 'gram' or source == 'activations' else ('spectrum', singular_values(total))


def to_host(tables: list[Totals]) -> list[Numbers]:
    """
    The one transfer from the device.

    Args:
        tables (List[Dict[Tuple[str, str], Dict[str, Tensor | float]]]):

    Returns:
        List[Dict[Tuple[str, str], Dict[str, ndarray | float]]]: the same, in float64

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import to_host
        >>> import torch
        >>> to_host([{('weights', 'abs'): {'a': torch.tensor(2), 'b': 3.}, ('weights', 'x'): {'a': torch.ones(2)}}])
        [{('weights', 'abs'): {'a': 2.0, 'b': 3.0}, ('weights', 'x'): {'a': array([1., 1.])}}]
    """
    tensors = [x for table in tables for own in table.values() for x in own.values() if isinstance(x, torch.Tensor)]
    # Some are on the CPU where a device has no float64.
    if len({x.device for x in tensors}) > 1:
        tensors = [x.cpu() for x in tensors]
    numbers = torch.cat([x.reshape(-1).double() for x in tensors]).numpy(force=True) if tensors else np.zeros(0)
    place = 0

    def of(x):
        nonlocal place
        if not isinstance(x, torch.Tensor):
            return x
        start, place = place, place + x.numel()
        # A copy, so that what is kept of a few numbers does not keep all.
        return float(numbers[start]) if x.ndim == 0 else numbers[start:place].reshape(x.shape).copy()

    return [{key: {layer: of(x) for layer, x in own.items()} for key, own in table.items()} for table in tables]


def takes_turns(metric: Metric) -> bool:
    """ Whether a metric needs singular values, which are so expensive that layers may take turns. """
    return any(need.field in SPECTRA for need in metric.needs)


def evaluate(metric: Metric, numbers: Numbers, before: Numbers | None = None, recent: Numbers | None = None,
             earlier: dict | None = None) -> tuple[dict, dict]:
    """
    The values of one metric.

    A layer with numbers that are not finite has no value, but the share of
    them; it is left out of the network's value. A layer whose step was skipped
    is not there.

    Args:
        metric (Metric):
        numbers (Dict[Tuple[str, str], Dict[str, ndarray | float]]): of all layers, by source and field
        before (Dict[Tuple[str, str], Dict[str, ndarray | float]] | None): the same at the last measurement
        recent (Dict[Tuple[str, str], Dict[str, ndarray | float]] | None): sums over the last ones, this one included
        earlier (Dict[str, Dict[str, float]] | None): the columns of layers at their last turn, which stand where it
            is not theirs

    Returns:
        Tuple[Dict[str, float], Dict[str, Dict[str, float]]]: the columns of
            the network, and those of each layer

    Raises:
        ValueError: if the formula does not return what it should

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import evaluate
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> numbers = {('weights', 'abs'): {'a': 4., 'b': 0.}, ('weights', 'count'): {'a': 2., 'b': 6.}}
        >>> evaluate(METRICS['weight_mag'], numbers)
        ({'value': 0.5}, {'a': {'value': 2.0}, 'b': {'value': 0.0}})
    """
    of = {None: numbers, 'before': before or {}, 'recent': recent or {}}
    tables = [of[need.when].get((need.source, need.field), {}) for need in metric.needs]
    # A layer of recent measurements has to be in this one too.
    known = tables + [numbers.get((need.source, need.field), {}) for need in metric.needs if need.when == 'recent']
    skipped = {name for source in metric.sources
               for name, is_skipped in numbers.get((source, LEFT_OUT.get(source)), {}).items() if is_skipped}
    names = [name for name in tables[0] if name not in skipped and all(name in table for table in known)]
    layers, finite = dict(_waiting(metric, numbers, names, earlier or {})), []
    shares = _nonfinite_shares(metric, numbers, names)
    with np.errstate(all='ignore'):
        for name in names:
            own = [table[name] for table in tables]
            columns, share = _checked(metric, metric.formula(*own)), shares.get(name)
            if share:
                columns['value'] = math.nan
            if metric.network == 'units':
                columns['units'] = int(numbers['activations', 'units'][name])
                if not numbers.get(('activations', 'samples'), {}).get(name, 1.):
                    columns['no_sample'] = True  # as of an expert that no token has reached
            if share:
                columns['nonfinite'] = share
            elif all(map(_is_finite, own)):
                finite.append(name)
            layers[name] = columns
        if metric.network == 'sum':
            if not finite:
                return {'value': math.nan}, layers
            sums = [sum(table[name] for name in finite) for table in tables]
            return _checked(metric, metric.formula(*sums)), layers
    finite += [name for name in layers if name not in names and not layers[name].get('nonfinite')]
    weights = {name: layers[name].get('units', 1.) for name in finite if math.isfinite(layers[name]['value'])}
    total = sum(weights.values())
    mean = sum(layers[name]['value'] * weight for name, weight in weights.items()) / total if total else math.nan
    return {'value': mean}, layers


def _waiting(metric, numbers, names, earlier):
    """ What stands of layers that were seen but have no spectrum now. """
    for name, columns in earlier.items():
        seen = all(name in numbers.get((source, 'nonfinite'), {}) for source in metric.sources)
        if seen and name not in names and numbers.get(('activations', 'samples'), {}).get(name, 1.):
            yield name, columns


def _is_finite(x):
    # NumPy takes some microseconds for what may be one number.
    return math.isfinite(x) if isinstance(x, float) else np.isfinite(x).all()


def _nonfinite_shares(metric, numbers, names):
    """ The share of numbers that are not finite, of those layers that have some. """
    shares = {}
    for source in metric.sources:
        bad, *sizes = (numbers.get((source, field), {}) for field in _OF_SHARE.get(source, ('nonfinite', 'count')))
        for name in filter(bad.get, names):
            share = bad[name] / math.prod(table.get(name, 0.) for table in sizes)
            shares[name] = max(share, shares.get(name, 0.))
    return shares


def _checked(metric, returned):
    """ The columns of a layer, or an error that says what a formula should return. """
    columns = dict(returned) if isinstance(returned, dict) else {'value': returned}
    if 'value' not in columns:
        raise ValueError(f"Expected the formula of {metric.name!r} to return 'value' among its columns, "
                         f'but got {returned!r}')
    for key, x in columns.items():
        if not isinstance(x, (int, float, np.number, np.bool_)):
            raise ValueError(f'Expected the formula of {metric.name!r} to return a number for {key!r}, but got {x!r}')
        columns[key] = float(x)
    return columns
