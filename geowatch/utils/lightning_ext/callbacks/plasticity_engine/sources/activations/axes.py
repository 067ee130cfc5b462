"""
On which axes of a tensor the units of a layer are.

They start where the layer puts them (``layers.py``) and are followed through
whatever comes before the activation: norms, dropout, sums, permutations,
reshapes (``moves.py``). A reshape may spread them over several axes, as the
heads of attention, or put them on one axis with something else, as channels
and examples: each piece is a :class:`Part`, and all of them together tell the
units apart. So the number of units is that of the layer, whatever happens to
its output.

Where that cannot be, these are the rules:

* No layer before the activation, nor a norm: axis 1 of images and volumes (4 or
  5 dimensions), else the last.
* A part of the units that gets onto one axis with positions becomes positions,
  if the others stay: a pixel shuffle, the patches of an image, the anchors of
  a detector. Together with the examples of a batch it stays a part.
* A function that sums over units, or picks one, leaves the other parts.
* Of a product of two activations, as in attention, the units are the columns
  of the right operand, else the rows of the left. The scores of attention have
  none.
"""
import math
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """
    A piece of the units on one axis.

    Attributes:
        axis (int): not negative
        size (int): how many it tells apart
        step (int): how many neighbours on the axis belong to one of them, more
            than 1 after a reshape put units and positions on one axis
    """
    axis: int
    size: int
    step: int = 1


Place = tuple[Part, ...]  # empty where no axis has units

# Functions that take a part of a tensor, such as one time step.
SLICES = {'__getitem__', 'select', 'narrow', 'chunk', 'split', 'split_with_sizes', 'tensor_split',
          'unbind', 'index_select', 'unsafe_chunk', 'unsafe_split'}


def default_axis(tensor: torch.Tensor) -> int:
    """
    The axis where no layer is known to have made the tensor.

    Args:
        tensor (Tensor): at least 1-d

    Returns:
        int: 1 for images and volumes (4 or 5 dimensions), else the last

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import default_axis
        >>> import torch
        >>> default_axis(torch.empty(2, 3, 8, 8)), default_axis(torch.empty(2, 5, 3))
        (1, 2)
    """
    return 1 if tensor.ndim in {4, 5} else tensor.ndim - 1


def whole(tensor: torch.Tensor, axes) -> Place:
    """
    The place of units that are all there is on some axes.

    Args:
        tensor (Tensor):
        axes (Iterable[int]): may be negative

    Returns:
        Place:
    """
    return tuple(Part(axis % tensor.ndim, tensor.shape[axis]) for axis in axes if -tensor.ndim <= axis < tensor.ndim)


def units_in(place: Place) -> int:
    """
    How many units a place tells apart.

    Args:
        place (Place):

    Returns:
        int:
    """
    return math.prod(part.size for part in place)


def units_last(tensor: torch.Tensor, place: Place) -> tuple[torch.Tensor, int]:
    """
    A tensor with all units on one axis.

    Args:
        tensor (Tensor):
        place (Place): not empty

    Returns:
        Tuple[Tensor, int]: itself and their axis where they are on one
            already, else a matrix of samples and units, and 1

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import (
        >>>     Part, units_last)
        >>> import torch
        >>> # Heads on the axis of the examples, features on the last
        >>> heads, features = Part(axis=0, size=3), Part(axis=2, size=4)
        >>> rows, axis = units_last(torch.empty(2 * 3, 5, 4), (heads, features))
        >>> tuple(rows.shape), axis
        ((10, 12), 1)
    """
    if len(place) == 1 and place[0].size == tensor.shape[place[0].axis]:
        return tensor, place[0].axis
    tensor, axes = parts_apart(tensor, place)
    others = [axis for axis in range(tensor.ndim) if axis not in axes]
    return tensor.permute(*others, *axes).flatten(len(others)).flatten(0, len(others) - 1), 1


def each_apart(tensor: torch.Tensor, place: Place, matrices: Place, labels=None) -> list[torch.Tensor]:
    """
    The outputs of a layer that has several matrices, each by itself.

    Args:
        tensor (Tensor):
        place (Place): of the units
        matrices (Place): of the matrices
        labels (Tuple[Tensor, int] | None): for each place on `matrices` which
            of so many it is; by default they are all different

    Returns:
        List[Tensor]: for each matrix, of shape (samples, units)

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import (
        >>>     Part, each_apart)
        >>> import torch
        >>> [tuple(x.shape) for x in each_apart(torch.empty(5, 2 * 3), (Part(1, 3),), (Part(1, 2, step=3),))]
        [(5, 3), (5, 3)]
    """
    tensor, axes = parts_apart(tensor, (*matrices, *place))
    first, last = axes[:len(matrices)], axes[len(matrices):]
    others = [axis for axis in range(tensor.ndim) if axis not in axes]
    found = tensor.permute(*first, *others, *last).flatten(-len(last)).flatten(0, len(first) - 1).flatten(1, -2)
    if labels is None:
        return list(found)
    own, count = labels
    return [found[own == i] for i in range(count)]


def parts_apart(tensor: torch.Tensor, place: Place) -> tuple[torch.Tensor, list[int]]:
    """
    A tensor in which each part of a place has an axis to itself.

    Args:
        tensor (Tensor):
        place (Place):

    Returns:
        Tuple[Tensor, List[int]]: and the axes, in the order of the parts
    """
    axes, shift = {}, 0
    for axis in sorted({part.axis for part in place}):
        at = axis + shift
        left, sizes = tensor.shape[at], []
        for part in sorted((part for part in place if part.axis == axis), key=lambda part: -part.step):
            behind = part.size * part.step
            sizes += [left // behind, part.size]
            axes[part] = at + len(sizes) - 1
            left = part.step
        tensor = tensor.unflatten(at, (*sizes, left))
        shift += len(sizes)
    return tensor, [axes[part] for part in place]
