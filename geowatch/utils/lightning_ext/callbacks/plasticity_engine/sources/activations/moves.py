"""
Where units go: to which axes of its output a function takes those of its input.
"""
import functools
import math

import torch

from .axes import SLICES, Part, Place
from .rules import Rules

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
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import Part
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.moves import follow_units
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


def stacked_axis(args, kwargs, output):
    """ The axis (int) that a stack of tensors has more than they. """
    return kwargs.get('dim', args[1] if len(args) > 1 else 0) % output.ndim


@MOVES.of('stack', 'unsqueeze')
def _inserts(args, kwargs, source, output):
    dim = stacked_axis(args, kwargs, output)
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
