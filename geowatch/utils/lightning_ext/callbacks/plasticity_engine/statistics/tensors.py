"""
Statistics of tensors that are there as a whole: weights, gradients, updates.
"""
from collections.abc import Callable, Collection

import torch

from ..sharding import part_for_gram
from .spectrum import gram
from .sums import sums


class Gram:
    """
    The Gram matrix of the smaller side of a tensor, computed when it is asked for.

    So that of many tensors one matrix at a time is there, which may be larger
    than the tensor. It adds up over the parts that processes hold.

    Args:
        tensor (Tensor | Slice | Weight): of two or more dimensions, which does not change until then
        factor (float): by which the matrix is multiplied

    Attributes:
        shape (Tuple[int, int]): of the Gram matrix

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import Gram
        >>> import torch
        >>> own = Gram(torch.tensor([[3., 4.]]))
        >>> own.shape, own.make().tolist()
        ((1, 1), [[25.0]])
    """

    def __init__(self, tensor, factor=1.):
        self._tensor = tensor = tensor.detach()
        self._factor = factor
        rows = tensor.shape[0]
        size = min(rows, tensor.numel() // rows)
        self.shape = (size, size)

    def make(self):
        """ The matrix (Tensor), float64, of the part that this process holds. All that share the tensor call it. """
        part, share, side = part_for_gram(self._tensor)
        matrix, factor = gram(part, side), share * self._factor
        return matrix if factor == 1 else matrix.mul_(factor)

    def __mul__(self, factor):
        return Gram(self._tensor, self._factor * factor)


def grams(tensors: dict[str, torch.Tensor], fields: Collection[str]) -> dict[str, dict]:
    """
    The Gram matrix of the smaller side of each tensor.

    Args:
        tensors (Dict[str, Tensor]): of two or more dimensions
        fields (Collection[str]): 'gram'

    Returns:
        Dict[str, Dict[str, Gram]]: to be made

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import grams
        >>> import torch
        >>> grams({'a': torch.tensor([[3., 4.]])}, ['gram'])['gram']['a'].make().tolist()
        [[25.0]]
    """
    return {'gram': {name: Gram(tensor) for name, tensor in tensors.items()}}


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
