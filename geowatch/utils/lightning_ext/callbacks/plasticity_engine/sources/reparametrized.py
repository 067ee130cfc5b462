"""
Weights that a network makes of other tensors: parametrizations, weight_norm, spectral_norm, pruning.
"""
import contextlib
import types
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
        parts (List[Parameter | Flattened]): of which it is made
        make (Callable[[List[Tensor]], Tensor]): of these, as the module would make it in eval, with nothing changed
        keeps_shape (bool): whether it is known to have the shape of the largest part
    """
    name: str
    parts: list[nn.Parameter]
    make: Callable[[list[torch.Tensor]], torch.Tensor]
    keeps_shape: bool = True


def made_by(module: nn.Module, parameters: dict | None = None) -> list[Made]:
    """
    What a module makes of parameters.

    Args:
        module (nn.Module):
        parameters (Dict[nn.Module, Dict[str, Parameter | Flattened]] | None):
            those of each module, see :func:`.flat.parameters_in`

    Returns:
        List[Made]: empty for most

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.reparametrized import made_by
        >>> import torch
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
        >>> (made,) = made_by(layer)
        >>> made.name, [tuple(part.shape) for part in made.parts], torch.equal(made.make(made.parts), layer.weight)
        ('weight', [(2, 1), (2, 3)], True)
        >>> made_by(torch.nn.Linear(3, 2))
        []
    """
    found, parameters = [], parameters or parameters_in(list(module.modules()))
    if 'parametrizations' in module._modules and isinstance(lists := module.parametrizations, nn.ModuleDict):
        for name, own in lists.items():
            named = {f'{path}.{key}' if path else key: param for path, part in own.named_modules()
                     for key, param in parameters[part].items()}
            found.append(Made(name, list(named.values()), lambda values, own=own, named=named: _run(
                own, dict(zip(named, values, strict=True))), all(
                    type(part).__module__.startswith('torch.nn.utils.') for part in own)))
    # The functions of torch.nn.utils that are older than parametrizations make it in a hook.
    for hook in module._forward_pre_hooks.values():
        if (recipe := _recipe(hook)) is not None:
            name, parts, make = recipe
            own = {part: param for part in parts if (param := parameters[module].get(part)) is not None}
            found += [Made(name, list(own.values()), lambda values, make=make, own=own: make(types.SimpleNamespace(
                **module._buffers, **dict(zip(own, values, strict=True)))))] if own else []
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


def _run(parametrizations, values):
    """ What a ParametrizationList makes of values, which in training may draw random numbers or update its buffers. """
    training = [module for module in parametrizations.modules() if module.training]
    buffers = {name: buffer.clone() for name, buffer in parametrizations.named_buffers()}
    devices = {tensor.device for tensor in parametrizations.parameters() if tensor.device.type == 'cuda'}
    with contextlib.ExitStack() as exit:
        exit.enter_context(torch.random.fork_rng(devices))
        for module in training:
            exit.callback(setattr, module, 'training', True)
            module.training = False
        return torch.func.functional_call(parametrizations, {**buffers, **values}, ())
