"""
Formulas that several metrics share.
"""
import numpy as np


def entropy_rank(spectrum: np.ndarray) -> float:
    """
    Effective rank of a matrix from its singular values [Roy2007]_.

    With p = s / sum(s) it is exp(-sum(p log p)), where 0 log 0 = 0.

    Args:
        spectrum (ndarray): of shape (values,), not negative

    Returns:
        float: 0 for a zero matrix, nan where a value is not finite

    References:
        .. [Roy2007] Roy and Vetterli, "The effective rank: a measure of
           effective dimensionality", EUSIPCO 2007.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._formulas import entropy_rank
        >>> import numpy as np
        >>> round(entropy_rank(np.array([4., 3., 2., 1.])), 10), entropy_rank(np.zeros(3))
        (3.5961154666, 0.0)
    """
    total = spectrum.sum()
    if total == 0:
        return 0.
    p = spectrum / total
    p = np.where(p == 0, 1., p)  # 0 log 0 = 0 = 1 log 1
    return float(np.exp(-(p * np.log(p)).sum()))


def binary_entropy(p: np.ndarray) -> np.ndarray:
    """
    Entropy of an event of probability p, in bits.

    Args:
        p (ndarray): of any shape, between 0 and 1

    Returns:
        ndarray: of the same shape, between 0 and 1

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._formulas import binary_entropy
        >>> import numpy as np
        >>> binary_entropy(np.array([0., 0.5, 0.25, 1.])).round(10).tolist()
        [0.0, 1.0, 0.8112781245, 0.0]
    """
    parts = [np.where(q > 0, q, 1.) for q in (p, 1 - p)]
    return 0. - sum(q * np.log2(q) for q in parts)


def of_rows(value: float, spectrum: np.ndarray, rows: float, units: float) -> dict[str, float]:
    """
    Columns of a number that comes of the spectrum of a feature matrix.

    Args:
        value (float): the number
        spectrum (ndarray): of shape (units used,)
        rows (float): of the matrix: no rank can exceed them
        units (float): of the layer

    Returns:
        Dict[str, float]: with 'units_used' where that is not all of them

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._formulas import of_rows
        >>> import numpy as np
        >>> of_rows(2., np.ones(4), rows=100., units=4.), of_rows(2., np.ones(4), rows=100., units=9.)
        ({'value': 2.0, 'rows': 100.0}, {'value': 2.0, 'rows': 100.0, 'units_used': 4})
    """
    columns = {'value': value, 'rows': rows}
    return columns if len(spectrum) == units else {**columns, 'units_used': len(spectrum)}
