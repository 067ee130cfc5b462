"""
How to speak of a metric: in pictures, in sentences, and when a change of it is worth a look.
"""
import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Words:
    """
    Attributes:
        title (str): at the head of a picture
        about (str): one line that says what the number is
        short (str): inside a sentence; by default the title in lower case
        grows (float | None): worth a look when the end is so many times the start
        shrinks (float | None): likewise, below one
        rises (float | None): worth a look when the end is so much above the start
        why (str): the reason
        percent (bool): a fraction, written in percent
        change_by_layer (bool): layers differ in size, so colour them by their change

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> words = METRICS['dead_units'].words
        >>> words.short, words.rule
        ('dead units', 'rises by 5 percentage points')
    """
    title: str
    about: str = ''
    short: str = ''
    grows: float | None = None
    shrinks: float | None = None
    rises: float | None = None
    why: str = ''
    percent: bool = False
    change_by_layer: bool = True

    def __post_init__(self):
        if not self.short:
            object.__setattr__(self, 'short', self.title[:1].lower() + self.title[1:])

    def text(self, value: float | None) -> str:
        """
        Write a value.

        Args:
            value (float | None):

        Returns:
            str:

        Example:
            >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
            >>> METRICS['dead_units'].words.text(0.1934), METRICS['erank'].words.text(58.96)
            ('19 %', '59')
        """
        if value is None or math.isnan(value):
            return 'n/a'
        if self.percent:
            percent = 100. * value
            return f'{percent:.0f} %' if percent >= 9.95 or percent.is_integer() else f'{percent:.2g} %'
        return f'{value:.0f}' if 1000 <= abs(value) < 1e6 else f'{value:.3g}'

    def is_sign(self, start: float, end: float) -> bool:
        """
        Has the value moved so far from its own start that it is worth a look?

        Args:
            start (float):
            end (float):

        Returns:
            bool:

        Example:
            >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
            >>> METRICS['dead_units'].words.is_sign(0.01, 0.19), METRICS['erank'].words.is_sign(59, 58)
            (True, False)
        """
        return bool(self.grows and end >= self.grows * start > 0
                    or self.shrinks and end <= self.shrinks * start
                    or self.rises and end - start >= self.rises)

    @property
    def rule(self) -> str:
        """ When a change is named, in words. """
        rules = [f'grows to {self.grows:g} times its start' if self.grows else '',
                 f'falls to {self.shrinks:g} of its start' if self.shrinks else '',
                 f'rises by {self.rises * 100:g} percentage points' if self.rises else '']
        return ' or '.join(filter(None, rules))

    def badness(self, start: float, value: float) -> float:
        """
        How bad a layer is, to find the worst one: the one rule for TensorBoard and the report.

        A fraction speaks for itself. Of all else a layer is compared with its
        own start, since layers differ in size.

        Args:
            start (float): the layer's first finite value, nan if it has none
            value (float): its value now

        Returns:
            float: the larger the worse, inf for what is not finite

        Example:
            >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
            >>> [METRICS['dead_units'].words.badness(.4, .5), METRICS['erank'].words.badness(8., 4.) > 0]
            [0.5, True]
        """
        if not math.isfinite(value):
            return math.inf
        if self.percent:
            return value
        if not start > 0:
            return 0.
        least = math.log(1e-12)
        change = max(math.log(value) - math.log(start), least) if value > 0 else least
        if self.shrinks and not self.grows:
            return -change
        return change if self.grows and not self.shrinks else abs(change)
