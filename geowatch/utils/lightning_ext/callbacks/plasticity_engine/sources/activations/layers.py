"""
Which functions are layers, and where a layer puts its units.

A unit is a feature of a linear layer or a channel of a convolution. Each
function has a rule in a registry.
"""
from .axes import Place, whole
from .rules import Rules

# Where a network starts with a norm, its axis is that of the norm.
NORM_AXIS = {'batch_norm': 1, 'instance_norm': 1, 'group_norm': 1, 'layer_norm': -1, 'rms_norm': -1}

LAYERS = Rules()


def layer_places(name: str, args: tuple, owners: list, output) -> tuple[Place, Place]:
    """
    Where a layer has put its units, and where the matrices of its weight are, if it has several.

    Args:
        name (str): of the function, a key of LAYERS
        args (tuple): of the call
        owners (List[Owner | None]): for each tensor argument, not None if it
            is a weight
        output (Tensor): at least 1-d

    Returns:
        Tuple[Place, Place]: of the units, and of the matrices: one for each
            expert of a mixture, usually none

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.layers import layer_places
        >>> import torch
        >>> layer_places('conv2d', (), [], torch.empty(2, 3, 8, 8))
        ((Part(axis=1, size=3, step=1),), ())
        >>> layer_places('matmul', (), ['proj', None], torch.empty(2, 4, 5))[0]
        (Part(axis=1, size=4, step=1),)
        >>> # Each of 2 experts has its own tokens
        >>> layer_places('einsum', ('etc,ecd->etd',), [None, 'proj'], torch.empty(2, 4, 5))
        ((Part(axis=2, size=5, step=1),), (Part(axis=0, size=2, step=1),))
    """
    units, matrices = LAYERS[name](args, owners, output)
    return whole(output, units), whole(output, matrices)


def of_one_group(name: str, args: tuple, kwargs: dict, inputs: list, place: Place) -> Place:
    """
    The units of a convolution whose weight was made for each example, where the groups are the examples.

    Args:
        name (str): of the function
        args (tuple): of the call
        kwargs (dict): of the call
        inputs (List[Tensor]): of the call, the weight second
        place (Place): of all channels

    Returns:
        Place: of one group's, unless the groups are those of one example, as in a depthwise convolution

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import Part
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.layers import of_one_group
        >>> import torch
        >>> # 5 examples with 3 channels each, which become 4
        >>> x, weight = torch.empty(1, 5 * 3, 8, 8), torch.empty(5 * 4, 3, 1, 1)
        >>> of_one_group('conv2d', (x, weight), {'groups': 5}, [x, weight], (Part(1, 20),))
        (Part(axis=1, size=4, step=1),)
    """
    if not name.startswith('conv') or len(inputs) < 2 or inputs[0].shape[0] != 1:
        return place
    at = 7 if 'transpose' in name else 6
    groups = kwargs.get('groups', args[at] if len(args) > at else 1)
    inside = inputs[0].shape[1] // groups
    return tuple(part._replace(size=part.size // groups) for part in place) if groups > 1 and inside > 1 else place


@LAYERS.of('linear', 'bilinear', 'embedding', 'embedding_bag', 'multi_head_attention_forward', 'lstm', 'gru',
           'rnn_tanh', 'rnn_relu', 'lstm_cell', 'gru_cell', 'rnn_tanh_cell', 'rnn_relu_cell',
           'mv', 'addmv', 'tensordot', 'inner', 'cdist')
def _features(args, owners, output):
    return [-1], []


# Unbatched inputs have no batch axis, so that it is counted from the end.
for _dims in (1, 2, 3):
    LAYERS.of(f'conv{_dims}d', f'conv_transpose{_dims}d')(lambda *call, axis=-1 - _dims: ([axis], []))
LAYERS.of('deform_conv2d')(lambda *call: ([-3], []))


@LAYERS.of('matmul', '__matmul__', 'mm', 'bmm')
def _product(args, owners, output, first=0):
    """ The columns of the right operand are units, or the rows of a weight on the left. """
    weight_first = len(owners) > 1 and owners[0] is not None and owners[1] is None
    at = int(not weight_first)
    weight = args[first + at] if len(args) > first + 1 else None
    # A parameter of three dimensions and more is a matrix for each place on the first ones.
    ndim = min(getattr(weight, 'ndim', 2), getattr(owners[at], 'ndim', 2)) if len(owners) > at else 2
    matrices = [axis for axis in range(-ndim, -2) if weight.shape[axis] > 1]
    return [-2 if weight_first and output.ndim > 1 else -1], matrices


@LAYERS.of('grouped_mm')
def _groups(args, owners, output):
    """ Rows of an expert after those of another. """
    return [-1], [0]


@LAYERS.of('__rmatmul__')
def _reflected_product(args, owners, output):
    return _product(args[1::-1], owners[1::-1], output)


@LAYERS.of('addmm', 'addbmm', 'baddbmm')
def _sum_of_product(args, owners, output):
    return _product(args, owners[1:], output, first=1)


@LAYERS.of('einsum')
def _einsum(args, owners, output):
    """ Units are on the letters that only the weight has, matrices on those that it shares with output and input. """
    letters = letters_of(args, len(owners))
    if letters is None:
        return [-1], []
    operands, out = letters
    of_inputs, of_weights, of_matrices = '', '', ''
    for own, owner in zip(operands, owners, strict=True):
        if owner is None:
            of_inputs += own
        else:
            of_weights += own
            # The last two dimensions of a parameter are a matrix, the others tell which; so do labels.
            of_matrices += own[:max(getattr(owner, 'ndim', 2) - 2, 0)]
    new = [x for x in out if x.isalpha() and x not in of_inputs]
    units = [x for x in new if x not in of_matrices] or new
    if not units:
        return [-1], []
    matrices = [x for x in out if x in of_weights and x not in units and x in of_inputs + of_matrices]
    return [out.index(x) - len(out) for x in units], [out.index(x) - len(out) for x in matrices]


def letters_of(args: tuple, count: int) -> tuple[list[str], str] | None:
    """
    The letters of an einsum.

    Args:
        args (tuple): of the call
        count (int): of operands

    Returns:
        Tuple[List[str], str] | None: of each operand and of the output, None
            where they are not given as one string

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.layers import letters_of
        >>> letters_of(('bi, ij -> bj',), 2)
        (['bi', 'ij'], 'bj')
    """
    if not args or not isinstance(args[0], str) or '->' not in args[0]:
        return None
    operands, out = args[0].replace(' ', '').split('->')
    operands = operands.split(',')
    return (operands, out) if len(operands) == count else None
