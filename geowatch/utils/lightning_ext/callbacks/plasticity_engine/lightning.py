"""
What the trainer and the model say: when an epoch ends, what scales gradients, where to look.

The one file that knows the attributes of Lightning that its callbacks have no
other way to learn.
"""
import math
import types
from typing import NamedTuple

import torch

from .statistics.sums import double


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


def replica_of(trainer) -> tuple[int, int]:
    """
    Which part of the data this process has, of how many: those of one tensor-parallel group have the same batches.

    Args:
        trainer (Trainer): of either package

    Returns:
        Tuple[int, int]:
    """
    sampler = trainer.distributed_sampler_kwargs or {}
    return sampler.get('rank', trainer.global_rank), sampler.get('num_replicas') or trainer.world_size


def step_of(trainer) -> int:
    """ Index of the optimizer step that goes on, or that comes next. """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def batch_of(trainer) -> int:
    """ Index in the epoch of the batch that goes on. The hooks have an old one where a step takes dataloader_iter. """
    return trainer.fit_loop.epoch_loop.batch_idx


def begins_step(trainer) -> bool:
    """ Whether the batch that begins is the first micro-batch of its step. """
    return batch_of(trainer) % trainer.accumulate_grad_batches == 0


def has_stepped(trainer) -> bool:
    """ Whether the batch that ends was the last micro-batch of its step. """
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def begins_anew(trainer) -> bool:
    """ Whether the network is untrained, as far as this run knows, when a checkpoint has been read. """
    return step_of(trainer) == 0 and trainer.global_step == 0


def batches_left(trainer, batch_idx: int | None = None, dataloader_idx: int | None = None) -> float:
    """ How many batches there will be, this one included; inf where that is not known. In training without indices. """
    if batch_idx is None:
        return trainer.num_training_batches - batch_of(trainer)
    batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    batches = list(batches)[dataloader_idx:] if isinstance(batches, (list, tuple)) else [batches]
    return sum(batches) - batch_idx


def resolve(interval, metric, trainer):
    """ What 'auto' means for a metric. """
    if interval != 'auto':
        return interval
    if metric.every != 'log' or not trainer.log_every_n_steps:
        return 'epoch'
    # The chunks of a batch cost about as much as the step.
    is_expensive = 'pieces' in metric.sources and trainer.world_size * trainer.accumulate_grad_batches == 1
    return trainer.log_every_n_steps * (10 if is_expensive else 1)


def is_last_step(trainer, pl_module) -> bool:
    """ Whether the optimizer step that this batch belongs to is the last one of the epoch, as far as that is known. """
    # Manual optimization may step any number of times in a batch: see may_be_last.
    if trainer.is_last_batch or (pl_module.automatic_optimization and 0 < trainer.max_steps <= trainer.global_step + 1):
        return True
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    return batches != math.inf and batch_of(trainer) // accumulate == (batches - 1) // accumulate


def validates_in_step(trainer) -> bool:
    """ Whether validation follows a batch of this step. """
    return batches_until_validation(trainer) < trainer.accumulate_grad_batches - (
        batch_of(trainer) % trainer.accumulate_grad_batches)


def is_last_epoch(trainer) -> bool:
    """ Whether the limits of a run let no other epoch follow, as far as that is known as one begins. """
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1:
        return True
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    return 0 < trainer.max_steps <= trainer.global_step + steps


def may_be_last(trainer, pl_module) -> bool:
    """ Whether the run may well end with this step: in validation, or with the steps that a batch takes. """
    if validates_in_step(trainer):
        return True
    if pl_module.automatic_optimization or trainer.max_steps <= 0:
        return False
    steps, batches = trainer.global_step, step_of(trainer)
    return not batches or trainer.max_steps - steps <= 2 * steps / batches


def is_over(trainer, timers) -> bool:
    """
    Whether no batch follows in this epoch, as far as that is known when one has ended, but for max_steps.

    Args:
        trainer (Trainer):
        timers (List[Timer]): those of Lightning among the callbacks, which may come later than we do
    """
    if trainer.is_last_batch:
        return True
    stops = trainer.should_stop or (timers and any(timer.time_remaining() <= 0 for timer in timers))
    return bool(stops) and trainer.fit_loop._can_stop_early


def timers_of(trainer) -> list:
    """ Those that end a run after a batch, as max_time does. """
    return [callback for callback in trainer.callbacks if type(callback).__name__ == 'Timer'
            and callback.time_remaining() is not None and getattr(callback, '_interval', None) == 'step']


def batches_until_validation(trainer) -> float:
    """ How many batches after this one the next validation of this epoch follows one; inf where that is not known. """
    every, loop = trainer.val_check_batch, trainer.fit_loop.epoch_loop
    if not every or every == math.inf or not trainer.enable_validation or not loop._should_check_val_epoch():
        return math.inf
    index = loop.batch_idx if trainer.check_val_every_n_epoch is not None else loop.total_batch_idx
    return every - 1 - index % every


def steps_until_an_end(trainer, pl_module) -> float:
    """ How many steps after this one the next comes that may be the last one of the epoch, as far as that is known. """
    left = math.inf
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    batch = batch_of(trainer)
    if batches != math.inf:
        left = (batches - 1) // accumulate - batch // accumulate
    if trainer.max_steps > 0:
        # Manual optimization may step any number of times in a batch.
        left = min(left, trainer.max_steps - trainer.global_step if pl_module.automatic_optimization else 1)
    validation = batches_until_validation(trainer)
    if validation == 0:
        validation = trainer.val_check_batch
    if validation != math.inf:
        left = min(left, (batch + validation) // accumulate - batch // accumulate)
    return max(left, 1)


def monitored_by(callbacks) -> list[str]:
    """ The tags that some callbacks look at, as EarlyStopping and ModelCheckpoint do. """
    tags = (getattr(callback, 'monitor', None) for callback in callbacks)
    return [tag for tag in tags if isinstance(tag, str)]


def watched_by(callbacks) -> set[str]:
    """ The metrics that other callbacks look at after validation, as EarlyStopping and ModelCheckpoint do. """
    return {tag.removeprefix('plasticity/') for tag in monitored_by(callbacks)}


def logged_names(trainer) -> list[str]:
    """ The tags that the host has logged so far, and those of ours that other callbacks see. """
    # The public properties compute what the model has logged, in the middle of an epoch, and keep it.
    connector = trainer._logger_connector
    names = dict.fromkeys(name for name in connector._logged_metrics if name not in ('epoch', 'step'))
    return [*names, *(name for name in connector._callback_metrics if name.startswith('plasticity/'))]


def logged_numbers(trainer) -> dict:
    """ What the host has logged last, by tag: numbers, or tensors of one number. """
    connector = trainer._logger_connector
    return {name: x for name, x in {**connector._callback_metrics, **connector._logged_metrics}.items()
            if name not in ('epoch', 'step') and not name.startswith('plasticity')}


def settings_of(trainer) -> dict:
    """ What model and data module have saved as hyperparameters, to be logged. """
    owners = (trainer.datamodule, trainer.lightning_module)
    return {key: value for owner in owners if _logs_settings(owner) for key, value in owner.hparams.items()}


def logs_settings(trainer) -> bool:
    """ Whether Lightning will log hyperparameters as a fit starts. A tuner ends before. """
    is_tuner = any(type(callback).__name__ in ('LearningRateFinder', 'BatchSizeFinder')
                   for callback in trainer.callbacks)
    return not is_tuner and (_logs_settings(trainer.datamodule) or _logs_settings(trainer.lightning_module))


def _logs_settings(owner):
    return bool(getattr(owner, '_log_hyperparams', False))


def optimizers_of(trainer) -> list:
    """ Those that have groups of parameters. """
    return [optimizer for optimizer in trainer.optimizers if getattr(optimizer, 'param_groups', None)]


def train_batch_size(trainer) -> int | None:
    """ What the loader of training says, or whoever will make it; None where none says it. """
    loaders = trainer.train_dataloader
    if loaders is None:  # not made yet
        loaders = trainer.fit_loop._data_source.instance
    for owner in (loaders, getattr(loaders, 'batch_sampler', None)):
        size = getattr(owner, 'batch_size', None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def is_second_last_step(trainer, pl_module):
    """ Whether the step after this one may be the last one of the epoch, as far as that is known. """
    return steps_until_an_end(trainer, pl_module) == 1


def steps_of(schedule, trainer, steps, seconds):
    """ About how many steps are between two measurements that are asked for. """
    if schedule.seconds is not None:
        return max(schedule.seconds * steps / seconds, 1)
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    epoch = steps if batches == math.inf else -(-batches // accumulate)
    return min(schedule.steps or epoch, max(epoch, 1))


def foresees_validation(trainer) -> bool:
    """ Whether the last validation of an epoch is known before: not with streams, nor by time. """
    return trainer.val_check_batch is not None and not math.isinf(trainer.num_training_batches)


def is_last_validation(trainer) -> bool:
    """ Whether no other validation follows in this epoch, as far as that is known. """
    loop = trainer.fit_loop
    if loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early):
        return True
    return foresees_validation(trainer) and (
        trainer.num_training_batches - (batch_of(trainer) + 1) < trainer.val_check_batch)


def validates_by_time(trainer) -> bool:
    """ Whether validation follows the batch that ends since it is time for it. """
    return (trainer.val_check_batch is None and trainer.enable_validation
            and trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def unscales_itself(optimizer) -> bool:
    """ Whether an optimizer takes gradients as a GradScaler has scaled them, as fused ones do. """
    return getattr(optimizer, '_step_supports_amp_scaling', False)


def scale_of(trainer, optimizer) -> float | torch.Tensor:
    """ What gradients are multiplied by as an optimizer begins to step; a Tensor where only the device knows. """
    scaler = scaler_of(trainer)
    if scaler is None or not unscales_itself(optimizer):
        return float(getattr(optimizer, 'loss_scale', 1.))  # that of DeepSpeed, which unscales as it steps
    # A private name, since the public one waits for the device.
    scale = getattr(scaler, '_scale', None)
    return scaler.get_scale() if scale is None else double(scale)


def scaler_of(trainer):
    """ The GradScaler, None without one. """
    return getattr(trainer.precision_plugin, 'scaler', None)


def weight_types(trainer) -> list[str]:
    """ Of the parameters that are trained, such as 'bfloat16'. """
    types = dict.fromkeys(param.dtype for param in trainer.lightning_module.parameters() if param.requires_grad)
    return [str(dtype).removeprefix('torch.') for dtype in types]


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
    """ A number that the progress bars show as we write it: they would show 0.0001 as 0.000. """

    def __new__(cls, value=0., text=''):
        number = super().__new__(cls, value)
        number._text = text
        return number

    def __format__(self, spec):
        return self._text

    __str__ = __repr__ = lambda self: self._text


def show_to_callbacks(trainer, values):
    """ Put values where other callbacks look. """
    # The public property computes what the model has logged, in the middle of an epoch, and keeps it.
    trainer._logger_connector._callback_metrics.update(values)


def show_in_progress_bar(trainer, values):
    """ Put values, each with its text, into the progress bar, by names as short as they can be. """
    # What the bar reads; the public property computes what the model has logged, in the middle of an epoch.
    shown = trainer._logger_connector._progress_bar_metrics
    for name, (value, text) in values.items():
        is_free = isinstance(shown.get(name, _InBar()), _InBar)
        shown[name if is_free else f'plasticity/{name}'] = _InBar(value, text)
