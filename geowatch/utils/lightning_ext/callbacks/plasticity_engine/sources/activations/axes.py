"""
On which axis of a tensor the units are.

A unit is a feature of a linear layer or a channel of a convolution. The axis
starts at the layer that produces a tensor and is followed through whatever
comes before the activation: norms, dropout, sums, permutations, reshapes.
Each function that needs one has a rule, in one of two registries.

Where it cannot be known, these are the rules:

* No layer before the activation, nor a norm: axis 1 of images and volumes (4 or
  5 dimensions), else the last.
* A reshape that splits the units over two axes: of features, the last part; of
  channels, the first one. One that only takes apart what an earlier one had put
  together is followed exactly.
* A tensor that is filled by assignments to parts of it: as without a layer.
* A product of two activations, as in attention: the last axis.
* An indexing or reduction that removes the axis of the units: the last axis.
"""
from typing import NamedTuple

import torch


class Rules(dict):
    """
    Functions by the names of the torch functions that they are for.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import Rules
        >>> rules = Rules()
        >>> @rules.of('relu', 'gelu')
        >>> def keeps(axis):
        >>>     return axis
        >>> rules['gelu'](3)
        3
    """

    def of(self, *names):
        """
        A decorator that registers a rule.

        Args:
            *names (str): of torch functions

        Returns:
            Callable:

        Raises:
            ValueError: if one of them has a rule already
        """
        def register(rule):
            doubles = [name for name in names if name in self]
            if doubles:
                raise ValueError(f'Expected functions without a rule, but got {", ".join(doubles)}')
            self.update(dict.fromkeys(names, rule))
            return rule
        return register


class Place(NamedTuple):
    """
    Where the units are in a tensor.

    Attributes:
        axis (int): not negative
        units (int): how many the layer made
        step (int): how many neighbours on the axis belong to one unit, more
            than 1 after a reshape put units and positions on one axis
    """
    axis: int
    units: int
    step: int = 1


# Where a network starts with a norm, its axis is that of the norm.
NORM_AXIS = {'batch_norm': 1, 'instance_norm': 1, 'group_norm': 1, 'layer_norm': -1, 'rms_norm': -1}
# Functions that take a part of a tensor, such as one time step.
SLICES = {'__getitem__', 'select', 'narrow', 'chunk', 'split', 'split_with_sizes', 'tensor_split',
          'unbind', 'index_select', 'unsafe_chunk', 'unsafe_split'}
# Layers when one operand is a weight: a product of two activations, as in attention, is none.
PRODUCTS = {'matmul', '__matmul__', '__rmatmul__', 'mm', 'mv', 'bmm', 'addmm', 'addmv', 'addbmm', 'baddbmm',
            'einsum', 'tensordot', 'inner'}


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


# --- where a layer puts its units ----------------------------------------------

LAYERS = Rules()


def layer_axis(name: str, args: tuple, owners: list, output) -> int:
    """
    The axis of the units that a layer has just produced.

    Args:
        name (str): of the function, a key of LAYERS
        args (tuple): of the call
        owners (List[str | None]): for each tensor argument, not None if it is
            a weight
        output (Tensor | Tuple[Tensor, ...]):

    Returns:
        int: may be negative

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import layer_axis
        >>> import torch
        >>> layer_axis('conv2d', (), [], torch.empty(2, 3, 8, 8))
        -3
        >>> layer_axis('matmul', (), ['proj', None], torch.empty(2, 4, 5))
        -2
        >>> layer_axis('einsum', ('bnc,cd->bdn',), [None, 'proj'], torch.empty(2, 4, 5))
        -2
    """
    return LAYERS[name](args, owners, output)


@LAYERS.of('linear', 'bilinear', 'embedding', 'embedding_bag', 'multi_head_attention_forward', 'lstm', 'gru',
           'rnn_tanh', 'rnn_relu', 'lstm_cell', 'gru_cell', 'rnn_tanh_cell', 'rnn_relu_cell',
           'mv', 'addmv', 'tensordot', 'inner')
def _features(args, owners, output):
    return -1


# Unbatched inputs have no batch axis, so that it is counted from the end.
for _dims in (1, 2, 3):
    LAYERS.of(f'conv{_dims}d', f'conv_transpose{_dims}d')(lambda *call, axis=-1 - _dims: axis)


@LAYERS.of('matmul', '__matmul__', 'mm', 'bmm')
def _product(args, owners, output):
    """ The columns of the right operand are units, or the rows of a weight on the left. """
    weight_first = len(owners) > 1 and owners[0] is not None and owners[1] is None
    return -2 if weight_first and getattr(output, 'ndim', 0) > 1 else -1


@LAYERS.of('__rmatmul__')
def _reflected_product(args, owners, output):
    return _product(args, owners[1::-1], output)


@LAYERS.of('addmm', 'addbmm', 'baddbmm')
def _sum_of_product(args, owners, output):
    return _product(args, owners[1:], output)


@LAYERS.of('einsum')
def _einsum(args, owners, output):
    """ The last letter of the output that only the weight has. """
    if isinstance(args[0], str) and '->' in args[0]:
        operands, out = args[0].replace(' ', '').split('->')
        operands = operands.split(',')
        if len(operands) == len(owners):
            of_inputs = ''.join(x for x, owner in zip(operands, owners, strict=True) if owner is None)
            of_weight = [letter for letter in out if letter.isalpha() and letter not in of_inputs]
            if of_weight:
                return out.index(of_weight[-1]) - len(out)
    return -1


# --- where units go -------------------------------------------------------------

MOVES = Rules()


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
        Place:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import (
        >>>     Place, follow_units)
        >>> import torch
        >>> x = torch.empty(2, 4, 4, 4)
        >>> channels = Place(axis=1, units=4)
        >>> follow_units('permute', (x, (0, 2, 3, 1)), {}, x, channels, x.permute(0, 2, 3, 1)).axis
        3
        >>> follow_units('mean', (x, (2, 3)), {}, x, channels, x.mean((2, 3))).axis
        1
        >>> # One axis of frames and channels, and apart again
        >>> together = follow_units('reshape', (), {}, x, Place(axis=1, units=4), x.reshape(8, 4, 4))
        >>> together
        Place(axis=0, units=4, step=1)
        >>> follow_units('reshape', (), {}, x.reshape(8, 4, 4), together, x)
        Place(axis=1, units=4, step=1)
    """
    if output is source or (name not in PRODUCTS and output.shape == source.shape
                            and output.stride() == source.stride()):
        return place  # by far the most calls
    if not output.ndim or not source.ndim:  # as the gradient of a loss
        return place._replace(axis=max(0, output.ndim - 1))
    return MOVES.get(name, _moves)(args, kwargs, source, place, output)


@MOVES.of('reshape', 'view', 'flatten', 'unflatten', 'reshape_as', 'view_as', 'ravel')
def _reshapes(args, kwargs, source, place, output):
    """ A reshape keeps the order of the elements, and so how many of them are behind one unit. """
    if output.numel() != source.numel():  # as a view of other numbers
        return _moves(args, kwargs, source, place, output)
    before, after = source.shape, output.shape
    axis, units, step = place
    inner = step
    for size in before[axis + 1:]:
        inner *= size
    first = last = len(after) - 1
    behind = step_of_last = 1
    for i in reversed(range(len(after))):
        if behind == inner and after[i] == units:
            return Place(i, units)
        if behind <= inner < behind * after[i]:
            last, step_of_last = i, inner // behind
        if behind < inner * units <= behind * after[i]:
            first = i
        behind *= after[i]
    # Where units are split: features take the last part, as in the heads of
    # attention; channels the first, as a pixel shuffle makes positions of the others.
    if first == last or axis == len(before) - 1:
        return Place(last, units, step_of_last)
    return Place(first, after[first])


@MOVES.of(*PRODUCTS, 'scaled_dot_product_attention')
def _attends(args, kwargs, source, place, output):
    return _at(output.ndim - 1, source, place, output)


@MOVES.of('permute', 'transpose', 'swapaxes', 'swapdims', 'movedim', 'moveaxis', 't', 'mT', 'T')
def _permutes(args, kwargs, source, place, output):
    axis = _axis_of_view(source, place.axis, output)
    # Where a part of the units is not on one axis any more, the last.
    return _at(output.ndim - 1 if axis is None else axis, source, place, output)


@MOVES.of('stack')
def _stacks(args, kwargs, source, place, output):
    dim = kwargs.get('dim', args[1] if len(args) > 1 else 0) % output.ndim
    return _at(place.axis + (dim <= place.axis), source, place, output)


def _moves(args, kwargs, source, place, output):
    """ All other functions: indexing, reductions, and what keeps each axis. """
    axis, last = place.axis, output.ndim - 1
    of_view = _axis_of_view(source, axis, output)
    if of_view is not None:
        return _at(of_view, source, place, output)
    if output.ndim == source.ndim:
        return _at(axis, source, place, output)
    dim = kwargs.get('dim', args[1] if len(args) > 1 else None)
    dims = [dim] if isinstance(dim, int) else dim
    if isinstance(dims, (list, tuple)) and all(isinstance(d, int) for d in dims):
        dims = {d % source.ndim for d in dims}
        if len(dims) == source.ndim - output.ndim and axis not in dims:
            return _at(axis - sum(d < axis for d in dims), source, place, output)
    # Indexing with a mask merges leading axes: count from the end.
    for guess in (axis - source.ndim + output.ndim, axis):
        if 0 <= guess <= last and output.shape[guess] == source.shape[axis]:
            return _at(guess, source, place, output)
    return _at(last, source, place, output)


def _at(axis, source, place, output):
    # Units are fewer in a part of them, as after a chunk.
    units = output.shape[axis] if source.shape[place.axis] == place.units else place.units
    return Place(axis, units, place.step)


def _axis_of_view(source, axis, output):
    """ A view keeps the stride of an axis, wherever it goes. """
    try:
        if source.untyped_storage()._cdata != output.untyped_storage()._cdata:
            return None
    except (NotImplementedError, RuntimeError):  # a tensor without storage of its own
        return None
    same = [i for i, size in enumerate(output.shape)
            if size == source.shape[axis] and output.stride(i) == source.stride(axis)]
    return axis if axis in same else same[-1] if same else None
