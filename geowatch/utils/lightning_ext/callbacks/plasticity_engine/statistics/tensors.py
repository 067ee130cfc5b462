"""
Statistics of tensors that are there as a whole: weights, gradients, updates.
"""
from collections.abc import Callable, Collection

import torch

from ..sharding import part_for_gram
from .spectrum import gram
from .sums import sums


def grams(tensors: dict[str, torch.Tensor], fields: Collection[str]) -> dict[str, dict]:
    """
    The Gram matrix of the smaller side of each tensor.

    Args:
        tensors (Dict[str, Tensor]): of two or more dimensions
        fields (Collection[str]): 'gram'

    Returns:
        Dict[str, Dict[str, Tensor]]: float64, of the part that this process holds

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import grams
        >>> import torch
        >>> grams({'a': torch.tensor([[3., 4.]])}, ['gram'])['gram']['a'].tolist()
        [[25.0]]
    """
    found, error = {}, None
    for name, tensor in tensors.items():
        # All processes have to shard anew what all do, also if one has failed.
        part, share, side = part_for_gram(tensor)
        try:
            found[name] = gram(part, side)
            if share != 1:
                found[name] *= share
        except Exception as ex:
            error = ex
    if error is not None:
        raise error
    return {'gram': found}


# Which function makes which fields, each in one look at a tensor.
STATISTICS = {sums: ('count', 'abs', 'squares', 'nonfinite'), grams: ('gram',)}


def functions_of(fields: Collection[str]) -> dict[Callable, tuple[str, ...]]:
    """
    Who makes some fields.

    Args:
        fields (Collection[str]): additive ones

    Returns:
        Dict[Callable, Tuple[str, ...]]: function to those of the fields that it makes

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import functions_of
        >>> {function.__name__: own for function, own in functions_of(['gram', 'abs']).items()}
        {'sums': ('abs',), 'grams': ('gram',)}
    """
    found = {function: tuple(field for field in own if field in fields) for function, own in STATISTICS.items()}
    return {function: own for function, own in found.items() if own}
