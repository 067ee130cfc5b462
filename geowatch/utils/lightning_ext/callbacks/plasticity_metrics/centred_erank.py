"""
Effective rank of the features after the mean of each unit is subtracted.

Activations such as ReLU have a mean above zero, which is one large singular
value of the features and makes :mod:`.feature_erank` small. Without it the
rank tells how many directions the features vary in, as the covariance does.
"""
from ._formulas import entropy_rank, of_rows
from ._registry import metric
from ._words import Words


@metric(
    needs=('activations.centred_spectrum', 'activations.rows', 'activations.units'), group='ranks',
    words=Words(
        'Effective rank of centred features', 'directions in which hidden features vary, mean over layers',
        shrinks=0.8, why='Features that vary in fewer directions tell fewer samples apart.'))
def centred_erank(spectrum, rows, units):
    """
    Effective rank of centred features.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.centred_erank import centred_erank
        >>> import numpy as np
        >>> round(centred_erank(np.array([0., 2., 2.]), rows=50., units=3.)['value'], 6)
        2.0
    """
    return of_rows(entropy_rank(spectrum), spectrum, rows, units)
