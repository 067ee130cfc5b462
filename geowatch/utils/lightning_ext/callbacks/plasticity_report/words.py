"""
What the report says about each metric: its name, how to write it, what to look for.
"""
import dataclasses
import math

CAVEAT = (
    'These numbers are correlates of a lost ability to learn, neither its cause nor a proof. Each run is compared '
    'with its own start, so that what is named here is worth a look, not a verdict: look at the loss beside it.')


@dataclasses.dataclass(frozen=True)
class Words:
    """
    Attributes:
        title (str): at the head of a picture
        short (str): inside a sentence
        about (str): one line that says what the number is
        grows (float | None): worth a look when the end is so many times the start
        shrinks (float | None): likewise, below one
        rises (float | None): worth a look when the end is so much above the start
        why (str): the reason
        percent (bool): a fraction, written in percent
        change_by_layer (bool): layers differ in size, so colour them by their change
    """
    title: str
    short: str
    about: str
    grows: float = None
    shrinks: float = None
    rises: float = None
    why: str = ''
    percent: bool = False
    change_by_layer: bool = True

    def text(self, value):
        """
        Write a value.

        Example:
            >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.words import describe
            >>> describe('dead_units').text(0.1934), describe('erank').text(58.96), describe('erank').text(None)
            ('19 %', '59', 'n/a')
        """
        if value is None or math.isnan(value):
            return 'n/a'
        if self.percent:
            percent = 100 * value
            return f'{percent:.0f} %' if percent >= 9.95 or percent == int(percent) else f'{percent:.2g} %'
        return f'{value:.0f}' if 1000 <= abs(value) < 1e6 else f'{value:.3g}'

    def is_sign(self, start, end):
        """
        Has the value moved so far from its own start that it is worth a look?

        Example:
            >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.words import describe
            >>> describe('dead_units').is_sign(0.01, 0.19), describe('erank').is_sign(59, 58)
            (True, False)
        """
        return bool(self.grows and end >= self.grows * start > 0
                    or self.shrinks and end <= self.shrinks * start
                    or self.rises and end - start >= self.rises)

    @property
    def rule(self):
        """ When a change is named, in words. """
        rules = [f'grows to {self.grows:g} times its start' if self.grows else '',
                 f'falls to {self.shrinks:g} of its start' if self.shrinks else '',
                 f'rises by {self.rises * 100:g} percentage points' if self.rises else '']
        return ' or '.join(filter(None, rules))


# In the order of the pictures: the five of the paper's figure, then what comes with them.
METRICS = {
    'weight_mag': Words(
        'Weight magnitude', 'weight magnitude', 'mean absolute weight', grows=1.5,
        why='The larger the weights, the less a step of the same size turns them, so that learning slows.'),
    'grad_mag': Words(
        'Gradient magnitude', 'gradient magnitude', 'mean absolute gradient, before clipping', grows=5, shrinks=0.1,
        why='Growing gradients mean a step size near instability; vanishing ones mean that the network has '
            'converged or can no longer learn, and the loss tells which.'),
    'dead_units': Words(
        'Dead units', 'dead units', 'fraction of units saturated on every sample', rises=0.05,
        why='A unit that is saturated on every sample passes no gradient on, so that it no longer learns.',
        percent=True, change_by_layer=False),
    'erank': Words(
        'Effective rank of weights', 'effective rank of weights',
        'directions that the weights use, mean over layers', shrinks=0.8,
        why='Weights that use fewer directions can represent less.'),
    'feature_erank': Words(
        'Effective rank of features', 'effective rank of features',
        'dimensions that hidden features use, mean over layers', shrinks=0.8,
        why='Features of fewer dimensions leave less to build something new from.'),
    'grad_norm': Words('Gradient norm', 'gradient norm', 'L2 norm of all gradients, before clipping'),
}
PANELS = ('weight_mag', 'grad_mag', 'dead_units', 'erank', 'feature_erank')


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
    return METRICS.get(metric) or Words(metric, metric, '')


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
