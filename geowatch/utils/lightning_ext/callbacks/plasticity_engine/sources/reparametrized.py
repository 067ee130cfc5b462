"""
Weights that a network makes of other tensors: parametrizations, weight_norm, spectral_norm, pruning.
"""
import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .flat import parameters_in


class Made(NamedTuple):
    """
    A tensor that a module makes of parameters whenever it runs.

    Attributes:
        name (str): what the module calls it
        parts (List[Parameter]): of which it is made
        make (Callable[[], Tensor]): as the module would make it in eval, with nothing changed
    """
    name: str
    parts: list[nn.Parameter]
    make: Callable[[], torch.Tensor]


def made_by(module: nn.Module, parameters: Callable | None = None) -> list[Made]:
    """
    What a module makes of parameters.

    Args:
        module (nn.Module):
        parameters (Callable[[nn.Module], Dict[str, Parameter | Flattened]] | None):
            gives those of a module itself, see :func:`.flat.parameters_in`

    Returns:
        List[Made]: empty for most

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.reparametrized import made_by
        >>> import torch
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
        >>> (made,) = made_by(layer)
        >>> made.name, [tuple(part.shape) for part in made.parts], torch.equal(made.make(), layer.weight)
        ('weight', [(2, 1), (2, 3)], True)
        >>> made_by(torch.nn.Linear(3, 2))
        []
    """
    found, parameters = [], parameters or parameters_in(module)
    if 'parametrizations' in module._modules and isinstance(lists := module.parametrizations, nn.ModuleDict):
        found += [Made(name, [param for part in own.modules() for param in parameters(part).values()],
                       lambda own=own: _run(own)) for name, own in lists.items()]
    # The functions of torch.nn.utils that are older than parametrizations make it in a hook.
    for hook in module._forward_pre_hooks.values():
        if (recipe := _recipe(hook)) is not None:
            name, parts, make = recipe
            own = [param for part in parts if (param := parameters(module).get(part)) is not None]
            found += [Made(name, own, lambda make=make: make(module))] if own else []
    return found


def _recipe(hook):
    """ The name of what a hook makes, those of its parts, and what makes it of a module. """
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name, [f'{hook._tensor_name}_orig'], hook.apply_mask
    if isinstance(hook, WeightNorm):
        return hook.name, [f'{hook.name}_g', f'{hook.name}_v'], hook.compute_weight
    if isinstance(hook, SpectralNorm):
        return hook.name, [f'{hook.name}_orig'], lambda module: hook.compute_weight(module, do_power_iteration=False)
    return None


def _run(parametrizations):
    """ What a ParametrizationList gives, which in training may draw random numbers or update its buffers. """
    training = [module for module in parametrizations.modules() if module.training]
    buffers = {name: buffer.clone() for name, buffer in parametrizations.named_buffers()}
    devices = {tensor.device for tensor in parametrizations.parameters() if tensor.device.type == 'cuda'}
    with contextlib.ExitStack() as exit:
        exit.enter_context(torch.random.fork_rng(devices))
        for module in training:
            exit.callback(setattr, module, 'training', True)
            module.training = False
        return torch.func.functional_call(parametrizations, buffers, ())
