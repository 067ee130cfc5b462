"""
All that lives as long as one fit: what is due, what is being collected, and where it goes.

PlasticityMonitor's hooks call the methods of this class, in the order in which
they stand here.
"""
import math
import time
from dataclasses import dataclass, field

from kwutil import util_pattern

from ..plasticity_metrics import METRICS, PlasticityConfigError
from .agenda import Agenda
from .budget import Budget
from .faults import Faults
from .lightning import (
    Moment,
    batches_left,
    begins_anew,
    begins_step,
    choose_source,
    has_stepped,
    is_last_step,
    is_last_validation,
    resolve,
    scale_of,
    step_of,
    steps_until_the_last,
)
from .measurement import Reading, additive_keys, needing
from .message import describe
from .processes import Processes
from .publisher import Publisher
from .say import say, warn
from .sharding import is_sharded
from .sinks import FILE_NAME, Sinks
from .sources import STEP_SOURCES
from .sources.activations.looks import Looks, layer_paths
from .sources.weights import weights_of


@dataclass(frozen=True)
class Settings:
    """ The arguments of PlasticityMonitor, read and found right. """
    intervals: dict
    source: str
    samples: int
    patterns: list = field(default_factory=list)
    per_layer: bool = False
    prog_bar: bool = False
    budget: object = None


class Fit:
    """
    One call of ``trainer.fit``, watched.

    Args:
        settings (Settings):
        trainer (Trainer): of either package
        beside (Callable | None): see :class:`.sinks.Sinks`

    Attributes:
        metrics (Dict[str, Metric]): those that are measured still
        source (str | None): 'train' or 'validation', where activations are seen
        moment (Moment): of the step that goes on
        first_step (int | None): of this fit, once it has one
    """

    def __init__(self, settings, trainer, beside=None):
        self.settings = settings
        self.trainer = trainer
        self.metrics = {name: METRICS[name] for name in settings.intervals}
        self.source = None
        self.moment = Moment(-1, None, False)
        self.first_step = None
        self.processes = Processes(trainer.world_size, trainer.strategy.root_device)
        # Some loggers broadcast here, so that every rank has to ask.
        self.sinks = Sinks(trainer, trainer.log_dir, list(self.metrics), settings.per_layer, settings.prog_bar, beside)
        self.budget = None if settings.budget is None else Budget(settings.budget)
        self.faults = Faults(self.processes.rank, self.budget)
        self.looks = Looks(settings.samples, self.processes.count, self._wants, self.faults, self._needing)
        self.agenda = self.publisher = None  # until the checkpoint is read
        self._restored = {}      # the state of a checkpoint, if the run goes on from one
        self._is_new = False     # whether the network is untrained
        self._sources = {}       # name to StepSource, of the step that goes on
        self._wanted = {}        # path of a layer to whether it is measured
        self._wake = 0           # the next step at which anything can be due
        self._is_awake = False

    # --- before training ---------------------------------------------------------

    def begin(self, module):
        """ Read what the model says, and tell what will be measured. """
        trainer, settings = self.trainer, self.settings
        validates = trainer.enable_validation
        if settings.source == 'validation' and not validates:
            raise PlasticityConfigError("Expected a validation loader for source='validation', but there is "
                                        "none. Give one, or set source='train'")
        self._check_patterns(module)
        self.source, reason = choose_source(settings.source, validates, module)
        asks = bool(self._of_activations())
        if self.source is None:
            for name in self._of_activations():
                del self.metrics[name]
        self.agenda = Agenda({name: resolve(settings.intervals[name], metric, trainer)
                              for name, metric in self.metrics.items()},
                             self._of_activations() if self.source == 'train' else (), self.processes.count)
        if isinstance(self._restored.get('schedules'), dict):
            self.agenda.load_state_dict(self._restored['schedules'])
        self.publisher = Publisher(self, self._restored.get('memory'))
        self._is_new = begins_anew(trainer)
        if not trainer.is_global_zero:
            return
        if self.sinks.file is None:
            warn(f'no log folder, so {FILE_NAME} is not written')
        elif not trainer.loggers:
            warn(f'no logger, so values go to {self.sinks.file.fpath} only')
        say(describe(module, self.metrics, self.agenda.schedules, self._wants,
                     f'{self.source}, {settings.samples} examples', reason if asks else None))

    def _check_patterns(self, module):
        names = dict.fromkeys([*weights_of(module), *layer_paths(module)])
        for pattern in self.settings.patterns:
            if not any(pattern.match(name) for name in names):
                raise PlasticityConfigError(
                    f'Expected `layers` to match layers of the model, but {pattern.pattern!r} matches none of: '
                    f'{", ".join(weights_of(module))}')

    def start_training(self, module):
        """ Measure the weights before the first step. """
        if self.budget is not None:
            self.budget.start(self.trainer.strategy.root_device)
        self.sinks.show()
        if self._is_new:
            names = self._at_start(['weights'])
            self._sources = self._open(names)
            self.publisher.publish([self._step_reading(module, names, Moment(-1, self.trainer.current_epoch, False))])

    # --- a batch of training --------------------------------------------------------

    def begin_batch(self, module, batch, batch_idx):
        """ Find what is due, and look at the batch if it is. """
        trainer = self.trainer
        step = step_of(trainer)
        # All that a step costs at which nothing is due.
        self._is_awake = (step >= self._wake or trainer.is_last_batch
                          or trainer.current_epoch != self.moment.epoch)
        if not self._is_awake:
            return
        self.moment = moment = Moment(step, trainer.current_epoch, is_last_step(trainer, batch_idx))
        if self.first_step is None:
            self._begin_first_step(step)
        self.agenda.begin(moment)
        due = [name for name in self.agenda.due(step) if not self.metrics[name].sees_activations]
        for name, source in self._open(due).items():
            self._sources.setdefault(name, source).fields |= source.fields
        for source in self._seeing_backward():
            source.begin_batch(self._walk(module), begins_step(trainer, batch_idx))
        if self.source == 'train':
            self._open_windows(self.agenda.due(step, self._of_activations()), moment)
            self.looks.look(module, batch, batches_left(trainer, batch_idx))

    def _begin_first_step(self, step):
        self.first_step = step
        self._drop_lines_after_checkpoint(lambda row: row['step'] >= step)
        if self.source == 'train' and self._is_new:
            self._open_start()

    def end_forward(self, module):
        """ Stop looking before the backward pass, unless more of the model may run after it. """
        if module.automatic_optimization:
            self.looks.look_away()

    def end_backward(self, module):
        """ Let sources see what a micro-batch has added. """
        for source in self._seeing_backward():
            source.after_backward(self._walk(module))

    def _seeing_backward(self):
        return [source for source in self._sources.values() if source.sees_backward]

    def before_step(self, module, optimizer):
        """ Let sources see the gradients, and the weights before an optimizer steps. """
        if self._is_awake and any(name != 'weights' for name in self._sources):
            own = {id(param) for group in optimizer.param_groups for param in group['params']}
            weights = {layer: weight for layer, weight in self._walk(module).items() if id(weight) in own}
            for source in self._sources.values():
                source.before_step(weights, scale_of(self.trainer, optimizer))

    def end_batch(self, module, batch_idx):
        """ Measure what was due at this step. """
        if not self._is_awake:
            return
        self.looks.look_away()
        step, stepped, readings = self.moment.step, has_stepped(self.trainer), []
        if self.source == 'train':
            self.looks.next_batch()
            # The first step ends what was seen of the untrained network.
            final = {window: stepped and (window.start or self.moment.is_last) for window in self.looks.windows}
            readings += [self._window_reading(window, self.moment, ends) for window, ends in final.items()
                         if ends or window in self.looks.asked()]
        if stepped:
            names = [name for name in self.metrics if not self.metrics[name].sees_activations
                     and self.agenda.schedules[name].is_due(step)]
            if names:
                readings.append(self._step_reading(module, names, self.moment))
        self.publisher.publish(readings, asks=stepped and self.agenda.asks_the_time(step))
        if stepped:
            self._wake = self._next_step(module, batch_idx)

    def _next_step(self, module, batch_idx):
        """ The first step after this one at which anything can be due; see also begin_batch. """
        if self.source == 'train' and self.looks.windows:
            return self.moment.step + 1
        in_steps = [name for name, metric in self.metrics.items()
                    if not metric.sees_activations or self.source == 'train']
        return self.agenda.wake(in_steps, self.moment, steps_until_the_last(self.trainer, module, batch_idx))

    def end_epoch(self):
        """ Measure what an epoch that ended early has left. """
        self.looks.look_away()
        if self.source == 'train' and self.looks.windows:
            # The step counter is one ahead.
            moment = Moment(step_of(self.trainer) - 1, self.trainer.current_epoch, True)
            self.publisher.publish([self._window_reading(window, moment, final=True) for window in self.looks.windows])

    # --- validation ---------------------------------------------------------------------

    def begin_validation(self):
        """ Find which activations are due: those of the untrained network in the sanity check. """
        if self.source != 'validation':
            return
        trainer = self.trainer
        moment = Moment(step_of(trainer), trainer.current_epoch, is_last_validation(trainer))
        if not trainer.sanity_checking:
            self._open_windows(self.agenda.due_in_validation(self._of_activations(), moment), moment)
        elif self._is_new:
            self._open_start()

    def begin_validation_batch(self, module, batch, batch_idx, dataloader_idx):
        """ Look at the batch if a window wants more. """
        if self.source == 'validation' and self.looks.windows:
            self.looks.look(module, batch, batches_left(self.trainer, batch_idx, dataloader_idx))

    def end_validation_batch(self):
        """ Stop looking. """
        self.looks.look_away()

    def end_validation(self):
        """ Measure what was seen, before EarlyStopping reads it. """
        if self.source == 'validation' and self.looks.windows:
            moment = Moment(step_of(self.trainer), self.trainer.current_epoch, True)
            self.publisher.publish([self._window_reading(window, moment, final=True) for window in self.looks.windows])

    # --- the end --------------------------------------------------------------------------

    def interrupt(self):
        """ Leave nothing behind, whatever happened. """
        self.looks.look_away()
        for source in self._sources.values():
            source.close()
        self._sources = {}
        self.faults.say()

    def give_up(self):
        """ What has failed outside of any metric, inside an except block, costs all of them. """
        self.faults.fail(list(self.metrics))
        self.looks.look_away()

    def end(self):
        """
        Say what was never measured.

        Returns:
            Path | None: the log folder, if there is something in it to see
        """
        self.interrupt()
        self.sinks.close()
        if not self.trainer.is_global_zero or self.publisher is None:
            return None
        missed = [name for name in self.metrics if name not in self.publisher.measured]
        if missed:
            say(f'PlasticityMonitor: asked for and never measured: {", ".join(missed)}')
        return self.sinks.folder if self.publisher.measured else None

    def state_dict(self):
        """ What a checkpoint needs: plain values. """
        if self.publisher is None:
            return {}
        schedules = self.agenda.state_dict()
        for name in (name for window in self.looks.windows if not window.start for name in window.metrics):
            schedules[name].update(next=0, epoch=None)  # due again, since what it has seen is not saved
        return {'version': 2, 'time': time.time(), 'schedules': schedules, 'memory': self.publisher.state_dict()}

    def load_state_dict(self, state):
        """ Go on from a checkpoint, which may be of another version: what cannot be read is left alone. """
        self._restored = state if isinstance(state, dict) else {}

    def _drop_lines_after_checkpoint(self, is_stale):
        """ A run that goes on from a checkpoint measures what came after it once more. """
        if self.trainer.ckpt_path:
            saved = self._restored.get('time')
            saved = saved if isinstance(saved, (int, float)) else -math.inf
            self.sinks.drop(lambda row: row['time'] > saved and is_stale(row))

    def drop_repeated_lines(self, lines):
        """ Those of a validation that runs again after a resume; where it does not, its lines stay. """
        step, metrics = lines[0]['step'], {line['metric'] for line in lines}
        if self.first_step is None or step < self.first_step:
            self._drop_lines_after_checkpoint(lambda row: row['step'] == step and row['metric'] in metrics)

    # --- what is due ----------------------------------------------------------------------

    def _of_activations(self):
        return [name for name, metric in self.metrics.items() if metric.sees_activations]

    def _at_start(self, sources):
        """ What is measured of the untrained network: all of some sources that asks for nothing before it. """
        return [name for name, metric in self.metrics.items() if set(metric.sources) <= set(sources)
                and not any(need.before for need in metric.needs)]

    def _open_windows(self, due, moment):
        open_already = {name for window in self.looks.windows if not window.start for name in window.metrics}
        due = [name for name in due if name not in open_already]
        self.looks.open(due, self._fields(due, 'activations'))
        self.agenda.done(due, moment)

    def _open_start(self):
        names = self._at_start(['activations'])
        self.looks.open(names, self._fields(names, 'activations'), start=True)

    def _open(self, names):
        """ Sources for what some metrics need at a step. """
        found = {}
        for name, cls in STEP_SOURCES.items():
            if fields := self._fields(names, name):
                found[name] = cls(set(fields), self._guard, self.processes.count)
        return found

    def _fields(self, names, source):
        keys = additive_keys(self.metrics[name] for name in names)
        return [field for own_source, field in keys if own_source == source]

    def _needing(self, names, fields, source='activations'):
        """ Those of some metrics that need any of some additive fields. """
        return needing({name: self.metrics[name] for name in names if name in self.metrics}, source, fields)

    def _guard(self, source, fields):
        return self.faults.guard(needing(self.metrics, source, fields))

    # --- what is there ----------------------------------------------------------------------

    def _walk(self, module):
        """ The weights that are measured, anew at each moment: FSDP2 puts others in their place in between. """
        return {layer: weight for layer, weight in weights_of(module).items() if self._wants(layer)}

    def _wants(self, layer):
        if layer not in self._wanted:
            patterns = self.settings.patterns
            self._wanted[layer] = not patterns or any(pattern.match(layer) for pattern in patterns)
        return self._wanted[layer]

    def _step_reading(self, module, names, moment):
        """ What the sources have found at a step, after which they begin anew. """
        reading, sources, self._sources = Reading(names, moment), self._sources, {}
        with self.faults.guard(names):  # other processes wait for the reading, whatever is in it
            weights = self._walk(module)
            for source in sources.values():
                source.end_step(weights)
                source.close()
                for fld, own in source.take().items():
                    for layer, x in own.items():
                        is_part = self.processes.count > 1 and (source.are_parts or is_sharded(weights.get(layer)))
                        totals = reading.parts if is_part else reading.whole
                        totals.setdefault((source.name, fld), {})[layer] = x
        return reading

    def _window_reading(self, window, moment, final):
        moment = moment._replace(step=-1) if window.start else moment
        return Reading(window.metrics, moment, parts=window.totals(), window=window, final=final)


def read_patterns(layers):
    """
    Patterns of layer names.

    Args:
        layers (str | List[str] | None): as in a shell, separated by commas or in a list

    Returns:
        List[Pattern]:

    Raises:
        PlasticityConfigError: if it is none of these
    """
    parts = [layers] if isinstance(layers, str) else layers
    if parts is None:
        return []
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise PlasticityConfigError('Expected `layers` to be patterns of layer names, separated by commas or in '
                                    f'a list, but got {layers!r}')
    names = [name.strip() for part in parts for name in part.split(',') if name.strip()]
    return [util_pattern.Pattern.coerce(name, hint='glob') for name in names]
