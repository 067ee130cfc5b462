"""
srank99: how many singular values hold 99 % of the sum of the features'.

    srank99 = least k with sum of the k largest singular values >= 0.99 * sum of all

References:
    .. [Kumar2021] Kumar et al., "Implicit under-parameterization inhibits
       data-efficient deep reinforcement learning", ICLR 2021; arXiv 2010.14498.
"""
import numpy as np

from ._formulas import of_rows
from ._registry import metric
from ._words import Words

SHARE = 0.99


@metric(
    needs=('activations.spectrum', 'activations.rows', 'activations.units'), group='ranks',
    words=Words(
        'srank99 of features', 'singular values that hold 99 % of the features, mean over layers', shrinks=0.8,
        why='Features of fewer dimensions leave less to build something new from.'))
def srank99(spectrum, rows, units):
    """
    Singular values that hold 99 % of the sum [Kumar2021]_.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.srank99 import srank99
        >>> import numpy as np
        >>> [srank99(np.array(values), rows=50., units=3.)['value'] for values in (
        >>>     [1., 2., 3.], [0., 0., 0.], [0., 1., 1000.])]
        [3.0, 0.0, 1.0]
    """
    held = np.cumsum(np.sort(spectrum)[::-1])
    # A part in 10^12 for what rounding takes from a sum that is just reached.
    least = 1. + np.argmax(held >= SHARE * held[-1] * (1 - 1e-12))
    # Neither zeros nor numbers that are not finite have a share.
    return of_rows(float(least if held[-1] > 0 else held[-1]), spectrum, rows, units)
