"""
Which functions are activations, at which outputs their units are dead, and above which they are on.
"""
import functools
import math
from collections.abc import Callable

import torch
from torch.overrides import handle_torch_function, has_torch_function


def _elu(input, alpha=1., *args, **kwargs):
    return (-float(alpha),)


def _selu(*args, **kwargs):
    return (-1.0507009873554805 * 1.6732632423543772,)


def _hardtanh(input, min_val=-1., max_val=1., *args, **kwargs):
    return (float(min_val), float(max_val))


def _threshold(input, threshold, value, *args, **kwargs):
    return (float(value),)


# Output values at which the gradient of a unit vanishes, by the name of the
# function (without the underscore of an in-place one) or of the module class.
# A callable takes the arguments of the call. Without a value a unit cannot
# die: such a function is not counted in dead_units, only in feature_erank.
SATURATED_VALUES = {
    'relu': (0.,),
    'relu6': (0., 6.),
    'hardtanh': _hardtanh,
    'threshold': _threshold,
    'hardshrink': (0.,),
    'softshrink': (0.,),
    'sigmoid': (0., 1.),
    'special_expit': (0., 1.),
    'hardsigmoid': (0., 1.),
    'log_sigmoid': (0.,),
    'logsigmoid': (0.,),
    'tanh': (-1., 1.),
    'softsign': (-1., 1.),
    'gelu': (0.,),
    'silu': (0.,),
    'mish': (0.,),
    'hardswish': (0.,),
    'softplus': (0.,),
    'glu': (0.,),
    'elu': _elu,
    'celu': _elu,
    'selu': _selu,
    'leaky_relu': (),
    'prelu': (),
    'rrelu': (),
    'tanhshrink': (),
    # Activations of the transformers library whose parts are no activations of their own.
    'ReLUSquaredActivation': (0.,),
    'XIELUActivation': (),
}


def _softplus(input, beta=1., *args, **kwargs):
    return math.log(2) / float(beta)


def _threshold_level(input, threshold, *args, **kwargs):
    return float(threshold)


# The output above which the input is positive, where that is not 0.
LEVELS = {
    'sigmoid': 0.5,
    'special_expit': 0.5,
    'hardsigmoid': 0.5,
    'softplus': _softplus,
    'log_sigmoid': -math.log(2),
    'logsigmoid': -math.log(2),
    'threshold': _threshold_level,
}

# Where nothing follows that is trained, these are the output of a network, and no hidden layer.
OUTPUTS = {'sigmoid', 'special_expit', 'hardsigmoid', 'log_sigmoid', 'logsigmoid', 'tanh', 'softplus', 'softsign',
           'hardtanh', 'threshold', 'hardshrink', 'softshrink', 'tanhshrink'}


def register_activation(function, saturated_values: tuple[float, ...] | Callable = ()):
    """
    Make captures see an activation of your own.

    Args:
        function (Callable | type | str): a torch function, a class of
            modules or of ``torch.autograd.Function``, the name of a function
            or module, or a Python function. A Python function has to be
            replaced by what is returned, as a decorator does, since a plain
            one cannot be seen. Of an ``autograd.Function`` the ``forward`` is
            replaced by one that does the same and is seen.
        saturated_values (Tuple[float, ...] | Callable): outputs at which a
            unit is dead, or a function of the call's arguments that returns
            them. With none it is counted in feature_erank only.

    Returns:
        Callable | type | str: `function`, or for a Python function one that
            does the same and is seen.

    Raises:
        ValueError: if `function` or `saturated_values` is none of the above

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import register_activation
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
        >>> import functools
        >>> import torch
        >>> @functools.partial(register_activation, saturated_values=(0.,))
        >>> def squared_relu(x):
        >>>     return torch.clamp(x, min=0).square()
        >>> seen = []
        >>> with Capture(torch.nn.Identity(), lambda *args: seen.append(args)):
        >>>     y = squared_relu(torch.tensor([[-1., 2.]]))
        >>> y.tolist(), seen[0][0].function, seen[0][3]
        ([[0.0, 4.0]], 'squared_relu', (0.0,))
    """
    if not callable(saturated_values):
        try:
            saturated_values = tuple(float(value) for value in saturated_values)
        except (TypeError, ValueError):
            raise ValueError('Expected `saturated_values` to be a tuple of numbers or a callable, '
                             f'but got {saturated_values!r}') from None
    name = function if isinstance(function, str) else getattr(function, '__name__', None)
    if not name or not (callable(function) or isinstance(function, str)):
        raise ValueError('Expected `function` to be a torch function, a module class, a Python function '
                         f'or a name, but got {function!r}')
    if isinstance(function, type) and not issubclass(function, (torch.nn.Module, torch.autograd.Function)):
        raise ValueError('Expected a class to be a torch.nn.Module or a torch.autograd.Function, '
                         f'but got {function!r}')
    SATURATED_VALUES[name if isinstance(function, type) else name.strip('_')] = saturated_values
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        if not hasattr(function.forward, 'is_visible'):
            function.forward = staticmethod(_visible(function.forward, name))
        return function
    is_python = hasattr(function, '__code__') and not str(function.__module__).startswith('torch')
    return _visible(function) if is_python else function


def _visible(function, name=None):
    """ A Python function that torch function modes see, as they see torch's own, by a name that may be another. """
    @functools.wraps(function)
    def visible(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if has_torch_function(tensors):
            return handle_torch_function(visible, tensors, *args, **kwargs)
        return function(*args, **kwargs)
    visible.__name__ = name or function.__name__
    visible.is_visible = True
    return visible


def saturated_values(name: str, args: tuple = (), kwargs: dict | None = None) -> tuple[float, ...] | None:
    """
    Output values at which a unit of one call is dead.

    Args:
        name (str): of a function or module class
        args (tuple): of the call
        kwargs (dict | None): of the call

    Returns:
        Tuple[float, ...] | None: None if it is not an activation

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.functions import (
        >>>     saturated_values)
        >>> saturated_values('elu', (None, 0.5)), saturated_values('prelu'), saturated_values('softmax')
        ((-0.5,), (), None)
    """
    values = SATURATED_VALUES.get(name)
    return values(*args, **(kwargs or {})) if callable(values) else values


def level(name: str, args: tuple = (), kwargs: dict | None = None) -> float:
    """
    Output above which the input of one call was positive.

    Args:
        name (str): of a function or module class
        args (tuple): of the call
        kwargs (dict | None): of the call

    Returns:
        float:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.functions import level
        >>> level('tanh'), level('sigmoid'), round(level('softplus', (None, 2.)), 3)
        (0.0, 0.5, 0.347)
    """
    above = LEVELS.get(name, 0.)
    return above(*args, **(kwargs or {})) if callable(above) else above
