"""
The words in which a metric names what it needs: sources and their fields.

No torch in here: metrics are formulas, and the report reads their words
without it. ``plasticity_engine/statistics`` makes what is listed.
"""
from typing import NamedTuple

from ._errors import PlasticityConfigError

_TENSORS = {
    'count': 'how many numbers',
    'abs': 'sum of absolute values',
    'squares': 'sum of squares',
    'nonfinite': 'how many numbers are not finite',
    'spectrum': 'singular values of the matrix (out, in * kh * kw), shape (smaller side,), the smallest first',
}
SOURCES = {
    'weights': _TENSORS,
    'gradients': _TENSORS,
    'distances': {
        'count': 'how many numbers of a weight',
        'squares': 'sum of squares of the weight less the weight before the first step of the run',
        'start_squares': 'sum of squares of the weight before the first step of the run',
        'nonfinite': 'how many of the differences are not finite',
    },
    'turns': {
        'count': 'how many numbers of a weight',
        'dot': 'sum of products of the gradient and what the step before has changed of the weight',
        'gradient_squares': 'sum of squares of the gradient',
        'step_squares': 'sum of squares of what the step before has changed of the weight',
        'nonfinite': 'how many of the products are not finite',
    },
    'updates': {
        'count': 'how many numbers of a weight',
        'squares': 'sum of squares of the weight after the step less the weight before',
        'before_squares': 'sum of squares of the weight before the step',
        'nonfinite': 'how many of the differences are not finite',
        'moving': 'how many entries of the weight have a gradient that is not zero',
        'unmoved': 'how many of these are the same after the step as before',
    },
    'pieces': {
        'count': 'how many pieces of the same size the gradient has, over micro-batches and processes',
        'examples': 'how many examples the pieces are of, over micro-batches and processes',
        'squares': 'sum over the pieces of their sums of squares; the pieces add up to the gradient',
        'gradient': 'sum of squares of the gradient',
        'known': 'the same where its pieces are known, else 0',
        'noise': 'estimate of the sum of squares of the noise in the gradient',
        'signal': 'estimate of the sum of squares of the gradient without noise',
        'example_noise': "estimate of the sum of squares of the noise in one example's gradient",
        'nonfinite': 'sum over the pieces of the share of their numbers that are not finite',
    },
    'activations': {
        'away': 'calls in which a unit had a sample away from a saturated value, shape (values, units)',
        'positive': 'samples with a positive input, shape (units,)',
        'samples': 'samples of each unit: examples, tokens, pixels',
        'nonfinite': 'how many numbers are not finite',
        'units': 'how many units',
        'rows': 'rows of the feature matrix: the rank cannot exceed it',
        'spectrum': 'singular values of the feature matrix (rows, units), shape (units,), the smallest first',
        'centred_spectrum': 'the same, after the mean of each column is subtracted',
    },
}
# Fields that are computed of additive ones, after all processes have been added up.
MADE_OF = {
    'spectrum': ('gram',),
    'centred_spectrum': ('gram', 'sum', 'rows'),
    'units': (),
    'noise': ('squares', 'known', 'count'),
    'signal': ('squares', 'known', 'count'),
    'example_noise': ('squares', 'known', 'count', 'examples'),
}
# Fields that say of a layer whether it is left out at this step: a GradScaler has skipped its step.
LEFT_OUT = {'updates': 'skipped', 'turns': 'skipped'}
# What lines of the record can say of a step besides.
NOTES = {'lr': 'learning rate of each parameter group that has stepped',
         'batch_examples': 'examples of the step, over micro-batches and processes'}
# Statistics that are for the notes of a metric.
OF_NOTES = {'batch_examples': ('pieces', 'examples')}
# Of which measurement a statistic is, by the first word of the need.
WHEN = {'before': "the metric's last measurement", 'recent': 'the sum over its last 25 to 50 measurements'}
# Fields whose shape depends on the layer, so that they cannot be summed over layers.
OF_A_LAYER = {'spectrum', 'centred_spectrum', 'away', 'positive'}


class Need(NamedTuple):
    """
    One statistic that a metric needs.

    Attributes:
        source (str): a key of SOURCES
        field (str): a key of the source
        when (str | None): a key of WHEN; None for this measurement

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._vocabulary import Need
        >>> Need.parse('before.weights.abs')
        Need(source='weights', field='abs', when='before')
    """
    source: str
    field: str
    when: str | None = None

    @classmethod
    def parse(cls, text: str):
        """
        Args:
            text (str): 'source.field', with 'before.' in front of it for the last measurement, 'recent.' for the
                sum over the last 25 to 50

        Returns:
            Need:

        Raises:
            PlasticityConfigError: if there is no such source or field
        """
        if not isinstance(text, str):
            raise PlasticityConfigError(f"Expected a need such as 'weights.abs', but got {text!r}")
        when, _, rest = text.partition('.')
        when, rest = (when, rest) if when in WHEN else (None, text)
        source, _, field = rest.partition('.')
        if source not in SOURCES:
            raise PlasticityConfigError(f'Unknown source in the need {text!r}. Expected one of: {", ".join(SOURCES)}')
        if field not in SOURCES[source]:
            raise PlasticityConfigError(
                f'Unknown field in the need {text!r}. Expected one of: '
                f'{", ".join(f"{source}.{known}" for known in SOURCES[source])}')
        return cls(source, field, when)


def additive_fields(field: str) -> tuple[str, ...]:
    """
    The additive fields of which a field is made.

    Args:
        field (str): of any source

    Returns:
        Tuple[str, ...]: itself, if it is additive

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._vocabulary import additive_fields
        >>> additive_fields('centred_spectrum'), additive_fields('abs')
        (('gram', 'sum', 'rows'), ('abs',))
    """
    return MADE_OF.get(field, (field,))
