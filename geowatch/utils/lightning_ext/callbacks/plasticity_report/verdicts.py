"""
One word for each run, best first: learned, slow, hardly moved, collapsed, diverged.
"""
import dataclasses
import math

from .evidence import gather
from .scalars import direction

# From the best to the worst.
WORDS = ('learned', 'slow', 'hardly moved', '', 'collapsed', 'diverged')


@dataclasses.dataclass
class Verdict:
    """
    Attributes:
        word (str): one of WORDS, nothing where nothing can be told
        reason (str): one sentence with the numbers
        best (bool): the best run of several
        at (int | None): the step at which it broke
    """
    word: str = ''
    reason: str = ''
    best: bool = False
    at: int | None = None


def judge(runs, under=None):
    """
    Judge runs against the fresh network, each other, and the loss.

    Args:
        runs (List[Run]): with their scalars
        under (str | None): the loss or metric to judge by; None takes one of validation, or else the training loss

    Returns:
        List[Verdict]: one per run, in their order
    """
    found, name = gather(runs, under)
    verdicts = [_judge(one, name, len(runs) > 1) for one in found]
    if len(runs) > 1 and name:
        best = _order(found, verdicts, name)[0]
        verdicts[best].best = verdicts[best].word in ('learned', 'slow')
    return verdicts


def rank(runs, verdicts, under=None):
    """
    Args:
        runs (List[Run]): with their scalars
        verdicts (List[Verdict]): of them
        under (str | None): as for judge

    Returns:
        List[int]: indices of runs, best first
    """
    return _order(*[(found, verdicts, name) for found, name in [gather(runs, under)]][0])


def _order(found, verdicts, name):
    sign = direction(name) if name else 0

    def key(i):
        word, score = verdicts[i].word, found[i].score
        return word == 'diverged', math.isnan(score), -sign * score if math.isfinite(score) else 0., WORDS.index(word)

    return sorted(range(len(found)), key=key)


def _judge(one, name, several):
    """ The rules, the first that holds. """
    learned = one.gain >= 0.9 if several else one.won >= 0.2
    useless = not one.gain >= 0.5 if several else not one.won >= 0.2
    if one.broke:
        return Verdict('diverged', f'{one.broke[0]} is not a number from step {one.broke[1]} on', at=one.broke[1])
    if one.loss > 2 and useless:
        return Verdict('diverged', 'loss exploded')
    if useless:
        if one.end.get('grad_mag', math.inf) < 1e-6:
            return Verdict('collapsed', 'gradient')
        if one.ratio.get('feature_erank', math.nan) < 0.3:
            return Verdict('collapsed', 'rank')
        if one.rise > .5:
            return Verdict('collapsed', 'dead')
    if learned:
        return Verdict('learned', 'gain')
    still = abs(one.ratio.get('weight_mag', math.nan) - 1) <= 0.04 and abs(one.ratio.get('erank', math.nan) - 1) <= 0.008
    if still or one.travel < 0.5:
        return Verdict('hardly moved' if not one.gain > 0.1 else 'slow', 'still')
    if math.isnan(one.gain):
        return Verdict('learned', 'no score')
    return Verdict('slow', 'behind')


def summary(table):
    """
    Say which runs are best, for a terminal.

    Args:
        table (Table): of the runs

    Returns:
        List[str]: best first, one line each, alike ones grouped
    """
    labels = table.labels()
    return [f'{labels[i]}: {table.verdicts[i].word}' for i in table.order if table.verdicts[i].word]


def larger_batch(runs):
    """
    Say from the noise scale whether a larger batch would help.

    Args:
        runs (List[Run]): of one sweep

    Returns:
        str: a sentence, or nothing where no noise scale was measured
    """
    return ''
