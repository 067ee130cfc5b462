"""
A Lightning callback that shows whether a network loses its ability to learn.
"""
import fnmatch
import json
import os
import time
import warnings

import pytorch_lightning as pl
import torch
import ubelt as ub

from .plasticity_metrics import METRICS, parse_metrics
from .plasticity_metrics._activations import Capture, clean_name, site_names
from .plasticity_metrics._schedule import Schedule

try:
    # A callback of `lightning` has to be an instance of its own class.
    from lightning.pytorch import Callback as _LightningCallback
    _BASES = (pl.Callback, _LightningCallback)
except ImportError:
    _BASES = (pl.Callback,)

SOURCES = ('auto', 'validation', 'train')


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
        ValueError: if an argument is not one of the above

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
        for own in [interval, *chosen.values()]:
            if own not in ('auto', None):
                Schedule(own)
        if source not in SOURCES:
            raise ValueError(f'Expected `source` to be one of {", ".join(SOURCES)}, but got {source!r}')
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f'Expected `samples` to be a whole number of at least 1, but got {samples!r}')
        self._intervals = {name: own or interval for name, own in chosen.items()}
        self._patterns = layers.split(',') if isinstance(layers, str) else layers
        self._enabled = False
        self._capture = None

    # --- the hooks of Lightning -------------------------------------------

    def setup(self, trainer, pl_module, stage):
        self._enabled = stage == 'fit' and not _switched_off()
        if not self._enabled:
            return
        # Some loggers broadcast here, so that every rank has to ask.
        self._log_dir = trainer.log_dir
        self._metrics = {name: METRICS[name]() for name in self._intervals}
        self._schedules = {
            name: Schedule(_resolve(interval, self._metrics[name], trainer))
            for name, interval in self._intervals.items()}
        self._due = set()      # measured at the current batch
        self._owed = set()     # activation metrics that wait for a window
        self._pending = {}     # metric name to additive statistics
        self._examples = 0     # seen by the open window
        self._measured = set()
        if self._patterns and not self._weights(pl_module):
            raise ValueError(
                f'Expected `layers` to match a layer of the model, but {self.layers!r} '
                f'matches none of: {", ".join(_weights(pl_module))}')

    def on_fit_start(self, trainer, pl_module):
        if not self._enabled:
            return
        validates = trainer.enable_validation
        if self.source == 'validation' and not validates:
            raise ValueError("Expected a validation loader for source='validation', but there is "
                             "none. Give one, or set source='train'")
        self._stage = 'validation' if validates and self.source != 'train' else 'train'
        if self._log_dir is None:
            warnings.warn('PlasticityMonitor: no log folder, so plasticity.jsonl is not written', stacklevel=2)
        if trainer.is_global_zero:
            every = ', '.join(f'{name} ({s.interval})' for name, s in self._schedules.items())
            print(f'PlasticityMonitor: {every}; {len(self._weights(pl_module))} weights; '
                  f'activations of {self._stage}')

    def on_train_epoch_start(self, trainer, pl_module):
        if self._enabled:
            for schedule in self._schedules.values():
                schedule.start_epoch()
            if self._stage == 'train':
                self._owed |= {name for name, s in self._schedules.items()
                               if s.interval == 'epoch' and self._metrics[name].looks_at == 'activations'}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self._enabled:
            return
        loop = trainer.fit_loop.epoch_loop
        self._due = set()
        if not loop._should_accumulate():
            last = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
            self._due = {name for name, schedule in self._schedules.items()
                         if schedule.is_due(loop._batches_that_stepped, last)}
            self._owed |= set(self._due_for('activations'))
        if self._stage == 'train':
            self._look(pl_module, batch)

    def on_before_backward(self, trainer, pl_module, loss):
        self._look_away()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self._enabled or not self._due_for('gradients'):
            return
        scaler = getattr(trainer.precision_plugin, 'scaler', None)
        # A fused optimizer unscales by itself, later.
        scaled = scaler is not None and getattr(optimizer, '_step_supports_amp_scaling', False)
        own = {id(param) for group in optimizer.param_groups for param in group['params']}
        gradients = {
            name: param.grad / scaler.get_scale() if scaled else param.grad
            for name, param in self._weights(pl_module).items()
            if param.grad is not None and id(param) in own}
        for name in self._due_for('gradients'):
            self._pending.setdefault(name, {}).update(self._metrics[name].statistics(gradients))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self._enabled:
            return
        self._look_away()
        for name in self._due_for('weights'):
            self._pending[name] = self._metrics[name].statistics(self._weights(pl_module))
        ready = self._due_for('weights') + self._due_for('gradients')
        if self._stage == 'train' and self._examples >= self.samples:
            ready += self._close_window()
        self._publish(trainer, ready)
        self._due = set()

    def on_train_epoch_end(self, trainer, pl_module):
        if self._enabled and self._stage == 'train':
            # The step of the last batch: the counter is one ahead by now.
            self._publish(trainer, self._close_window(), behind=1)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self._enabled and self._stage == 'validation' and not trainer.sanity_checking:
            self._look(pl_module, batch)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._look_away()

    def on_validation_epoch_end(self, trainer, pl_module):
        # Before on_validation_end, where EarlyStopping reads what we measured.
        if self._enabled and self._stage == 'validation' and not trainer.sanity_checking:
            self._publish(trainer, self._close_window())

    def on_exception(self, trainer, pl_module, exception):
        self._look_away()

    def teardown(self, trainer, pl_module, stage):
        self._look_away()
        if self._enabled and stage == 'fit':
            missed = [name for name in self._metrics if name not in self._measured]
            if missed and trainer.is_global_zero:
                print(f'PlasticityMonitor: asked for and never measured: {", ".join(missed)}')

    # --- what is measured --------------------------------------------------

    def _due_for(self, kind):
        return [name for name in self._metrics if name in self._due and self._metrics[name].looks_at == kind]

    def _weights(self, pl_module):
        return {name: weight for name, weight in _weights(pl_module).items() if self._wants(name)}

    def _wants(self, name):
        return not self._patterns or any(fnmatch.fnmatchcase(name, p.strip()) for p in self._patterns)

    def _look(self, pl_module, batch):
        """ Watch the activations of the next forward pass, if they are owed. """
        if not self._owed or self._examples >= self.samples:
            return
        def observe(site, features, saturated):
            if self._wants(site.layer) or self._wants(site.short_name):
                for name in self._owed:
                    self._metrics[name].observe(self._pending.setdefault(name, {}), site, features, saturated)
        self._capture = Capture(pl_module, [observe])
        self._capture.__enter__()
        self._examples += _count_examples(batch)

    def _look_away(self):
        if self._capture is not None:
            capture, self._capture = self._capture, None
            capture.__exit__(None, None, None)

    def _close_window(self):
        ready = sorted(self._owed) if self._examples else []
        self._owed -= set(ready)
        self._window = self._examples
        self._examples = 0
        for name in ready:
            stats = self._pending.get(name, {})
            names = site_names(stats)
            self._pending[name] = {names[site]: s for site, s in stats.items()}
        return ready

    def _publish(self, trainer, ready, behind=0):
        """ Compute, move all numbers to the host at once, hand them out. """
        results = {}
        for name in ready:
            stats = self._pending.pop(name, None)
            if stats:
                samples = self._window if self._metrics[name].looks_at == 'activations' else None
                for tag, result in self._metrics[name].compute(stats).items():
                    results[tag] = samples, result
                self._measured.add(name)
        if not results:
            return
        flat = [result.value for _, result in results.values()]
        flat += [x for _, result in results.values() for layer in result.layers.values() for x in layer.values()]
        numbers = iter(torch.stack([x.double() for x in flat]).tolist())
        values = {tag: next(numbers) for tag in results}
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - behind
        scalars = {f'plasticity/{tag}': value for tag, value in values.items()}
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in scalars.items()})
        lines = []
        for tag, (samples, result) in results.items():
            layers = {name: {key: next(numbers) for key in layer} for name, layer in result.layers.items()}
            if self.per_layer:
                scalars.update({f'plasticity_layers/{tag}/{name}': layer['value'] for name, layer in layers.items()})
            lines.append({'metric': tag, 'step': step, 'epoch': trainer.current_epoch, 'time': time.time(),
                          'samples': samples, 'value': values[tag], 'layers': layers})
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=step)
            if self._log_dir is not None:
                fpath = ub.Path(self._log_dir).ensuredir() / 'plasticity.jsonl'
                with fpath.open('a') as file:
                    file.writelines(json.dumps(_finite(line)) + '\n' for line in lines)


def _switched_off():
    return os.environ.get('DISABLE_PLASTICITY_MONITOR', '').lower() in {'1', 'true', 'yes', 'on'}


def _resolve(interval, metric, trainer):
    if interval != 'auto':
        return interval
    return 'epoch' if metric.dear else max(1, trainer.log_every_n_steps)


def _weights(pl_module):
    """ Layer name to weight: trainable, floating point, two or more dimensions. """
    return {clean_name(name).removesuffix('.weight'): param
            for name, param in pl_module.named_parameters()
            if param.requires_grad and param.is_floating_point() and param.ndim >= 2}


def _count_examples(batch):
    """ Examples in a batch: a list of items as in geowatch, or tensors. """
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, dict):
        return max(map(_count_examples, batch.values()), default=0)
    if isinstance(batch, (list, tuple)):
        if batch and all(isinstance(item, dict) or item is None for item in batch):
            return sum(item is not None for item in batch)
        return max(map(_count_examples, batch), default=0)
    return 1


def _finite(item):
    """ JSON has no nan or inf: they are written as null. """
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, float) and not (item - item == 0):
        return None
    return item
