"""
Which tensor came from where: the run of a layer, and the axes of its units.

A tensor's trail also knows the activations on its way since the last trained
layer. Once a further trained layer takes it in, they are hidden layers; those
of which that never happens, as in a loss or a metric, are none.
"""
import itertools
import weakref
from typing import NamedTuple

import torch
from torch import nn

from ..flat import calls_torch
from .axes import SLICES, Part, Place, units_in, whole
from .layers import LAYERS, NORM_AXIS, layer_places, of_one_group
from .moves import MOVES, follow_units, stacked_axis
from .nested import tensors_in
from .owners import LOOKUPS, MASKS, Owners, slice_name
from .products import OPERANDS, PRODUCTS, follow_product
from .sharded import Shards, is_summand, shards_of
from .written import CASTS, COMPARISONS

_NONE = frozenset()
# What has the shape or type of another tensor, and none of its numbers; and losses, after which no layer comes.
_WITHOUT_TRAIL = {
    'zeros_like', 'ones_like', 'empty_like', 'full_like', 'rand_like', 'randn_like', 'randint_like', 'new_zeros',
    'new_ones', 'new_empty', 'new_full', 'new_tensor', 'binary_cross_entropy', 'binary_cross_entropy_with_logits',
    'cross_entropy', 'kl_div', 'l1_loss', 'mse_loss', 'smooth_l1_loss', 'huber_loss', 'nll_loss', 'gaussian_nll_loss',
    'poisson_nll_loss', 'soft_margin_loss'}
_PRODUCTS = {*PRODUCTS, *OPERANDS}
# Functions after which a tensor of the same shape has not the same trail.
_MOVING = {*MOVES, *OPERANDS, 'detach'}


class Run:
    """
    One run of a layer, and the activation calls on what it produced.

    Attributes:
        layer (str): its path
        order (int): how many ran before
        is_trained (bool): whether the layer's own weight is
        calls (Dict[Any, int]): how many calls of each kind there were
    """
    __slots__ = ('layer', 'order', 'is_trained', 'calls')

    def __init__(self, layer, order, is_trained):
        self.layer = layer
        self.order = order
        self.is_trained = is_trained
        self.calls = {}


class Trail(NamedTuple):
    """
    Where a tensor came from.

    Attributes:
        run (Run): of the layer that ran last on the way to it
        place (Place): of its units
        matrices (Place): of the matrices of the layer's weight, if it has several
        labels (Tuple[Tensor, int] | None): where each place on `matrices` is of one of so many
        extent (int): which slice of what the layer produced
        root (int): tensors of one root are computed element by element from each other
        acts (Tuple[Tuple[str, Tuple[Site, ...]], ...]): activations since the root
        pending (FrozenSet[Site]): those since the last trained layer
        is_trained (bool): whether there is a trained layer on the way
        shards (Shards | None): which part of all this process has, where the tensor does not tell it itself
    """
    run: Run
    place: Place
    matrices: Place = ()
    labels: tuple | None = None
    extent: int = 0
    root: int = 0
    acts: tuple = ()
    pending: frozenset = _NONE
    is_trained: bool = True
    shards: Shards | None = None


class _Known(weakref.ref):
    """ What is known of a tensor, which it does not keep alive. """
    __slots__ = ('key', 'trail', 'owner')


class Trails:
    """
    Follows tensors from layers through all that is done with them, without keeping any alive.

    Args:
        contents (Contents): of the model, whose parameters and buffers are
            known by their layer
        unseen (Dict[str, str] | None): module path to the reason why
            something in it is not seen, to which is added

    Attributes:
        confirmed (Set[Site]): activations with a trained layer before and after them
        lost (Set[Site]): those of which something came that has no units any more, as a loss

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.trails import Trails
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
        >>> import torch
        >>> layer = torch.nn.Linear(3, 4)
        >>> trails, x = Trails(Contents(torch.nn.ModuleDict({'fc': layer}))), torch.ones(2, 3)
        >>> y = layer(x)
        >>> trails.follow('linear', (x, layer.weight, layer.bias), {}, [y], 'fc')
        True
        >>> trail = trails.get(y)
        >>> trail.run.layer, trail.place, trail.is_trained
        ('fc', (Part(axis=1, size=4, step=1),), True)
    """

    def __init__(self, contents, unseen=None):
        self.confirmed = set()
        self.lost = set()
        self._unseen = {} if unseen is None else unseen
        self._owners = Owners(contents)
        self._are_flat = self._owners.are_flat
        self._known = {}      # id of a tensor to _Known
        self._masks = {}      # id of a comparison with zero to itself, the trail of what it compares, and which way
        self._order = itertools.count(1)

    # This runs for each call of a torch function: it has to be cheap.
    def follow(self, name, args, kwargs, outputs, path):
        """
        Note one call of a torch function.

        Args:
            name (str): of the function
            args (tuple): of the call
            kwargs (dict): of the call
            outputs (List[Tensor]): those of real or complex numbers that it returned, and not of integers
            path (str): of the module that runs

        Returns:
            bool: False if all that it was given are weights: it has no samples
        """
        inputs = tensors_in(args)
        if kwargs:
            inputs += tensors_in(kwargs.values())
        source = trail = weight = None
        several = False
        owners = []  # of those inputs that are weights, or made of weights alone
        for x in inputs:
            known = self._known.get(id(x))
            if known is None:
                owner = self._owners.known.get(id(x))
                if owner is None and (type(x) is not torch.Tensor or x.grad_fn is not None or self._are_flat):
                    owner = self._of_unknown(x, path)
            else:
                owner = known.owner
                if known.trail is not None:
                    if trail is None:
                        source, trail = x, known.trail
                    elif known.trail is not trail:
                        several = True
            owners.append(owner)
            if owner is not None and (weight is None or owner.rank > weight.rank):
                weight = owner
        if name in _WITHOUT_TRAIL:
            return True
        is_layer = name in LAYERS
        if weight is not None:
            if name == 'grad':  # fast weights are made of it
                self._own_gradients(args, kwargs, outputs)
                return False
            if name in LOOKUPS and owners[0] is weight and None in owners:
                table = inputs[0]
                if table.ndim > 2:
                    self.remember(outputs[0], None, weight._replace(labels=inputs[-1], count=len(table)))
                    return False
                name, is_layer = 'embedding', True  # written by hand
            # What a network holds in a buffer may be data, such as points; a mask may come from anywhere.
            is_weight = None not in owners or (name in MASKS and trail is None and weight.rank[0] and any(
                x.shape == outputs[0].shape for x, owner in zip(inputs, owners, strict=True) if owner is weight))
            if is_weight and not (is_layer and owners[0].is_data):
                for x, owner in self._owners.made(name, inputs, owners, weight, outputs):
                    self.remember(x, None, owner)
                return False
        if is_layer and (weight is not None or name not in PRODUCTS):
            self._run_layer(name, args, kwargs, inputs, owners, weight, outputs, path)
        elif trail is not None:
            if not several and name not in _MOVING and len(outputs) == 1 and outputs[0].shape == source.shape:
                self.remember(outputs[0], trail)  # by far the most calls
                return True
            self._pass_on(name, args, kwargs, inputs, outputs, source, trail, several)
        elif name in NORM_AXIS:
            for x in outputs:
                self.remember(x, self._trail(path, whole(x, [NORM_AXIS[name]]), is_trained=False))
        return True

    def _of_unknown(self, x, path):
        """ The owner (Owner | None) of what may be a parameter, or of an autograd.Function that hides its work. """
        owner = None
        if isinstance(x, nn.Parameter) or self._are_flat:
            owner = self._owners.of_unknown(x, path)
        # As far as gradients tell.
        if owner is None and isinstance(x.grad_fn, torch.autograd.function.BackwardCFunction):
            name = type(x.grad_fn).__name__.removesuffix('Backward')
            self._unseen[path] = f'{name}, an autograd.Function that is not registered'
        return owner

    def _pass_on(self, name, args, kwargs, inputs, outputs, source, trail, several):
        """ Anything but a layer. """
        pending, is_trained, root, place = trail.pending, trail.is_trained, None, None
        if several or name in OPERANDS:
            found = [(x, own) for x, own in ((x, self.get(x)) for x in inputs) if own is not None]
            pending = _NONE.union(*(own.pending for _, own in found)) - self.confirmed
            is_trained = any(own.is_trained for _, own in found)
            root = next(self._order)
            if name in _PRODUCTS:
                trails = [self.get(x) for x in inputs]
                i, place = follow_product(name, args, inputs, [own and own.place for own in trails], outputs[0])
                source, trail = inputs[i], trails[i]
            else:
                # The factor of a product that is not broadcast, the features and not the boxes of a pooling, else
                # what ran last.
                source, trail = max(found, key=lambda pair: (
                    pair[0].shape == outputs[0].shape, pair[0].ndim == outputs[0].ndim, bool(pair[1].place),
                    pair[1].run.order))
                if name == 'stack' and trail.place and len({own.run.layer for _, own in found}) == len(inputs):
                    # Layers on an axis of their own are told apart by it.
                    place = (*follow_units(name, args, kwargs, source, trail.place, outputs[0]),
                             Part(stacked_axis(args, kwargs, outputs[0]), len(inputs)))
        if name == 'detach' and not calls_torch('deepspeed.'):
            pending, is_trained = _NONE, False
            root = root or next(self._order)
        for x in outputs:
            self.remember(x, self._moved(name, args, kwargs, source, trail, x, pending, is_trained, root, place))

    def _moved(self, name, args, kwargs, source, trail, x, pending, is_trained, root, place):
        """ The trail of what a call has made of a tensor that has one: the same, where nothing has moved. """
        run, before, matrices, labels, extent, old_root, acts, *_, shards = trail
        if place is None:
            place = follow_units(name, args, kwargs, source, before, x)
            if matrices:
                matrices = follow_units(name, args, kwargs, source, matrices, x)
        else:
            matrices = ()
        if name in SLICES and x.ndim and x.numel() < source.numel() and units_in(place) == units_in(before):
            extent = root = next(self._order)
        elif x.shape != source.shape:
            root = next(self._order)
        if not place and before and pending:
            self.lost |= pending
        if root is not None:
            old_root, acts = root, ()
        elif place is before and pending is trail.pending and is_trained is trail.is_trained:
            return trail
        return Trail(run, place, matrices, labels, extent, old_root, acts, pending, is_trained, shards)

    def convert(self, name, source, output):
        """
        Note that a local tensor was made of a DTensor, or the other way round.

        Args:
            name (str): of the method
            source (Tensor):
            output (Tensor):
        """
        trail = self.get(source)
        if trail is not None:
            shards = None
            if name == 'to_local':
                if is_summand(source):
                    return
                shards = shards_of(source, trail.place, trail.matrices)
            moved = self._moved(name, (), {}, source, trail, output, trail.pending, trail.is_trained, None, None)
            self.remember(output, moved._replace(shards=shards))

    # --- layers ------------------------------------------------------------------

    def _run_layer(self, name, args, kwargs, inputs, owners, weight, outputs, path):
        layer, is_trained = (path, False) if weight is None else (weight.layer, weight.is_trained)
        if weight is None and len(inputs) > 1 and (made := self.get(inputs[1])) is not None:
            # What another layer has made is the weight.
            layer, is_trained = slice_name(made.run.layer, inputs[1]), made.is_trained
        trail = self._consume(layer, inputs, is_trained)
        labels = None
        if weight is not None and weight.labels is not None:
            labels = weight.labels.flatten(), weight.count
        elif name == 'grouped_mm':
            labels = _labels_of_groups(outputs[0], inputs), len(inputs[1])
        for x in outputs:
            if x.ndim:
                place, matrices = layer_places(name, args, owners, x)
                if len(owners) > 1 and owners[1] is None:
                    place = of_one_group(name, args, kwargs, inputs, place)
                self.remember(x, trail._replace(place=place, matrices=matrices, labels=labels))

    def start(self, layer, outputs, axis, inputs=(), is_trained=True):
        """
        A layer ran as one piece: everything made of its outputs leads back to here.

        Args:
            layer (str): its path
            outputs (List[Tensor]):
            axis (Callable[[Tensor], int]): of the units of an output
            inputs (Iterable[Tensor]): what it was given
            is_trained (bool): whether its weights are
        """
        trail = self._consume(layer, inputs, is_trained)
        for x in outputs:
            if x.ndim:
                self.remember(x, trail._replace(place=whole(x, [axis(x)])))

    def _consume(self, layer, inputs, is_trained):
        """ The trail of what a layer makes of some tensors; a trained one confirms what is pending on them. """
        pending, after_trained, samples = _NONE, False, ()
        for x in inputs:
            trail = self.get(x)
            if trail is not None:
                pending = pending | trail.pending if trail.pending else pending
                after_trained = after_trained or trail.is_trained
                if trail.shards is not None:
                    samples = max(samples, trail.shards.samples)
        if is_trained:
            self.confirmed |= pending
            pending = _NONE
        return self._trail(layer, (), is_trained, pending, after_trained, Shards(samples=samples) if samples else None)

    def _trail(self, layer, place, is_trained, pending=_NONE, after_trained=False, shards=None):
        order = next(self._order)
        return Trail(Run(layer, order, is_trained), place, root=order, pending=pending,
                     is_trained=is_trained or after_trained, shards=shards)

    def activate(self, output, name, sites, parts=()):
        """
        Note that a tensor is the output of an activation.

        Args:
            output (Tensor):
            name (str): of the function
            sites (Tuple[Site, ...]): where it was called: one for each expert, usually a single one
            parts (Collection[Site]): sites that are parts of it
        """
        trail = self.get(output)
        if trail is not None:
            run, place, matrices, labels, extent, root, acts, pending, is_trained, shards = trail
            pending = pending.difference(parts) if parts else pending
            if is_trained:
                pending = pending.union(sites)
            acts = ((name, sites),) if parts else (*acts, (name, sites))
            self.remember(output, Trail(run, place, matrices, labels, extent, root, acts, pending, is_trained, shards))

    def _own_gradients(self, args, kwargs, outputs):
        of = args[1] if len(args) > 1 else kwargs.get('inputs', args[0])
        of = [of] if isinstance(of, torch.Tensor) else list(of)
        for x, gradient in zip(of, outputs, strict=False):
            known = self._known.get(id(x))
            owner = self._owners.known.get(id(x)) if known is None else known.owner
            if owner is not None:
                self.remember(gradient, None, owner)

    # --- masks -------------------------------------------------------------------

    def compare(self, name, args, output):
        """
        Note a comparison of a tensor with zero, or what is cast from one.

        Args:
            name (str): of the function
            args (tuple): of the call
            output (Tensor):
        """
        x = args[0] if args else None
        if name in COMPARISONS:
            trail = self.get(x)
            if trail is not None and len(args) > 1 and type(args[1]) in (int, float) and args[1] == 0:
                self._masks[id(output)] = weakref.ref(output), trail, COMPARISONS[name]
        elif name in CASTS and id(x) in self._masks and self._masks[id(x)][0]() is x:
            self._masks[id(output)] = (weakref.ref(output), *self._masks[id(x)][1:])

    def mask_of(self, mask, x):
        """
        Args:
            mask (Any):
            x (Any):

        Returns:
            bool | None: True if the mask says where x is above zero, False for
                below, None if it does neither
        """
        own = self._masks.get(id(mask)) if self._masks else None
        if own is None or own[0]() is not mask:
            return None
        trail = self.get(x)
        if trail is None:
            return None
        return own[2] if (trail.root, trail.acts) == (own[1].root, own[1].acts) else None

    # --- what is known -----------------------------------------------------------

    def get(self, tensor):
        """ The trail (Trail | None) of a tensor. """
        known = self._known.get(id(tensor))
        return known.trail if known is not None else None

    def of(self, tensors):
        """ The trail (Trail | None) of the layer that ran last on the way to some tensors. """
        return max(filter(None, map(self.get, tensors)), key=lambda trail: trail.run.order, default=None)

    def is_trained(self, path, module):
        """ Whether any weight of a module is. """
        return self._owners.is_trained(path, module)

    def remember(self, tensor, trail, owner=None):
        """
        Args:
            tensor (Tensor):
            trail (Trail | None):
            owner (Owner | None): of what is made of weights alone
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
        self._masks.clear()
        self._owners.clear()


def _labels_of_groups(output, inputs):
    """ Which group each row is of, by where the groups end. """
    ends = next((x for x in inputs if not x.is_floating_point()), None)
    rows = torch.arange(len(output), device=output.device)
    return torch.zeros_like(rows) if ends is None else torch.searchsorted(ends.to(rows.dtype), rows, right=True)
