"""
What a model consists of at one moment, and what has been found in it.

To find weights and layers takes a walk through all modules, which would cost
more than the sums over the weights of a small network. What was found is
used again until anything has changed on which it depends.
"""
import operator
from collections.abc import Callable

from torch import nn
from torch.nn.parameter import is_lazy

from ..sharding import is_sharded
from .flat import is_flat, parameters_in, stepped_by


class Contents:
    """
    The modules and parameters of a model at one moment.

    Args:
        model (nn.Module):
        is_trained (Callable[[str, Parameter], bool] | None): whether an
            optimizer has a parameter that requires a gradient; by default all have one

    Attributes:
        model (nn.Module):
        modules (List[Tuple[str, nn.Module]]): by their paths, each once
        parameters (Dict[nn.Module, Dict[str, Parameter | Flattened]]): of
            each, see :func:`.flat.parameters_in`

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> contents = Contents(net)
        >>> def paths(contents):
        >>>     return [path for path, _ in contents.modules]
        >>> contents.once(paths), contents.once(paths) is contents.once(paths), contents.are_those_of(net)
        (['', '0', '1'], True, True)
        >>> _ = net[0].requires_grad_(False)
        >>> contents.are_those_of(net)
        False
    """

    def __init__(self, model, is_trained=None):
        self.model = model
        self.is_trained = is_trained
        self.modules = list(model.named_modules())
        self.parameters = parameters_in([module for _, module in self.modules])
        self._found = {}
        self._names, self._objects = self._structure()
        self._params = [param for _, module in self.modules for param in module._parameters.values()
                        if param is not None]
        # Strategies move parts of flat buffers about as only they know, and what is lazy has no shape to compare.
        self._can_stay = not any(map(is_lazy, self._params)) and not any(
            is_flat(param) for own in self.parameters.values() for param in own.values())
        self._states = self._state() if self._can_stay else None

    def has_any(self, ids: set[int]) -> bool:
        """ Whether any parameter has one of some ids. """
        return not ids.isdisjoint(map(id, self._params))

    def once(self, find: Callable):
        """
        Args:
            find (Callable[[Contents], Any]): by which it is known, so no lambda; it is called once

        Returns:
            Any: what it has found in these contents, which nobody may change
        """
        if find not in self._found:
            self._found[find] = find(self)
        return self._found[find]

    def are_those_of(self, model: nn.Module) -> bool:
        """
        Whether a model consists of the same still, so that the same would be found in it.

        By the objects themselves, since the id of one that is gone may be that of a new one.
        """
        if not self._can_stay or model is not self.model:
            return False
        names, objects = self._structure()
        return (names == self._names and len(objects) == len(self._objects)
                and all(map(operator.is_, objects, self._objects)) and self._state() == self._states)

    def _structure(self):
        """ Names, and what they stand for. Not of buffers, which may be others at each step. """
        names, objects = [], []
        for _, module in self.modules:
            names.append(type(module))  # which also tells where its names begin
            for table in (module._modules, module._parameters, module._forward_pre_hooks):
                if table:
                    names += table.keys()
                    objects += table.values()
        return names, objects

    def _state(self):
        """ What of a parameter may become another while it stays the same object. """
        return [(type(param), param.requires_grad, param.shape, param.dtype, param.device, param.layout,
                 len(param.__dict__)) for param in self._params]


class Trained:
    """
    The contents of the model that a run trains, with which of its parameters the optimizers have.

    Where they have none of the model's, as where it makes optimizers of its
    own, all count.

    Args:
        trainer (Trainer): of either package

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Trained
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import weights_of
        >>> import torch
        >>> import types
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        >>> trained = Trained(types.SimpleNamespace(optimizers=[torch.optim.SGD(net[1].parameters())]))
        >>> list(weights_of(trained.look(net))), trained.look(net) is trained.look(net)
        (['1'], True)
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._ids = None
        self._knows = False
        self._sharded = set()  # names
        self._contents = None

    def look(self, model: nn.Module) -> Contents:
        """
        Look at the model and the optimizers, of which each may have got other parameters.

        Args:
            model (nn.Module):

        Returns:
            Contents: the same as at the last look, if nothing has changed
        """
        ids = stepped_by(self._trainer.optimizers)
        if ids != self._ids:
            self._ids, self._knows, self._sharded, self._contents = ids, False, set(), None
        if self._contents is None or not self._contents.are_those_of(model):
            self.forget()
            contents = Contents(model)
            self._knows = self._knows or contents.has_any(ids)
            contents.is_trained = self._has if self._knows else None
            self._contents = contents
        return self._contents

    def forget(self):
        """ Keep nothing of the model. """
        self._contents = None

    def _has(self, name, param):
        if id(getattr(param, 'parameter', param)) in self._ids:
            if is_sharded(param):
                self._sharded.add(name)
            return True
        # FSDP2 puts whole ones in their place from a forward pass on until the next backward pass.
        return name in self._sharded
