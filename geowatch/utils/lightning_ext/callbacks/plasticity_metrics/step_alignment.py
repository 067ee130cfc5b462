"""
Step alignment: whether the next gradient points on along the last step, or back.

    step_alignment = -cos(gradient of the next step, step of the weights)

over all weights, with the gradient before clipping. Along a straight slope it
is +1, after a step that overshoots the bottom -1. Where the best step along a
line has been made the two are at right angles: 0.

References:
    .. [Almeida1998] Almeida et al., "Parameter adaptation in stochastic
       optimization", in On-Line Learning in Neural Networks, 1998, where its sign
       adapts the learning rate.
"""
import math

from ._registry import metric
from ._words import Words


@metric(
    needs=('turns.dot', 'turns.gradient_squares', 'turns.step_squares'), network='sum', every='log', group='tuning',
    words=Words('Step alignment', 'minus the cosine of the next gradient and the last step of the weights'))
def step_alignment(dot, gradient_squares, step_squares):
    """
    Minus the cosine of the next gradient and the last step [Almeida1998]_.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.step_alignment import step_alignment
        >>> step_alignment(dot=-2., gradient_squares=4., step_squares=4.)
        0.5
    """
    norms = math.sqrt(gradient_squares) * math.sqrt(step_squares)
    return max(-1., min(-dot / norms, 1.)) if norms else math.nan
