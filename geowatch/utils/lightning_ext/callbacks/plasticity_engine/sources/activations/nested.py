"""
Tensors in the arguments and results of a call.
"""
import torch

_NO_TENSORS = frozenset((int, float, bool, str, slice, type(None), type(...), torch.Size, torch.dtype))


def tensors_in(items):
    """
    All tensors in any nesting of lists, tuples and dicts.

    Args:
        items (Iterable):

    Returns:
        List[Tensor]:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.nested import tensors_in
        >>> import torch
        >>> len(tensors_in([torch.ones(1), {'a': (torch.ones(2), 3)}]))
        2
    """
    found = []
    for item in items:
        if type(item) in _NO_TENSORS:
            continue
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            if item and type(item[0]) is not int:  # most are strides and sizes
                found += tensors_in(item)
        elif isinstance(item, dict):
            found += tensors_in(item.values())
    return found
