"""
All that lives as long as one fit: what is due, what is being collected, and where it goes.

PlasticityMonitor's hooks call the methods of this class, in the order in which
they stand here.
"""
import math
import time
import warnings
from dataclasses import dataclass, field

import numpy as np
from kwutil import util_pattern

from ..plasticity_metrics import BUILT_IN, METRICS, PlasticityConfigError
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
    steps_of,
    steps_until_the_last,
)
from .measurement import Reading, additive_keys, derive, evaluate, needed_keys, to_host
from .message import describe
from .processes import Processes, contradictions, layout_of
from .sharding import is_sharded
from .sinks import FILE_NAME, Sinks
from .sources.activations.looks import Looks, layer_paths
from .sources.steps import STEP_SOURCES
from .sources.weights import weights_of

NEVER = -math.inf


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
        restored (dict): the state of a checkpoint, if the run goes on from one
    """

    def __init__(self, settings, trainer, beside=None):
        self.settings = settings
        self.trainer = trainer
        self.metrics = {name: METRICS[name] for name in settings.intervals}
        self.restored = {}
        self.source = None       # 'train' or 'validation', where activations are seen
        self.processes = Processes(trainer.world_size, trainer.strategy.root_device)
        # Some loggers broadcast here, so that every rank has to ask.
        self.sinks = Sinks(trainer, trainer.log_dir, list(self.metrics), settings.per_layer, settings.prog_bar, beside)
        self.budget = None if settings.budget is None else Budget(settings.budget)
        self.faults = Faults(self.processes.rank, self.budget)
        self.looks = Looks(settings.samples, self.processes.count, self._wants, self.faults, self._needing)
        self.agenda = None
        self.measured = set()    # metrics that were measured, the start left out
        self._owes_start = False
        self._sources = {}       # name to StepSource, of the step that goes on
        self._wanted = {}        # path of a layer to whether it is measured
        self._memory = {}        # metric to its statistics at the last measurement
        self._first_step = None
        self._moment = Moment(-1, None, False)
        self._wake = 0           # the next step at which anything can be due
        self._is_awake = False
        self._told = None        # numbers of the budget that all processes know
        self._told_words = set(BUILT_IN)

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
        if isinstance(self.restored.get('schedules'), dict):
            self.agenda.load_state_dict(self.restored['schedules'])
        self._owes_start = begins_anew(trainer)
        if not trainer.is_global_zero:
            return
        if self.sinks.file is None:
            warnings.warn(f'PlasticityMonitor: no log folder, so {FILE_NAME} is not written', stacklevel=2)
        elif not trainer.loggers:
            warnings.warn(f'PlasticityMonitor: no logger, so values go to {self.sinks.file.fpath} only', stacklevel=2)
        print(describe(module, self.metrics, self.agenda.schedules, self._wants,
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
        if self._owes_start:
            names = [name for name, metric in self.metrics.items() if metric.sources == ('weights',)
                     and not any(need.before for need in metric.needs)]
            self._sources = self._open(names)
            self._publish([self._step_reading(module, names, Moment(-1, self.trainer.current_epoch, False))])

    # --- a batch of training --------------------------------------------------------

    def begin_batch(self, module, batch, batch_idx):
        """ Find what is due, and look at the batch if it is. """
        trainer = self.trainer
        step = step_of(trainer)
        # All that a step costs at which nothing is due.
        self._is_awake = (step >= self._wake or trainer.is_last_batch
                          or trainer.current_epoch != self._moment.epoch)
        if not self._is_awake:
            return
        self._moment = moment = Moment(step, trainer.current_epoch, is_last_step(trainer, batch_idx))
        if self._first_step is None:
            self._first_step = step
            self._drop_stale_lines(lambda row: row['step'] >= step)
        self.agenda.begin(moment)
        due = [name for name in self.agenda.due(step) if not self.metrics[name].sees_activations]
        for name, source in self._open(due).items():
            self._sources.setdefault(name, source).fields |= source.fields
        for source in self._sources.values():
            source.begin_batch(self._walk(module), begins_step(trainer, batch_idx))
        if self.source == 'train':
            self._open_windows(self.agenda.due(step, self._of_activations()), moment)
            self.looks.look(module, batch, batches_left(trainer, batch_idx))

    def end_forward(self, module):
        """ Stop looking before the backward pass, unless more of the model may run after it. """
        if module.automatic_optimization:
            self.looks.look_away()

    def end_backward(self, module):
        """ Let sources see what a micro-batch has added. """
        for source in self._sources.values():
            source.after_backward(self._walk(module))

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
        step, stepped, readings = self._moment.step, has_stepped(self.trainer), []
        if self.source == 'train':
            self.looks.next_batch()
            # The first step ends what was seen of the untrained network.
            final = {window: stepped and (window.start or self._moment.is_last) for window in self.looks.windows}
            readings += [self._window_reading(window, self._moment, ends) for window, ends in final.items()
                         if ends or window in self.looks.asked()]
        if stepped:
            names = [name for name in self.metrics if not self.metrics[name].sees_activations
                     and self.agenda.schedules[name].is_due(step)]
            if names:
                readings.append(self._step_reading(module, names, self._moment))
        self._publish(readings, asks=stepped and self.agenda.asks_the_time(step))
        if stepped:
            self._wake = self._next_step(module, batch_idx)

    def _next_step(self, module, batch_idx):
        """ The first step after this one at which anything can be due; see also begin_batch. """
        if self.source == 'train' and self.looks.windows:
            return self._moment.step + 1
        in_steps = [name for name, metric in self.metrics.items()
                    if not metric.sees_activations or self.source == 'train']
        return self.agenda.wake(in_steps, self._moment, steps_until_the_last(self.trainer, module, batch_idx))

    def end_epoch(self):
        """ Measure what an epoch that ended early has left. """
        self.looks.look_away()
        if self.source == 'train' and self.looks.windows:
            # The step counter is one ahead.
            moment = Moment(step_of(self.trainer) - 1, self.trainer.current_epoch, True)
            self._publish([self._window_reading(window, moment, final=True) for window in self.looks.windows])

    # --- validation ---------------------------------------------------------------------

    def begin_validation(self):
        """ Find which activations are due: those of the untrained network in the sanity check. """
        if self.source != 'validation':
            return
        trainer = self.trainer
        moment = Moment(step_of(trainer), trainer.current_epoch, is_last_validation(trainer))
        if not trainer.sanity_checking:
            self._open_windows(self.agenda.due_in_validation(self._of_activations(), moment), moment)
        elif self._owes_start:
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
            self._publish([self._window_reading(window, moment, final=True) for window in self.looks.windows])

    # --- the end --------------------------------------------------------------------------

    def interrupt(self):
        """ Leave nothing behind, whatever happened. """
        self.looks.look_away()
        for source in self._sources.values():
            source.close()
        self._sources = {}
        self.faults.say()

    def end(self):
        """
        Say what was never measured.

        Returns:
            Path | None: the log folder, if there is something in it to see
        """
        self.interrupt()
        if not self.trainer.is_global_zero:
            return None
        missed = [name for name in self.metrics if name not in self.measured]
        if missed:
            print(f'PlasticityMonitor: asked for and never measured: {", ".join(missed)}')
        fpath = self.sinks.file and self.sinks.file.fpath
        return fpath.parent if self.measured and fpath is not None and fpath.exists() else None

    def state_dict(self):
        """ What a checkpoint needs: plain values. """
        schedules = self.agenda.state_dict() if self.agenda is not None else {}
        for window in self.looks.windows:
            for name in window.metrics:
                # What it has seen is not saved.
                schedules[name].update({'next': 0, 'epoch': None} if not window.start else {})
        memory = {name: [[*key, {layer: x.tolist() if hasattr(x, 'tolist') else x for layer, x in own.items()}]
                         for key, own in tables.items()] for name, tables in self._memory.items()}
        return {'version': 2, 'time': time.time(), 'schedules': schedules, 'memory': memory}

    def load_state_dict(self, state):
        """ Go on from a checkpoint, which may be of another version: what cannot be read is left alone. """
        self.restored = state
        self._memory = read_memory(state.get('memory'))

    # --- what is due ----------------------------------------------------------------------

    def _of_activations(self):
        return [name for name, metric in self.metrics.items() if metric.sees_activations]

    def _open_windows(self, due, moment):
        if self._owes_start and self.source == 'train':
            self._open_start()
        open_already = {name for window in self.looks.windows if not window.start for name in window.metrics}
        due = [name for name in due if name not in open_already]
        self.looks.open(due, self._fields(due, 'activations'))
        self.agenda.done(due, moment)

    def _open_start(self):
        self._owes_start = self.source == 'validation'  # of the weights, still
        names = [name for name in self._of_activations() if not any(need.before for need in self.metrics[name].needs)]
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
        return [name for name in names if name in self.metrics
                and any((source, field) in additive_keys([self.metrics[name]]) for field in fields)]

    def _guard(self, source, fields):
        names = [name for name in self.metrics if source in self.metrics[name].sources]
        return self.faults.guard(self._needing(names, fields, source))

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

    # --- from readings to lines ------------------------------------------------------------------

    def _publish(self, readings, asks=False):
        """
        Add up over processes, move all numbers to the host at once, compute, hand out.

        All processes come here with readings of the same metrics.
        """
        if not readings and not asks:
            return
        names = list(dict.fromkeys(name for reading in readings for name in reading.metrics))
        with self.faults.spending(names):
            readings = self._combine(readings)
            tables = self._numbers(readings)
            rows = [self._rows(reading, numbers) for reading, numbers in zip(readings, tables, strict=True)]
            for own in filter(None, rows):
                if self._first_step is None or own[0]['step'] < self._first_step:
                    # A validation that runs again; where it does not, its lines stay.
                    metrics = {row['metric'] for row in own}
                    self._drop_stale_lines(lambda row, step=own[0]['step'], metrics=metrics: (
                        row['step'] == step and row['metric'] in metrics))
                self.sinks.write(own)
        measured = {row['metric'] for own in rows for row in own if row['step'] >= 0}
        if self.budget is not None and measured:
            self.budget.count(measured)
            self._keep_to_the_budget()

    def _combine(self, readings):
        """ The readings of all processes that are complete, without what has failed on any. """
        own_layout = layout_of([reading.parts for reading in readings])
        messages = self.processes.exchange({
            'failed': sorted(self.faults.failed), 'now': time.monotonic(),
            'has': [[name for name in reading.metrics if name in self.metrics and reading.has(self.metrics[name])]
                    for reading in readings],
            'examples': [reading.window and reading.window.examples for reading in readings],
            'layout': own_layout if self.processes.count > 1 else [],
            'spent': self.budget and self.budget.numbers()})
        self._told = messages[0]['spent']
        self.agenda.set_the_clock(self._moment.step, messages[0]['now'])
        layouts = [message['layout'] for message in messages]
        self._switch_off(messages, contradictions(layouts))
        kept = []
        for index, reading in enumerate(readings):
            reading.metrics = [name for name in reading.metrics if name in self.metrics]
            examples = [message['examples'][index] for message in messages]
            if reading.metrics and (reading.window is None or self._is_complete(reading, examples)):
                kept.append(index)
        needed = {index: set(additive_keys(self.metrics[name] for name in readings[index].metrics)) for index in kept}
        layouts = [[entry for entry in layout if entry[0] in kept and (entry[1], entry[2]) in needed[entry[0]]]
                   for layout in layouts]
        sums = self.processes.add_up([reading.parts for reading in readings], layouts)
        for index in kept:
            reading = readings[index]
            reading.parts = sums[index]
            if reading.window is not None:
                reading.examples = sum(message['examples'][index] for message in messages)
                self.looks.close(reading.window)
            else:
                reading.metrics = [name for name in reading.metrics
                                   if any(name in message['has'][index] for message in messages)]
                if reading.moment.step >= 0:
                    # Also if its values cannot be computed here: all processes have to agree.
                    self.agenda.done(reading.metrics, reading.moment)
        return [readings[index] for index in kept]

    def _is_complete(self, reading, examples):
        """ Whether all processes have seen enough; where they have not, the next question comes later. """
        if reading.final:
            return True
        window = reading.window
        progress = min(examples) / window.wanted
        window.poll.answer(window.batches, progress)
        return progress >= 1

    def _switch_off(self, messages, contradictory):
        """ What cannot be measured on one process is not measured on any. """
        gone = set()
        for (source, fld), why in contradictory.items():
            names = self._needing(self.metrics, [fld], source)
            gone.update(names)
            if self.processes.rank == 0:
                print(f'PlasticityMonitor: {", ".join(names)} differs between processes and will not be measured '
                      f'any more: {source}.{fld} of {why}')
        failed = [set(message['failed']) for message in messages]
        # The first of those on which it failed says so.
        self.faults.say(set().union(*failed[:self.processes.rank]))
        for name in gone.union(*failed):
            self.faults.failed.pop(name, None)
            self.looks.drop(name)
            if self.metrics.pop(name, None):
                self.agenda.drop(name)

    def _numbers(self, readings):
        """ For each reading the statistics as the formulas take them, on the host. """
        tables = []
        for reading in readings:
            metrics = [self.metrics[name] for name in reading.metrics]
            totals = {key: {**reading.whole.get(key, {}), **reading.parts.get(key, {})}
                      for key in [*reading.whole, *reading.parts]}

            def guard(source, fld, names=reading.metrics):
                needing = [name for name in names if (source, fld) in needed_keys([self.metrics[name]])]
                return self.faults.guard(needing)
            tables.append(derive(totals, needed_keys(metrics), guard))
        with self.faults.guard([name for reading in readings for name in reading.metrics]):
            return to_host(tables)
        return [{} for _ in readings]

    def _rows(self, reading, numbers):
        rows, now = [], time.time()
        for name in reading.metrics:
            if name in self.faults.failed:
                continue
            metric = self.metrics[name]
            with self.faults.guard([name]):
                value, layers = evaluate(metric, numbers, self._memory.get(name))
                if any(need.before for need in metric.needs):
                    self._memory[name] = {(need.source, need.field): numbers.get((need.source, need.field), {})
                                          for need in metric.needs if need.before}
                if layers:
                    row = {'metric': name, 'step': reading.moment.step, 'epoch': reading.moment.epoch, 'time': now,
                           'samples': reading.examples, 'value': value, 'layers': layers}
                    if name not in self._told_words:
                        self._told_words.add(name)
                        row['words'] = vars(metric.words)
                    rows.append(row)
                    if reading.moment.step >= 0:
                        self.measured.add(name)
        return rows

    def _keep_to_the_budget(self):
        """ Let what is too dear wait, on all processes alike, and say so. """
        step = max(self._moment.step, 0)
        # Several processes need the same numbers: what the first one knew when they last agreed.
        numbers = self.budget.numbers() if self.processes.count == 1 else self._told
        # A run that goes on may begin with a validation, before any step of its own.
        steps = 1 if self._first_step is None else max(step - self._first_step, 0) + 1
        schedules = self.agenda.schedules
        asked = {name: steps_of(schedule, self.trainer, steps, numbers['seconds'])
                 for name, schedule in schedules.items()}
        overhead, waits = self.budget.plan(numbers, steps, asked)
        intervals = {}
        for name, schedule in schedules.items():
            wait = waits.get(name, 0)
            schedule.wait(step + wait)
            intervals[name] = wait if wait > asked[name] else schedule.steps or schedule.interval
        self.sinks.write([{'metric': 'overhead', 'step': step, 'epoch': self.trainer.current_epoch,
                           'time': time.time(), 'samples': None, 'value': overhead, 'layers': {},
                           'intervals': intervals}], dashboard=False)

    def _drop_stale_lines(self, is_stale):
        """ A run that goes on from a checkpoint measures what came after it once more. """
        if self.trainer.ckpt_path:
            saved = self.restored.get('time')
            saved = saved if isinstance(saved, (int, float)) else NEVER
            self.sinks.drop(lambda row: row['time'] > saved and is_stale(row))


def read_memory(saved):
    """
    Statistics of the last measurements, from a checkpoint.

    Args:
        saved (Any): as :meth:`Fit.state_dict` makes it, or of another version

    Returns:
        Dict[str, Dict[Tuple[str, str], Dict[str, ndarray | float]]]: by metric; empty if it cannot be read

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.fit import read_memory
        >>> read_memory({'mine': [['weights', 'abs', {'fc1': 3.0}]]}), read_memory('odd')
        ({'mine': {('weights', 'abs'): {'fc1': 3.0}}}, {})
    """
    try:
        return {name: {(source, fld): {layer: np.array(x, dtype=float) if isinstance(x, list) else float(x)
                                       for layer, x in own.items()} for source, fld, own in tables}
                for name, tables in saved.items()}
    except (AttributeError, TypeError, ValueError):
        return {}


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
