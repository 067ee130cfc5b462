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
from pathlib import Path

import pytorch_lightning as pl
import torch

from .plasticity_metrics import METRICS, PlasticityConfigError, parse_metrics
from .plasticity_metrics._activations import Capture, site_names
from .plasticity_metrics._budget import Budget
from .plasticity_metrics._message import describe
from .plasticity_metrics._metric import check_result
from .plasticity_metrics._reduce import add_up, contradictions, exchange, layout_of, processes, rank, to_host
from .plasticity_metrics._schedule import Poll, Schedule
from .plasticity_metrics._sinks import JsonLines, Loggers, plain
from .plasticity_metrics._trainer import (
    choose_source,
    is_last_step,
    is_last_validation,
    resolve,
    say_uncut,
    scale_of,
    show_in_progress_bar,
    steps_of,
    steps_until_the_last,
)
from .plasticity_metrics._weights import clean_name, is_sharded, weights_of
from .plasticity_metrics._window import Window
from .plasticity_report import report_command, write_report_script

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
    those of every layer to ``plasticity.jsonl`` in the log folder, where
    ``plasticity_report.sh`` draws them. TensorBoard has them on one page under
    'Custom scalars', each metric's layers as a histogram, and the worst layers
    under 'Text'. Set the environment variable ``DISABLE_PLASTICITY_MONITOR=1``
    to switch it off.

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
        prog_bar (bool): if True, the progress bar shows the values too.
        budget (str | float | None): the monitor's largest share of the
            training time, such as '2%'. What is too dear is measured less
            often, but at least once. Logs the share so far as
            ``plasticity/overhead``, and the intervals in ``plasticity.jsonl``.

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
                 interval='auto', source='auto', samples=2000, layers=None, per_layer=False,
                 prog_bar=False, budget=None):
        self.metrics = metrics
        self.interval = interval
        self.source = source
        self.samples = samples
        self.layers = layers
        self.per_layer = per_layer
        self.prog_bar = prog_bar
        self.budget = budget
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
        self._budget = None if budget is None else Budget(budget)
        self._is_on = False
        self._is_awake = False
        self._capture = None
        self._failed = {}
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
        self._has_script = False
        self._metrics = {name: METRICS[name]() for name in self._intervals}
        self._loggers = Loggers(trainer.loggers, [tag for name, metric in self._metrics.items()
                                                  for tag in metric.tags or [name]])
        self._schedules = {name: Schedule(resolve(interval, self._metrics[name], trainer))
                           for name, interval in self._intervals.items()}
        self._clock_poll = Poll()
        self._clock = None      # the time that all processes know, for the next step
        self._windows = {}      # activation metric to what it has seen
        self._gradients = {}    # gradient metric to the statistics of this step
        self._failed = {}       # metrics that failed here, not known elsewhere yet, to what is still to be said
        self._measured = set()  # metrics that were measured in this fit
        self._wanted = {}       # layer name to whether it is measured
        self._first_step = self._epoch = None
        self._wake = 0          # the next step at which anything can be due
        self._restored = {}     # not of a fit that has failed: a checkpoint is read after this

    def on_fit_start(self, trainer, pl_module):
        if not self._is_on:
            return
        validates = trainer.enable_validation
        if self.source == 'validation' and not validates:
            raise PlasticityConfigError("Expected a validation loader for source='validation', but there is "
                                        "none. Give one, or set source='train'")
        self._check_patterns(pl_module)
        self._source, reason = choose_source(self.source, validates, pl_module)
        if self._source is None:
            for name in self._of('activations'):
                del self._metrics[name], self._schedules[name]
        if trainer.is_global_zero:
            if self._file is None:
                warnings.warn(f'PlasticityMonitor: no log folder, so {FILE_NAME} is not written', stacklevel=2)
            elif not trainer.loggers:
                warnings.warn(f'PlasticityMonitor: no logger, so values go to {self._file.fpath} only', stacklevel=2)
            asked = any(METRICS[name].looks_at == 'activations' for name in self._intervals)
            print(describe(pl_module, self._metrics, self._schedules, self._wants,
                           f'{self._source}, {self.samples} examples', reason if asked else None))

    def on_train_start(self, trainer, pl_module):
        if self._is_on:
            if self._budget is not None:
                self._budget.start(trainer.strategy.root_device)
            self._epoch = self._restored.get('epoch')
            for name, state in self._restored.get('schedules', {}).items():
                if name in self._schedules:
                    self._schedules[name].load_state_dict(state)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self._is_on:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        # All that a step costs at which nothing is due.
        self._is_awake = step >= self._wake or trainer.is_last_batch or trainer.current_epoch != self._epoch
        if not self._is_awake:
            return
        if self._first_step is None:
            self._first_step = step
            self._drop_stale_lines(trainer, lambda row: row['step'] >= step)
        last = is_last_step(trainer, batch_idx)
        # Not at the hook for it, which Lightning leaves out where a run goes on.
        if trainer.current_epoch != self._epoch:
            self._start_epoch(trainer.current_epoch, step)
        now, self._clock = (time.monotonic() if processes() == 1 else self._clock), None
        for schedule in self._schedules.values():
            schedule.tick(step, last, now)
        if self._source == 'train':
            self._open_windows(self._owed('activations'))
            self._look(pl_module, batch)

    def on_before_backward(self, trainer, pl_module, loss):
        # Manual optimization may run more of the model after this.
        if self._capture is not None and pl_module.automatic_optimization:
            self._look_away()

    # Which comes first where gradients are not accumulated; it calls torch twice for each parameter.
    on_before_zero_grad = on_before_backward

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self._is_awake or not self._owed('gradients'):
            return
        own = {id(param) for group in optimizer.param_groups for param in group['params']}
        gradients = {name: param.grad for name, param in self._weights(pl_module).items()
                     if param.grad is not None and id(param) in own}
        scale = scale_of(trainer, optimizer)
        for name in self._owed('gradients'):
            with self._guarding(name):
                stats = self._metrics[name].statistics(gradients, scale)
                self._gradients.setdefault(name, {}).update(stats)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self._is_awake:
            return
        self._look_away()
        ready, stepped = {}, not trainer.fit_loop.epoch_loop._should_accumulate()
        if stepped:
            for name in self._owed('weights'):
                ready[name] = {}  # also where it fails here: other processes have it
                with self._guarding(name):
                    ready[name] = self._metrics[name].statistics(self._measurable(name, pl_module))
            ready.update({name: self._gradients.get(name, {}) for name in self._owed('gradients')})
        windows = self._windows if self._source == 'train' else {}
        for window in windows.values():
            window.batches += 1
        self._publish(trainer, pl_module, ready, windows, epoch_ends=stepped and is_last_step(trainer, batch_idx),
                      asks=stepped and self._asks_the_time(trainer))
        if stepped:
            self._gradients = {}
            self._wake = self._next_step(trainer, pl_module, batch_idx)

    def on_train_epoch_end(self, trainer, pl_module):
        self._look_away()
        # What an epoch that ended early has left; the step counter is one ahead.
        if self._is_on and self._source == 'train':
            self._publish(trainer, pl_module, {}, self._windows, epoch_ends=True, behind=1)

    def on_validation_start(self, trainer, pl_module):
        if self._looks_at_validation(trainer):
            is_last = is_last_validation(trainer)
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            self._open_windows([name for name in self._of('activations') if self._schedules[name].owed
                                or (is_last and not self._schedules[name].measured
                                    and step >= self._schedules[name].not_before)])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self._looks_at_validation(trainer):
            self._look(pl_module, batch)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._look_away()

    def on_validation_epoch_end(self, trainer, pl_module):
        # Before on_validation_end, where EarlyStopping reads what we measured.
        if self._looks_at_validation(trainer):
            self._publish(trainer, pl_module, {}, self._windows, epoch_ends=True)

    def on_exception(self, trainer, pl_module, exception):
        self._look_away()
        self._say_what_failed()

    def teardown(self, trainer, pl_module, stage):
        self._look_away()
        self._say_what_failed()
        if self._is_on and stage == 'fit':
            self._is_on = self._is_awake = False
            missed = [name for name in self._metrics if name not in self._measured]
            if missed and trainer.is_global_zero:
                print(f'PlasticityMonitor: asked for and never measured: {", ".join(missed)}')
            if self._measured and trainer.is_global_zero and self._file is not None and self._file.fpath.exists():
                say_uncut(f'To see the plasticity of this run: {report_command(self._file.fpath.parent)}')

    def state_dict(self):
        if not self._is_on:
            return {}
        now = time.monotonic()
        schedules = {name: schedule.state_dict(now) for name, schedule in self._schedules.items()}
        for name in self._windows:
            schedules[name]['owed'] = True  # what it has seen is not saved
        return {'version': 1, 'time': time.time(), 'epoch': self._epoch, 'schedules': schedules}

    def load_state_dict(self, state_dict):
        # It may be of another version: what cannot be read is left alone.
        schedules = state_dict.get('schedules')
        schedules = schedules if isinstance(schedules, dict) else {}
        self._restored = {'time': state_dict.get('time'), 'epoch': state_dict.get('epoch'),
                          'schedules': {k: v for k, v in schedules.items() if isinstance(v, dict)}}

    # --- when ---------------------------------------------------------------

    def _of(self, kind):
        return [name for name, metric in self._metrics.items() if metric.looks_at == kind]

    def _owed(self, kind):
        return [name for name in self._of(kind) if self._schedules[name].owed]

    def _next_step(self, trainer, pl_module, batch_idx):
        """ The first step after this one at which anything can be due; see also on_train_batch_start. """
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        in_steps = [name for name, metric in self._metrics.items()
                    if metric.looks_at != 'activations' or self._source == 'train']
        if (self._timed() or self._source == 'train' and self._windows
                or any(self._schedules[name].owed for name in in_steps)):
            return step + 1
        wake = min((schedule.next_due(step + 1) for schedule in self._schedules.values()), default=math.inf)
        if not all(schedule.measured for schedule in self._schedules.values()):
            wake = min(wake, step + steps_until_the_last(trainer, pl_module, batch_idx))
        return wake

    def _start_epoch(self, epoch, step):
        self._epoch = epoch
        for schedule in self._schedules.values():
            schedule.start_epoch()
        if self._source == 'train':
            # The window of an epoch opens with it, not with its last step.
            for schedule in map(self._schedules.get, self._of('activations')):
                schedule.owed |= schedule.interval == 'epoch' and step >= schedule.not_before

    def _looks_at_validation(self, trainer):
        return self._is_on and self._source == 'validation' and not trainer.sanity_checking

    def _timed(self):
        return [schedule for schedule in self._schedules.values() if schedule.seconds is not None]

    def _asks_the_time(self, trainer):
        """ Whether the time is worth a message, after which all processes know it. """
        return (processes() > 1 and bool(self._timed())
                and self._clock_poll.is_due(trainer.fit_loop.epoch_loop._batches_that_stepped))

    def _set_the_clock(self, trainer, now):
        self._clock = now
        waits = [(now - schedule.since) / schedule.seconds for schedule in self._timed() if schedule.since is not None]
        if waits:
            self._clock_poll.answer(trainer.fit_loop.epoch_loop._batches_that_stepped, min(max(waits), 1.))
            if max(waits) >= 1:
                self._clock_poll = Poll()

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
                raise PlasticityConfigError(
                    f'Expected `layers` to match layers of the model, but {pattern.pattern!r} matches none of: '
                    f'{", ".join(weights_of(pl_module))}')

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

        self._look_away()  # where a hook of the model has ended the last batch before its end
        with self._guarding(*windows):
            capture = Capture(pl_module, observe, on_error=lambda ex: self._fail(windows))
            capture.__enter__()
            self._capture, self._looking = capture, list(windows)
            for window in windows.values():
                window.count(batch)

    def _look_away(self):
        if self._capture is not None:
            capture, self._capture = self._capture, None
            capture.__exit__(None, None, None)
            if self._budget is not None:
                self._budget.add(self._looking, capture.seconds)

    def _asked_windows(self, windows, epoch_ends):
        """ Those that may have seen enough; what others have seen of them is not known yet. """
        if epoch_ends:
            return dict(windows)
        if processes() == 1:
            return {name: window for name, window in windows.items() if window.is_full}
        return {name: window for name, window in windows.items() if window.poll.is_due(window.batches)}

    @staticmethod
    def _not_full_everywhere(asked, messages):
        """ Those of which some process has not seen enough. """
        waiting = set()
        for name, window in asked.items():
            progress = min(message['examples'][name] for message in messages) / window.wanted
            window.poll.answer(window.batches, progress)
            if progress < 1:
                waiting.add(name)
        return waiting

    # --- results ----------------------------------------------------------------

    def _publish(self, trainer, pl_module, ready, windows, epoch_ends=False, asks=False, behind=0):
        """
        Add up over processes, compute, move all numbers to the host at once, hand them out.

        All processes come here with the same names in `ready` and `windows`.
        """
        asked = self._asked_windows(windows, epoch_ends)
        if ready or asked or asks:
            with self._spending(*ready, *asked):
                self._publish_what_is_asked(trainer, pl_module, ready, asked, epoch_ends, behind)
            if self._budget is not None:
                self._keep_to_the_budget(trainer, behind)

    def _publish_what_is_asked(self, trainer, pl_module, ready, asked, epoch_ends, behind):
        stats, samples = self._combine(trainer, pl_module, ready, asked, epoch_ends)
        results = {}
        for name, own in stats.items():
            if own:
                with self._guarding(name):
                    results.update({tag: (name, check_result(tag, result))
                                    for tag, result in self._metrics[name].compute(own).items()})
        if not results:
            return
        columns = {}
        with self._guarding(*dict.fromkeys(name for name, _ in results.values())):
            columns = to_host(results)
        if not columns:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - behind
        now, epoch = time.time(), trainer.current_epoch
        rows = []
        for tag, (name, result) in results.items():
            value, numbers = columns[tag]
            with self._guarding(name):
                layers = {layer: {key: plain(x) for key, x in zip(numbers, row, strict=True) if key == 'value' or x}
                          for layer, row in zip(result.names, zip(*numbers.values(), strict=True), strict=True)}
                rows.append({'metric': tag, 'step': step, 'epoch': epoch, 'time': now, 'samples': samples.get(name),
                             'value': plain(value), 'layers': layers})
                self._measured.add(name)
        scalars = {f'plasticity/{tag}': value for tag, (value, _) in columns.items()}
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in scalars.items()})
        if self.prog_bar:
            show_in_progress_bar(trainer, {tag: value for tag, (value, _) in columns.items()})
        if trainer.is_global_zero:
            if self._file is not None:
                if self._first_step is None or step < self._first_step:
                    # A validation that runs again; where it does not, its lines stay.
                    self._drop_stale_lines(trainer, lambda row: row['step'] == step and any(
                        row['metric'] == new['metric'] for new in rows))
                self._file.add(rows)
                self._write_script()
            if self.per_layer:
                scalars.update({f'plasticity_layers/{row["metric"]}/{layer}': math.nan if own['value'] is None
                                else own['value'] for row in rows for layer, own in row['layers'].items()})
            self._loggers.log(scalars, step, rows)
        if self._budget is not None:
            self._budget.count({name for name, _ in results.values()})

    def _spending(self, *names):
        return contextlib.nullcontext() if self._budget is None else self._budget.spending(names)

    def _keep_to_the_budget(self, trainer, behind):
        """ Let what is too dear wait, on all processes alike, and say so. """
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - behind
        # Several processes need the same numbers: what the first one knew when they last agreed.
        numbers = self._budget.numbers() if processes() == 1 else self._numbers
        # A run that goes on may begin with a validation, before any step of its own.
        steps = 1 if self._first_step is None else max(step - self._first_step, 0) + 1
        asked = {name: steps_of(schedule, trainer, steps, numbers['seconds'])
                 for name, schedule in self._schedules.items()}
        overhead, waits = self._budget.plan(numbers, steps, asked)
        intervals = {}
        for name, schedule in self._schedules.items():
            wait = waits.get(name, 0)
            schedule.not_before = step + wait
            intervals[name] = wait if wait > asked[name] else schedule.steps or schedule.interval
        trainer.callback_metrics['plasticity/overhead'] = torch.tensor(overhead)
        if trainer.is_global_zero:
            row = {'metric': 'overhead', 'step': step, 'epoch': trainer.current_epoch, 'time': time.time(),
                   'samples': None, 'value': overhead, 'layers': {}, 'intervals': intervals}
            if self._file is not None:
                self._file.add([row])
            self._loggers.log({'plasticity/overhead': overhead}, step, [])

    def _combine(self, trainer, pl_module, ready, asked, epoch_ends):
        """ Statistics and examples of all processes; what has failed on one is off on all. """
        ready = {**ready, **{name: window.stats for name, window in asked.items()}}
        additive = {name: own if name in asked else _sharded(own, pl_module) for name, own in ready.items()}
        device = trainer.strategy.root_device
        messages = exchange({
            'failed': sorted(self._failed), 'has': [name for name, own in ready.items() if own],
            'examples': {name: window.examples for name, window in asked.items()}, 'now': time.monotonic(),
            'layout': {name: layout_of(own) for name, own in additive.items()},
            'spent': self._budget and self._budget.numbers()}, device)
        self._numbers = messages[0]['spent']
        if processes() > 1:
            self._set_the_clock(trainer, messages[0]['now'])
        layouts = [message['layout'] for message in messages]
        gone = self._switch_off(messages, contradictions(layouts))
        if not epoch_ends:
            gone |= self._not_full_everywhere(asked, messages)
        names = [name for name in ready if name not in gone]
        total = add_up({name: additive[name] for name in names},
                       [{name: layout[name] for name in names} for layout in layouts], device)
        stats, samples = {}, {}
        for name in names:
            stats[name] = {**ready[name], **total[name]}
            if name in asked:
                del self._windows[name]
                readable = site_names(stats[name])
                stats[name] = {readable[site]: own for site, own in stats[name].items()}
                samples[name] = sum(message['examples'][name] for message in messages)
            elif any(name in message['has'] for message in messages):
                # Also if its values cannot be computed here: all processes have to agree.
                self._schedules[name].done()
        return stats, samples

    def _switch_off(self, messages, contradictory):
        """ What cannot be measured on one process is not measured on any. """
        for name, why in contradictory.items():
            if rank() == 0:
                print(f'PlasticityMonitor: {name} differs between processes and will not be measured any more: {why}')
        failed = [set(message['failed']) for message in messages]
        gone = set(contradictory).union(*failed)
        # The first of those on which it failed says so.
        self._say_what_failed(set().union(*failed[:rank()]))
        for name in gone:
            self._failed.pop(name, None)
            self._windows.pop(name, None)
            if self._metrics.pop(name, None):
                del self._schedules[name]
        return gone

    # --- faults -------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarding(self, *names):
        """ What fails in here is a fault of ours: it costs the metric, not the run. """
        with self._spending(*names):
            try:
                yield
            except Exception:
                self._fail(names)

    def _fail(self, names):
        text = (f'PlasticityMonitor: {", ".join(names)} failed and will not be measured any more:\n'
                f'{traceback.format_exc()}')
        if rank() == 0:
            print(text)
        # What fails on all processes is said once: others wait until they know.
        self._failed.update(dict.fromkeys(names, '' if rank() == 0 else text))

    def _say_what_failed(self, said=()):
        for text in {text for name, text in self._failed.items() if text and name not in said}:
            print(text)
        self._failed = dict.fromkeys(self._failed, '')

    # --- what is said and written ----------------------------------------------

    def _write_script(self):
        """ Beside the first lines, as the host does it for its pictures. """
        if not self._has_script:
            self._has_script = True
            try:
                write_report_script(self._file.fpath.parent)
            except OSError as ex:
                warnings.warn(f'PlasticityMonitor: the script for the report could not be written ({ex}); training '
                              'and logging go on', stacklevel=2)

    def _drop_stale_lines(self, trainer, is_stale):
        """ A run that goes on from a checkpoint measures what came after it once more. """
        if trainer.ckpt_path and trainer.is_global_zero and self._file is not None:
            saved = self._restored.get('time')
            saved = saved if isinstance(saved, (int, float)) else -math.inf
            self._file.drop(lambda row: row['time'] > saved and is_stale(row))


def _read_patterns(layers):
    from kwutil import util_pattern
    parts = [layers] if isinstance(layers, str) else layers
    if parts is None:
        return []
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise PlasticityConfigError('Expected `layers` to be patterns of layer names, separated by commas or in '
                                    f'a list, but got {layers!r}')
    names = [name.strip() for part in parts for name in part.split(',') if name.strip()]
    return [util_pattern.Pattern.coerce(name, hint='glob') for name in names]


def _sharded(stats, pl_module):
    """ The statistics of which each process has its part: all others are the same everywhere. """
    if processes() == 1:
        return {}
    sharded = {name for name, weight in weights_of(pl_module).items() if is_sharded(weight)}
    return {name: own for name, own in stats.items() if name in sharded}
