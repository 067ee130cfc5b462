"""
Gradient norm: the L2 norm of all gradients.

    grad_norm = sqrt(sum g^2)

of the gradients that :mod:`.grad_mag` measures, with which it comes. A layer
whose gradient is not finite is left out.
"""
import numpy as np

from ._registry import metric
from ._words import Words


@metric(
    needs=('gradients.squares',), network='sum', every='log', group='paper', along='grad_mag',
    words=Words('Gradient norm', 'L2 norm of all gradients, before clipping'))
def grad_norm(squares):
    """
    L2 norm of the gradients, before clipping.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.grad_norm import grad_norm
        >>> float(grad_norm(squares=25. + 144.))  # of [3, 4] and [0, 12]
        13.0
    """
    return np.sqrt(squares)
