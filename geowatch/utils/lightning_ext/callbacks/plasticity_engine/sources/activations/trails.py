"""
Which tensor came from where: the run of a layer, and the axis of its units.
"""
import itertools
import weakref
from typing import NamedTuple

import torch
from torch import nn

from .axes import LAYERS, NORM_AXIS, PRODUCTS, SLICES, Place, follow_units, layer_axis


class Run:
    """
    One run of a layer, and the activation calls on what it produced.

    Attributes:
        layer (str): its path
        order (int): how many ran before
        calls (Dict[Any, int]): how many calls of each kind there were
    """
    __slots__ = ('layer', 'order', 'calls')

    def __init__(self, layer, order):
        self.layer = layer
        self.order = order
        self.calls = {}


class Trail(NamedTuple):
    """
    Where a tensor came from.

    Attributes:
        run (Run): of the layer that ran last on the way to it
        place (Place): of its units
        extent (int): which slice of what the layer produced
    """
    run: Run
    place: Place
    extent: int = 0


class _Known(weakref.ref):
    """ What is known of a tensor, which it does not keep alive. """
    __slots__ = ('key', 'trail', 'owner')


class Trails:
    """
    Follows tensors from layers through all that is done with them, without keeping any alive.

    Args:
        named (List[Tuple[str, nn.Module]]): modules by their paths, whose
            parameters and buffers are known by their layer

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.trails import Trails
        >>> import torch
        >>> layer = torch.nn.Linear(3, 4)
        >>> trails, x = Trails([('fc', layer)]), torch.ones(2, 3)
        >>> y = layer(x)
        >>> trails.follow('linear', (x, layer.weight, layer.bias), {}, [y], y, path='fc')
        >>> trail = trails.of([y])
        >>> trail.run.layer, trail.place
        ('fc', Place(axis=1, units=4, step=1))
    """

    def __init__(self, named):
        self._constants = {}  # id of a parameter or buffer to the path of its layer
        for path, module in named:
            layer = _layer_path(path) if 'parametrizations' in path else path
            for table in (module._parameters, module._buffers):
                for tensor in table.values():
                    self._constants[id(tensor)] = layer
        self._constants.pop(id(None), None)
        self._known = {}      # id of a tensor to _Known
        self._order = itertools.count(1)

    # This runs for each call of a torch function: it has to be cheap.
    def follow(self, name, args, kwargs, outputs, output, path):
        """
        Note one call of a torch function.

        Args:
            name (str): of the function
            args (tuple): of the call
            kwargs (dict): of the call
            outputs (List[Tensor]): those of floating point that it returned
            output (Tensor | Tuple[Tensor, ...]): all that it returned
            path (str): of the module that runs

        Returns:
            bool: False if all that it was given are weights: it has no samples
        """
        inputs = tensors_in(args)
        if kwargs:
            inputs += tensors_in(kwargs.values())
        source = trail = weight = None
        owners = []  # of those inputs that are weights, or made of weights alone
        for x in inputs:
            known = self._known.get(id(x))
            if known is None:
                owner = self._constants.get(id(x))
                if owner is None and isinstance(x, nn.Parameter):
                    owner = path  # sharding replaces parameters just before they are used
            else:
                owner = known.owner
                own = known.trail
                if own is not None and (trail is None or own.run.order > trail.run.order):
                    source, trail = x, own
            owners.append(owner)
            if weight is None:
                weight = owner
        is_constant = bool(inputs) and None not in owners
        if name in LAYERS and (name not in PRODUCTS or (not is_constant and weight is not None)):
            self.start(path if weight is None else weight, outputs, layer_axis(name, args, owners, output))
        elif is_constant:
            for x in outputs:
                if id(x) not in self._constants:
                    self.remember(x, None, owners[0])
            return False
        elif trail is not None:
            for x in outputs:
                place, extent = follow_units(name, args, kwargs, source, trail.place, x), trail.extent
                if name in SLICES and x.ndim and x.numel() < source.numel() and (
                        x.shape[place.axis] == source.shape[trail.place.axis]):
                    extent = next(self._order)
                same = place == trail.place and extent == trail.extent
                self.remember(x, trail if same else Trail(trail.run, place, extent))
        elif name in NORM_AXIS:
            self.start(path, outputs, NORM_AXIS[name])
        return True

    def start(self, layer, outputs, axis):
        """ A layer ran: everything made of its outputs (List[Tensor]) leads back to here. """
        run = Run(layer, next(self._order))
        for x in outputs:
            if x.ndim:
                self.remember(x, Trail(run, Place(axis % x.ndim, x.shape[axis])))

    def of(self, tensors):
        """ The trail (Trail | None) of the layer that ran last on the way to some tensors. """
        trails = [known.trail for known in map(self._known.get, map(id, tensors)) if known and known.trail]
        return max(trails, key=lambda trail: trail.run.order, default=None)

    def remember(self, tensor, trail, owner=None):
        """
        Args:
            tensor (Tensor):
            trail (Trail | None):
            owner (str | None): path of the layer, of what is made of weights alone
        """
        key = id(tensor)
        known = self._known.get(key)
        if known is None or known() is not tensor:
            known = self._known[key] = _Known(tensor, self._forget)
            known.key = key
        known.trail = trail
        known.owner = owner

    def _forget(self, known):
        # Not if the id has been given to a new tensor meanwhile.
        if self._known.get(known.key) is known:
            del self._known[known.key]

    def clear(self):
        """ Forget all tensors. """
        self._known.clear()
        self._constants.clear()


def tensors_in(items):
    """
    All tensors in any nesting of lists, tuples and dicts.

    Args:
        items (Iterable):

    Returns:
        List[Tensor]:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.trails import tensors_in
        >>> import torch
        >>> len(tensors_in([torch.ones(1), {'a': (torch.ones(2), 3)}]))
        2
    """
    found = []
    for item in items:
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            if item and type(item[0]) is not int:  # most are strides and sizes
                found += tensors_in(item)
        elif isinstance(item, dict):
            found += tensors_in(item.values())
    return found


def _layer_path(path):
    """ The layer whose weight a parametrization makes. """
    parts = path.split('.')
    return '.'.join(parts[:parts.index('parametrizations')]) if 'parametrizations' in parts else path
