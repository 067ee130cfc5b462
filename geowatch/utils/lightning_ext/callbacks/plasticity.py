"""
A Lightning callback that shows whether a network loses its ability to learn.

This file says when to measure and hands on; what is measured, and how, is in
:mod:`.plasticity_metrics`.
"""
import contextlib
import math
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytorch_lightning as pl
import torch

from .plasticity_metrics import METRICS, PlasticityConfigError, parse_metrics
from .plasticity_metrics._activations import Capture, fused_modules, site_names
from .plasticity_metrics._reduce import add_up, exchange, layout_of, processes
from .plasticity_metrics._schedule import Poll, Schedule
from .plasticity_metrics._sinks import JsonLines, Loggers, plain
from .plasticity_metrics._weights import (
    clean_name,
    is_sharded,
    nonfinite_shares,
    weights_of,
    why_not_a_weight,
)
from .plasticity_metrics._window import Window

try:
    # A callback of `lightning` has to be an instance of its own class.
    from lightning.pytorch import Callback as _LightningCallback
    _BASES = (pl.Callback, _LightningCallback)
except ImportError:
    _BASES = (pl.Callback,)

SOURCES = ('auto', 'validation', 'train')
FILE_NAME = 'plasticity.jsonl'


class PlasticityMonitor(*_BASES):
    """
    Logs weight and gradient magnitude, dead units and effective rank.

    =============================  ===============================================
    Tag                            Value
    =============================  ===============================================
    ``plasticity/weight_mag``      mean absolute weight
    ``plasticity/grad_mag``        mean absolute gradient, before clipping
    ``plasticity/grad_norm``       L2 norm of all gradients, before clipping
    ``plasticity/dead_units``      fraction of units saturated on every sample
    ``plasticity/erank``           effective rank of the weights, mean over layers
    ``plasticity/feature_erank``   effective rank of the features, mean over layers
    =============================  ===============================================

    The values go to all loggers, to ``trainer.callback_metrics``, and with
    those of every layer to ``plasticity.jsonl`` in the log folder. Set the
    environment variable ``DISABLE_PLASTICITY_MONITOR=1`` to switch it off.

    Args:
        metrics (str | List[str]): names separated by commas, a list, or 'all'.
            A name may carry its own interval: ``'weight_mag@1,erank@epoch'``.
        interval (int | str): a number of optimizer steps, 'epoch', a duration
            such as '5 minutes', or 'auto': weights and gradients every
            ``log_every_n_steps`` of the trainer, ranks and activations once
            per epoch. An epoch is measured at least once.
        source (str): where activations are seen: 'validation', 'train', or
            'auto', that is validation where there is a loader for it.
        samples (int): examples per activation measurement.
        layers (str | List[str] | None): patterns of layer names to restrict
            the measurement to, as in a shell, separated by commas.
        per_layer (bool): if True, log ``plasticity_layers/<metric>/<layer>``.

    Raises:
        PlasticityConfigError: a ValueError, if an argument is not one of the above

    References:
        .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
           learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
        >>> import pytorch_lightning as pl
        >>> import torch
        >>> import ubelt as ub
        >>> import json
        >>> class Net(pl.LightningModule):
        >>>     def __init__(self):
        >>>         super().__init__()
        >>>         self.net = torch.nn.Sequential(
        >>>             torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>>     def training_step(self, batch, batch_idx):
        >>>         return self.net(batch).square().mean()
        >>>     def configure_optimizers(self):
        >>>         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> dpath = ub.Path.appdir('geowatch/tests/plasticity').delete().ensuredir()
        >>> monitor = PlasticityMonitor(metrics='weight_mag@1,dead_units')
        >>> trainer = pl.Trainer(max_epochs=2, default_root_dir=dpath, callbacks=[monitor],
        >>>                      accelerator='cpu', enable_progress_bar=False)
        >>> trainer.fit(Net(), torch.utils.data.DataLoader(torch.rand(32, 8), batch_size=16))
        >>> lines = (ub.Path(trainer.log_dir) / 'plasticity.jsonl').read_text().splitlines()
        >>> [(row['metric'], row['step']) for row in map(json.loads, lines)][:3]
        [('weight_mag', 0), ('weight_mag', 1), ('dead_units', 1)]
        >>> # The same in the files that TensorBoard reads
        >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        >>> events = EventAccumulator(trainer.log_dir)
        >>> _ = events.Reload()
        >>> [event.step for event in events.Scalars('plasticity/weight_mag')]
        [0, 1, 2, 3]
    """

    def __init__(self, metrics='weight_mag,grad_mag,dead_units,erank,feature_erank',
                 interval='auto', source='auto', samples=2000, layers=None, per_layer=False):
        self.metrics = metrics
        self.interval = interval
        self.source = source
        self.samples = samples
        self.layers = layers
        self.per_layer = per_layer
        chosen = parse_metrics(metrics)
        self._intervals = {name: interval if own is None else own for name, own in chosen.items()}
        for own in [interval, *self._intervals.values()]:
            if own != 'auto':
                Schedule(own)
        if source not in SOURCES:
            raise PlasticityConfigError(f'Expected `source` to be one of {", ".join(SOURCES)}, but got {source!r}')
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise PlasticityConfigError(f'Expected `samples` to be a whole number of at least 1, but got {samples!r}')
        self._patterns = _read_patterns(layers)
        self._is_on = False
        self._capture = None
        self._restored = {}

    # --- the hooks of Lightning -------------------------------------------

    def setup(self, trainer, pl_module, stage):
        from kwutil import util_environ
        self._is_on = stage == 'fit' and not util_environ.envflag('DISABLE_PLASTICITY_MONITOR')
        if not self._is_on:
            return
        # Some loggers broadcast here, so that every rank has to ask.
        log_dir = trainer.log_dir
        self._file = None if log_dir is None else JsonLines(Path(log_dir) / FILE_NAME)
        self._loggers = Loggers(trainer.loggers)
        self._metrics = {name: METRICS[name]() for name in self._intervals}
        self._schedules = {name: Schedule(_resolve(interval, self._metrics[name], trainer))
                           for name, interval in self._intervals.items()}
        self._clock_poll = Poll()
        self._windows = {}      # activation metric to what it has seen
        self._gradients = {}    # gradient metric to the statistics of this step
        self._failed = set()    # metrics that failed here, not known elsewhere yet
        self._measured = set()  # metrics that were measured in this fit
        self._wanted = {}       # layer name to whether it is measured
        self._is_first_batch = True

    def on_fit_start(self, trainer, pl_module):
        if not self._is_on:
            return
        validates = trainer.enable_validation
        if self.source == 'validation' and not validates:
            raise PlasticityConfigError("Expected a validation loader for source='validation', but there is "
                             "none. Give one, or set source='train'")
        self._check_patterns(pl_module)
        self._source, reason = _choose_source(self.source, validates, pl_module)
        if self._source is None:
            for name in self._of('activations'):
                del self._metrics[name], self._schedules[name]
        if trainer.is_global_zero:
            if self._file is None:
                warnings.warn(f'PlasticityMonitor: no log folder, so {FILE_NAME} is not written', stacklevel=2)
            elif not trainer.loggers:
                warnings.warn(f'PlasticityMonitor: no logger, so values go to {self._file.fpath} only', stacklevel=2)
            print(self._describe(pl_module, reason))

    def on_train_start(self, trainer, pl_module):
        if self._is_on:
            for name, state in self._restored.get('schedules', {}).items():
                if name in self._schedules:
                    self._schedules[name].load_state_dict(state, time.monotonic())

    def on_train_epoch_start(self, trainer, pl_module):
        if self._is_on:
            for schedule in self._schedules.values():
                schedule.start_epoch()
            if self._source == 'train':
                # The window of an epoch opens with it, not with its last step.
                for name in self._of('activations'):
                    self._schedules[name].owed |= self._schedules[name].interval == 'epoch'

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self._is_on:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self._is_first_batch:
            self._is_first_batch = False
            self._drop_stale_lines(trainer, step)
        last = _is_last_step(trainer, batch_idx)
        now = self._ask_the_time(trainer, step)
        for schedule in self._schedules.values():
            schedule.tick(step, last, now)
        if self._source == 'train':
            self._open_windows(self._owed('activations'))
            self._look(pl_module, batch)

    def on_before_backward(self, trainer, pl_module, loss):
        # Manual optimization may run more of the model after this.
        if self._capture is not None and pl_module.automatic_optimization:
            self._look_away()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self._is_on or not self._owed('gradients'):
            return
        own = {id(param) for group in optimizer.param_groups for param in group['params']}
        gradients = {name: param.grad for name, param in self._weights(pl_module).items()
                     if param.grad is not None and id(param) in own}
        scale = _scale_of(trainer, optimizer)
        for name in self._owed('gradients'):
            with self._guarding(name):
                stats = self._metrics[name].statistics(gradients, scale)
                self._gradients.setdefault(name, {}).update(stats)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self._is_on:
            return
        self._look_away()
        ready = {}
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            for name in self._owed('weights'):
                with self._guarding(name):
                    ready[name] = self._metrics[name].statistics(self._measurable(name, pl_module))
            ready.update({name: self._gradients.get(name, {}) for name in self._owed('gradients')})
        if self._source == 'train':
            ready.update(self._close_windows(trainer, epoch_ends=_is_last_step(trainer, batch_idx)
                                             and not trainer.fit_loop.epoch_loop._should_accumulate()))
        self._publish(trainer, pl_module, ready)
        self._gradients = {}

    def on_train_epoch_end(self, trainer, pl_module):
        # What an epoch that ended early has left; the step counter is one ahead.
        if self._is_on and self._source == 'train':
            self._publish(trainer, pl_module, self._close_windows(trainer, epoch_ends=True), behind=1)

    def on_validation_start(self, trainer, pl_module):
        if self._looks_at_validation(trainer):
            is_last = _is_last_validation(trainer)
            self._open_windows([name for name in self._of('activations') if self._schedules[name].owed
                                or (is_last and not self._schedules[name].measured)])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self._looks_at_validation(trainer):
            self._look(pl_module, batch)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._look_away()

    def on_validation_epoch_end(self, trainer, pl_module):
        # Before on_validation_end, where EarlyStopping reads what we measured.
        if self._looks_at_validation(trainer):
            self._publish(trainer, pl_module, self._close_windows(trainer, epoch_ends=True))

    def on_exception(self, trainer, pl_module, exception):
        self._look_away()

    def teardown(self, trainer, pl_module, stage):
        self._look_away()
        if self._is_on and stage == 'fit':
            self._is_on = False
            missed = [name for name in self._metrics if name not in self._measured]
            if missed and trainer.is_global_zero:
                print(f'PlasticityMonitor: asked for and never measured: {", ".join(missed)}')
            self._restored = {}

    def state_dict(self):
        if not self._is_on:
            return {}
        now = time.monotonic()
        schedules = {name: schedule.state_dict(now) for name, schedule in self._schedules.items()}
        for name in self._windows:
            schedules[name]['owed'] = True  # what it has seen is not saved
        return {'version': 1, 'time': time.time(), 'schedules': schedules}

    def load_state_dict(self, state_dict):
        # It may be of another version: what cannot be read is left alone.
        schedules = state_dict.get('schedules')
        schedules = schedules if isinstance(schedules, dict) else {}
        self._restored = {'time': state_dict.get('time'),
                          'schedules': {k: v for k, v in schedules.items() if isinstance(v, dict)}}

    # --- when ---------------------------------------------------------------

    def _of(self, kind):
        return [name for name, metric in self._metrics.items() if metric.looks_at == kind]

    def _owed(self, kind):
        return [name for name in self._of(kind) if self._schedules[name].owed]

    def _looks_at_validation(self, trainer):
        return self._is_on and self._source == 'validation' and not trainer.sanity_checking

    def _ask_the_time(self, trainer, step):
        """ A clock that all processes share, or None where it is not worth a collective. """
        timed = [s for s in self._schedules.values() if s.seconds is not None]
        if not timed or processes() == 1:
            return time.monotonic()
        if not self._clock_poll.is_due(step):
            return None
        now = exchange({'now': time.monotonic()}, trainer.strategy.root_device)[0]['now']
        progress = max((now - s.since) / s.seconds for s in timed) if all(s.since for s in timed) else 0
        self._clock_poll.answer(step, min(progress, 1.))
        if progress >= 1:
            self._clock_poll = Poll()
        return now

    # --- what ---------------------------------------------------------------

    def _weights(self, pl_module):
        return {name: weight for name, weight in weights_of(pl_module).items() if self._wants(name)}

    def _measurable(self, name, pl_module):
        return {layer: weight for layer, weight in self._weights(pl_module).items()
                if self._metrics[name].why_not(weight) is None}

    def _wants(self, layer):
        if layer not in self._wanted:
            self._wanted[layer] = not self._patterns or any(pattern.match(layer) for pattern in self._patterns)
        return self._wanted[layer]

    def _check_patterns(self, pl_module):
        names = dict.fromkeys([*weights_of(pl_module), *(clean_name(name) for name, _ in pl_module.named_modules())])
        for pattern in self._patterns:
            if not any(pattern.match(name) for name in names):
                raise PlasticityConfigError(f'Expected `layers` to match layers of the model, but {pattern.pattern!r} matches '
                                 f'none of: {", ".join(weights_of(pl_module))}')

    # --- activations ----------------------------------------------------------

    def _open_windows(self, names):
        for name in names:
            if name not in self._windows:
                self._windows[name] = Window(wanted=math.ceil(self.samples / processes()))
                self._schedules[name].done()

    def _look(self, pl_module, batch):
        """ Watch the next forward pass, if there is a window that wants more. """
        windows = {name: window for name, window in self._windows.items()
                   if not window.is_full and name not in self._failed}
        if not windows:
            return

        def observe(site, output, axis, saturated):
            if self._wants(site.layer) or self._wants(site.module):
                for name, window in windows.items():
                    if name not in self._failed:
                        with self._guarding(name):
                            self._metrics[name].observe(window.stats, site, output, axis, saturated)

        with self._guarding(*windows):
            capture = Capture(pl_module, observe, on_error=lambda ex: self._fail(windows))
            capture.__enter__()
            self._capture = capture
            for window in windows.values():
                window.count(batch)

    def _look_away(self):
        if self._capture is not None:
            capture, self._capture = self._capture, None
            capture.__exit__(None, None, None)

    def _close_windows(self, trainer, epoch_ends):
        """ Take the statistics of the windows that have seen enough. """
        closed = {name: window for name, window in self._windows.items() if epoch_ends or window.is_full}
        if not epoch_ends and processes() > 1:
            closed = self._full_everywhere(trainer)
        for name in closed:
            del self._windows[name]
        return closed

    def _full_everywhere(self, trainer):
        polled = {name: window for name, window in self._windows.items() if window.poll.is_due(window.batches)}
        if not polled:
            return {}
        seen = exchange({name: window.examples for name, window in polled.items()}, trainer.strategy.root_device)
        closed = {}
        for name, window in polled.items():
            progress = min(own[name] for own in seen) / window.wanted
            window.poll.answer(window.batches, progress)
            if progress >= 1:
                closed[name] = window
        return closed

    # --- results ----------------------------------------------------------------

    def _publish(self, trainer, pl_module, ready, behind=0):
        """ Add up over processes, compute, move all numbers to the host at once, hand them out. """
        if not ready:
            return
        stats, samples = self._combine(trainer, pl_module, ready)
        results = {}
        for name in ready:
            if name in self._metrics and stats[name]:
                with self._guarding(name):
                    for tag, result in self._metrics[name].compute(stats[name]).items():
                        results[tag] = name, result
        if not results:
            return
        columns = _to_host(results)
        for name in {name for name, _ in results.values()}:
            self._measured.add(name)
            if self._metrics[name].looks_at != 'activations':
                self._schedules[name].done(time.monotonic() if processes() == 1 else None)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - behind
        now, epoch = time.time(), trainer.current_epoch
        rows = []
        for tag, (name, result) in results.items():
            value, numbers = columns[tag]
            layers = {layer: {key: plain(x) for key, x in zip(numbers, row, strict=True) if key == 'value' or x}
                      for layer, row in zip(result.names, zip(*numbers.values(), strict=True), strict=True)}
            self._note_nonfinite(trainer, pl_module, name, layers)
            rows.append({'metric': tag, 'step': step, 'epoch': epoch, 'time': now, 'samples': samples.get(name),
                         'value': plain(value), 'layers': layers})
        scalars = {f'plasticity/{tag}': value for tag, (value, _) in columns.items()}
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in scalars.items()})
        if trainer.is_global_zero:
            if self._file is not None:
                self._file.add(rows)
            if self.per_layer:
                scalars.update({f'plasticity_layers/{row["metric"]}/{layer}': math.nan if own['value'] is None
                                else own['value'] for row in rows for layer, own in row['layers'].items()})
            self._loggers.log(scalars, step)

    def _combine(self, trainer, pl_module, ready):
        """ Statistics and examples of all processes; what has failed on one is off on all. """
        stats = {name: own.stats if isinstance(own, Window) else own for name, own in ready.items()}
        examples = {name: own.examples for name, own in ready.items() if isinstance(own, Window)}
        additive = {name: own if name in examples else _sharded(own, pl_module) for name, own in stats.items()}
        device = trainer.strategy.root_device
        messages = exchange({'failed': sorted(self._failed), 'examples': examples,
                             'layout': {name: layout_of(own) for name, own in additive.items()}}, device)
        total = add_up(additive, [message['layout'] for message in messages], device)
        stats = {name: {**own, **total[name]} for name, own in stats.items()}
        for name in {name for message in messages for name in message['failed']}:
            self._failed.discard(name)
            self._windows.pop(name, None)
            if self._metrics.pop(name, None):
                del self._schedules[name]
        for name in examples:
            names = site_names(stats[name])
            stats[name] = {names[site]: own for site, own in stats[name].items()}
        return stats, {name: sum(message['examples'].get(name, 0) for message in messages) for name in examples}

    def _note_nonfinite(self, trainer, pl_module, name, layers):
        """ The share of non-finite numbers of the layers that have any. """
        bad = {layer for layer, own in layers.items() if own['value'] is None}
        kind = self._metrics[name].looks_at
        # Clipping has changed the gradients since they were measured.
        if bad and (kind == 'weights' or kind == 'gradients' and not trainer.gradient_clip_val):
            tensors = {layer: weight if kind == 'weights' else weight.grad
                       for layer, weight in self._weights(pl_module).items() if layer in bad}
            for layer, share in nonfinite_shares(tensors).items():
                layers[layer]['nonfinite'] = share

    # --- faults -------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarding(self, *names):
        """ What fails in here is a fault of ours: it costs the metric, not the run. """
        try:
            yield
        except Exception:
            self._fail(names)

    def _fail(self, names):
        print(f'PlasticityMonitor: {", ".join(names)} failed and will not be measured any more:')
        traceback.print_exc()
        self._failed |= set(names)

    # --- what is said and written ----------------------------------------------

    def _describe(self, pl_module, reason):
        """ One message on what is watched, and what is not and why. """
        watched = ', '.join(f'{name} ({_every(schedule)})' for name, schedule in self._schedules.items())
        parts = [watched or 'nothing']
        weights = weights_of(pl_module)
        parts.append(f'{sum(map(self._wants, weights))} weights')
        if self._of('activations'):
            parts.append(f'activations in {self._source}, {self.samples} examples')
        without = Counter(why_not_a_weight(param) for param in pl_module.parameters())
        without = [f'{count} parameters {why}' for why, count in without.items() if why not in (None, 'biases and scales')]
        without += [f'{name} of {layer} ({why})' for name in self._of('weights') for layer, weight in weights.items()
                    if (why := self._metrics[name].why_not(weight))]
        if self._of('activations'):
            without += [f'activations inside {path} ({why})' for path, why in fused_modules(pl_module).items()]
        without += [reason] if reason and any(METRICS[name].looks_at == 'activations' for name in self._intervals) else []
        if not all(map(self._wants, weights)):
            without.append(f'{len(weights) - sum(map(self._wants, weights))} weights outside of layers={self.layers!r}')
        shown = without[:6] + ([f'and {len(without) - 6} more'] if len(without) > 6 else [])
        return f'PlasticityMonitor: {"; ".join(parts)}' + (f'. Not watched: {"; ".join(shown)}' if shown else '')

    def _drop_stale_lines(self, trainer, step):
        """ A run that goes on from a checkpoint measures the steps after it once more. """
        if trainer.ckpt_path and trainer.is_global_zero and self._file is not None:
            saved = self._restored.get('time')
            self._file.drop(lambda row: row['time'] > saved if saved else row['step'] >= step)


# --- what Lightning and the model say -------------------------------------------

def _resolve(interval, metric, trainer):
    if interval != 'auto':
        return interval
    return 'epoch' if metric.dear or not trainer.log_every_n_steps else trainer.log_every_n_steps


def _every(schedule):
    return f'every {schedule.interval} steps' if schedule.steps else f'every {schedule.interval}'


def _read_patterns(layers):
    from kwutil import util_pattern
    parts = [layers] if isinstance(layers, str) else layers
    if parts is None:
        return []
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise PlasticityConfigError('Expected `layers` to be patterns of layer names, separated by commas or in a list, '
                         f'but got {layers!r}')
    names = [name.strip() for part in parts for name in part.split(',') if name.strip()]
    return [util_pattern.Pattern.coerce(name, hint='glob') for name in names]


def _is_last_step(trainer, batch_idx):
    """ Whether the optimizer step that this batch belongs to is the last one of the epoch. """
    if trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step + max(1, len(trainer.optimizers)):
        return True
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    return batches != math.inf and batch_idx // accumulate == (batches - 1) // accumulate


def _is_last_validation(trainer):
    """ Whether no other validation follows in this epoch; True as well where that is unknown. """
    every, batches = trainer.val_check_batch, trainer.num_training_batches
    if trainer.is_last_batch or every is None or math.isinf(every) or math.isinf(batches):
        return True
    return batches - (trainer.fit_loop.epoch_loop.batch_idx + 1) < every


def _choose_source(source, validates, pl_module):
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
        for module in pl_module.modules())


def _scale_of(trainer, optimizer):
    """ What the gradients are multiplied by now. A fused optimizer unscales by itself, later. """
    scaler = getattr(trainer.precision_plugin, 'scaler', None)
    if scaler is not None and getattr(optimizer, '_step_supports_amp_scaling', False):
        return scaler.get_scale()
    return 1.


def _sharded(stats, pl_module):
    """ The statistics of which each process has its part: all others are the same everywhere. """
    if processes() == 1:
        return {}
    sharded = {name for name, weight in weights_of(pl_module).items() if is_sharded(weight)}
    return {name: own for name, own in stats.items() if name in sharded}


def _to_host(results):
    """
    The one transfer from the device: value and columns of each tag as numbers.
    """
    tensors = []
    for _, result in results.values():
        tensors += [result.value, *(x for x in result.columns.values() if isinstance(x, torch.Tensor))]
    flat = torch.cat([x.reshape(-1).double() for x in _on_one_device(tensors)])
    numbers = iter(flat.tolist())
    columns = {}
    for tag, (_, result) in results.items():
        value = next(numbers)
        columns[tag] = value, {
            key: [next(numbers) for _ in range(len(x))] if isinstance(x, torch.Tensor) else x
            for key, x in result.columns.items()}
    return columns


def _on_one_device(tensors):
    # Some are on the CPU where a device has no float64.
    devices = {x.device for x in tensors}
    return tensors if len(devices) == 1 else [x.cpu() for x in tensors]
