"""
One word for each run, best first: diverged, collapsed, learned, slow, hardly moved.
"""
import dataclasses

WORDS = ('learned', 'slow', 'hardly moved', 'collapsed', 'diverged')


@dataclasses.dataclass
class Verdict:
    """
    Attributes:
        word (str): one of WORDS, or nothing where nothing can be told
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
    return [Verdict() for _ in runs]


def rank(runs, verdicts, under=None):
    """
    Args:
        runs (List[Run]): with their scalars
        verdicts (List[Verdict]): of them
        under (str | None): as for judge

    Returns:
        List[int]: indices of runs, best first
    """
    return list(range(len(runs)))


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
