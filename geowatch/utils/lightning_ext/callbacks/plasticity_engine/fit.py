"""
All that lives as long as one fit: what is due, what is being collected, and where it goes.

PlasticityMonitor's hooks call the methods of this class, in the order in which
they stand here.
"""
from dataclasses import replace
from functools import partial

import torch

from ..plasticity_metrics import METRICS, PlasticityConfigError
from .activations import Activations
from .agenda import Agenda
from .alarms import Alarms
from .budget import Budget
from .checkpoint import Saved
from .faults import Faults
from .last_step import LastStep, listen
from .lightning import (
    Moment,
    batches_left,
    begins_anew,
    choose_source,
    has_stepped,
    is_last_epoch,
    is_last_step,
    is_over,
    may_be_last,
    replica_of,
    resolve,
    step_of,
    steps_until_an_end,
    timers_of,
    unscales_itself,
    validates_by_time,
    validates_in_step,
    watched_by,
)
from .lines import FILE_NAME
from .measurement import needing, takes_turns
from .message import describe, grouped, why_missing
from .places import new_run, open_lines
from .processes import Processes
from .publisher import Publisher
from .say import say, warn
from .sinks import Sinks
from .sources.activations.looks import layer_paths
from .sources.activations.modules import FUSED_FUNCTIONS
from .sources.contents import Contents, Trained
from .sources.flat import stepped_by
from .sources.weights import parameters_of, walk, wanted, weights_of
from .steps import Steps
from .verdict import Curves, words_on

# What is expensive may cost 1 % of the time beyond half a second, the measurement at the end included, where nobody has
# set a budget or its interval.
_THRIFT = '1%', .5, 1


class Fit:
    """
    One call of ``trainer.fit``, watched.

    Args:
        settings (Settings):
        trainer (Trainer): of either package
        beside (Callable | None): see :class:`.sinks.Sinks`
        nth (int): which of the monitors of this trainer it is
        run (str | None): the run that this fit goes on with, if it begins with trained weights

    Attributes:
        metrics (Dict[str, Metric]): those that are measured still
        limited (Set[str]): those of them that wait where they would be too expensive
        watched (Set[str]): those that other callbacks look at after validation
        activations (Activations): where and when they are looked at
        run (str): which its lines are of
        moment (Moment): of the step that goes on
        last (LastStep): that is over
        first_step (int | None): of this fit, once it has one
    """

    def __init__(self, settings, trainer, beside=None, nth=0, run=None):
        self.settings = settings
        self.trainer = trainer
        self.metrics = {name: METRICS[name] for name in settings.intervals}
        self.limited = {name for name, interval in settings.intervals.items() if settings.budget is not None
                        or interval == 'auto' and (takes_turns(METRICS[name]) or METRICS[name].sees_activations)}
        self.watched = set()
        self.run = run
        self.moment = Moment(-1, None, False)
        self.last = LastStep()
        self.first_step = None
        self.processes = Processes(trainer.world_size, trainer.strategy.root_device, replica_of(trainer))
        # Some loggers broadcast here, so that every rank has to ask.
        self._log_dir, self._nth = trainer.log_dir, nth
        self.curves = Curves(trainer)
        self.sinks = Sinks(trainer, list(self.metrics), settings.per_layer, settings.prog_bar, beside, not nth,
                           [('The warnings', Alarms(trainer).look), ('The verdict', self.curves.add)])
        self.budget = Budget(*_THRIFT) if settings.budget is None else Budget(settings.budget)
        self.faults = Faults(self.processes.rank, self.budget)
        self.activations = Activations(self, self._wants, self._names, self._needing)
        self.looks = self.activations.looks
        self.steps = Steps(self)
        self.agenda = self.publisher = None  # until the checkpoint is read
        self.saved = Saved(self)
        self._is_new = False     # whether the network is untrained
        self._is_open = False    # whether training is sure to begin
        self._reason = None      # why activations are not, or not quite, seen
        self._timers = []        # which may end the run after a batch
        self._held = []          # metrics that are read at this step in case it is the last
        self._told = None        # ids of parameters of whose steps Lightning tells; None for all
        self._handle = None      # of the hook for all others
        self._scales = False     # whether something scales the loss
        self._wanted = {}        # path of a layer to whether it is measured
        self._trained = Trained(trainer)
        self._said = set()       # paths of modules that are named as not seen
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
        self.activations.source, self._reason = choose_source(settings.source, validates, module)
        if not self.activations.metrics:
            self._reason = None
        if self.activations.source is None:
            for name in self.activations.metrics:
                del self.metrics[name]
        self.agenda = Agenda({name: resolve(settings.intervals[name], metric, trainer)
                              for name, metric in self.metrics.items()},
                             self.activations.metrics if self.activations.source == 'train' else (),
                             self.processes.count)
        self.publisher = Publisher(self)
        self.watched = watched_by(trainer.callbacks) & set(self.metrics)
        if settings.budget is None:
            self.limited -= self.watched
        # Processes have clocks of their own.
        self._timers = timers_of(trainer) if self.processes.count == 1 else []
        self.saved.restore()
        self.sinks.begin()

    def open(self, module):
        """ Tell what will be measured, and find a file for it. Training is sure to begin: tuners end before. """
        if self._is_open:
            return
        self._is_open = True
        trainer = self.trainer
        self._is_new = begins_anew(trainer)
        if self.run is None or self._is_new:
            self.run = new_run()
        self._scales = getattr(trainer.precision_plugin, 'scaler', None) is not None
        self._told = stepped_by(trainer.optimizers) if module.automatic_optimization else set()
        if all(id(param) in self._told for weight in weights_of(Contents(module)).values()
               for param in parameters_of(weight)):
            self._told = None
        if not trainer.is_global_zero:
            return
        self.sinks.run = self.run
        self.sinks.file = open_lines(trainer, self._log_dir, self.run, self._nth)
        if self.sinks.file is None:
            warn(f'no log folder, so {FILE_NAME} is not written')
        elif not trainer.loggers:
            warn(f'no logger, so values go to {self.sinks.file.fpath} only')
        say(describe(self.contents(module), self.metrics, self.agenda.schedules, self._wants,
                     f'{self.activations.source}, {self.settings.samples} examples', self._reason))
        if self.processes.holders:
            say(f'PlasticityMonitor: as stages of a pipeline, {self.processes.count} processes have layers of their '
                'own, which are measured too')

    def _check_patterns(self, module):
        weights = weights_of(self.contents(module))
        self._trained.forget()  # a strategy may put others in the place of parameters, for which there has to be room
        # Of all weights, since others may be trained later; what a pipeline has elsewhere counts too.
        names = self.processes.meet([*weights, *(getattr(weight, 'of', '') for weight in weights.values()),
                                     *(name for name, _, _ in walk(Contents(module))), *layer_paths(module)])
        for pattern in self.settings.patterns:
            if not any(pattern.match(name) for name in names):
                raise PlasticityConfigError(
                    f'Expected `layers` to match layers of the model, but {pattern.pattern!r} matches none of: '
                    f'{", ".join(weights)}')

    def start_training(self, module):
        """ Measure the weights before the first step. """
        self.open(module)
        # To wait for a device is only worth it for who asks for a share.
        self.budget.start(None if self.settings.budget is None else self.trainer.strategy.root_device)
        self.sinks.show()
        self.steps.begin_training(self._walk(module), self._is_new, self.saved.content.get('sources'))
        if self._is_new:
            names = self.at_start(['weights'])
            self.steps.open(names, -1)
            self.publisher.publish(self._step_readings(module, names, Moment(-1, self.trainer.current_epoch, False)))

    # --- a batch of training --------------------------------------------------------

    def begin_batch(self, module, batch):
        """ Find what is due, and look at the batch if it is. """
        trainer = self.trainer
        step, epoch = step_of(trainer), trainer.current_epoch
        self.last.begin_batch(step, epoch)
        # All that a step costs at which nothing is due.
        self._is_awake = (step >= self._wake or trainer.is_last_batch
                          or epoch != self.moment.epoch)
        if not self._is_awake:
            return
        self.moment = moment = Moment(step, epoch, is_last_step(trainer, module))
        if self.first_step is None:
            self._begin_first_step(step)
        if is_last_epoch(trainer):
            self.wait_no_longer()
        self.agenda.begin(moment)
        of_steps = [name for name, metric in self.metrics.items() if not metric.sees_activations]
        if validates_in_step(trainer):
            self.agenda.want(self.watched.intersection(of_steps), step)
        due = self.agenda.due(step, of_steps)
        # Weights can be read at any time; what is there at a step only is read at each that may be the last.
        self._held = [name for name in self.agenda.missing(moment, of_steps) if name not in due
                      and set(self.metrics[name].sources) != {'weights'}] if may_be_last(trainer, module) else []
        self.steps.open([*due, *self._held, *self.steps.due_next(module, moment)], step)
        self.steps.begin_batch(partial(self._walk, module), batch)
        if self._told is not None and self.steps.see_an_optimizer:
            self._handle = listen(lambda optimizer: self.steps.before_step(partial(self._walk, module), optimizer,
                                                                           self._told))
        if self.activations.source == 'train':
            self.activations.open(self.agenda.due(step, self.activations.metrics), moment)
            self.activations.look(module, batch, batches_left(trainer))

    def wait_no_longer(self):
        """ The end is measured whatever it costs, unless the user has set a budget. """
        if self.settings.budget is None:
            self.agenda.wait_no_longer(self.limited)

    def _begin_first_step(self, step):
        self.first_step = step
        self.saved.drop_lines_after(lambda row: row['step'] >= step)
        if self.activations.source == 'train' and self._is_new:
            self.activations.open_start()

    def end_forward(self, module, loss=None):
        """ Stop looking before the backward pass, unless more of the model may run; let sources see the graph. """
        if self._is_awake:
            if module.automatic_optimization:
                self.looks.look_away()
            if loss is not None:
                self.steps.before_backward(loss)
                self.curves.see(self.moment.step, loss)

    def end_backward(self, module):
        """ Let sources see what a micro-batch has added. """
        if self._is_awake:
            self.steps.after_backward(partial(self._walk, module))

    def before_step(self, module, optimizer):
        """ Let sources see the gradients, and the weights before an optimizer steps. """
        self.last.before_step(optimizer, self._scales and unscales_itself(optimizer))
        # Of manual optimization torch tells, also of optimizers that Lightning does not know.
        if self._is_awake and (self._handle is None or module.automatic_optimization
                               or not isinstance(optimizer, torch.optim.Optimizer)):
            self.steps.before_step(partial(self._walk, module), optimizer)

    def end_batch(self, module, batch):
        """ Measure what was due at this step, and what is left where it turns out to be the last. """
        if not module.automatic_optimization:
            self.last.end_batch()
        if self._is_awake:
            self._measure_step(module, batch)
            self._is_awake = False
        if is_over(self.trainer, self._timers):
            self.conclude(module, ('step',))  # a validation may follow
        elif validates_by_time(self.trainer):
            self._hold_left(module)

    def _measure_step(self, module, batch):
        self._stop_listening()
        self.activations.look_away(batch)
        step, stepped, readings = self.moment.step, has_stepped(self.trainer), []
        if self.activations.source == 'train':
            self.looks.next_batch()
            # The first step ends what was seen of the untrained network.
            final = {window: stepped and (window.start or self.moment.is_last) for window in self.looks.windows}
            readings += [self.activations.read(window, self.moment, ends) for window, ends in final.items()
                         if ends or window in self.looks.asked()]
        if stepped:
            names = [name for name in self.metrics if not self.metrics[name].sees_activations
                     and self.agenda.schedules[name].is_due(step)]
            found = self._step_readings(module, [*names, *self._held], self.moment)
            readings += [replace(reading, metrics=names) for reading in found if names]
            for reading in found:
                if self._held:
                    self.last.hold('step', reading.settled({name: self.metrics[name] for name in self._held
                                                            if name in self.metrics}))
        self.publisher.publish(readings, asks=stepped and self.agenda.asks_the_time(step))
        # A step that is awake in its first micro-batch, as one that begins an epoch, is so in all of them.
        self._wake = self._next_step(module) if stepped else step

    def _next_step(self, module):
        """ The first step after this one at which anything can be due; see also begin_batch. """
        if self.activations.source == 'train' and self.looks.windows:
            return self.moment.step + 1
        in_steps = [name for name, metric in self.metrics.items()
                    if not metric.sees_activations or self.activations.source == 'train']
        wake = self.agenda.wake(in_steps, self.moment, steps_until_an_end(self.trainer, module))
        return max(wake - 1, self.moment.step + 1) if self.steps.looking_back() else wake

    def conclude(self, module, places=('step', 'validation')):
        """ Measure what the last step has left, where nobody could know before that it would be the last. """
        self.looks.look_away()
        self._close_sources()
        moment = self.last.moment
        if moment is None:
            return
        windows = self.looks.windows if self.activations.source == 'train' else []
        missing = self.agenda.missing(moment)
        readings = [self.activations.read(window, moment, final=True) for window in windows]
        readings += [reading for place in places for reading in self.last.take(place, missing, moment)]
        for reading in readings:
            if reading.window is not None and not reading.window.start:
                self.agenda.done(reading.metrics, reading.moment)
        taken = {name for reading in readings for name in reading.metrics}
        left = [name for name in missing if name not in taken
                and set(self.metrics[name].sources) <= {'weights', 'gradients', 'distances'}]
        if left:
            readings += self._left_readings(module, left, moment)
        self.publisher.publish(readings)

    def conclude_all(self, module):
        """ The same where training is over, for what has waited, too. """
        self.wait_no_longer()
        self.conclude(module)

    def _left_readings(self, module, names, moment):
        """ What is there of a step when it is over: weights, and gradients unless somebody has changed them. """
        self.steps.open(names, moment.step)
        self.steps.look_again(lambda: self.last.left(self._walk(module)))
        return self._step_readings(module, names, moment)

    def _hold_left(self, module):
        """ Read gradients before a validation that may be the end of the run, and that makes them zero. """
        moment = self.last.moment
        names = [name for name in ([] if moment is None else self.agenda.missing(moment))
                 if set(self.metrics[name].sources) in ({'gradients'}, {'gradients', 'weights'})]
        if names and not self.steps.are_open and not self.last.holds('step', moment):
            for reading in self._left_readings(module, names, moment):
                self.last.hold('step', reading)

    # --- validation ---------------------------------------------------------------------

    def begin_validation(self):
        """ Find which activations are due. """
        self.activations.begin_validation(self._is_new)

    def begin_validation_batch(self, module, batch, batch_idx, dataloader_idx):
        """ Look at the batch if a window wants more. """
        self.activations.begin_validation_batch(module, batch, batch_idx, dataloader_idx)

    def end_validation_batch(self, batch):
        """ Stop looking. """
        self.activations.look_away(batch)

    def end_validation(self):
        """ Measure what was seen. """
        if self.activations.end_validation():
            self._wake = 0

    # --- the end --------------------------------------------------------------------------

    def fail(self, module):
        """ Measure what an exception has left. Other processes would have to help, which may not have failed. """
        if self._is_open and self.processes.count == 1:
            self.saved.content = self.state_dict()  # a run that goes on from here measures it where it ends
            with self.faults.guard(list(self.metrics)):
                self.conclude_all(module)
        self.interrupt()

    def interrupt(self):
        """ Leave nothing behind, whatever happened. """
        self.looks.look_away()
        self._trained.forget()
        self._close_sources()
        self.faults.say()

    def _close_sources(self):
        self._stop_listening()
        self.steps.close()

    def _stop_listening(self):
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def give_up(self):
        """ What has failed outside of any metric, inside an except block, costs all of them. """
        self.faults.fail(list(self.metrics))
        self.looks.look_away()

    def end(self):
        """
        Say what was never measured, and what has become of the run.

        Returns:
            Path | None: the log folder, if there is something in it to see
        """
        self.interrupt()
        self.sinks.close()
        if not self.trainer.is_global_zero or not self._is_open:
            return None
        missed = [metric for name, metric in self.metrics.items() if name not in self.publisher.measured]
        if missed:
            looked = self.activations.source == 'train' or self.activations.validated_step is not None
            say(why_missing(missed, self.last.moment is not None,
                            self.looks.why_nothing() if looked else 'no validation ran', self.steps.why_not))
        for line in words_on(self.curves):
            say(line)
        return self.sinks.folder if self.publisher.measured else None

    def measured(self):
        """ Where its lines are, of which run, and their outline, which outlive it: nothing of the trainer. """
        return self.sinks.folder, self.run, self.curves.outline()

    def state_dict(self):
        """ What a checkpoint needs: plain values. """
        return {} if self.publisher is None else self.saved.make()

    def load_state_dict(self, state):
        """ Go on from a checkpoint, which may be of another version. """
        self.saved.content = state if isinstance(state, dict) else {}
        if self.publisher is not None:  # of strategies that read it late
            self.saved.restore()

    def drop_repeated_lines(self, lines):
        """ Those of a validation that runs again after a resume; where it does not, its lines stay. """
        step, metrics = lines[0]['step'], {line['metric'] for line in lines}
        if self.first_step is None or step < self.first_step:
            self.saved.drop_lines_after(lambda row: row['step'] == step and row['metric'] in metrics)

    def unsaid(self):
        """ Modules in which activations ran that could not be seen, and why (Dict[str, str]). """
        return {path: why for path, why in self.looks.unseen.items()
                if path not in self._said and why not in FUSED_FUNCTIONS}  # those are named at the start

    def say_unseen(self):
        """ Name the modules in which activations ran that could not be seen, each once. """
        reasons = self.unsaid()
        self._said.update(reasons)
        if reasons and self.trainer.is_global_zero:
            say(f'PlasticityMonitor: not seen: {"; ".join(grouped(reasons))}')

    # --- what is due ----------------------------------------------------------------------

    def at_start(self, sources):
        """ What is measured of the untrained network: all of some sources that asks for nothing before it. """
        return [name for name, metric in self.metrics.items() if set(metric.sources) <= set(sources)
                and not any(need.when for need in metric.needs)]

    def _needing(self, names, fields, source='activations'):
        """ Those of some metrics that need any of some additive fields. """
        return needing({name: self.metrics[name] for name in names if name in self.metrics}, source, fields)

    # --- what is there ----------------------------------------------------------------------

    def _walk(self, module):
        """ The weights that are measured, anew at each moment: FSDP2 puts others in their place in between. """
        return wanted(self.contents(module).once(weights_of), self._wants)

    def _wants(self, layer):
        if layer not in self._wanted:
            patterns = self.settings.patterns
            self._wanted[layer] = not patterns or any(pattern.match(layer) for pattern in patterns)
        return self._wanted[layer]

    def _names(self, path):
        """ Whether the user names a module, and not only a pattern that it matches. """
        return bool(path) and any(pattern.pattern == path for pattern in self.settings.patterns)

    def contents(self, module):
        """ What the model consists of now, as :meth:`Trained.look` tells it. """
        return self._trained.look(module)

    def _step_readings(self, module, names, moment):
        return self.steps.read(partial(self._walk, module), names, moment)
