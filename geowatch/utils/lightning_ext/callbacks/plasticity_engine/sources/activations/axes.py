"""
On which axes of a tensor the units of a layer are.

They start where the layer puts them (``layers.py``) and are followed through
whatever comes before the activation: norms, dropout, sums, permutations,
reshapes. A reshape may spread them over several axes, as the heads of
attention, or put them on one axis with something else, as channels and
examples: each piece is a :class:`Part`, and all of them together tell the
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
import functools
import math
from typing import NamedTuple

import torch

from .rules import Rules


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


# --- where units go -------------------------------------------------------------

# Rules for where each axis goes: rule(args, kwargs, source, output) returns for
# each axis of the source its axis in the output, None where it is gone.
MOVES = Rules()
_INTEGERS = frozenset((int,))
_RESHAPES = {'reshape', 'view', 'flatten', 'unflatten', 'reshape_as', 'view_as', 'ravel'}


def follow_units(name: str, args: tuple, kwargs: dict, source: torch.Tensor, place: Place,
                 output: torch.Tensor) -> Place:
    """
    Where the units are after a call that may have moved them.

    Args:
        name (str): of the function
        args (tuple): of the call
        kwargs (dict): of the call
        source (Tensor): the input that has the units
        place (Place): where they are in `source`
        output (Tensor): what the call returned

    Returns:
        Place: `place` itself where nothing has moved

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import (
        >>>     Part, follow_units)
        >>> import torch
        >>> x = torch.empty(2, 4, 4, 4)
        >>> channels = (Part(axis=1, size=4),)
        >>> follow_units('permute', (x, (0, 2, 3, 1)), {}, x, channels, x.permute(0, 2, 3, 1))
        (Part(axis=3, size=4, step=1),)
        >>> follow_units('mean', (x, (2, 3)), {}, x, channels, x.mean((2, 3)))
        (Part(axis=1, size=4, step=1),)
        >>> # One axis of frames and channels, and apart again
        >>> together = follow_units('reshape', (), {}, x, channels, x.reshape(8, 4, 4))
        >>> together
        (Part(axis=0, size=4, step=1),)
        >>> follow_units('reshape', (), {}, x.reshape(8, 4, 4), together, x)
        (Part(axis=1, size=4, step=1),)
        >>> # Two heads of two features each
        >>> follow_units('view', (), {}, x, (Part(3, 4),), x.view(2, 4, 4, 2, 2))
        (Part(axis=3, size=2, step=1), Part(axis=4, size=2, step=1))
    """
    before, after = source.shape, output.shape
    move = MOVES.get(name)
    if not place or (before == after and (move is None or output is source)):
        return place  # by far the most calls
    if name in _RESHAPES:
        return _reshaped(place, before, after)
    if move is None and len(before) == len(after):
        axes = range(len(before))
    else:
        axes = tuple((move or _moves)(args, kwargs, source, output))
    return _carried(place, axes, before, after, name in SLICES)


@functools.lru_cache(maxsize=4096)
def _carried(place, axes, before, after, is_slice):
    """ A place after each axis has gone to another one, or is gone. """
    moved = []
    for part in place:
        axis = axes[part.axis]
        if axis is not None and axis < len(after):
            own = Part(axis, part.size, part.step)
            if before[part.axis] != after[axis]:
                own = _resized(own, before[part.axis], after[axis], is_slice)
            moved.append(own)
    moved = tuple(part for part in moved if part is not None)
    return place if moved == place else moved


def _resized(part, before, after, is_slice):
    """ A part on an axis that may have become longer, as by concatenation, or shorter. """
    if part.size == before:
        # A sum over all units has none; the one that a slice has picked is one.
        return part._replace(size=after) if after > 1 or is_slice else None
    return part if after % (part.size * part.step) == 0 else None


@functools.lru_cache(maxsize=4096)
def _reshaped(place, before, after):
    """
    A reshape keeps the order of the elements: that an element is of the k-th
    unit of a part says a digit of its number, and so does each axis.
    """
    if math.prod(before) != math.prod(after) or not math.prod(after):  # as a view of other numbers
        return ()
    of_example = math.prod(before[1:])  # elements behind one place on the first axis
    behind = [math.prod(after[i + 1:]) for i in range(len(after))]
    pieces = []
    for axis, size, step in place:
        low = step * math.prod(before[axis + 1:])
        high = low * size
        for i, length in enumerate(after):
            start, end = max(low, behind[i]), min(high, behind[i] * length)
            if start < end and start % behind[i] == 0 and end % start == 0:
                pieces.append((Part(i, end // start, start // behind[i]), end))
    found = []
    for i in dict.fromkeys(part.axis for part, _ in pieces):
        own = [(part, end) for part, end in pieces if part.axis == i]
        if math.prod(part.size for part, _ in own) == after[i]:
            found.append(Part(i, after[i]))
            continue
        # Together with positions; with the examples of a batch, or as all that there is, it stays.
        part, end = own[0]
        for other, other_end in own[1:]:  # neighbours that belong together
            if part.step == other.size * other.step:
                part = Part(i, part.size * other.size, other.step)
            elif other.step == part.size * part.step:
                part, end = Part(i, part.size * other.size, part.step), other_end
        alone = len({x.axis for x, _ in pieces}) == 1
        if alone or (i == 0 and end >= of_example):
            found.append(part)
    place_after = tuple(found)
    return place if place_after == place else place_after


def _dims(args, kwargs, ndim, names=('dim', 'dims', 'axis')):
    """ The dimensions that a call names, not negative, or None. """
    given = next((kwargs[name] for name in names if name in kwargs), None)
    if given is None and len(args) > 1:
        given = args[1:] if isinstance(args[1], int) else args[1]
    given = (given,) if isinstance(given, int) else given
    if not isinstance(given, (list, tuple)) or not _INTEGERS.issuperset(map(type, given)):
        return None
    return [dim % ndim for dim in given]


@MOVES.of('permute')
def _permutes(args, kwargs, source, output):
    dims = _dims(args, kwargs, source.ndim)
    return [dims.index(axis) for axis in range(source.ndim)]


@MOVES.of('transpose', 'swapaxes', 'swapdims')
def _swaps(args, kwargs, source, output):
    first, second = (dim % source.ndim for dim in (*args[1:], *kwargs.values()))
    return _swapped(source.ndim, first, second)


@MOVES.of('t', 'mT', 'mH', 'adjoint')
def _transposes(args, kwargs, source, output):
    return _swapped(source.ndim, -2, -1) if source.ndim > 1 else [0]


def _swapped(ndim, first, second):
    axes = list(range(ndim))
    axes[first], axes[second] = axes[second], axes[first]
    return axes


@MOVES.of('T', 'H')
def _reverses(args, kwargs, source, output):
    return list(range(source.ndim))[::-1]


@MOVES.of('movedim', 'moveaxis')
def _moves_axes(args, kwargs, source, output):
    given = [*args[1:], *kwargs.values()]
    old, new = ([dim % source.ndim for dim in ([x] if isinstance(x, int) else x)] for x in given)
    order = [axis for axis in range(source.ndim) if axis not in old]
    for at, axis in sorted(zip(new, old, strict=True)):
        order.insert(at, axis)
    return [order.index(axis) for axis in range(source.ndim)]


@MOVES.of('stack', 'unsqueeze')
def _inserts(args, kwargs, source, output):
    dim = kwargs.get('dim', args[1] if len(args) > 1 else 0) % output.ndim
    return [axis + (dim <= axis) for axis in range(source.ndim)]


@MOVES.of('squeeze')
def _squeezes(args, kwargs, source, output):
    dims = _dims(args, kwargs, source.ndim)
    gone = [axis for axis in range(source.ndim) if source.shape[axis] == 1 and (dims is None or axis in dims)]
    return _without(source.ndim, gone)


@MOVES.of('select', 'unbind')
def _picks(args, kwargs, source, output):
    dim = kwargs.get('dim', args[1] if len(args) > 1 else 0)
    return _without(source.ndim, [dim % source.ndim])


def _without(ndim, gone):
    return [None if axis in gone else axis - sum(other < axis for other in gone) for axis in range(ndim)]


@MOVES.of('expand', 'expand_as', 'broadcast_to', 'repeat', 'tile')
def _repeats(args, kwargs, source, output):
    return [axis + output.ndim - source.ndim for axis in range(source.ndim)]


@MOVES.of('__getitem__')
def _indexes(args, kwargs, source, output):
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    kinds = [type(item) if type(item) in _PLAIN_INDICES else (_is_mask(item), getattr(item, 'ndim', 1))
             for item in index]
    return _indexed(tuple(kinds), source.ndim)


# Of what is neither of these, a tensor or a list, it is told whether it is a mask, and how many dimensions it has.
_PLAIN_INDICES = frozenset((int, slice, bool, type(None), type(...)))


@functools.lru_cache(maxsize=4096)
def _indexed(kinds, ndim):
    """ Where axes go by an index of items of such kinds. """
    taken = sum(1 if kind in (int, slice) else 0 if kind in _PLAIN_INDICES else kind[1] if kind[0] else 1
                for kind in kinds)
    axes, old, new, merged = [None] * ndim, 0, 0, None
    for kind in kinds:
        if kind in (type(None), bool):
            new += 1
        elif kind is type(...):
            for _ in range(ndim - taken):
                axes[old], old, new = new, old + 1, new + 1
        elif kind is slice:
            axes[old], old, new = new, old + 1, new + 1
        elif kind in (int, (False, 0)):  # one number, also as a tensor
            old += 1
        else:  # a tensor or a list; several take one place together
            is_mask, dims = kind
            if merged is None:
                merged = new
                new += 1 if is_mask else dims
                if not is_mask or dims == 1:
                    axes[old] = merged
            old += dims if is_mask else 1
    for axis in range(old, ndim):
        axes[axis], new = new, new + 1
    return axes


def _is_mask(item):
    return isinstance(item, torch.Tensor) and item.dtype in {torch.bool, torch.uint8}


@MOVES.of('unfold')
def _unfolds(args, kwargs, source, output):
    # Of a tensor one more axis at the end, of an image patches with their channels first.
    return range(source.ndim) if output.ndim > source.ndim else [0, 1, *[2] * (source.ndim - 2)]


def _moves(args, kwargs, source, output):
    """ All other functions that change the number of dimensions, such as reductions. """
    if not output.ndim:
        return [None] * source.ndim
    dims = _dims(args[:2], kwargs, source.ndim) if source.ndim else None
    if dims is not None and len(set(dims)) == source.ndim - output.ndim:
        return _without(source.ndim, set(dims))
    # Leading axes that are merged or new: count from the end.
    shift = output.ndim - source.ndim
    return [axis + shift if 0 <= axis + shift and output.shape[axis + shift] == source.shape[axis]
            else axis if axis < output.ndim and output.shape[axis] == source.shape[axis] else None
            for axis in range(source.ndim)]
