"""
Effective rank of the hidden features of every layer, and their mean.

Rows are samples, columns are units; the features are those after the
activation. Neither centred nor squared, see :mod:`.erank`. It cannot exceed
the number of rows and is biased low below about 4 rows per unit, so that each
layer's rows are recorded. Of a layer with more units than are used, a fixed
random choice is, and its record says how many.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
from ._formulas import entropy_rank, of_rows
from ._registry import metric
from ._words import Words


@metric(
    needs=('activations.spectrum', 'activations.rows', 'activations.units'), group='paper',
    words=Words(
        'Effective rank of features', 'dimensions that hidden features use, mean over layers', shrinks=0.8,
        why='Features of fewer dimensions leave less to build something new from.'))
def feature_erank(spectrum, rows, units):
    """
    Effective rank of post-activation features [Dohare2024]_.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.feature_erank import feature_erank
        >>> import numpy as np
        >>> feature_erank(np.array([2.]), rows=6., units=1)
        {'value': 1.0, 'rows': 6.0}
    """
    return of_rows(entropy_rank(spectrum), spectrum, rows, units)
