"""
What a metric is, and what it returns.
"""
import dataclasses

import torch


@dataclasses.dataclass
class Result:
    """
    One measurement, still on the device.

    Attributes:
        value (Tensor): 0-d, the value of the whole network
        names (List[str]): the layers or sites
        columns (Dict[str, Tensor | List[float]]): for each layer a number;
            'value' is one of them. What is 0 in another column is not
            written, so that 'nonfinite' is there only where it says something.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._metric import Result
        >>> import torch
        >>> Result(torch.tensor(.5), ['fc1'], {'value': torch.tensor([.5])}).names
        ['fc1']
    """
    value: torch.Tensor
    names: list
    columns: dict


class Metric:
    """
    Base class of the metrics.

    A metric turns what it looks at into statistics that add up, over batches
    and over processes, and statistics into values::

        statistics: {layer or site: {field: tensor}}, tensors that add up

    What is not finite in one layer is left out of the network's value.

    Attributes:
        name (str): as users write it
        looks_at (str): 'weights', 'gradients' or 'activations'
        dear (bool): if True, ``interval='auto'`` is once per epoch
        tags (Tuple[str, ...]): what it logs, under ``plasticity/``

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import Metric, Result
        >>> import torch
        >>> class LargestWeight(Metric):
        >>>     name, looks_at, tags = 'largest_weight', 'weights', ('largest_weight',)
        >>>     def statistics(self, tensors, scale=1.):
        >>>         return {name: {'largest': w.detach().abs().max()} for name, w in tensors.items()}
        >>>     def compute(self, stats):
        >>>         largest = torch.stack([own['largest'] for own in stats.values()])
        >>>         return {self.name: Result(largest.max(), list(stats), {'value': largest})}
        >>> metric = LargestWeight()
        >>> metric.compute(metric.statistics({'fc': torch.tensor([[1., -3.]])}))['largest_weight'].value.item()
        3.0
    """
    name = None
    looks_at = None
    dear = True
    tags = ()

    def why_not(self, tensor):
        """
        Why a weight cannot be measured by this metric.

        Args:
            tensor (Tensor): the weight

        Returns:
            str | None: None if it can be
        """

    def statistics(self, tensors, scale=1.):
        """
        Statistics of weights or gradients.

        Args:
            tensors (Dict[str, Tensor]): layer name to tensor
            scale (float): what gradients are multiplied by, under a GradScaler

        Returns:
            Dict[str, Dict[str, Tensor]]: see the class
        """
        raise NotImplementedError

    def observe(self, stats, site, output, axis, saturated):
        """
        Add one call of an activation function to the statistics.

        Args:
            stats (Dict[Any, Dict[str, Tensor]]): changed in place
            site (Any): key of the site
            output (Tensor): what the function returned, of any shape
            axis (int): of the units in `output`
            saturated (Tuple[float, ...]): outputs at which a unit is dead
        """
        raise NotImplementedError

    def compute(self, stats):
        """
        Values from statistics.

        Args:
            stats (Dict[str, Dict[str, Tensor]]): see the class

        Returns:
            Dict[str, Result]: for each tag
        """
        raise NotImplementedError


def check_result(tag, result):
    """
    Refuse what could not be written, for metrics that are being developed.

    Args:
        tag (str): of the result
        result (Result):

    Returns:
        Result: the same

    Raises:
        ValueError: if it is not what :class:`Result` says

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._metric import Result, check_result
        >>> import torch
        >>> check_result('mine', Result(torch.tensor(.5), ['fc1'], {'value': [.5]})).names
        ['fc1']
    """
    if not isinstance(result, Result):
        raise ValueError(f'Expected {tag!r} to be a Result, but got {result!r}')
    if not isinstance(result.value, torch.Tensor) or result.value.ndim:
        raise ValueError(f'Expected `value` of {tag!r} to be a tensor without dimensions, but got {result.value!r}')
    sizes = {key: len(x) for key, x in result.columns.items()}
    if 'value' not in sizes or set(sizes.values()) != {len(result.names)}:
        raise ValueError(f"Expected 'value' and other columns of {tag!r} to have a number for each of "
                         f'{len(result.names)} layers, but got {sizes}')
    return result


def column(stats, field):
    """
    One field of all layers.

    Args:
        stats (Dict[str, Dict[str, Tensor]]): layer name to statistics
        field (str): which one, of the same shape in all layers

    Returns:
        Tensor: with one row for each layer

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._metric import column
        >>> import torch
        >>> column({'a': {'n': torch.tensor(2.)}, 'b': {'n': torch.tensor(3.)}}, 'n').tolist()
        [2.0, 3.0]
    """
    return torch.stack([layer[field] for layer in stats.values()])


def finite_mean(values):
    """
    Mean over the layers whose value is finite, nan if there is none.

    Args:
        values (Tensor): of shape (layers,)

    Returns:
        Tensor: 0-d

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._metric import finite_mean
        >>> import torch
        >>> finite_mean(torch.tensor([1., float('nan'), 3.])).item()
        2.0
    """
    return torch.where(values.isfinite(), values, torch.nan).nanmean()


def ratio_of_sums(above, below):
    """
    Sum over sum, over the layers where both are finite.

    Args:
        above (Tensor): of shape (layers,)
        below (Tensor): of shape (layers,)

    Returns:
        Tensor: 0-d, nan if nothing is finite

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._metric import ratio_of_sums
        >>> import torch
        >>> ratio_of_sums(torch.tensor([1., float('inf'), 3.]), torch.tensor([2., 2., 2.])).item()
        1.0
    """
    finite = above.isfinite() & below.isfinite()
    return torch.where(finite, above, 0.).sum() / torch.where(finite, below, 0.).sum()
