"""
What a metric returns, and the sums that most of them share.
"""
import dataclasses

import torch


@dataclasses.dataclass
class Result:
    """
    One measurement, still on the device.

    Attributes:
        value (Tensor): 0-d, the value of the whole network
        layers (Dict[str, Dict[str, Tensor]]): layer or site name to its 0-d
            numbers; each has at least a 'value'.
        samples (Tensor | None): 0-d, how many rows an activation metric saw

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._result import Result
        >>> import torch
        >>> result = Result(torch.tensor(0.5), {'fc1': {'value': torch.tensor(0.5)}})
        >>> result.samples is None
        True
    """
    value: torch.Tensor
    layers: dict
    samples: torch.Tensor = None


def float64_sum_abs(tensor):
    """
    Sum of absolute values, accumulated in float64 without a copy.

    Args:
        tensor (Tensor): any shape, real floating point

    Returns:
        Tensor: 0-d float64

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._result import float64_sum_abs
        >>> import torch
        >>> float(float64_sum_abs(torch.tensor([[1., -3.]])))
        4.0
    """
    return torch.linalg.vector_norm(tensor.detach(), 1, dtype=torch.float64)


def total(stats, field):
    """
    Sum of one field over layers.

    Args:
        stats (Dict[str, Dict[str, Tensor]]): layer name to statistics
        field (str): which 0-d statistic

    Returns:
        Tensor: 0-d

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._result import total
        >>> import torch
        >>> stats = {'a': {'n': torch.tensor(2.)}, 'b': {'n': torch.tensor(3.)}}
        >>> float(total(stats, 'n'))
        5.0
    """
    return torch.stack([layer[field] for layer in stats.values()]).sum()
