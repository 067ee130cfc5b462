"""
One word for each run, best first: learned, slow, hardly moved, collapsed, diverged.

The rules were made on one half of sweeps with known accuracy and checked on the other, see docs/report.md.
"""
import dataclasses
import math
import statistics

from .evidence import compare, gather, since
from .foreign import readable
from .scalars import loss_name, score_name
from .settings import compared_settings, in_short
from .words import describe

# From the best to the worst; nothing where nothing can be told.
WORDS = ('learned', '', 'slow', 'hardly moved', 'collapsed', 'diverged')
# Times the loss of the fresh network.
EXPLODED = 2.
# What the best run must have won, so that there is anything to compare.
LEAST_WON = 0.02
# Of one word, in a terminal.
MOST_LINES = 5
# How far the loss of a run alone must have come.
SOME_WAY, LONG_WAY = 0.1, 0.6
# A loss of which so much is left has come down, however little the weights have moved.
HALVED = 0.5


@dataclasses.dataclass
class Verdict:
    """
    Attributes:
        word (str): one of WORDS
        reason (str): one sentence with the numbers
        best (bool): the best run of several
        at (int | None): the step at which it broke
        rate (str): what it says of the learning rate: 'too low', 'too high' or nothing
    """
    word: str = ''
    reason: str = ''
    best: bool = False
    at: int | None = None
    rate: str = ''


def judge(runs, under=None):
    """
    Judge runs against the fresh network, each other, and the loss.

    Args:
        runs (List[Run]): with their scalars
        under (str | None): the loss or metric to judge by; None, or one whose name does not say whether more or less is
            better, takes one of validation, or else the training loss

    Returns:
        List[Verdict]: one per run, in their order

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import Point, Run
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.verdicts import judge
        >>> runs = [Run([], {'weight_mag': [Point(step, 0, value, None, {}) for step, value in enumerate(values)]}, {},
        >>>             [], {'val_acc': {0: 0.1, 2: end}})
        >>>         for values, end in (([0.05, 0.06, 0.08], 0.95), ([0.05, 9.0, float('nan')], 0.1))]
        >>> [(verdict.word, verdict.best) for verdict in judge(runs)]
        [('learned', True), ('diverged', False)]
    """
    bench = _Bench(runs, under)
    verdicts = [bench.judge(i) for i in range(len(runs))]
    for run, verdict in zip(runs, verdicts, strict=True):
        verdict.rate = {'diverged': 'too high', 'collapsed': 'too high', 'hardly moved': 'too low'}.get(
            verdict.word, verdict.rate)
        if verdict.rate == 'too low' and _may_go_on(run, runs):
            verdict.rate = ''
    if bench.score and len(runs) > 1:
        first = verdicts[bench.order(verdicts)[0]]
        first.best = first.word in ('learned', 'slow')
    return verdicts


def _may_go_on(run, runs):
    """ Whether another has gone on for longer, in epochs and in steps: who is behind may still come as far. """
    return any(run.epochs and other.epochs and run.epochs[1] < other.epochs[1] and run.last_step < other.last_step
               for other in runs)


def rank(runs, verdicts, under=None):
    """
    Args:
        runs (List[Run]): with their scalars
        verdicts (List[Verdict]): of them
        under (str | None): as for judge

    Returns:
        List[int]: indices of runs, best first
    """
    return _Bench(runs, under).order(verdicts)


class _Bench:
    """ Some runs, what they show, and the rules. """

    def __init__(self, runs, under):
        self.runs, self.found = runs, gather(runs)
        self.loss = compare(runs, self.found, loss_name(runs))
        self.score = compare(runs, self.found, under) or compare(runs, self.found, score_name(runs))
        self.has_gains = self._has_gains()

    def _has_gains(self):
        """ Alone, or where nobody has won anything, there is nothing to compare with. """
        if len(self.runs) == 1 or self.score is None or not self.score.won() > LEAST_WON:
            return False
        loss = self.loss.won() if self.loss else math.nan
        # The best of runs that are dead or have not moved is so by chance, unless it is so clearly.
        return not loss < LEAST_WON and (max(loss, 0.) > SOME_WAY or self.score.won() > LONG_WAY
                                         or any(not one.lost() and not one.is_still() for one in self.found))

    def order(self, verdicts):
        def key(i):
            end = self.score.sign * self.score.ends[i] if self.score else math.nan
            return WORDS.index(verdicts[i].word), -end if math.isfinite(end) else math.inf

        return sorted(range(len(self.runs)), key=key)

    def gain(self, i):
        return self.score.gain(i) if self.has_gains else math.nan

    def is_behind(self, i):
        return self.has_gains and self.gain(i) < self.score.limit and (
            self.score.is_start_known or self.score.is_worse(i) or bool(self.found[i].lost()))

    def has_learned(self, i):
        """ By its score, beside the others, or by how far its own loss has come. """
        if not math.isnan(self.gain(i)):
            return not self.is_behind(i)
        own = self.loss or self.score
        # A loss that has come down from an explosion has come a long way, too.
        return own is not None and len(self.runs) == 1 and own.progress(i) > LONG_WAY and not self.found[i].lost()

    def judge(self, i):
        """ The first rule that holds. """
        for rule in (self.not_a_number, self.exploded, self.dead, self.learned, self.still, self.behind):
            verdict = rule(i)
            if verdict:
                return verdict
        moves = self.moves(i)
        return Verdict('learned' if moves else '', '; '.join([*moves, *self.outcome(i)]))

    # --- the rules: a verdict, or None ---------------------------------------

    def not_a_number(self, i):
        broken = {describe(name).short: step for name, step in self.found[i].not_finite().items()}
        if self.loss:
            broken[_short(self.loss.name)] = since(self.loss.curves[i], lambda x: not math.isfinite(x))
        name = min((name for name in broken if broken[name] is not None), key=broken.get, default=None)
        return name and Verdict('diverged', f'{name} is not a number from step {broken[name]} on', at=broken[name])

    def exploded(self, i):
        if self.loss and self.loss.ends[i] > EXPLODED * self.loss.start > 0 and not self.has_learned(i):
            return Verdict('diverged', f'{_short(self.loss.name)} {_text(self.loss.ends[i])} at the end, '
                           f'{_text(self.loss.start)} in the fresh network',
                           at=since(self.loss.curves[i], lambda x: x > EXPLODED * self.loss.start))

    def dead(self, i):
        lost = self.found[i].lost()
        if lost and not self.has_learned(i):
            return Verdict('collapsed', '; '.join([', '.join(self.change(i, name) for name in lost), *self.outcome(i)]),
                           at=min(lost.values()))

    def learned(self, i):
        if self.has_learned(i):
            return Verdict('learned', '; '.join(self.outcome(i)))

    def still(self, i):
        if self.found[i].is_still():
            own = self.loss or self.score
            came = self.gain(i) > SOME_WAY or len(self.runs) == 1 and own is not None and (
                own.progress(i) > SOME_WAY or own is self.loss and own.ends[i] < HALVED * own.start)
            return Verdict('slow' if came else 'hardly moved', '; '.join(self.moves(i) + self.outcome(i)),
                           rate='too low')

    def behind(self, i):
        if self.is_behind(i):
            best = self.order([Verdict('learned')] * len(self.runs))[0]
            is_further = self.found[i].ratio('weight_mag') > self.found[best].ratio('weight_mag')
            how = [f'{text}, {"more" if is_further else "less"} than the best run' for text in self.moves(i)]
            return Verdict('slow', '; '.join(self.outcome(i) + how), rate='too high' if is_further else 'too low')

    # --- what they say ---------------------------------------------------------

    def change(self, i, name):
        words, one = describe(name), self.found[i]
        return f'{words.short} {words.text(one.fresh[name])} -> {words.text(one.end[name])}'

    def moves(self, i):
        """ By how much the weights have changed, as a list of one text, or of none. """
        known = [(describe(name).short, self.found[i].ratio(name)) for name in ('weight_mag', 'erank')]
        known = [f'{name} {100 * (ratio - 1):+.2g} %' if ratio < 1.995 else f'{name} {ratio:.2g} times its start'
                 for name, ratio in known if math.isfinite(ratio)]
        return [', '.join(known)] if known else []

    def outcome(self, i):
        """ The score, beside the best one or beside its own start, as a list of one text, or of none. """
        own = self.score if len(self.runs) > 1 else self.loss or self.score
        if own is None or not own.curves[i]:
            return []
        end, name = own.ends[i], _short(own.name)
        if len(self.runs) == 1:
            return [f'{name} {_text(next(iter(own.curves[i].values())))} -> {_text(end)}']
        return [f'{name} {_text(end)}' + ('' if end == own.best else f', best {_text(own.best)}')]


def _short(name):
    return readable(name, 40)


def _text(value):
    return f'{value:.3g}'


def summary(table):
    """
    Say which runs are best, for a terminal.

    Args:
        table (Table): of the runs

    Returns:
        List[str]: best first, one line each, alike ones grouped
    """
    labels, lines = table.labels(), []
    for word in filter(None, WORDS):
        own = [i for i in table.order if table.verdicts[i].word == word]
        alike = _of_one_rate(table, own) if word != 'learned' else {}
        lines += [f'lr {rate}: {_all(len(group))} {word}{_when(table, group)}' for rate, group in alike.items()]
        alone = [i for i in own if not any(i in group for group in alike.values())]
        shown = alone[:MOST_LINES] if len(alone) > MOST_LINES + 1 else alone
        lines += [f'{labels[i]}: {_called(table.verdicts[i])}, {table.verdicts[i].reason}' for i in shown]
        if len(alone) > len(shown):
            rest = alone[len(shown):]
            lines.append(f'{labels[rest[0]]} and {len(rest) - 1} more: {word}{_when(table, rest)}')
    return lines


def _called(verdict):
    if not verdict.best:
        return verdict.word
    return 'best' if verdict.word == 'learned' else f'best, and still {verdict.word}'


def _of_one_rate(table, own):
    """ Learning rate to its runs, where there are several and the verdict is the same on all. """
    rates = [in_short('', rate).strip() for rate in table.settings.get('learning rate', [None] * len(table.runs))]
    groups = {rates[i]: [j for j in own if rates[j] == rates[i]] for i in own}
    return {rate: group for rate, group in groups.items() if rates.count(rate) == len(group) > 1
            and len(set(rates)) > 1}


def _all(count):
    return {2: 'both', 3: 'all three', 4: 'all four', 5: 'all five'}.get(count, f'all {count}')


def _when(table, group):
    """ When they broke, or else where they ended. """
    steps = [table.verdicts[i].at for i in group]
    if None not in steps:
        return f' before step {max(steps) + 1}'
    ends = [table.under_trends[i].end for i in group if table.under_trends[i] and table.under_trends[i].end is not None]
    if not ends:
        return ''
    low, high = (_text(end) for end in (min(ends), max(ends)))
    return f' ({_short(table.under)} {low})' if low == high else f' ({_short(table.under)} {low} to {high})'


def larger_batch(runs):
    """
    Say from the noise scale whether a larger batch would help.

    Args:
        runs (List[Run]): of one sweep, with their scalars

    Returns:
        str: a sentence on the best run of which both are known, the noise scale and the batch size, or nothing
    """
    for i in rank(runs, judge(runs)):
        points = runs[i].metrics.get('noise_scale', [])
        late = [point.value for point in points[-max(1, len(points) // 5):] if math.isfinite(point.value)]
        settings = {title: value for title, (value,) in compared_settings(runs[i:i + 1])[0].items()}
        batch = settings.get('batch size')
        if late and isinstance(batch, int) and batch > 0:
            scale = statistics.median(late)
            least = 'at least ' if 'adam' in str(settings.get('optimizer')).lower() else 'about '
            text = (f'The noise scale of {runs[i].name} is {least}{describe("noise_scale").text(scale)} at the end, '
                    f'its batch size {batch}: ')
            if scale > 2 * batch:
                return text + ('a batch twice as large, with a learning rate that is larger too, needs fewer steps, up '
                               'to half as many.')
            if scale < batch / 2:
                return text + 'a larger batch would hardly help, and a smaller one may get as far in as many steps.'
            return text + 'it is about right, and a larger batch would give less than it costs.'
    return ''
