"""
From measurements to a table of trends, and to sentences about what is worth a look.
"""
import dataclasses
import itertools
import math

from .scalars import find_scalar
from .settings import compared_settings, in_short, is_in_name
from .verdicts import judge, rank
from .words import describe, in_order


@dataclasses.dataclass
class Trend:
    """
    Where a curve began, where it ended, and which way it went.

    Attributes:
        start (float | None): first finite value
        end (float | None): last finite value
        word (str): 'rises', 'falls', 'steady', 'up and down', 'one point' or 'no data'
        points (int): how many measurements, non-finite ones included
        broke_at (int | None): first step with a non-finite value
    """
    start: float | None
    end: float | None
    word: str
    points: int
    broke_at: int | None = None


def trend(steps, values, percent=False):
    """
    Summarize a curve.

    The direction is that of Kendall's rank correlation with time, so that
    neither noise nor one outlier makes a trend, and a change below 5 percent
    (one point for fractions) counts as none.

    Args:
        steps (List[int]): in order
        values (List[float]): nan where not finite
        percent (bool): the values are fractions

    Returns:
        Trend: its summary

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.findings import trend
        >>> trend([0, 10, 20], [59.0, 40.0, 24.0])
        Trend(start=59.0, end=24.0, word='falls', points=3, broke_at=None)
        >>> trend([0, 10, 20], [1.0, float('nan'), float('nan')])
        Trend(start=1.0, end=1.0, word='one point', points=3, broke_at=10)
    """
    finite = [value for value in values if math.isfinite(value)]
    broke_at = next((step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)), None)
    if not finite:
        return Trend(None, None, 'no data', len(values), broke_at)
    word = 'one point' if len(finite) == 1 else _direction(bin_means(finite, 100), percent)
    return Trend(finite[0], finite[-1], word, len(values), broke_at)


def _direction(values, percent):
    fifth = max(1, len(values) // 5)
    low, high, start = min(values[fifth:]), max(values[fifth:]), values[0]
    # Of a jump in the first fifth, rank correlation sees little: the start lies far outside all that comes after it.
    apart = max(0.01 if percent else 0.05 * max(abs(start), abs(low), abs(high)), (high - low) / 2)
    if not low - apart <= start <= high + apart:
        return 'falls' if start > high else 'rises'
    first, last = sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth
    small = 0.01 if percent else 0.05 * max(abs(first), abs(last))
    if abs(last - first) <= small:
        return 'up and down' if max(values) - min(values) > 5 * small else 'steady'
    pairs = [(values[j] > values[i]) - (values[j] < values[i]) for j in range(len(values)) for i in range(j)]
    correlation = sum(pairs) / len(pairs)
    if abs(correlation) < 0.3 or (correlation > 0) != (last > first):
        return 'up and down'
    return 'rises' if last > first else 'falls'


def bin_means(values, count):
    """
    Shorten a curve to means of neighbours.

    Args:
        values (List[float]): nan and inf are left out of the means
        count (int): the most to return

    Returns:
        List[float]: nan where a bin has no finite value

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.findings import bin_means
        >>> bin_means([1., 3., 5., 7.], 2)
        [2.0, 6.0]
    """
    if len(values) <= count:
        return list(values)
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = []
    for low, high in itertools.pairwise(edges):
        finite = [value for value in values[low:high] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def running_mean(values):
    """
    The course of a noisy curve: means over a fifteenth of its length.

    Args:
        values (List[float]): nan and inf are left out of the means

    Returns:
        List[float] | None: as many values, or None where the curve is short or smooth enough to be seen as it is

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.findings import running_mean
        >>> running_mean([0.0, 5.0] * 31)[28:31], running_mean([0.0, 5.0])
        ([2.0, 3.0, 2.0], None)
    """
    if len(values) <= 60:
        return None
    half = len(values) // 30
    windows = [[v for v in values[max(0, i - half):i + half + 1] if math.isfinite(v)] for i in range(len(values))]
    # Where there is no value there is a gap, also if its neighbours have some.
    means = [sum(window) / len(window) if math.isfinite(value) else math.nan
             for value, window in zip(values, windows, strict=True)]
    finite = [mean for mean in means if math.isfinite(mean)]
    noise = [abs(value - mean) for value, mean in zip(values, means, strict=True) if math.isfinite(value)]
    smooth = not finite or sum(noise) / len(noise) <= 0.03 * (max(finite) - min(finite))
    return None if smooth else means


@dataclasses.dataclass
class Table:
    """
    Attributes:
        runs (List[Run]): the rows
        settings (Dict[str, list]): title to one value per run
        trends (List[Dict[str, Trend]]): per run, by metric
        under (str | None): the scalar that is drawn under each metric
        under_trends (List[Trend | None]): per run
        more_settings (int): how many others differ between the runs
        verdicts (List[Verdict]): per run
        order (List[int]): indices of runs, best first
    """
    runs: list
    settings: dict
    trends: list
    under: str | None
    under_trends: list
    more_settings: int = 0
    verdicts: list = dataclasses.field(default_factory=list)
    order: list = dataclasses.field(default_factory=list)

    def labels(self):
        """ Names of runs with the settings in which they differ, where the name does not hold them. """
        differing = {title: values for title, values in self.settings.items() if len(set(map(str, values))) > 1}
        # A name such as lr2-bs8 says it all, where each of them does.
        telling = [(title, values) for title, values in list(differing.items())[:3]
                   if not all(is_in_name(value, run.name) for run, value in zip(self.runs, values, strict=True))]
        labels = []
        for i, run in enumerate(self.runs):
            extra = [in_short(title, values[i]) for title, values in telling if values[i] is not None]
            labels.append(f'{run.name} ({", ".join(extra)})' if extra else run.name)
        return labels

    def signs(self, i):
        """ The metrics of run i that moved far from where they began, and in that direction. """
        return [name for name in in_order([self.runs[i]]) if _is_sign(name, self.trends[i][name])]


def _is_sign(name, trend):
    return _ended_far(name, trend) and trend.word == ('rises' if trend.end > trend.start else 'falls')


def _ended_far(name, trend):
    """ Also where it only goes up and down, and ends far from its start by chance. """
    return trend.start is not None and describe(name).is_sign(trend.start, trend.end)


def make_table(runs, under=None):
    """
    Summarize all curves of all runs.

    Args:
        runs (List[Run]): with their scalars, if `under` is given
        under (str | None): name of the scalar that belongs into the table

    Returns:
        Table: what the report and the programs read
    """
    trends = [{name: trend([p.step for p in points], [p.value for p in points], describe(name).percent)
               for name, points in run.metrics.items()} for run in runs]
    scalars = [find_scalar(run, under) if under else None for run in runs]
    settings, more = compared_settings(runs)
    verdicts = judge(runs, under)
    return Table(runs, settings, trends, under, [trend(list(s), list(s.values())) if s else None for s in scalars],
                 more, verdicts, rank(runs, verdicts, under))


HEADS = {'broken': 'Broke', 'sign': 'Worth a look', 'calm': 'No sign', 'data': 'Data'}
# What a verdict is, whatever else is to be said of the run.
KINDS = {'diverged': 'broken', 'collapsed': 'broken', 'slow': 'sign', 'hardly moved': 'sign', 'learned': 'calm'}


@dataclasses.dataclass
class Finding:
    """
    Attributes:
        kind (str): 'sign' of lost plasticity, 'broken', 'calm', or 'data' about what was measured
        run (str): label of the run that it is about, or nothing
        text (str): with the numbers
        why (str): the reason, or nothing
        word (str): the verdict on the run, or nothing
    """
    kind: str
    run: str
    text: str
    why: str = ''
    word: str = ''

    @property
    def head(self):
        """ What stands beside it: the verdict, where there is one. """
        return self.word.capitalize() or HEADS[self.kind]

    @property
    def sentence(self):
        return f'{self.run}: {self.text}' if self.run else self.text


def find(table):
    """
    Say what is worth a look.

    Args:
        table (Table): of the runs

    Returns:
        List[Finding]: what broke, then runs with the most signs, then the calm ones, then notes on the data
    """
    labels = table.labels()
    signs = [table.signs(i) for i in range(len(table.runs))]
    words = [verdict.word for verdict in table.verdicts]
    findings = [_broken(*one) for one in zip(labels, table.trends, words, strict=True)]
    for i in sorted(range(len(labels)), key=lambda i: -len(signs[i])):
        if signs[i]:
            findings.append(_signs(table, labels, signs, i))
    findings += _calm(table, labels, [i for i in range(len(labels)) if not signs[i] and not findings[i]])
    return [f for f in findings if f] + _about_data(table, labels)


def _broken(label, trends, word):
    broken = [f'{describe(name).short} from step {t.broke_at}' for name, t in trends.items() if t.broke_at is not None]
    if broken:
        return Finding('broken', label, f'not a finite number: {", ".join(broken)}.',
                       'Values that overflow or are not a number mean that training has diverged there, '
                       'or that the metric could not be computed.', word)


def _moved(name, trend):
    words = describe(name)
    return f'{words.short} {words.text(trend.start)} -> {words.text(trend.end)}'


def _signs(table, labels, signs, i):
    parts = [_moved(name, table.trends[i][name]) + _worst_layer(table.runs[i], name) for name in signs[i]]
    text = f'{", ".join(parts)}.'
    if table.under_trends[i] is not None and table.under_trends[i].start is not None:
        text += f' Meanwhile {_moved(table.under, table.under_trends[i])}.'
    others = [j for j in range(len(labels)) if j != i and all(name in table.trends[j] for name in signs[i])]
    clear = [labels[j] for j in others if not any(_ended_far(name, table.trends[j][name]) for name in signs[i])]
    if clear:
        one, many = {1: ('does not show this', 'do not show this'), 2: ('shows neither', 'show neither')}.get(
            len(signs[i]), ('shows none of these', 'show none of these'))
        text += f' {_some(clear)} {one if len(clear) == 1 else many}.'
    elif others and all(set(signs[i]) <= set(signs[j]) for j in others):
        text += ' The other runs show the same.'
    return Finding(_kind(table, i, 'sign'), labels[i], text, ' '.join(describe(name).why for name in signs[i]),
                   table.verdicts[i].word)


def _kind(table, i, otherwise):
    """ As the verdict says. What moves in the best run is no reason to worry; in another it may be. """
    verdict = table.verdicts[i]
    return otherwise if verdict.word == 'learned' and not verdict.best else KINDS.get(verdict.word, otherwise)


def _some(labels):
    """ A few of them by name. """
    named, rest = (labels, []) if len(labels) <= 3 else (labels[:2], labels[2:])
    named = [*named, f'{len(rest)} more'] if rest else named
    return named[0] if len(named) == 1 else f'{", ".join(named[:-1])} and {named[-1]}'


def _worst_layer(run, name):
    """ The layer that is worst, if there are several: by the rule that TensorBoard's text has, too. """
    words, starts, ends = describe(name), {}, {}
    for point in run.metrics[name]:
        finite = {layer: value for layer, value in point.layers.items() if math.isfinite(value)}
        starts = {**finite, **starts}
        ends.update(finite)
    if len(starts) < 2:
        return ''
    layer = max(starts, key=lambda layer: words.badness(starts[layer], ends[layer]))
    return f' (most in {layer}: {words.text(starts[layer])} -> {words.text(ends[layer])})'


def _calm(table, labels, calm):
    findings, still = [], {}
    for i in calm:
        word, shown = table.verdicts[i].word, [(name, t) for name, t in table.trends[i].items()
                                               if describe(name).rule and t.word not in ('one point', 'no data')]
        moves = ', '.join(_moved(name, t) for name, t in shown)
        restless = [describe(name).short for name, t in table.trends[i].items()
                    if t.word != 'steady' and _ended_far(name, t)]
        if restless:
            findings.append(Finding(_kind(table, i, 'sign'), labels[i],
                                    f'{" and ".join(restless)} went up and down, without a trend, and ended far from '
                                    f'the start ({moves}).', word=word))
        elif shown:
            still.setdefault(word, {})[labels[i]] = moves
    many = sum(map(len, still.values())) > 4
    for word, alike in still.items():
        said = {_some([*alike]): ''} if many else {label: f' ({moves})' for label, moves in alike.items()}
        findings += [Finding(KINDS.get(word, 'calm'), label, f'nothing moved far from its own start{moves}.', word=word)
                     for label, moves in said.items()]
    return findings


def _about_data(table, labels):
    runs, notes = table.runs, {}

    def note(label, text, why=''):
        notes.setdefault((text, why), []).append(label)

    names = in_order(runs)
    for label, run, trends in zip(labels, runs, table.trends, strict=True):
        single = [describe(name).short for name, t in trends.items() if t.word == 'one point' and t.points == 1]
        if single:
            note(label, f'one measurement of {", ".join(single)}, so that no trend can be told.')
        missing = [describe(name).short for name in names if name not in run.metrics]
        if missing:
            note(label, f'{", ".join(missing)} not measured.')
        for text in run.notes:
            note(label, f'{text}.')
    if table.more_settings:
        note('', f'{table.more_settings} more settings differ between the runs than the table has room for.')
    ends = [run.epochs[1] for run in runs if run.epochs]
    for label, run in zip(labels, runs, strict=True):
        if run.epochs and run.epochs[1] < max(ends):
            note(label, f'ends in epoch {run.epochs[1]}, where another goes on to epoch {max(ends)}.',
                 'It is still going, was stopped early, or crashed.')
    for name in ('dead_units', 'feature_erank'):
        samples = {run.metrics[name][-1].samples for run in runs if name in run.metrics} - {None}
        if len(samples) > 1:
            note('', f'{describe(name).title}: measured on different numbers of samples '
                 f'({", ".join(map(str, sorted(samples)))}), so that runs are compared better by their change.',
                 'More samples find fewer dead units and more dimensions.')
    for name in names:
        layers = [tuple(run.metrics[name][-1].layers) for run in runs if name in run.metrics]
        if len(set(layers)) > 1:
            note('', 'The runs measured different layers, so that they are compared better by their change.')
            break
    return [Finding('data', 'All runs' if len(about) == len(labels) > 1 else _some(about), text, why)
            for (text, why), about in notes.items()]


def to_records(table):
    """
    The table for programs.

    Args:
        table (Table): of the runs

    Returns:
        List[Dict[str, object]]: one flat record per run; None where a number is missing
    """
    records = []
    names = in_order(table.runs)
    for i, run in enumerate(table.runs):
        record = {'run': run.name, 'folder': str(run.folders[-1]), 'last_step': run.last_step,
                  'last_epoch': run.epochs and run.epochs[1]}
        record.update({title: values[i] for title, values in table.settings.items()})
        columns = [(name, table.trends[i].get(name)) for name in names]
        columns += [(table.under, table.under_trends[i])] if table.under else []
        for name, t in columns:
            t = t or Trend(None, None, 'no data', 0)
            record.update({f'{name}.start': t.start, f'{name}.end': t.end, f'{name}.trend': t.word,
                           f'{name}.points': t.points, f'{name}.not_finite_from': t.broke_at})
        record['signs'] = table.signs(i)
        verdict = table.verdicts[i]
        record.update(verdict=verdict.word, verdict_reason=verdict.reason, best=verdict.best)
        records.append(record)
    return records
