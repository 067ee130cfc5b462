"""
The sources of the optimizer step that goes on: which there are, and what they have found.
"""
from .lightning import begins_step, is_second_last_step, scale_of, scaler_of
from .measurement import Reading, additive_keys, needing
from .notes import Notes
from .say import say
from .sharding import is_sharded
from .sources import STEP_SOURCES
from .sources.activations.examples import count_examples
from .sources.flat import stepped_by
from .sources.weights import among


class Steps:
    """
    Opens sources for metrics that are due, hands them the moments of a step, and reads them.

    Args:
        fit (Fit): whose trainer, metrics, agenda, faults and processes it uses
    """

    def __init__(self, fit):
        self._fit = fit
        self._notes = Notes()
        self._open = {}     # name to StepSource, of the step that goes on
        self._lasting = {}  # name to StepSource, of those that last
        self._said = {}     # name to why a source finds nothing, once it has been told

    # --- which ---------------------------------------------------------------

    def open(self, names, step):
        """
        Open sources for what some metrics need at a step; those that are open see more fields.

        Args:
            names (List[str]): metrics of no activations
            step (int): its index
        """
        fit = self._fit
        keys = additive_keys(fit.metrics[name] for name in names)
        for name, cls in STEP_SOURCES.items():
            fields = [field for source, field in keys if source == name]
            if fields:
                source = self._open.get(name) or self._lasting.get(name) or cls(
                    fields, self._guard, fit.processes.holding, scaler_of(fit.trainer))
                source.begin_step(step, fields)
                self._open[name] = source
                if cls.lasts:
                    self._lasting[name] = source

    def begin_training(self, weights, is_new, saved):
        """
        Let sources that last see the weights before the first step of a fit.

        Args:
            weights (Dict[str, Parameter]): by layer
            is_new (bool): whether the network is untrained
            saved (Any): as :meth:`state_dict` makes it, or of another version
        """
        self.open([name for name in self._fit.metrics if self._is(name, 'lasts')], step=-1)
        for name, source in self._lasting.items():
            own = saved.get(name) if isinstance(saved, dict) else None
            source.begin_training(weights, is_new, own if isinstance(own, dict) else None)
            self._explain(source)
        self._open = {}

    def _is(self, name, what):
        """ Whether a metric has a source with an attribute such as 'lasts'. """
        metric = self._fit.metrics[name]
        return not metric.sees_activations and any(getattr(STEP_SOURCES[source], what) for source in metric.sources)

    def looking_back(self):
        """
        Returns:
            List[str]: metrics for which a source has to see the step before, too
        """
        return [name for name in self._fit.metrics if self._is(name, 'looks_back')]

    def due_next(self, module, moment):
        """
        Returns:
            List[str]: of :meth:`looking_back` those that are due at the step after this moment
        """
        names, schedules = self.looking_back(), self._fit.agenda.schedules
        ends = bool(names) and is_second_last_step(self._fit.trainer, module)
        return [name for name in names if schedules[name].is_due(moment.step + 1)
                or ends and schedules[name].epoch != moment.epoch]

    # --- the moments of a step -----------------------------------------------------

    def begin_batch(self, walk, batch):
        """ A batch begins; walk() gives the weights by layer. """
        trainer = self._fit.trainer
        for source in self._seeing_backward():
            is_first = begins_step(trainer)
            ends = trainer.accumulate_grad_batches == 1 or trainer.is_last_batch
            is_alone = is_first and ends and self._fit.processes.count == 1
            source.begin_batch(walk(), is_first, 0 if is_alone and _has_items(batch) else count_examples(batch),
                               is_alone)

    def before_backward(self, loss):
        """ A loss (Tensor) is about to be differentiated. """
        for source in self._seeing_backward():
            source.before_backward(loss)

    def after_backward(self, walk):
        """ A micro-batch has been through backward. """
        for source in self._seeing_backward():
            source.after_backward(walk())

    def _seeing_backward(self):
        return [source for source in self._open.values() if source.sees_backward]

    @property
    def are_open(self):
        """ Whether any source is open. """
        return bool(self._open)

    @property
    def see_an_optimizer(self):
        """ Whether any source that is open has to see an optimizer step. """
        return any(name != 'weights' for name in self._open)

    def before_step(self, walk, optimizer, told=()):
        """ An optimizer is about to step; of parameters whose ids are in `told` another call has told. """
        if self.see_an_optimizer:
            weights = among(walk(), stepped_by([optimizer]).difference(told))
            self._notes.before_step(optimizer)
            for source in self._open.values():
                source.before_step(weights, scale_of(self._fit.trainer, optimizer))

    def look_again(self, walk):
        """ The step is over, and its gradients are still there. """
        if 'gradients' in self._open:
            self._open['gradients'].before_step(walk(), 1.)

    def read(self, walk, names, moment):
        """
        What the sources have found, after which they begin anew.

        Args:
            walk (Callable): gives the weights by layer
            names (List[str]): metrics that it is for; of none, sources only see that the step is over
            moment (Moment):

        Returns:
            List[Reading]: one, or none
        """
        reading, sources, self._open = Reading(names, moment, notes=self._notes.take()), self._open, {}
        with self._fit.faults.guard(names):  # other processes wait for the reading, whatever is in it
            weights = walk() if names or sources else {}
            for source in sources.values():
                source.end_step(weights)
                source.close()
                self._explain(source)
                for field, own in source.take().items():
                    self._sort(reading, source, field, own, weights)
        return [reading] if names else []

    def _sort(self, reading, source, field, own, weights):
        """ Put what a source has found of layers where it belongs: to what is the same on all processes, or not. """
        processes = self._fit.processes
        for layer, x in own.items():
            has_part, holders = is_sharded(weights.get(layer)), processes.holders.get(layer)
            is_part = processes.count > 1 and (source.are_parts or has_part or holders is not None)
            totals = reading.parts if is_part else reading.whole
            if is_part and holders is not None and not source.are_parts:
                x = x * processes.share_of(layer, has_part)
            # Of what stages share, as tied embeddings, a process sees the gradients of its own stage alone.
            if not source.are_parts or (holders or processes.count) == processes.holding:
                totals.setdefault((source.name, field), {})[layer] = x

    def close(self):
        """ Leave nothing behind. """
        for source in self._open.values():
            source.close()
        self._open = {}

    def state_dict(self):
        """ What sources that last need in a checkpoint. """
        return {name: state for name, source in self._lasting.items() if (state := source.state_dict())}

    def why_not(self, metric):
        """
        Args:
            metric (Metric):

        Returns:
            str | None: why its sources have found nothing, as far as they have said
        """
        return next((said[-1] for source, said in self._said.items() if said and source in metric.sources), None)

    # --- what goes wrong ----------------------------------------------------------

    def _guard(self, source, fields):
        return self._fit.faults.guard(needing(self._fit.metrics, source, fields))

    def _explain(self, source):
        """ Say once why a source finds nothing, or not all. """
        names = [name for name, metric in self._fit.metrics.items() if source.name in metric.sources]
        told = self._said.setdefault(source.name, [])
        if source.why_not is not None and source.why_not not in told and len(told) < 3 and names:
            told.append(source.why_not)
            if self._fit.processes.rank == 0:
                say(f'PlasticityMonitor: {", ".join(names)}: {source.why_not}')


def _has_items(batch):
    """ Whether a batch is a list of items, such as dicts, as geowatch has them. """
    return isinstance(batch, (list, tuple)) and any(isinstance(item, dict) for item in batch)
