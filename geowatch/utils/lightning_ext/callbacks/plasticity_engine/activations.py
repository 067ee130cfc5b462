"""
When activations are looked at: in validation, or in training.
"""
from .lightning import Moment, batches_left, is_last_epoch, is_last_validation, step_of
from .measurement import Reading, additive_keys
from .say import say
from .sources.activations.looks import Looks


class Activations:
    """
    Opens windows for the metrics of activations that are due, lets them see batches, and reads them.

    Args:
        fit (Fit): whose trainer, metrics, agenda and publisher it uses
        wants (Callable[[str], bool]): whether a layer is measured
        names (Callable[[str], bool]): whether the user names a module
        needing (Callable): metrics that need some fields

    Attributes:
        source (str | None): 'train' or 'validation', where they are seen
        looks (Looks): at them
        validated_step (int | None): the last at which there was validation
        held (Window | None): of this validation, in case it is the last
    """

    def __init__(self, fit, wants, names, needing):
        self.source = None
        self.looks = Looks(fit.settings.samples, fit.processes, wants, fit.faults, needing, names)
        self.validated_step = None
        self.held = None
        self._fit = fit
        self._sees_validation = False  # whether any hidden layer ran in one

    @property
    def metrics(self):
        """ Names (List[str]) of those that are measured still. """
        return [name for name, metric in self._fit.metrics.items() if metric.sees_activations]

    # --- windows ------------------------------------------------------------------------

    def open(self, due, moment):
        """ Open a window for those metrics that have none, and note that they are no longer due. """
        open_already = {name for window in self.looks.windows if not window.start for name in window.metrics}
        due = [name for name in due if name not in open_already]
        self._open(due)
        self._fit.agenda.done(due, moment)

    def open_start(self):
        """ Open a window for what is measured of the untrained network. """
        self._open(self._fit.at_start(['activations']), start=True)

    def _open(self, names, **kwargs):
        keys = additive_keys(self._fit.metrics[name] for name in names)
        fields = [field for source, field in keys if source == 'activations']
        self.looks.open(names, fields, takes=self._fit.publisher.choose_sites(names), **kwargs)

    def look(self, module, batch, left):
        """ Look at what a batch makes the model do; `left` batches follow, this one included. """
        self.looks.look(module, batch, left, self._fit.contents)

    def look_away(self, batch):
        """ Stop looking: the batch is over. """
        self.looks.look_away()
        for window in self.looks.windows:
            window.took(batch)

    @staticmethod
    def read(window, moment, final):
        """ What a window has seen, as a Reading; if `final`, all that it will see. """
        moment = moment._replace(step=-1) if window.start else moment
        return Reading(window.metrics, moment, parts=window.totals(), window=window, final=final)

    # --- validation ---------------------------------------------------------------------

    def begin_validation(self, is_new):
        """ Find which metrics are due: those of the untrained network in the sanity check, if it is (bool) one. """
        fit = self._fit
        if self.source != 'validation':
            return
        if fit.trainer.sanity_checking:
            if is_new:
                self.open_start()
            return
        if is_last_epoch(fit.trainer):
            fit.wait_no_longer()
        names, moment = self.metrics, self._validated()
        if moment.step != self.validated_step:
            self.validated_step = moment.step
            fit.agenda.want(fit.watched.intersection(names), moment.step)
        # Of a stream nobody knows the last one: each is looked at, and the last is what counts.
        is_last = is_last_validation(fit.trainer)
        self.open(fit.agenda.missing(moment, names) if is_last else fit.agenda.due(moment.step, names), moment)
        held = fit.agenda.missing(moment, names)
        self._open(held)
        self.held = self.looks.windows[-1] if held else None

    def _validated(self):
        """ The moment of what is validated: the network after the last step, which a batch of None has not made. """
        trainer, last = self._fit.trainer, self._fit.last.moment
        return Moment(step_of(trainer) if last is None else last.step, trainer.current_epoch, True)

    def begin_validation_batch(self, module, batch, batch_idx, dataloader_idx):
        """ Look at the batch if a window wants more. """
        if self.source == 'validation' and self.looks.windows:
            self.look(module, batch, batches_left(self._fit.trainer, batch_idx, dataloader_idx))

    def end_validation(self):
        """ Measure what was seen, before EarlyStopping reads it; tell whether to look at training from now on. """
        if self.source != 'validation' or not self.looks.windows:
            return False
        held, self.held = self.held, None
        moment = self._validated()
        readings = [self.read(window, moment, final=True) for window in self.looks.windows]
        if held in self.looks.windows:
            self._fit.last.hold('validation', readings.pop(self.looks.windows.index(held)))
            self.looks.close(held)
        self._fit.publisher.publish(readings)
        return self._fit.settings.source == 'auto' and self._look_elsewhere(readings)

    def _look_elsewhere(self, readings):
        """ Where a validation runs no hidden layer, on any process, look at training. """
        self._sees_validation = self._sees_validation or self._fit.faults.failed or any(
            reading.parts for reading in readings)
        if self._sees_validation or not any(reading.examples for reading in readings):
            return False
        self.source = 'train'
        self._fit.agenda.look_at_training(self.metrics)
        if self._fit.trainer.is_global_zero:
            say('PlasticityMonitor: validation ran no hidden layer, so activations are seen in training')
        return True
