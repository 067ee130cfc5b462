"""
Gradient magnitude: the mean absolute gradient.

    grad_mag = sum |g| / number of weights

over the weights that :mod:`.weight_mag` measures, as the optimizer will see
them before clipping: accumulated, reduced over processes, unscaled. A weight
that has no gradient in a step is left out of that step.
"""
from ._registry import metric
from ._words import Words


@metric(
    needs=('gradients.abs', 'gradients.count'), network='sum', every='log', group='paper',
    words=Words(
        'Gradient magnitude', 'mean absolute gradient, before clipping', grows=5, shrinks=0.1,
        why='Growing gradients mean a step size near instability; vanishing ones mean that the network has '
            'converged or can no longer learn, and the loss tells which.'))
def grad_mag(absolute, count):
    """
    Mean absolute gradient, before clipping.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.grad_mag import grad_mag
        >>> grad_mag(absolute=7., count=2.)  # of [[3, 4]]
        3.5
    """
    return absolute / count
