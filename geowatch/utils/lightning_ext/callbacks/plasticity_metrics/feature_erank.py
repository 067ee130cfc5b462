"""
Effective rank of the hidden features of every layer, and their mean.

Rows are samples, columns are units; the features are those after the
activation. Neither centred nor squared, see :mod:`.erank`.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.
"""
import torch

from . import _spectrum
from ._result import Result


class FeatureERank:
    """
    Effective rank of post-activation features [Dohare2024]_.

    Logs ``feature_erank``, the mean over layers.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics.feature_erank import FeatureERank
        >>> import torch
        >>> metric, stats = FeatureERank(), {}
        >>> metric.observe(stats, 'fc1', torch.eye(3), (0.,))
        >>> metric.observe(stats, 'fc1', torch.eye(3), (0.,))
        >>> round(float(metric.compute(stats)['feature_erank'].value), 6)
        3.0
    """
    name = 'feature_erank'
    tags = ('feature_erank',)
    looks_at = 'activations'
    dear = True
    max_rows = 4096

    def observe(self, stats, site, features, saturated):
        """
        Add one call of an activation function to the statistics.

        Args:
            stats (Dict[Any, Dict[str, Tensor]]): changed in place
            site (Any): key of the site
            features (Tensor): of shape (rows, units). At most `max_rows` of
                the rows, evenly strided, are used.
            saturated (Tuple[float, ...]): unused
        """
        stride = max(1, -(-len(features) // self.max_rows))
        rows = features[::stride]
        gram = _spectrum.gram(rows, 'columns')
        count = torch.tensor(float(len(rows)), dtype=torch.float64, device=gram.device)
        seen = stats.get(site)
        stats[site] = ({'gram': gram, 'rows': count} if seen is None else
                       {'gram': seen['gram'] + gram, 'rows': seen['rows'] + count})

    def compute(self, stats):
        """
        Values from statistics.

        Args:
            stats (Dict[str, Dict[str, Tensor]]): see :func:`observe`

        Returns:
            Dict[str, Result]: for each tag
        """
        layers = {name: {'value': _spectrum.entropy_rank(s['gram']), 'rows': s['rows']}
                  for name, s in stats.items()}
        value = torch.stack([layer['value'] for layer in layers.values()]).mean()
        return {'feature_erank': Result(value, layers)}
