"""
What each registered metric is, computed by NumPy from raw tensors and without any code of the package.

A function for each metric, from the arrays of one layer to its value; how the
network's value comes from those is in ``of_network``.
"""
import numpy as np
from common import numpy_erank

from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS


def singular(matrix):
    return np.linalg.svd(np.asarray(matrix, dtype=np.float64).reshape(len(matrix), -1), compute_uv=False)


def bits(p):
    return 0. if p in (0, 1) else -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def share_on(z):
    """ Of each unit, on how many of the samples its input is positive. """
    return [np.mean([row[unit] > 0 for row in z]) for unit in range(z.shape[1])]


def least_with(values, share):
    values = sorted(values, reverse=True)
    return next(k for k in range(len(values) + 1) if sum(values[:k]) >= share * sum(values))


# Of a weight or a gradient w, or of the inputs z and outputs h of an activation, both (samples, units).
OF_TENSORS = {
    'weight_mag': lambda w: np.abs(w).mean(),
    'grad_mag': lambda w: np.abs(w).mean(),
    'grad_norm': lambda w: np.sqrt((w ** 2).sum()),
    'erank': lambda w: numpy_erank(w.reshape(len(w), -1)),
    'spectral_norm': lambda w: singular(w).max(),
    'stable_rank': lambda w: (singular(w) ** 2).sum() / (singular(w) ** 2).max(),
}
# Metrics of more than one tensor of a layer: test_tuning.py and test_noise.py have them beside plain training loops.
OF_STEPS = {'update_ratio', 'step_alignment', 'weight_distance', 'noise_scale', 'noise_fraction'}
OF_CALLS = {
    'dead_units': lambda z, h: np.mean([(h[:, unit] == 0).all() for unit in range(h.shape[1])]),
    'rare_units': lambda z, h: np.mean([p < 0.01 for p in share_on(z)]),
    'sign_entropy': lambda z, h: np.mean([bits(p) for p in share_on(z)]),
    'feature_erank': lambda z, h: numpy_erank(h),
    'centred_erank': lambda z, h: numpy_erank(h - h.mean(0)),
    'srank99': lambda z, h: least_with(singular(h), 0.99),
}


def of_network(name, layers):
    """
    The value of the network.

    Args:
        name (str): of a metric
        layers (List[ndarray | Tuple[ndarray, ndarray]]): w, or z and h, of each layer that is finite
    """
    if name in ('weight_mag', 'grad_mag'):
        return np.abs(np.concatenate([w.ravel() for w in layers])).mean()
    if name == 'grad_norm':
        return np.sqrt((np.concatenate([w.ravel() for w in layers]) ** 2).sum())
    if name in OF_TENSORS:
        return np.mean([OF_TENSORS[name](w) for w in layers])
    values = [OF_CALLS[name](z, h) for z, h in layers]
    sizes = [h.shape[1] for _, h in layers] if METRICS[name].network == 'units' else None
    return np.average(values, weights=sizes)
