"""
The experts of a mixture that no sample has reached.

An expert that is a module does not run at all then. Its siblings tell which
hidden layers it has.
"""
import dataclasses

from torch import nn

from ..contents import Contents
from ..weights import clean_name


def alike(contents: Contents) -> list[list[str]]:
    """
    Modules in one list that are built alike and trained, as the experts of a mixture.

    Args:
        contents (Contents): of the model

    Returns:
        List[List[str]]: paths of those that are alike

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.experts import alike
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> import torch
        >>> model = torch.nn.ModuleDict({'experts': torch.nn.ModuleList(torch.nn.Linear(2, n) for n in (3, 4, 3))})
        >>> alike(Contents(model))
        [['experts.0', 'experts.2']]
    """
    found = []
    for path, module in contents.modules:
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            kinds = {}
            for name, child in module.named_children():
                shapes = tuple(param.shape for param in child.parameters() if param.requires_grad)
                if shapes:
                    kinds.setdefault((type(child), shapes), []).append(clean_name(f'{path}.{name}' if path else name))
            found += [paths for paths in kinds.values() if len(paths) > 1]
    return found


def of_idle_siblings(lists: list[list[str]], window) -> dict:
    """
    The hidden layers of modules that did not run, by those of their siblings.

    Args:
        lists (List[List[str]]): as :func:`alike` gives them
        window (Window): that has seen the others

    Returns:
        Dict[Site, Tuple[float, ...]]: and the values at which their units are dead
    """
    idle = {}
    for paths in lists:
        ran = [path for path in paths if path in window.ran]
        if not ran or len(ran) == len(paths):
            continue
        for site, values in window.values.items():
            if site in window.hidden and _within(site.module, ran[0]):
                for path in paths:
                    if path not in window.ran:
                        layer = path + site.layer[len(ran[0]):] if _within(site.layer, ran[0]) else site.layer
                        idle[dataclasses.replace(site, module=path + site.module[len(ran[0]):], layer=layer)] = values
    return idle


def _within(path, parent):
    return path == parent or path.startswith(f'{parent}.')
