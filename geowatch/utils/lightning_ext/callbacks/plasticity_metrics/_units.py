"""
On which axis of a tensor the units are.

A unit is a feature of a linear layer or a channel of a convolution. The axis
starts at the layer that produces a tensor and is followed through whatever
comes before the activation: norms, dropout, sums, permutations, reshapes.

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

# Functions that run a layer. True: always; False: only when one operand is a
# weight, since a product of two activations, as in attention, is no layer.
LAYER_FUNCTIONS = {
    'linear': True, 'bilinear': True, 'embedding': True, 'embedding_bag': True,
    'conv1d': True, 'conv2d': True, 'conv3d': True,
    'conv_transpose1d': True, 'conv_transpose2d': True, 'conv_transpose3d': True,
    'multi_head_attention_forward': True,
    'lstm': True, 'gru': True, 'rnn_tanh': True, 'rnn_relu': True,
    'lstm_cell': True, 'gru_cell': True, 'rnn_tanh_cell': True, 'rnn_relu_cell': True,
    'matmul': False, '__matmul__': False, '__rmatmul__': False, 'mm': False, 'mv': False,
    'bmm': False, 'addmm': False, 'addmv': False, 'addbmm': False, 'baddbmm': False,
    'einsum': False, 'tensordot': False, 'inner': False,
}
_PRODUCTS = {name for name, always in LAYER_FUNCTIONS.items() if not always}
# Which of its tensors is the left one of the product, where a weight makes rows the units.
_WEIGHT_FIRST = {'matmul': 0, '__matmul__': 0, '__rmatmul__': 0, 'mm': 0, 'bmm': 0,
                 'addmm': 1, 'addbmm': 1, 'baddbmm': 1}
# Where a network starts with a norm, its axis is that of the norm.
NORM_AXIS = {'batch_norm': 1, 'instance_norm': 1, 'group_norm': 1, 'layer_norm': -1, 'rms_norm': -1}
# Functions that take a part of a tensor, such as one time step.
SLICES = {'__getitem__', 'select', 'narrow', 'chunk', 'split', 'split_with_sizes', 'tensor_split',
          'unbind', 'index_select', 'unsafe_chunk', 'unsafe_split'}
_RESHAPES = {'reshape', 'view', 'flatten', 'unflatten', 'reshape_as', 'view_as', 'ravel'}


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


def default_axis(tensor):
    """
    The axis where no layer is known to have made the tensor.

    Args:
        tensor (Tensor): at least 1-d

    Returns:
        int: 1 for images and volumes (4 or 5 dimensions), else the last

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._units import default_axis
        >>> import torch
        >>> default_axis(torch.empty(2, 3, 8, 8)), default_axis(torch.empty(2, 5, 3))
        (1, 2)
    """
    return 1 if tensor.ndim in {4, 5} else tensor.ndim - 1


def layer_axis(name, args, kwargs, owners, output):
    """
    The axis of the units that a layer has just produced.

    Args:
        name (str): of the function, a key of LAYER_FUNCTIONS
        args (tuple): of the call
        kwargs (dict): of the call
        owners (List[str | None]): for each tensor argument, not None if it is
            a weight
        output (Tensor | Tuple[Tensor, ...]):

    Returns:
        int: may be negative

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._units import layer_axis
        >>> import torch
        >>> layer_axis('conv2d', (), {}, [], torch.empty(2, 3, 8, 8))
        -3
        >>> layer_axis('matmul', (), {}, ['proj', None], torch.empty(2, 4, 5))
        -2
        >>> layer_axis('einsum', ('bnc,cd->bdn',), {}, [None, 'proj'], torch.empty(2, 4, 5))
        -2
    """
    if name.startswith('conv'):
        return -1 - int(name.rstrip('_')[-2])  # unbatched inputs have no batch axis
    if name == 'einsum' and isinstance(args[0], str) and '->' in args[0]:
        operands, out = args[0].replace(' ', '').split('->')
        operands = operands.split(',')
        if len(operands) == len(owners):
            of_inputs = ''.join(x for x, owner in zip(operands, owners, strict=True) if owner is None)
            of_weight = [letter for letter in out if letter.isalpha() and letter not in of_inputs]
            if of_weight:
                return out.index(of_weight[-1]) - len(out)
    if name in _WEIGHT_FIRST and getattr(output, 'ndim', 0) > 1:
        first, second = owners[_WEIGHT_FIRST[name]:][:2]
        if name == '__rmatmul__':
            first, second = second, first
        if first is not None and second is None:  # weight @ x
            return -2
    return -1


def follow_units(name, args, kwargs, source, place, output):
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
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._units import Place, follow_units
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
    if output is source or (name not in _PRODUCTS and output.shape == source.shape
                            and output.stride() == source.stride()):
        return place  # by far the most calls
    if not output.ndim or not source.ndim:  # as the gradient of a loss
        return place._replace(axis=max(0, output.ndim - 1))
    if name in _RESHAPES and output.numel() == source.numel():
        return _reshaped(source.shape, place, output.shape)
    axis = place.axis
    moved = _moved_axis(name, args, kwargs, source, axis, output)
    # Units are fewer in a part of them, as after a chunk.
    units = output.shape[moved] if source.shape[axis] == place.units else place.units
    return Place(moved, units, place.step)


def _moved_axis(name, args, kwargs, source, axis, output):
    units, last = source.shape[axis], output.ndim - 1
    if name in _PRODUCTS or name == 'scaled_dot_product_attention':
        return last
    if _is_view(source, output):
        # A view keeps the stride of an axis, wherever it goes.
        same = [i for i, size in enumerate(output.shape)
                if size == units and output.stride(i) == source.stride(axis)]
        if same:
            return axis if axis in same else same[-1]
    if name in {'permute', 'transpose', 'swapaxes', 'swapdims', 'movedim', 'moveaxis', 't', 'mT', 'T'}:
        return last  # a part of the units is not on one axis any more
    if name == 'stack':
        dim = kwargs.get('dim', args[1] if len(args) > 1 else 0) % output.ndim
        return axis + (dim <= axis)
    if output.ndim == source.ndim:
        return axis
    dim = kwargs.get('dim', args[1] if len(args) > 1 else None)
    dims = [dim] if isinstance(dim, int) else dim
    if isinstance(dims, (list, tuple)) and all(isinstance(d, int) for d in dims):
        dims = {d % source.ndim for d in dims}
        if len(dims) == source.ndim - output.ndim and axis not in dims:
            return axis - sum(d < axis for d in dims)
    # Indexing with a mask merges leading axes: count from the end.
    for guess in (axis - source.ndim + output.ndim, axis):
        if 0 <= guess <= last and output.shape[guess] == units:
            return guess
    return last


def _is_view(source, output):
    try:
        return source.untyped_storage()._cdata == output.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor without storage of its own
        return False


def _reshaped(before, place, after):
    """ A reshape keeps the order of the elements, and so how many of them are behind one unit. """
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
