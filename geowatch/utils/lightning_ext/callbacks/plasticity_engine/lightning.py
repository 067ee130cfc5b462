"""
What the trainer and the model say: when an epoch ends, what scales gradients, where to look.

The one file that knows the attributes of Lightning that its callbacks have no
other way to learn.
"""
import math
import types
from typing import NamedTuple

import torch


class Moment(NamedTuple):
    """
    Where a run is.

    Attributes:
        step (int): index of the optimizer step, from 0; -1 before the first
        epoch (int): from 0
        is_last (bool): whether the step is the last one of the epoch

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lightning import Moment
        >>> Moment(9, epoch=1, is_last=True)
        Moment(step=9, epoch=1, is_last=True)
    """
    step: int
    epoch: int
    is_last: bool


def step_of(trainer) -> int:
    """ Index of the optimizer step that goes on, or that comes next. """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def begins_step(trainer, batch_idx: int) -> bool:
    """ Whether the batch that begins is the first micro-batch of its step. """
    return batch_idx % trainer.accumulate_grad_batches == 0


def has_stepped(trainer) -> bool:
    """ Whether the batch that ends was the last micro-batch of its step. """
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def begins_anew(trainer) -> bool:
    """ Whether the network is untrained, as far as this run knows. """
    return not trainer.ckpt_path and step_of(trainer) == 0


def batches_left(trainer, batch_idx: int, dataloader_idx: int | None = None) -> float:
    """ How many batches there will be, this one included; inf where that is not known. """
    if dataloader_idx is None:
        return trainer.num_training_batches - batch_idx
    batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    batches = list(batches)[dataloader_idx:] if isinstance(batches, (list, tuple)) else [batches]
    return sum(batches) - batch_idx


def resolve(interval, metric, trainer):
    """ What 'auto' means for a metric. """
    if interval != 'auto':
        return interval
    return trainer.log_every_n_steps if metric.every == 'log' and trainer.log_every_n_steps else 'epoch'


def is_last_step(trainer, batch_idx):
    """ Whether the optimizer step that this batch belongs to is the last one of the epoch. """
    if trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step + max(1, len(trainer.optimizers)):
        return True
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    return batches != math.inf and batch_idx // accumulate == (batches - 1) // accumulate


def steps_until_the_last(trainer, pl_module, batch_idx):
    """ How many steps after this one the last one of the epoch comes, as far as that is known. """
    left = math.inf
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if batches != math.inf:
        left = (batches - 1) // accumulate - batch_idx // accumulate
    if trainer.max_steps > 0:
        # Manual optimization may step any number of times in a batch.
        left = min(left, trainer.max_steps - trainer.global_step if pl_module.automatic_optimization else 1)
    return max(left, 1)


def steps_of(schedule, trainer, steps, seconds):
    """ About how many steps are between two measurements that are asked for. """
    if schedule.seconds is not None:
        return max(schedule.seconds * steps / seconds, 1)
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    epoch = steps if batches == math.inf else -(-batches // accumulate)
    return min(schedule.steps or epoch, max(epoch, 1))


def is_last_validation(trainer):
    """ Whether no other validation follows in this epoch; True as well where that is unknown. """
    every, batches = trainer.val_check_batch, trainer.num_training_batches
    if trainer.is_last_batch or every is None or math.isinf(every) or math.isinf(batches):
        return True
    return batches - (trainer.fit_loop.epoch_loop.batch_idx + 1) < every


def scale_of(trainer, optimizer):
    """ What the gradients are multiplied by now. A fused optimizer unscales by itself, later. """
    scaler = getattr(trainer.precision_plugin, 'scaler', None)
    if scaler is not None and getattr(optimizer, '_step_supports_amp_scaling', False):
        return scaler.get_scale()
    return 1.


def choose_source(source, validates, pl_module):
    """ Where activations are seen, None for nowhere, and a word on what that leaves out. """
    compiled = _is_compiled(pl_module)
    if compiled and not hasattr(torch.compiler, 'set_stance'):
        return None, 'activations (the model is compiled, and this torch cannot run it as written: 2.6 can)'
    if source == 'auto' and compiled and not validates:
        return None, ("activations (the model is compiled, and there is no validation; source='train' looks, and "
                      'runs the steps that it sees uncompiled)')
    chosen = 'validation' if validates and source != 'train' else 'train'
    if compiled and chosen == 'train':
        return chosen, 'training steps whose activations are seen run uncompiled, and may differ in their last bits'
    return chosen, None


def _is_compiled(pl_module):
    return getattr(pl_module, '_compiler_ctx', None) is not None or any(
        hasattr(module, '_orig_mod') or getattr(module, '_compiled_call_impl', None) is not None
        or has_compiled_methods(module) for module in pl_module.modules())


def has_compiled_methods(module) -> bool:
    """
    Whether a method or an attribute of a module is what ``torch.compile`` returns.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lightning import has_compiled_methods
        >>> import torch
        >>> class Net(torch.nn.Module):
        >>>     @torch.compile
        >>>     def features(self, x):
        >>>         return x.relu()
        >>> has_compiled_methods(Net()), has_compiled_methods(torch.nn.ReLU())
        (True, False)
    """
    own = [value for cls in type(module).__mro__ if not cls.__module__.startswith('torch.')
           for value in vars(cls).values()]
    # Of a method the function, and of a static one what is in it.
    found = [getattr(getattr(value, '__func__', value), '__dict__', {}) for value in (*own, *vars(module).values())
             if isinstance(value, (types.FunctionType, types.MethodType, staticmethod, classmethod))]
    return any('_torchdynamo_orig_callable' in names and not names.get('_torchdynamo_disable') for names in found)


class _InBar(float):
    """ A number with three significant digits in the progress bar, which would show 0.0001 as 0.000. """

    def __format__(self, spec):
        return format(float(self), '.3g')


def show_to_callbacks(trainer, values):
    """ Put values where other callbacks look. """
    # The public property computes what the model has logged, in the middle of an epoch, and keeps it.
    trainer._logger_connector._callback_metrics.update(values)


def show_in_progress_bar(trainer, values):
    """ Put values into the progress bar, by names as short as they can be. """
    # What the bar reads; the public property computes what the model has logged, in the middle of an epoch.
    shown = trainer._logger_connector._progress_bar_metrics
    for name, value in values.items():
        is_free = isinstance(shown.get(name, _InBar()), _InBar)
        shown[name if is_free else f'plasticity/{name}'] = _InBar(value)
