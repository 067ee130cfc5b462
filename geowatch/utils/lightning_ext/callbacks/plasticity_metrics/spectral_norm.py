"""
Spectral norm of every weight matrix, and their mean: the largest singular value.

    spectral_norm = max s

The most by which the layer can stretch its input. Together with
:mod:`.weight_mag` it tells whether weights grow in all directions or in one.
"""
from ._registry import metric
from ._words import Words


@metric(
    needs=('weights.spectrum',), group='ranks',
    words=Words(
        'Spectral norm of weights', 'largest singular value of the weights, mean over layers', grows=2.,
        why='A layer that stretches one direction ever more makes training less stable and its features narrower.'))
def spectral_norm(spectrum):
    """
    Largest singular value.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.spectral_norm import spectral_norm
        >>> import numpy as np
        >>> spectral_norm(np.array([1., 2., 3., 4.]))
        4.0
    """
    return float(spectrum.max())
