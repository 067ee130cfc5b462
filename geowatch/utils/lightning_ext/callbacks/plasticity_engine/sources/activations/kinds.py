"""
What is known of a torch function by its name.
"""
import functools
from typing import NamedTuple

from .modules import FUSED_FUNCTIONS
from .written import CASTS, COMPARISONS, GATES, WRITTEN

# Of other functions, but for activations, only where tensors go is of interest.
_KNOWN = {*FUSED_FUNCTIONS, *WRITTEN, *GATES}


class Kind(NamedTuple):
    """
    What is known of a torch function, beside whether it is an activation: those are registered at any time.

    Attributes:
        name (str): without the underscores of in-place and private ones
        is_mask (bool): whether it compares, or makes numbers of what was compared
        is_plain (bool): whether only where tensors go is of interest
    """
    name: str
    is_mask: bool
    is_plain: bool


@functools.lru_cache(maxsize=1024)
def kind_of(func):
    """
    What is known of a torch function.

    Args:
        func (Callable):

    Returns:
        Kind:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.kinds import kind_of
        >>> import torch
        >>> kind_of(torch.Tensor.exp_), kind_of(torch.Tensor.T.__get__).name
        (Kind(name='exp', is_mask=False, is_plain=False), 'T')
    """
    name = func.__name__
    if name == '__get__':  # a property, such as x.T
        name = getattr(func.__self__, '__name__', '')
    name = name if name.startswith('__') else name.strip('_')  # F.threshold is _threshold
    return Kind(name, name in COMPARISONS or name in CASTS, name not in _KNOWN)
