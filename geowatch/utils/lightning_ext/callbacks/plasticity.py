"""
A Lightning callback that shows whether a network loses its ability to learn.

This file reads the settings and hands the hooks of Lightning on; what is
measured is in :mod:`.plasticity_metrics`, and how in :mod:`.plasticity_engine`.
"""
import inspect
import traceback
from numbers import Integral

import pytorch_lightning as pl

from .plasticity_engine.budget import Budget
from .plasticity_engine.fit import Fit
from .plasticity_engine.say import say
from .plasticity_engine.schedule import Schedule
from .plasticity_engine.settings import Settings, read_patterns
from .plasticity_metrics import METRICS, PlasticityConfigError, parse_metrics
from .plasticity_report import report_command, write_report_script

try:
    # A callback of `lightning` has to be an instance of its own class.
    from lightning.pytorch import Callback as _LightningCallback
    _BASES = (pl.Callback, _LightningCallback)
except ImportError:
    _BASES = (pl.Callback,)

SOURCES = ('auto', 'validation', 'train')
_NOTHING = None, None, {}  # as of Fit.measured


class PlasticityMonitor(*_BASES):
    """
    Logs how well a network in training can still learn.

    {tags}

    The values go to all loggers, to ``trainer.callback_metrics``, and with
    those of every layer to ``plasticity.jsonl`` in the log folder, where
    ``plasticity_report.sh`` draws them. TensorBoard has them on one page under
    'Custom scalars', with the band of each metric's layers, the worst layers
    under 'Text', and a row for each run under 'HParams'. A run that begins
    anew is measured before its first step too: these lines have the step -1.
    What breaks is warned of once, and a run ends with a verdict. Set the
    environment variable ``DISABLE_PLASTICITY_MONITOR=1`` to switch it off.

    Args:
        metrics (str | List[str]): names or groups separated by commas, a list
            of them, or 'all'. Each may carry its own interval:
            ``'weight_mag@1,ranks@epoch'``. Groups are 'paper', 'tuning',
            'units' and 'ranks'.
        interval (int | str): a number of optimizer steps, 'epoch', a duration
            such as '5 minutes', or 'auto': weights and gradients every
            ``log_every_n_steps`` of the trainer, ranks and activations once
            per epoch. An epoch is measured at least once.
        source (str): where activations are seen: 'validation', 'train', or
            'auto', that is validation where there is a loader for it.
        samples (int): examples per activation measurement.
        layers (str | List[str] | None): patterns of layer names to restrict
            the measurement to, as in a shell, separated by commas. One that is
            the path of a module names it: its activations count even if they
            are no hidden layers, as that of an output.
        per_layer (bool): if True, log ``plasticity_layers/<metric>/<layer>``.
        prog_bar (bool): if True, the progress bar shows two of the values.
        budget (str | float | None): the monitor's largest share of the
            training time, such as '2%'. What is too expensive is measured
            less often, but at least once. Logs the share so far as
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
        >>> [(row['metric'], row['step']) for row in map(json.loads, lines)][:5]
        [('weight_mag', -1), ('dead_units', -1), ('weight_mag', 0), ('dead_units', 1), ('weight_mag', 1)]
        >>> # The same in the files that TensorBoard reads
        >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        >>> events = EventAccumulator(trainer.log_dir)
        >>> _ = events.Reload()
        >>> [event.step for event in events.Scalars('plasticity/weight_mag')]
        [-1, 0, 1, 2, 3]
    """

    why_one = None  # where a second one would come from, while there may be a single one only

    def __init__(self, metrics='paper,update_ratio', interval='auto', source='auto', samples=2000, layers=None,
                 per_layer=False, prog_bar=False, budget=None):
        self.metrics = metrics
        self.interval = interval
        self.source = source
        self.samples = samples
        self.layers = layers
        self.per_layer = per_layer
        self.prog_bar = prog_bar
        self.budget = budget
        self._fit = None
        self._run = None  # of the last fit, with which the next may go on
        self._measured = _NOTHING  # in the last fit, for who asks when it is over
        self._settings = self._read()

    def _read(self):
        """ The arguments as the engine takes them, or an error that says what was expected. """
        intervals = {name: self.interval if own is None else own for name, own in parse_metrics(self.metrics).items()}
        for own in [self.interval, *intervals.values()]:
            if own != 'auto':
                Schedule(own)
        if self.source not in SOURCES:
            raise PlasticityConfigError(
                f'Expected `source` to be one of {", ".join(SOURCES)}, but got {self.source!r}')
        if isinstance(self.samples, bool) or not isinstance(self.samples, Integral) or self.samples < 1:
            raise PlasticityConfigError(
                f'Expected `samples` to be a whole number of at least 1, but got {self.samples!r}')
        for name in ('per_layer', 'prog_bar'):
            if not isinstance(value := getattr(self, name), bool):
                raise PlasticityConfigError(f'Expected `{name}` to be True or False, but got {value!r}')
        if self.budget is not None:
            Budget(self.budget)
        return Settings(intervals, self.source, int(self.samples), read_patterns(self.layers), self.per_layer,
                        self.prog_bar, self.budget)

    def __getstate__(self):
        # A copy is of the settings: what a fit has opened belongs to that fit.
        return {**vars(self), '_fit': None, '_run': None, '_measured': _NOTHING}

    @property
    def state_key(self):
        # Several monitors of a trainer differ in these, and each has a state in checkpoints.
        own = {name: getattr(self, name) for name in ('metrics', 'source', 'layers')
               if getattr(self, name) != _DEFAULTS[name].default}
        return self._generate_state_key(**own) if own else super().state_key

    @property
    def history(self):
        """
        What the last fit has measured so far (pandas.DataFrame), as of
        :func:`.plasticity_report.load`: from the run's file with every layer,
        or, where there is none, the course of the network's values from
        memory. Empty before a fit, and on all processes but the first.
        """
        from .plasticity_report.frames import history
        return history(*(self._measured if self._fit is None else self._fit.measured()))

    # --- the hooks of Lightning, in the order in which they are called -----

    def setup(self, trainer, pl_module, stage):
        from kwutil import util_environ
        self._hand_over(Fit.interrupt)  # of a run that ended where none of our hooks was called
        if stage == 'fit':
            is_off = util_environ.envflag('DISABLE_PLASTICITY_MONITOR')
            self._fit, self._measured = None, _NOTHING
            own = [callback for callback in trainer.callbacks if isinstance(callback, PlasticityMonitor)]
            if self.why_one and len(own) > 1:
                raise PlasticityConfigError(f'Expected PlasticityMonitor once, but got it from {self.why_one}')
            if not is_off:
                try:
                    self._fit = Fit(self._settings, trainer, write_report_script, own.index(self), self._run)
                except Exception:
                    say(f'PlasticityMonitor: nothing is measured, since it has failed:\n{traceback.format_exc()}')

    def _hand_over(self, method, *args):
        """ Call a method of the fit, if there is one; what fails in it costs what it measures, and not the run. """
        if self._fit is not None:
            try:
                return method(self._fit, *args)
            except PlasticityConfigError:
                raise  # before training
            except Exception:
                self._fit.give_up()

    def on_fit_start(self, trainer, pl_module):
        self._hand_over(Fit.begin, pl_module)

    def on_sanity_check_start(self, trainer, pl_module):
        self._hand_over(Fit.open, pl_module)

    def on_train_start(self, trainer, pl_module):
        self._hand_over(Fit.start_training, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._hand_over(Fit.begin_batch, pl_module, batch)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        # Which comes first where gradients are not accumulated; it calls torch twice for each parameter.
        self._hand_over(Fit.end_forward, pl_module)

    def on_before_backward(self, trainer, pl_module, loss):
        self._hand_over(Fit.end_forward, pl_module, loss)

    def on_after_backward(self, trainer, pl_module):
        self._hand_over(Fit.end_backward, pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._hand_over(Fit.before_step, pl_module, optimizer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._hand_over(Fit.end_batch, pl_module, batch)

    def on_train_epoch_end(self, trainer, pl_module):
        self._hand_over(Fit.conclude, pl_module)

    def on_train_end(self, trainer, pl_module):
        self._hand_over(Fit.conclude_all, pl_module)

    def on_validation_start(self, trainer, pl_module):
        self._hand_over(Fit.begin_validation)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._hand_over(Fit.begin_validation_batch, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._hand_over(Fit.end_validation_batch, batch)

    def on_validation_epoch_end(self, trainer, pl_module):
        self._hand_over(Fit.end_validation)

    def on_exception(self, trainer, pl_module, exception):
        self._hand_over(Fit.fail, pl_module)

    def teardown(self, trainer, pl_module, stage):
        log_dir = self._hand_over(Fit.end)
        self._run = None if self._fit is None else self._fit.run
        if self._fit is not None:
            self._measured = self._hand_over(Fit.measured) or _NOTHING
        self._fit = None
        if log_dir is not None:
            say(f'To see the plasticity of this run: {report_command(log_dir)}', uncut=True)

    # --- checkpoints -------------------------------------------------------

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        # One that had other settings, or is of an older version, has another key.
        states, keys = checkpoint['callbacks'], {callback.state_key for callback in trainer.callbacks}
        (state, *others) = [own for key, own in states.items()
                            if str(key).startswith(type(self).__qualname__) and key not in keys] or [None]
        if state and not others and self.state_key not in states:
            self.load_state_dict(state)

    def state_dict(self):
        return self._hand_over(Fit.state_dict) or {}

    def load_state_dict(self, state_dict):
        self._hand_over(Fit.load_state_dict, state_dict)


_DEFAULTS = inspect.signature(PlasticityMonitor).parameters


def _table_of_tags():
    """ What is logged, from the registry: one line for each metric. """
    rows = [('Tag', 'Value')] + [(f'``plasticity/{name}``', one.words.about or one.words.title)
                                 for name, one in METRICS.items()]
    left, right = (max(map(len, column)) for column in zip(*rows, strict=True))
    line = f'{"=" * left}  {"=" * right}'
    lines = [f'{tag:{left}}  {about}'.rstrip() for tag, about in rows]
    return '\n    '.join([line, lines[0], line, *lines[1:], line])


if PlasticityMonitor.__doc__:  # python -OO leaves it out
    PlasticityMonitor.__doc__ = PlasticityMonitor.__doc__.replace('{tags}', _table_of_tags())
