"""
What can be read of an output of the model, and how nobody else sees us do it.
"""
import contextlib

import torch
from torch import nn

from ...sharding import is_sharded

# Types of tensors that hold their own numbers.
PLAIN = frozenset((torch.Tensor, nn.Parameter))
_NOTHING = contextlib.nullcontext()


def unseen_by_others():
    """ What we call is none of the user's: selective checkpointing would replay its results as the model's. """
    if not torch._C._len_torch_dispatch_stack() and not torch.is_inference_mode_enabled():
        return _NOTHING
    contexts = contextlib.ExitStack()
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _disable_current_modes
        contexts.enter_context(_disable_current_modes())
    if torch.is_inference_mode_enabled():
        # What adds up in one look has to take calls from inside and from outside of it.
        contexts.enter_context(torch.inference_mode(False))
    return contexts


def local_of(tensor):
    """ What this process has of a DTensor. """
    if type(tensor) in PLAIN or not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def can_be_read(tensor):
    """ Whether it has numbers, and samples of them. """
    return (tensor.ndim > 0 and tensor.layout is torch.strided and tensor.is_floating_point()
            and not tensor.is_meta and not tensor.is_nested and not _is_fake(tensor) and not is_strange(tensor))


def _is_fake(tensor):
    """ As while somebody only asks for shapes. """
    if type(tensor) in PLAIN:
        return False
    from torch._subclasses.fake_tensor import FakeTensor
    return isinstance(tensor, FakeTensor)


def is_strange(tensor):
    """ Whether it holds other tensors. """
    if type(tensor) in PLAIN:
        return False
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
    return is_traceable_wrapper_subclass(tensor)
