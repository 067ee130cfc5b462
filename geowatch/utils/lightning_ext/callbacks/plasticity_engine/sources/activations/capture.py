"""
Sees every call of an activation function while it is open.

A module hook sees ``nn.ReLU`` but not ``F.relu``, ``torch.relu`` or
``x.relu_()``. A :class:`torch.overrides.TorchFunctionMode` sees them all. It
also sees the layers, so that each tensor can carry a trail: which run of which
layer produced it, and on which axis its units are. A site is (module,
function, producing layer, k-th such call since that layer ran): one ``nn.ReLU``
used after two layers is two sites, one layer that runs for each item of a list
is one.

Which of them are hidden layers shows only later, when a further trained layer
takes in what came of them; until then the observer's numbers are provisional.
"""
import sys
import time
import weakref

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..contents import Contents
from .axes import Part, default_axis, each_apart, units_in, units_last
from .functions import OUTPUTS, SATURATED_VALUES, level, saturated_values
from .kinds import kind_of
from .modules import FUSED_FUNCTIONS, Hooks, Modules
from .moves import follow_units
from .nested import tensors_in
from .opening import Opening
from .readable import PLAIN, can_be_read, is_strange, local_of, unseen_by_others
from .sharded import Conversions, Shards, shards_of
from .sites import Site
from .trails import Trails
from .written import GATES, WRITTEN, as_written

_RETURNED = (torch.Tensor, tuple, list)
_SET_ITEM = torch.Tensor.__setitem__


class Capture:
    """
    Reports every activation call inside a ``with`` block.

    Nothing is attached to the model. It closes when nobody keeps it, too. An activation of weights alone, such as a
    learned gate, has no samples and is not reported.

    Args:
        model (torch.nn.Module): names of layers come from it
        observe (Callable): called with (site, output, axis, values, level):
            the output of the call, the axis of its units, the values at which
            a unit of this function is dead, a tuple, and the output above
            which its input is positive.
        on_error (Callable | None): called with the path of a module and the
            exception where we failed to follow a call in it, which is not
            seen then. By default the exception is raised.
        contents (Contents | None): of the model, if they are known, and which of them are trained; by default all
        everything (bool): observe also activations without a trained layer before them
        names (Callable[[str], bool]): whether the user names a module of this
            path, whose activations count wherever they are
        parts (Set[Site] | None): shared by captures, see below

    Attributes:
        hidden (Set[Site]): sites that are hidden layers, as seen so far
        parts (Set[Site]): sites that are only part of an activation that is
            written out, as the sigmoid of ``x * sigmoid(x)``
        values (Dict[Site, Tuple[float, ...]]): all sites, observed or not, and
            the values at which their units are dead
        empty (Dict[Site, Tuple[float, ...]]): those that were called without a sample
        without_units (Set[Site]): those of what has none, as the scores of attention
        ran (Set[str]): paths of modules that ran
        unseen (Dict[str, str]): module path to the reason why activations in it are not seen
        seconds (float): of our own work so far, without that of `observe`

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> seen = []
        >>> with Capture(model, lambda *args: seen.append(args)):
        >>>     _ = model(torch.ones(2, 3))
        >>> [(site.names()[0], tuple(x.shape), axis, dead, level) for site, x, axis, dead, level in seen]
        [('1', (2, 4), 1, (0.0,), 0.0)]
    """

    def __init__(self, model, observe, on_error=None, contents=None, everything=True,
                 names=lambda path: False, parts=None):
        self._model = model
        self._observe = observe
        self._on_error = on_error
        self._contents = contents
        self._everything = everything
        self._names = names
        self.parts = set() if parts is None else parts
        self.hidden = set()
        self.values = {}
        self.empty = {}
        self.without_units = set()
        self.ran = set()
        self.unseen = {}
        self.seconds = 0.
        self._modules = self._trails = None
        self._sites = {}
        self._last = {}  # path of a module that runs to sites in it that are hidden layers also if none follows
        self._suspended = None  # the module that runs without us
        self._at_work = False
        self._broken = False
        self._mode = _Mode(self)
        self._opening = Opening(
            self._mode, Hooks(_weakly(self, Capture._entering), _weakly(self, Capture._leaving)),
            Conversions(_weakly(self, Capture._converted)))
        # Private names of torch: where one is missing, no capture opens, and nothing else is lost.
        self._graph_task = torch._C._current_graph_task_id
        self._functorch_level = torch._C._functorch.peek_interpreter_stack
        from torch.overrides import _get_current_function_mode
        self._innermost_mode = _get_current_function_mode

    # --- attach and detach -------------------------------------------------

    def __enter__(self):
        contents = self._contents or Contents(self._model)
        self._modules = Modules(contents)
        self._trails = Trails(contents, self.unseen)
        self.hidden = self._trails.confirmed
        try:
            self._opening.open()
        except Exception:
            self.close()
            raise
        return self

    def __exit__(self, *exc):
        self.close()

    def __del__(self):
        if hasattr(self, '_opening') and not sys.is_finalizing():
            self.close()

    def close(self):
        """ Leave nothing behind: from any state, and as often as it takes. """
        self._opening.close()
        self._suspended, self._broken = None, True
        if self._modules is not None:
            self.ran |= self._modules.ran()
        for known in filter(None, (self._last, self._modules, self._trails)):
            known.clear()
        self._contents = None

    def _guard(self, function, *args):
        """ An error of ours never reaches the model, and our time is noted. """
        if self._broken:
            return
        outermost, self._at_work = not self._at_work, True
        start = time.perf_counter()
        try:
            function(*args)
        except Exception as ex:
            if self._on_error is None:
                self._broken = True
                raise
            self._on_error(self._modules.path, ex)
        finally:
            if outermost:
                self._at_work = False
                self.seconds += time.perf_counter() - start

    # --- the modules that run ----------------------------------------------

    def _entering(self, module, args):
        running = self._modules.enter(module)
        if running is not None and running.may_be_fast and self._suspended is None and self._is_fast(module):
            self._suspended = module
            self._opening.pop()

    def _leaving(self, module, args, *kwargs_and_output):
        for running in self._modules.leave(module):
            if running.is_plain and running.path not in self._last:
                continue
            # After an exception torch gives neither kwargs nor output.
            returned = running.module is module and len(kwargs_and_output) == 2
            if self._suspended is running.module:
                self._suspended = None
                self._opening.push()
                if returned:
                    self._guard(self._look_apart, running, args, *kwargs_and_output)
            if running.is_opaque and returned:
                self._guard(self._run_as_one, running, args, *kwargs_and_output)
            if running.activation and returned:
                self._guard(self._report_module, running, kwargs_and_output[1])
            if (sites := self._last.pop(running.path, None)) and returned:
                self._guard(self._keep_features, sites, kwargs_and_output[1])

    def _is_fast(self, module):
        # Also a frozen part of a network in training.
        return (not module.training and self._innermost_mode() is self._mode and not (
            torch.is_grad_enabled() and any(param.requires_grad for param in module.parameters())))

    def _look_apart(self, running, args, kwargs, output):
        """ What ran without us runs once more, for the look only. """
        outputs = tensors_in([output])
        if isinstance(running.module, nn.MultiheadAttention):  # it has no activation
            self.unseen[running.path] = 'scaled_dot_product_attention'
            self._trails.start(running.path, outputs[:1], lambda x: -1, tensors_in([args, kwargs]),
                               self._trails.is_trained(running.path, running.module))
        elif outputs and not any(x.is_nested for x in tensors_in([args, kwargs])):
            self._modules.push(running)
            self._suspended = running.module  # so that nothing inside is suspended again
            try:
                with torch.no_grad():
                    apart = running.module.forward(*args, **kwargs)
            finally:
                self._suspended = None
                self._modules.pop()
            trail = self._trails.of(tensors_in([apart]))
            if trail is not None:
                self._trails.remember(outputs[0], trail)

    def _run_as_one(self, running, args, kwargs, output):
        """ A module whose functions cannot be seen: a layer. """
        self.unseen[running.path] = running.is_opaque
        self._trails.start(running.path, tensors_in([output]), default_axis, tensors_in([args, kwargs]),
                           self._trails.is_trained(running.path, running.module))

    # --- the functions that are called -------------------------------------

    def _converted(self, name, source, output):
        if self._graph_task() == -1 and isinstance(source, torch.Tensor):
            with torch._C.DisableTorchFunction():
                self._guard(self._trails.convert, name, source, output)

    def called(self, func, args, kwargs, output):
        """ Note one call of a torch function, and what it returned. """
        # Activation checkpointing runs the forward again inside backward.
        if self._graph_task() == -1:
            self._guard(self._follow, func, args, kwargs, output)

    # This runs for each call of a torch function: it has to be cheap.
    def _follow(self, func, args, kwargs, output):
        (name, is_mask, is_plain), path, trails = kind_of(func), self._modules.path, self._trails
        if is_mask:
            trails.compare(name, args, output)
        found = [output] if isinstance(output, torch.Tensor) else tensors_in(output)
        outputs = [x for x in found if x.is_floating_point() or x.is_complex()]
        if not outputs:
            return
        is_activation = name in SATURATED_VALUES
        if self._functorch_level() is not None:
            if is_activation:
                self.unseen[path] = 'a transform of torch.func'
            return
        if is_plain and not is_activation:
            trails.follow(name, args, kwargs, outputs, path)
            return
        if name in FUSED_FUNCTIONS:
            self.unseen[path] = name
        written = as_written(name, args, kwargs, trails) if name in WRITTEN and not is_activation else None
        has_samples = trails.follow(name, args, kwargs, outputs, path)
        if not has_samples or self._modules.inside:
            return
        if is_activation:
            self._report(name, outputs[0], saturated_values(name, args, kwargs), level(name, args, kwargs))
        elif written is not None:
            name, values, parts = written
            self.parts.update(parts)
            self._report(name, outputs[0], values, level(name), parts, is_hinge=not parts)
        elif name in GATES:
            trails.activate(outputs[0], name, ())

    def _report_module(self, running, output):
        if not self._modules.inside and isinstance(output, torch.Tensor):
            self._modules.push(running._replace(activation=None))
            try:
                with torch._C.DisableTorchFunction():  # unlike a call, a hook runs under our mode
                    name = running.activation
                    self._report(name, output, saturated_values(name), level(name))
            finally:
                self._modules.pop()

    def _report(self, name, output, values, above, parts=(), is_hinge=False):
        trail, path = self._trails.get(output), self._modules.path
        local = local_of(output)
        if not can_be_read(local):
            if is_strange(local):
                self.unseen[path] = f'{name} of a {type(local).__name__}, which has no numbers of its own'
            return
        if trail is None:
            layer, nth, matrices, shards = '', 0, (), None
            place = (Part(default_axis(output), output.shape[default_axis(output)]),)
        else:
            layer, place, matrices, shards = trail.run.layer, trail.place, trail.matrices, trail.shards
            key = path, name, trail.extent
            nth = trail.run.calls.get(key, 0)
            trail.run.calls[key] = nth + 1
        if not place:
            site = self._site(path, name, layer, nth, 0)
            self.without_units.add(site)
            self._trails.activate(output, name, (site,), parts)
            return
        if local is not output:
            shards = shards_of(output, place, matrices)
            place = follow_units('to_local', (), {}, output, place, local)
        with unseen_by_others(), torch.no_grad():
            plain = local.detach()
            pieces = [(layer, plain if type(plain) is torch.Tensor else plain.as_subclass(torch.Tensor), place)]
            if matrices:  # each expert of a mixture is a layer of its own
                pieces = [(f'{layer}.{i}', one, (Part(one.ndim - 1, one.shape[-1]),))
                          for i, one in enumerate(each_apart(pieces[0][1], place, matrices, trail.labels))]
            sites = tuple(self._site(path, name, own_layer, nth, units_in(own), shards)
                          for own_layer, _, own in pieces)
            self._trails.activate(output, name, sites, parts)
            self.values.update(dict.fromkeys(sites, values))
            is_named = self._names(path)
            if is_named:
                self.hidden.update(sites)
            elif name not in OUTPUTS and not is_hinge and trail is not None and trail.run.is_trained:
                for holder in self._modules.holding(layer):
                    self._last.setdefault(holder, []).extend(sites)
            if is_named or self._everything or (trail is not None and trail.is_trained):
                for site, (_, one, own) in zip(sites, pieces, strict=True):
                    if not one.numel():
                        self.empty[site] = values
                    elif site not in self.parts:
                        self._look(site, *units_last(one, own), values, above)

    def _keep_features(self, sites, output):
        """ What a part of the network makes counts also if no layer follows, unless it has become a loss in there. """
        returned = tensors_in([output, getattr(output, '__dict__', None)])  # which may be an object of the user's
        trails = [trail for trail in map(self._trails.get, returned) if trail is not None and trail.place]
        lost = self._trails.lost.difference(*(trail.pending for trail in trails))
        self.hidden.update(site for site in sites if site not in lost)

    def _site(self, path, name, layer, nth, units, shards=None):
        key = path, name, layer, nth, units, shards
        site = self._sites.get(key)
        if site is None:
            running = self._modules.top
            shards = (shards or Shards()).of(units)
            site = self._sites[key] = Site(
                path, name, layer, nth, units if shards.offset is None else shards.units,
                running is not None and running.is_leaf, shards.offset, shards.samples)
        return site

    def _look(self, site, *seen):
        """ Hand one output to the observer. """
        device, start = seen[0].device.type, time.perf_counter()
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                self._observe(site, *seen)
        else:
            self._observe(site, *seen)
        self.seconds -= time.perf_counter() - start


class _Mode(TorchFunctionMode):
    """ Tells a capture of each call. What torch keeps of us does not keep the capture. """

    def __init__(self, capture):
        super().__init__()
        self._capture = weakref.ref(capture)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs) if kwargs else func(*args)
        # Many calls only ask for a size.
        if isinstance(output, _RETURNED) and type(output) is not torch.Size:
            returned = output
        elif output is None and func is _SET_ITEM:
            returned = args[0]
        else:
            return output
        if (capture := self._capture()) is not None:
            if PLAIN.issuperset(types):
                capture.called(func, args, kwargs or {}, returned)
            else:  # of a subclass of tensors, what we ask would be calls of its own
                with torch._C.DisableTorchFunctionSubclass():
                    capture.called(func, args, kwargs or {}, returned)
        return output


def _weakly(capture, method):
    """ A function that calls a method of the class as long as the capture is there. """
    ref = weakref.ref(capture)

    def call(*args):
        alive = ref()
        if alive is not None:
            method(alive, *args)
    return call
