"""
Which modules of a model run.

Two global hooks of torch follow them, so that nothing is attached to the model.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..weights import clean_name
from .functions import SATURATED_VALUES

# Modules and functions that compute activations inside one kernel.
FUSED_MODULES = (nn.RNNBase, nn.RNNCellBase)
FUSED_FUNCTIONS = {'lstm', 'gru', 'rnn_tanh', 'rnn_relu', 'lstm_cell', 'gru_cell', 'rnn_tanh_cell',
                   'rnn_relu_cell', 'scaled_dot_product_attention', 'multi_head_attention_forward'}
# In eval they may take a fast path, which any mode or hook would switch off.
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class Hooks:
    """
    Two functions that are called whenever any module runs, with the arguments of torch's global hooks.

    Args:
        entering (Callable):
        leaving (Callable): also after an exception

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.modules import Hooks
        >>> import torch
        >>> seen = []
        >>> hooks = Hooks(lambda module, args: seen.append('in'), lambda module, *args: seen.append('out'))
        >>> hooks.attach()
        >>> _ = torch.nn.Linear(2, 2)(torch.ones(1, 2))
        >>> hooks.detach()
        >>> _ = torch.nn.Linear(2, 2)(torch.ones(1, 2))
        >>> seen
        ['in', 'out']
    """

    def __init__(self, entering, leaving):
        self._entering = entering
        self._leaving = leaving

    def attach(self):
        """ Call them from now on. """
        register_module_forward_pre_hook(self._entering)
        register_module_forward_hook(self._leaving, with_kwargs=True, always_call=True)

    def detach(self):
        """ Call them no more. By what is registered: a handle is lost if an interrupt comes before it is kept. """
        found = {key for table in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
                 for key, hook in list(table.items()) if hook in (self._entering, self._leaving)}
        for name in ('_global_forward_pre_hooks', '_global_forward_hooks', '_global_forward_hooks_always_called',
                     '_global_forward_hooks_with_kwargs'):
            for key in found:
                getattr(torch_module, name, {}).pop(key, None)


class Running(NamedTuple):
    """
    A module of the model, while it runs.

    Attributes:
        module (nn.Module):
        path (str): its name in the model
        activation (str | None): its class, where that is registered as an activation
        may_be_fast (bool): whether it may take a fast path
        is_opaque (str | None): why its functions cannot be seen
        is_plain (bool): whether nothing but its path is of interest
    """
    module: nn.Module
    path: str
    activation: str | None
    may_be_fast: bool
    is_opaque: str | None
    is_plain: bool

    @property
    def is_leaf(self):
        """ Whether it goes by its path alone: nn.ReLU, or a user's own without layers. """
        return bool(self.path) and not self.module._modules and all(
            param is None or param.ndim < 2 for param in self.module._parameters.values())


class Modules:
    """
    The modules of a model, as a stack of those that run now.

    Args:
        contents (Contents): of the model, whose names they have

    Attributes:
        path (str): of the innermost that runs, or ''
        inside (int): registered activation modules that run now

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.modules import Modules
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU()))
        >>> modules, paths = Modules(Contents(model)), []
        >>> for module in model.modules():
        >>>     paths.append(modules.enter(module).path)
        >>> _ = list(modules.leave(model))
        >>> paths, modules.path
        (['', '0', '1', '1.0'], '')
    """

    def __init__(self, contents):
        self.path = ''
        self.inside = 0
        self._paths = contents.once(_paths)
        # id to Running, of those that have run; with the path of the caller where it is in several places
        self._known = {}
        self._stack = []

    def holding(self, layer):
        """
        Which modules that run hold a layer: the network and its parts, and neither a loss nor a metric.

        Args:
            layer (str): its path

        Returns:
            List[str]: their paths
        """
        # Strategies run a step as the forward of the whole, which they replace meanwhile.
        return [running.path for running in self._stack if (
            layer.startswith(f'{running.path}.') or layer == running.path if running.path
            else 'forward' not in vars(running.module))]

    @property
    def top(self):
        """ The innermost that runs, or None. """
        return self._stack[-1] if self._stack else None

    def enter(self, module):
        """
        Note that a module begins.

        Args:
            module (nn.Module):

        Returns:
            Running | None: None if it is not of the model
        """
        running = self._known.get(id(module)) or self._look_up(module)
        if running is not None:
            self.push(running)
        return running

    def _look_up(self, module):
        paths = self._paths.get(id(module))
        if paths is None:
            return None
        key, path = id(module), paths[0]
        if len(paths) > 1:  # one object in several blocks: that of the block which runs
            key = key, self.path
            if key in self._known:
                return self._known[key]
            inside = [own for own in paths if not self.path or own.startswith(f'{self.path}.')]
            path = (inside or paths)[0]
        name = type(module).__name__
        special = (name if name in SATURATED_VALUES else None, isinstance(module, _FAST_PATHS),
                   'torch.jit' if isinstance(module, torch.jit.ScriptModule) else None)
        running = self._known[key] = Running(module, path, *special, is_plain=not any(special))
        return running

    def leave(self, module):
        """
        Note that a module ends.

        Args:
            module (nn.Module):

        Returns:
            List[Running]: those that end; an exception may have left more than one
        """
        stack = self._stack
        if stack and stack[-1].module is module:  # by far the most
            return [self.pop()]
        if not any(running.module is module for running in stack):
            return []
        return [self.pop(), *self.leave(module)]

    def push(self, running):
        """ Note that a Running begins. """
        self._stack.append(running)
        self.path = running.path
        self.inside += running.activation is not None

    def pop(self):
        """ Note that the innermost ends; it is returned. """
        running = self._stack.pop()
        self.path = self._stack[-1].path if self._stack else ''
        self.inside -= running.activation is not None
        return running

    def ran(self):
        """ Paths (Set[str]) of those that have run. """
        return {running.path for running in self._known.values()}

    def clear(self):
        """ Forget the model. """
        self._known.clear()
        self._stack.clear()
        self.path, self.inside, self._paths = '', 0, {}


def places(contents):
    """ The modules (List[Tuple[str, nn.Module]]) by their paths; one in several places at each. """
    return [(clean_name(path), module) for path, module in contents.model.named_modules(remove_duplicate=False)]


def _paths(contents):
    """ Id to the path of a module, or paths if it is in several places. """
    found = {}
    for path, module in contents.once(places):
        found.setdefault(id(module), []).append(path)
    return found


def fused_modules(model):
    """
    Modules whose activations are computed inside one kernel.

    Args:
        model (torch.nn.Module):

    Returns:
        Dict[str, str]: module path to the reason

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.modules import (
        >>>     fused_modules)
        >>> import torch
        >>> fused_modules(torch.nn.ModuleDict({'rnn': torch.nn.LSTM(2, 3)}))
        {'rnn': 'LSTM is one fused kernel'}
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, FUSED_MODULES):
            found[clean_name(path)] = f'{type(module).__name__} is one fused kernel'
        elif isinstance(module, nn.MultiheadAttention):
            found[clean_name(path)] = 'scaled_dot_product_attention is one fused kernel'
    return found
