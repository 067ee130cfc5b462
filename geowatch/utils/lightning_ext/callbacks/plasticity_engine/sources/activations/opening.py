"""
What a capture switches on in the process, and how all of it goes back.

A capture is open over several hooks of Lightning, between which the user's
modes and stances may come and go in any order. So nothing here counts on being
the last one in: a mode of ours lies below the user's, a stance of ours turns
into the one that was there. Going back starts from whatever is on, so that it
can be interrupted anywhere and done again.

While torch.export follows the code of a model, all of it is off: Dynamo would
follow our hooks as well, and take the model for one that is called otherwise.
"""
import functools
import importlib.machinery
import re
import sys
import threading
import warnings

import torch

_open = {}  # id of an Opening to itself
# Of global hooks torch warns where a part of the model is a compiled module. Who makes errors of
# warnings would get one in the middle of the model.
_NEEDLESS = re.compile(r'Using `torch\.compile\(module\)` when there are global hooks')
# What all of torch.export goes through.
_EXPORT = 'torch.export._trace'


class Opening:
    """
    A mode, hooks of torch, and code that runs as it is written.

    Args:
        mode (TorchFunctionMode):
        *hooks (object): with ``attach()`` and ``detach()``, see :class:`.modules.Hooks`

    Attributes:
        is_on (bool): not while something is exported
        thread (int | None): in which it is open

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.opening import Opening
        >>> import types
        >>> from torch.overrides import TorchFunctionMode, _get_current_function_mode
        >>> hooks = types.SimpleNamespace(attach=lambda: None, detach=lambda: None)
        >>> ours, theirs = TorchFunctionMode(), TorchFunctionMode()
        >>> opening = Opening(ours, hooks)
        >>> opening.open()
        >>> with theirs:  # which is entered last and left first
        >>>     opening.close()
        >>>     assert _get_current_function_mode() is theirs
        >>> assert _get_current_function_mode() is None
    """

    def __init__(self, mode, *hooks):
        self._mode = mode
        self._hooks = hooks
        self._stance = self._stance_before = None
        self._wanted = None  # the stack of modes, while it is built anew
        self._filters = []   # the warnings that are shown
        self._silence = 'ignore', _NEEDLESS, UserWarning, None, 0
        self.is_on = False
        self.thread = None

    def open(self):
        """ Switch on; after an error, close() undoes what there is. """
        self.thread = threading.get_ident()
        _open[id(self)] = self
        _look_out_for_exports()
        self.switch_on()

    def close(self):
        """ Switch off whatever is on, for good. """
        self.switch_off()
        _open.pop(id(self), None)
        if not _open:
            _look_out_no_more()

    def switch_on(self):
        """ What open() does, again after switch_off(). """
        self.is_on = True
        # Compiled code runs as written, where modes and hooks work; nothing is recompiled later.
        if 'torch._dynamo' in sys.modules and hasattr(torch.compiler, 'set_stance'):
            from torch._dynamo import eval_frame
            self._stance_before, self._stance = eval_frame._stance, eval_frame.DynamoStance('force_eager')
            eval_frame._set_stance(self._stance)
        # Not by the function for it, after which warnings that were said once are said again.
        self._filters = warnings.filters
        self._filters.insert(0, self._silence)
        for hooks in self._hooks:
            hooks.attach()
        self.push()

    def push(self):
        """ Put the mode below those of the user, but for the one of the device, whose place is the lowest. """
        from torch.utils._device import DeviceContext
        stack = _stack()
        place = sum(isinstance(mode, DeviceContext) for mode in stack)
        self._build([*stack[:place], self._mode, *stack[place:]])

    def pop(self):
        """ Take the mode out of the stack, wherever it is. """
        stack = _stack() if self._wanted is None else self._wanted
        if self._wanted is not None or any(mode is self._mode for mode in stack):
            self._build([mode for mode in stack if mode is not self._mode])

    def switch_off(self):
        """ Switch off whatever is on. """
        self.pop()
        for hooks in self._hooks:
            hooks.detach()
        if self._stance is not None:
            from torch._dynamo import eval_frame
            # Whoever will restore ours, since it was on when theirs came, restores what was there before.
            for name, value in vars(self._stance_before).items():
                object.__setattr__(self._stance, name, value)
            if eval_frame._stance is self._stance:
                eval_frame._set_stance(self._stance_before)
            self._stance = None
        # Whoever has copied the list meanwhile brings back the one that was there.
        for filters in (self._filters, warnings.filters):
            filters[:] = [one for one in filters if one is not self._silence]
        self.is_on = False

    def _build(self, wanted):
        stack, self._wanted = _stack(), wanted
        kept = 0
        while kept < min(len(stack), len(wanted)) and stack[kept] is wanted[kept]:
            kept += 1
        for _ in range(len(stack) - kept):
            torch.overrides._pop_mode()
        for mode in wanted[kept:]:
            torch.overrides._push_mode(mode)
        self._wanted = None


def _stack():
    """ The modes of this thread, the lowest first. """
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def is_open_elsewhere() -> bool:
    """
    Whether another thread has one open: hooks and stances are those of the whole process.

    Returns:
        bool:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.opening import (
        >>>     is_open_elsewhere)
        >>> is_open_elsewhere()
        False
    """
    return any(opening.thread != threading.get_ident() for opening in list(_open.values()))


# --- what is exported meanwhile ---------------------------------------------------

class _Arrival:
    """ Sees torch.export load what it goes through, which it does as it is first called: half a second of imports. """

    @staticmethod
    def find_spec(name, path=None, target=None):
        """ See :class:`importlib.abc.MetaPathFinder`. """
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == _EXPORT else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if _open:
                    _look_out_for_exports()
            spec.loader.exec_module = exec_module
        return spec


def _look_out_for_exports():
    trace = sys.modules.get(_EXPORT)
    if trace is None and _Arrival not in sys.meta_path:
        sys.meta_path.insert(0, _Arrival)
    export = getattr(trace, '_export', None)
    if export is not None and not hasattr(export, 'of_torch'):
        trace._export = _without_us(export)


def _look_out_no_more():
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _Arrival]
    trace = sys.modules.get(_EXPORT)
    export = getattr(trace, '_export', None)
    if hasattr(export, 'of_torch'):
        trace._export = export.of_torch


def _without_us(export):
    @functools.wraps(export)
    def without_us(*args, **kwargs):
        ours = [opening for opening in _open.values() if opening.is_on and opening.thread == threading.get_ident()]
        for opening in ours:
            opening.switch_off()
        try:
            return export(*args, **kwargs)
        finally:
            for opening in ours:
                try:
                    opening.switch_on()
                except Exception:  # it sees no more
                    opening.close()
    without_us.of_torch = export
    return without_us
