"""
Products: a layer where one operand is a weight, and where units go where none is, as in attention.
"""
import torch

from .axes import Part, Place
from .layers import letters_of
from .rules import Rules

# Rules: rule(args, tensors, output) returns for each operand of an activation
# (tensor, axes), where axes has for each of its axes that of the output, None
# where it is summed over.
OPERANDS = Rules()
PRODUCTS = {'matmul', '__matmul__', '__rmatmul__', 'mm', 'mv', 'bmm', 'addmm', 'addmv', 'addbmm', 'baddbmm',
            'einsum', 'tensordot', 'inner', 'cdist'}


def follow_product(name: str, args: tuple, tensors: list, places: list, output: torch.Tensor):
    """
    Whose units a product of activations has.

    Args:
        name (str): of the function
        args (tuple): of the call
        tensors (List[Tensor]): operands
        places (List[Place | None]): of the units of each, None where they are not known
        output (Tensor):

    Returns:
        Tuple[int, Place]: which operand, and where they are: nowhere if they
            are summed over, as in the scores of attention

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import Part
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.products import (
        >>>     follow_product)
        >>> import torch
        >>> # Pixels attend to each other; channels come first
        >>> v, scores = torch.empty(2, 3, 7), torch.empty(2, 7, 7)
        >>> follow_product('matmul', (v, scores), [v, scores], [(Part(1, 3),), ()], v @ scores)
        (0, (Part(axis=1, size=3, step=1),))
    """
    rule = OPERANDS.get(name)
    last = (max(i for i, place in enumerate(places) if place is not None), ())
    if rule is None:
        return last
    axes = rule(args, tensors, output)
    for i in reversed(range(len(tensors))):
        place = places[i] and _carried(places[i], axes[i])
        if place:
            return i, place
    return last


def _carried(place: Place, axes) -> Place:
    moved = [axes[part.axis] for part in place] if axes is not None else [None]
    return () if None in moved else tuple(
        Part(axis, part.size, part.step) for axis, part in zip(moved, place, strict=True))


@OPERANDS.of('matmul', '__matmul__', '__rmatmul__', 'mm', 'bmm', 'addmm', 'baddbmm')
def _matrices(args, tensors, output):
    axes = [None] * len(tensors)
    if len(tensors) < 2 or min(x.ndim for x in tensors[-2:]) < 2:
        return axes
    for i, gone in ((-2, 1), (-1, 2)):
        ndim = tensors[i].ndim
        axes[i] = [None if axis == ndim - gone else axis + output.ndim - ndim for axis in range(ndim)]
    return axes


@OPERANDS.of('scaled_dot_product_attention')
def _attention(args, tensors, output):
    value = tensors[2]
    return [None, None, [None if axis == value.ndim - 2 else axis for axis in range(value.ndim)],
            *[None] * (len(tensors) - 3)]


@OPERANDS.of('einsum')
def _einsum(args, tensors, output):
    letters = letters_of(args, len(tensors))
    if letters is None or '.' in args[0]:
        return [None] * len(tensors)
    operands, out = letters
    return [[out.index(x) if x in out else None for x in operand] for operand in operands]
