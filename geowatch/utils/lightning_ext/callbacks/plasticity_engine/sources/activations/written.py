"""
Activations that are written out, instead of called by their name.

``x * sigmoid(1.7 * x)`` is a SiLU: a gate that is multiplied with what it was
computed from. ``x.clamp(min=0)``, ``maximum(x, 0)``, ``where(x > 0, x, 0)`` and
``x * (x > 0)`` are ReLUs, and leaky ones with another function of x in the
place of the 0. Gates that multiply something else, as those of
squeeze-and-excitation or of a GLU, are sigmoids.
"""
import torch

from .rules import Rules

# What a product with its own argument makes of a gate. All of them are dead at 0.
SELF_GATED = {
    ('sigmoid',): 'silu',
    ('special_expit',): 'silu',
    ('softplus', 'tanh'): 'mish',
    ('exp', 'tanh'): 'mish',
    ('tanh',): 'gelu',
    ('erf',): 'gelu',
    ('erfc',): 'gelu',
    ('special_erf',): 'gelu',
    ('special_erfc',): 'gelu',
    ('special_ndtr',): 'gelu',
    ('exp',): 'silu',  # x * (1 / (1 + exp(-x)))
    ('relu6',): 'hardswish',
    ('hardtanh',): 'hardswish',
    ('hardsigmoid',): 'hardswish',
}
# Functions that are no activation but in a product.
GATES = {'erf', 'erfc', 'special_erf', 'special_erfc', 'special_ndtr', 'exp'}
# Comparisons, and whether they hold above.
COMPARISONS = {'gt': True, 'ge': True, '__gt__': True, '__ge__': True, 'greater': True, 'greater_equal': True,
               'lt': False, 'le': False, '__lt__': False, '__le__': False, 'less': False, 'less_equal': False}
CASTS = {'float', 'half', 'bfloat16', 'double', 'to', 'type', 'type_as'}

# Rules: rule(args, kwargs, trails) returns the name of the activation that the
# call is, the values at which it is dead and the sites of gates that are only
# parts of it; or None.
WRITTEN = Rules()


def as_written(name: str, args: tuple, kwargs: dict, trails):
    """
    The activation that a call of another function is.

    Args:
        name (str): of the function, a key of WRITTEN
        args (tuple): of the call
        kwargs (dict): of the call
        trails (Trails): that know the tensors

    Returns:
        Tuple[str, Tuple[float, ...], Tuple[Site, ...]] | None: its name, the
            values at which it is dead, and the sites that are parts of it

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.trails import Trails
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.written import as_written
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> import torch
        >>> trails, x = Trails(Contents(torch.nn.Identity())), torch.ones(2)
        >>> as_written('clamp', (x,), {'min': 0}, trails), as_written('clamp', (x, -1, 1), {}, trails)
        (('relu', (0.0,), ()), None)
    """
    try:
        return WRITTEN[name](args, kwargs, trails)
    except (IndexError, KeyError, TypeError, ValueError):  # called in another way than we know
        return None


@WRITTEN.of('clamp', 'clip')
def _clamps(args, kwargs, trails):
    low, high = (args[i] if len(args) > i else kwargs.get(name) for i, name in ((1, 'min'), (2, 'max')))
    if not _is_zero(low):
        return None
    if high is None:
        return 'relu', (0.,), ()
    return ('relu6', (0., 6.), ()) if high == 6 else None


@WRITTEN.of('clamp_min')
def _clamps_below(args, kwargs, trails):
    low = args[1] if len(args) > 1 else kwargs['min']
    return ('relu', (0.,), ()) if _is_zero(low) else None


@WRITTEN.of('maximum', 'max', 'fmax')
def _larger_of_two(args, kwargs, trails):
    first, second = (*args, *kwargs.values())
    if isinstance(second, torch.Tensor):  # and not a dimension
        for x, other in ((first, second), (second, first)):
            if trails.get(x) is not None and trails.get(other) is None and _is_zero(other):
                return 'relu', (0.,), ()
        if _of_one_root(first, second, trails):
            return 'leaky_relu', (), ()
    return None


@WRITTEN.of('where')
def _chooses(args, kwargs, trails):
    mask, x, other = (*args, *kwargs.values())
    if mask.dtype is not torch.bool:  # as a method of x
        mask, x = x, mask
    for kept, below, is_above in ((x, other, True), (other, x, False)):
        if trails.mask_of(mask, kept) is is_above:
            if _is_zero(below):
                return 'relu', (0.,), ()
            if _of_one_root(kept, below, trails):
                return 'leaky_relu', (), ()
    return None


@WRITTEN.of('masked_fill', '__setitem__')
def _fills(args, kwargs, trails):
    x, mask, value = (*args, *kwargs.values())
    return ('relu', (0.,), ()) if trails.mask_of(mask, x) is False and _is_zero(value) else None


@WRITTEN.of('div', 'divide', 'true_divide', '__truediv__')
def _divides(args, kwargs, trails):
    """ x / (1 + exp(-x)). """
    x, below = map(trails.get, args)
    if x is None or below is None or x.root != below.root or below.acts[len(x.acts):] != (('exp', ()),):
        return None
    return 'silu', (0.,), ()


@WRITTEN.of('mul', '__mul__', '__rmul__', 'multiply')
def _multiplies(args, kwargs, trails):
    first, second = args
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return None
    if trails.mask_of(second, first) or trails.mask_of(first, second):
        return 'relu', (0.,), ()
    x, gate = trails.get(first), trails.get(second)
    if x is None or gate is None or x.root != gate.root or x.acts == gate.acts:
        return None
    if len(x.acts) > len(gate.acts):
        x, gate = gate, x
    if gate.acts[:len(x.acts)] != x.acts:
        return None
    own = gate.acts[len(x.acts):]
    name = SELF_GATED.get(tuple(function for function, _ in own))
    return name and (name, (0.,), tuple(site for _, sites in own for site in sites))


def _of_one_root(x, other, trails):
    """ Whether a tensor is another function of the same numbers. """
    own, of_other = trails.get(x), trails.get(other)
    return own is not None and of_other is not None and own.root == of_other.root


def _is_zero(x):
    if isinstance(x, torch.Tensor):
        return not x.is_meta and not x.requires_grad and not bool(x.detach().count_nonzero())
    return type(x) in (int, float) and x == 0
