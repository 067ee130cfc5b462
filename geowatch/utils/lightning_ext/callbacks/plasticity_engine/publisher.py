"""
From readings to lines: one exchange and one sum over processes, one transfer, formulas, sinks.
"""
import itertools
import time

from ..plasticity_metrics import BUILT_IN
from ..plasticity_metrics._vocabulary import LEFT_OUT, OF_NOTES
from .lightning import is_last_epoch, steps_of
from .measurement import (
    SPECTRA,
    Reading,
    additive_keys,
    derive,
    evaluate,
    needed_keys,
    needing,
    spectrum_of,
    takes_turns,
    to_host,
)
from .memory import Memory
from .processes import contradictions, layout_of
from .rota import Rota, spectral_work
from .say import say
from .sources.activations.sites import site_names
from .statistics.rows import MAX_UNITS


class Publisher:
    """
    Makes lines of what a fit has collected, on all processes alike, and hands them out.

    Args:
        fit (Fit): whose metrics, agenda, windows, faults, processes, sinks and budget it uses

    Attributes:
        measured (Set[str]): metrics that have a line, that of the untrained network left out
        memory (Memory): what is known of the last measurements, also of a run that goes on from a checkpoint
    """

    def __init__(self, fit):
        self.measured = set()
        self.memory = Memory()
        self._fit = fit
        self._known_words = set(BUILT_IN)
        self._shared = None  # numbers of the budget that all processes know
        self._rota = Rota(fit.budget.share, fit.trainer.strategy.root_device)
        self._in_turns = set()  # metrics of which it is said that layers take turns
        self._waiting = set()   # metrics of which it is said that they wait

    def publish(self, readings: list[Reading], asks: bool = False):
        """
        Add up over processes, move all numbers to the host at once, compute, hand out.

        All processes come here with readings of the same metrics.

        Args:
            readings (List[Reading]): windows that some process has not filled stay open
            asks (bool): whether to talk to other processes even if there is none
        """
        if not readings and not asks:
            return
        fit = self._fit
        with fit.faults.spending(list(dict.fromkeys(name for reading in readings for name in reading.metrics))):
            readings = self._combine(readings)
            tables = self._numbers(readings)
            self._rota.end()
            lines = [line for reading, numbers in zip(readings, tables, strict=True)
                     for line in self._lines(reading, numbers)]
            for step in dict.fromkeys(line['step'] for line in lines):
                own = [line for line in lines if line['step'] == step]
                fit.drop_repeated_lines(own)
                fit.sinks.write(own)
        fit.budget.count([line['metric'] for line in lines])
        measured = {line['metric'] for line in lines if line['step'] >= 0}
        self.measured |= measured
        if measured:
            self._keep_to_the_budget()

    # --- over all processes ---------------------------------------------------

    def _combine(self, readings):
        """ The readings that are complete, of all processes, without what has failed on any. """
        fit = self._fit
        messages = fit.processes.exchange(self._message(readings), otherwise=lambda: self._failing(readings))
        self._shared = messages[0]['spent']
        fit.agenda.set_the_clock(fit.moment.step, messages[0]['now'])
        layouts = [message['layout'] for message in messages]
        for message in messages:
            fit.looks.unseen |= message['unseen']
        self._switch_off(messages, contradictions(layouts))
        if len({len(message['has']) for message in messages}) > 1:
            self._drop(list(fit.metrics))  # a process that failed between two steps is not where the others are
        kept = []
        for index, reading in enumerate(readings):
            reading.metrics = [name for name in reading.metrics if name in fit.metrics]
            # Those that have the same data have seen the same examples.
            examples = {message['replica']: message['examples'][index] for message in messages}
            if reading.metrics and self._is_complete(reading, list(examples.values())):
                kept.append(index)
        waiting = self._take_turns(readings, kept, layouts, messages[0])
        needed = {(index, key) for index in kept
                  for key in additive_keys([fit.metrics[name] for name in readings[index].metrics])}
        layouts = [[entry for entry in layout if (entry[0], (entry[1], entry[2])) in needed
                    and (entry[0], (entry[1], entry[2]), str(entry[3])) not in waiting] for layout in layouts]
        sums, lost = fit.processes.add_up(
            [reading.parts for reading in readings], layouts,
            on_error=lambda source, field: fit.faults.fail(needing(fit.metrics, source, [field])),
            replicas=[message['replica'] for message in messages], whole=spectrum_of)
        # Where it failed says so when it is asked next.
        self._drop(name for source, field in lost for name in needing(fit.metrics, source, [field]))
        for index in kept:
            readings[index].metrics = [name for name in readings[index].metrics if name in fit.metrics]
            readings[index].parts = sums[index]
            self._close(readings[index], [message['has'][index] for message in messages])
        return [readings[index] for index in kept]

    def _message(self, readings):
        fit = self._fit
        try:
            return {
                **self._known(), 'unseen': fit.unsaid(),
                'has': [[name for name in reading.metrics if name in fit.metrics and reading.has(fit.metrics[name])]
                        for reading in readings],
                'examples': [reading.window and reading.window.examples for reading in readings],
                'layout': layout_of([reading.parts for reading in readings]) if fit.processes.count > 1 else []}
        except Exception:
            return self._failing(readings)

    def _failing(self, readings):
        """ What the others hear from this process inside an except block, whatever is wrong here. """
        self._fit.faults.fail(list(self._fit.metrics))
        return {**self._known(), 'unseen': {}, 'has': [[] for _ in readings], 'examples': [0 for _ in readings],
                'layout': []}

    def _known(self):
        """ What a message says whatever the readings are. """
        fit = self._fit
        return {'failed': sorted(fit.faults.failed), 'now': time.monotonic(), 'pace': self._rota.pace,
                'replica': fit.processes.replica, 'spent': fit.budget.numbers()}

    def _is_complete(self, reading, examples):
        """ Whether all processes have seen enough; where they have not, the next question comes later. """
        window = reading.window
        if window is None:
            return True
        # All stages of a pipeline see the same ones.
        processes = self._fit.processes
        reading.examples = sum(examples) * processes.holding // processes.count
        if reading.final:
            return True
        progress = min(examples) / window.wanted
        window.poll.answer(window.batches, progress)
        return progress >= 1

    def _close(self, reading, has):
        """ Note what is measured: also if its values cannot be computed here, since all processes have to agree. """
        if reading.window is not None:
            self._fit.looks.close(reading.window)
            self._fit.say_unseen()
            if any(takes_turns(self._fit.metrics[name]) for name in reading.metrics):
                self.memory.sites = list(reading.parts.get(('activations', 'samples'), {}))
            self._rota.also(sum(spectral_work(own.shape[0], rows=0)
                                for own in reading.parts.get(('activations', 'gram'), {}).values()))
            return
        reading.metrics = [name for name in reading.metrics if any(name in own for own in has)]
        if reading.moment.step >= 0:
            self._fit.agenda.done(reading.metrics, reading.moment)

    def _switch_off(self, messages, contradictory):
        """ What cannot be measured on one process is not measured on any. """
        fit, gone = self._fit, set()
        for (source, field), why in contradictory.items():
            names = needing(fit.metrics, source, [field])
            gone.update(names)
            if fit.processes.rank == 0:
                say(f'PlasticityMonitor: {", ".join(names)} differs between processes and will not be measured '
                    f'any more: {source}.{field} of {why}')
        failed = [set(message['failed']) for message in messages]
        # The first of those on which it failed says so.
        fit.faults.say(set().union(*failed[:fit.processes.rank]))
        for name in set().union(*failed):
            fit.faults.failed.pop(name, None)
        self._drop(gone.union(*failed))

    def _drop(self, names):
        fit = self._fit
        for name in set(names):
            fit.looks.drop(name)
            if fit.metrics.pop(name, None):
                fit.agenda.drop(name)

    # --- turns ----------------------------------------------------------------

    def choose_sites(self, names):
        """
        Which sites a window for some metrics takes rows of.

        Args:
            names (List[str]): metrics of activations

        Returns:
            Callable[[Site, int, int], bool]: of a site, its units and the rows that are wanted of it; it stays by
                what it has said
        """
        metrics = [self._fit.metrics[name] for name in names if takes_turns(self._fit.metrics[name])]
        rows, names = max(self._fit.settings.samples, 1), site_names(self.memory.sites if metrics else [])
        choice = self._rota.choice(
            {site: spectral_work(size, max(rows, 8 * size)) for site in names
             for size in [min(site.units, MAX_UNITS)]},
            lambda site: self.memory.last_step(metrics, names[site]))
        return lambda site, units, rows: choice.takes(site, spectral_work(units, rows))

    def _take_turns(self, readings, kept, layouts, message):
        """ Leave out the spectra of weights for which there is no time now, on all processes the same ones. """
        waiting, key = set(), ('weights', 'gram')
        of_spectra = {index: [self._fit.metrics[name] for name in readings[index].metrics
                              if takes_turns(self._fit.metrics[name])] for index in kept}
        if any(of_spectra.values()):
            self._rota.begin(message['now'], message['pace'])
        for index, metrics in of_spectra.items():
            reading = readings[index]
            works = {layer: spectral_work(own.shape[0]) for layer, own in reading.whole.get(key, {}).items()}
            works |= {layer: spectral_work(shape[0]) for place, source, field, layer, shape in itertools.chain(*layouts)
                      if place == index and (source, field) == key}
            taken = set(self._rota.plan(works, lambda layer, metrics=metrics: self.memory.last_step(metrics, layer)))
            for own in (reading.whole, reading.parts):
                if key in own:
                    own[key] = {layer: x for layer, x in own[key].items() if layer in taken}
            waiting |= {(index, key, layer) for layer in works if layer not in taken}
        return waiting

    # --- numbers and lines ----------------------------------------------------

    def _numbers(self, readings):
        """ For each reading the statistics as the formulas take them, on the host. """
        fit, tables = self._fit, []
        for reading in readings:
            keys = {name: needed_keys([fit.metrics[name]]) for name in reading.metrics}

            def guard(source, field, keys=keys):
                return fit.faults.guard([name for name, own in keys.items() if (source, field) in own])
            totals = {key: {**reading.whole.get(key, {}), **reading.parts.get(key, {})}
                      for key in [*reading.whole, *reading.parts]}
            tables.append(derive(totals, list(dict.fromkeys(itertools.chain(*keys.values()))), guard))
        with fit.faults.guard([name for reading in readings for name in reading.metrics]):
            return to_host(tables)
        return [{} for _ in readings]

    def _lines(self, reading, numbers):
        lines, now = [], time.time()
        for name in reading.metrics:
            if name in self._fit.faults.failed:
                continue
            with self._fit.faults.guard([name]):
                metric = self._fit.metrics[name]
                self.memory.add(metric, numbers)
                columns, layers = evaluate(metric, numbers, self.memory.before.get(name), self.memory.recent(metric),
                                           self.memory.earlier(metric))
                self.memory.remember(metric, numbers)
                fresh = self._fresh(metric, numbers, layers, reading.moment.step)
                if any(any(numbers.get((source, LEFT_OUT.get(source)), {}).values()) for source in metric.sources):
                    self.memory.skipped[name] = self.memory.skipped.get(name, 0) + 1
                if layers:
                    line = {'metric': name, 'step': reading.moment.step, 'epoch': reading.moment.epoch,
                            'time': now, 'samples': reading.examples, 'value': columns.pop('value'),
                            'layers': layers, **fresh, **self._words(metric)}
                    besides = self._besides(metric, reading, numbers, columns)
                    # Columns of a user's metric may have any name.
                    lines.append({**line, **{key: x for key, x in besides.items() if key not in line}})
        return lines

    def _fresh(self, metric, numbers, layers, step):
        """ What a line says where layers take turns, which is said to the user once. """
        if not takes_turns(metric):
            return {}
        tables = [numbers.get((need.source, need.field), {}) for need in metric.needs if need.field in SPECTRA]
        fresh = {layer: columns for layer, columns in layers.items() if all(layer in table for table in tables)}
        self.memory.note(metric, step, fresh)
        seen = [layer for layer in numbers.get((metric.sources[0], 'nonfinite'), {})
                if numbers.get(('activations', 'samples'), {}).get(layer, 1.)]
        if len(fresh) < len(seen) and metric.name not in self._in_turns:
            self._in_turns.add(metric.name)
            if self._fit.processes.rank == 0:
                say(f'PlasticityMonitor: {metric.name}: {len(fresh)} of {len(seen)} layers at this measurement, since '
                    'all would take too long; they take turns')
        return {'fresh': list(fresh)} if len(fresh) < len(seen) else {}

    def _besides(self, metric, reading, numbers, columns):
        """ What a line says of the network and its step beside the value. """
        notes = {**reading.notes, **{note: max(numbers[key].values()) for note, key in OF_NOTES.items()
                                     if numbers.get(key)}, 'skipped': self.memory.skipped.get(metric.name)}
        return {**columns, **{note: notes[note] for note in (*metric.notes, 'skipped') if notes.get(note)}}

    def _words(self, metric):
        """ The first line of a user's metric brings its words along, so that the report judges it like ours. """
        if metric.name in self._known_words:
            return {}
        self._known_words.add(metric.name)
        return {'words': vars(metric.words)}

    # --- the budget -----------------------------------------------------------

    def _keep_to_the_budget(self):
        """ Let what is too expensive wait, on all processes alike, and say so if the user has set the budget. """
        fit = self._fit
        step = max(fit.moment.step, 0)
        # Several processes need the same numbers: what the first one knew when they last agreed.
        numbers = fit.budget.numbers() if fit.processes.count == 1 else self._shared
        # A run that goes on may begin with a validation, before any step of its own.
        steps = 1 if fit.first_step is None else max(step - fit.first_step, 0) + 1
        schedules = {name: schedule for name, schedule in fit.agenda.schedules.items()
                     if name in fit.limited and name in self.measured}
        asked = {name: steps_of(schedule, fit.trainer, steps, numbers['seconds'])
                 for name, schedule in schedules.items()}
        overhead, waits = fit.budget.plan(numbers, steps, asked)
        if fit.settings.budget is None:
            # To look once for all is cheaper than once for each.
            looks = {name: wait for name, wait in waits.items() if fit.metrics[name].sees_activations}
            waits.update(dict.fromkeys(looks, max(looks.values(), default=0)))
        intervals = {}
        for name, schedule in schedules.items():
            wait = waits.get(name, 0)
            schedule.wait(step + wait)
            intervals[name] = wait if wait > asked[name] else schedule.steps or schedule.interval
        if fit.settings.budget is None:
            self._say_what_waits([name for name in schedules if waits.get(name, 0) > asked[name]])
            return
        fit.sinks.write([{'metric': 'overhead', 'step': step, 'epoch': fit.trainer.current_epoch, 'time': time.time(),
                          'samples': None, 'value': overhead, 'layers': {}, 'intervals': intervals}], dashboard=False)

    def _say_what_waits(self, names):
        new = [name for name in names if name not in self._waiting]
        self._waiting.update(new)
        if new and self._fit.processes.rank == 0 and not is_last_epoch(self._fit.trainer):
            say(f'PlasticityMonitor: {", ".join(new)}: less often than every epoch, since that would take more than '
                "1 % of the time; an interval that you set, such as 'epoch', is kept")
