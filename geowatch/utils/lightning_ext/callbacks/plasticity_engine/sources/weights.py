"""
The weights of a network.
"""
import torch
from torch.nn.parameter import is_lazy

from .step import StepSource

_WRAPPERS = {'_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_forward_module'}


def clean_name(name: str) -> str:
    """
    A parameter's or module's name without the prefixes of wrappers.

    Args:
        name (str): as ``named_parameters`` gives it

    Returns:
        str:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import clean_name
        >>> clean_name('_forward_module.net._orig_mod.0._fsdp_wrapped_module.weight')
        'net.0.weight'
        >>> clean_name('fc.parametrizations.weight.original')
        'fc.weight'
    """
    name = name.replace('.parametrizations.weight.original', '.weight') if name.endswith('.original') else name
    return '.'.join(part for part in name.split('.') if part not in _WRAPPERS)


def weights_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """
    The weights: trainable, floating point, two or more dimensions.

    Biases and norm scales have one dimension and are left out; a tied weight
    is there once.

    Args:
        model (torch.nn.Module):

    Returns:
        Dict[str, torch.nn.Parameter]: name of the layer to its weight

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import weights_of
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        >>> {name: tuple(weight.shape) for name, weight in weights_of(net).items()}
        {'0': (4, 3, 3, 3)}
    """
    return {clean_name(name).removesuffix('.weight'): param
            for name, param in model.named_parameters() if why_not_a_weight(param) is None}


def why_not_a_weight(param: torch.nn.Parameter) -> str | None:
    """
    Why a parameter is not measured.

    Args:
        param (torch.nn.Parameter):

    Returns:
        str | None: None if it is measured

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import why_not_a_weight
        >>> import torch
        >>> why_not_a_weight(torch.nn.Parameter(torch.ones(3)))
        'biases and scales'
        >>> why_not_a_weight(torch.nn.Parameter(torch.ones(3, 3), requires_grad=False))
        'frozen'
    """
    if is_lazy(param):
        return 'without a shape yet'
    if hasattr(param, 'ds_id') and not param.numel():
        return 'sharded by DeepSpeed, which keeps no tensor of them'
    if getattr(param, '_fsdp_flattened', False) or type(param).__name__ == 'FlatParameter':
        return 'flattened by FSDP1; FSDP2 keeps their shape'
    if param.ndim < 2:
        return 'biases and scales'
    if not param.is_floating_point():
        return 'not floating point'
    if not param.requires_grad:
        return 'frozen'
    if param.is_meta:
        return 'on the meta device'
    if param.layout is not torch.strided or not param.numel():
        return 'sparse or empty'
    return None


class Weights(StepSource):
    """
    The weights after the step.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import Weights
        >>> import contextlib
        >>> import torch
        >>> source = Weights(['abs'], lambda *args: contextlib.nullcontext())
        >>> source.end_step({'fc': torch.tensor([[1., -3.]])})
        >>> source.take()['abs']['fc'].item()
        4.0
    """
    name = 'weights'

    def end_step(self, weights):
        self._add_tensors(weights)
