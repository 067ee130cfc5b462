"""
Where results go: loggers, what other callbacks watch, and a file with a line for each measurement.
"""
import math
import traceback
from functools import partial

import torch

from .dashboard import Dashboard, band, is_tensorboard, words_of
from .events import Events
from .hparams import HParams
from .lightning import logs_settings, show_in_progress_bar, show_to_callbacks
from .room import Patient, Room
from .say import say, warn

# What the progress bar shows first: it has room for two.
IN_BAR = ('dead_units', 'feature_erank')
MOST_IN_BAR = 2

def plain(number):
    """
    A number as JSON can hold it.

    Args:
        number (float):

    Returns:
        float | int | None: None for what is not finite

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sinks import plain
        >>> plain(float('nan')), plain(16.0), plain(0.5)
        (None, 16.0, 0.5)
    """
    return number if math.isfinite(number) else None


class Loggers:
    """
    The loggers of a trainer, less those that have failed.

    Args:
        loggers (List[Logger]): of Lightning
        tags (List[str]): what will be logged, for the dashboard of TensorBoard
        tables (List[Tuple[str, Callable]]): writers of what a run is, which come first and last as well
        more (List[Tuple[str, Callable]]): other writers, each with its name,
            called with (scalars, step, rows)
        is_full (Callable[[], bool]): whether a file of ours has just found a full disk

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sinks import Loggers
        >>> from pytorch_lightning.loggers import CSVLogger
        >>> import ubelt as ub
        >>> logger = CSVLogger(ub.Path.appdir('geowatch/tests/loggers'))
        >>> Loggers([logger]).log({'plasticity/erank': 3.0}, step=4)
        >>> logger.experiment.metrics[-1]['step']
        4
    """

    def __init__(self, loggers, tags=(), tables=(), more=(), is_full=lambda: False):
        self._tables = tables
        self._writers = []
        for logger in loggers:
            name = type(logger).__name__
            if is_tensorboard(logger):
                room, dashboard = Room(logger.save_dir, is_full), Dashboard(logger, tags)
                # The scalars come last: they are there at each measurement, so that they put all on disk.
                self._writers += [
                    (f'The dashboard of {name}', Patient(dashboard.log, room, most=1, choose=dashboard.due)),
                    (name, Patient(Events(logger).log, room, partial(_flush, logger), choose=_with_band))]
            else:
                self._writers.append((name, partial(_log_scalars, logger)))
        self._writers += [*tables, *more]

    def log(self, scalars, step, rows=()):
        """
        Args:
            scalars (Dict[str, float]): by tag
            step (int): on the x-axis
            rows (List[dict]): the same with the layers, as in plasticity.jsonl
        """
        self._each(lambda write: write(scalars, step, rows))

    def begin(self):
        """ Say which run it is, before the host does: TensorBoard heeds the first to say it. """
        self._each(lambda write: write({}, -1, ()), [writer for writer in self._writers if writer in self._tables])

    def close(self):
        """ Write what waits for room, if there is some now, and what is known in the end. """
        self.begin()
        patient = [(name, write) for name, write in self._writers if isinstance(write, Patient)]
        self._each(Patient.try_again, patient)
        for name, write in patient:
            if write.waiting:
                warn(f'{name} has not got the last {len(write.waiting)} measurements: there was no room')

    def _each(self, call, writers=None):
        for writer in list(self._writers if writers is None else writers):
            name, write = writer
            try:
                call(write)
            except Exception:
                self._writers.remove(writer)
                say(f'PlasticityMonitor: {name} has failed and gets no more of its values:\n{traceback.format_exc()}')


def _log_scalars(logger, scalars, step, rows):
    logger.log_metrics(scalars, step=step)


def _with_band(scalars, step, rows):
    return scalars, step, band(rows)


def _flush(logger):
    logger.experiment.flush()


class Sinks:
    """
    All places where the results of a fit go.

    Args:
        trainer (Trainer):
        tags (List[str]): what will be logged, under ``plasticity/``
        per_layer (bool): whether each layer has a tag
        prog_bar (bool): whether the progress bar shows the values
        beside (Callable | None): called with the folder of the file, to put
            something beside its first lines
        says_settings (bool): whether TensorBoard hears the settings of the run
        more (List[Tuple[str, Callable]]): who else looks at what is measured,
            each with its name, called with (scalars, step, rows)

    Attributes:
        file (JsonLines | None): where lines go, once it is known
        run (str | None): which its lines are of

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sinks import Sinks
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lines import JsonLines
        >>> import pytorch_lightning as pl
        >>> import ubelt as ub
        >>> dpath = ub.Path.appdir('geowatch/tests/sinks').delete().ensuredir()
        >>> trainer = pl.Trainer(logger=False, accelerator='cpu', default_root_dir=dpath)
        >>> sinks = Sinks(trainer, ['erank'])
        >>> sinks.file = JsonLines(dpath / 'plasticity.jsonl')
        >>> sinks.write([{'metric': 'erank', 'step': 4, 'epoch': 0, 'time': 0., 'value': 3., 'layers': {}}])
        >>> sinks.watched['plasticity/erank'].item(), len((dpath / 'plasticity.jsonl').read_text().splitlines())
        (3.0, 1)
    """

    def __init__(self, trainer, tags, per_layer=False, prog_bar=False, beside=None, says_settings=True,
                 more=()):
        self.file = self.run = None
        self._trainer = trainer
        tables = [(f'The HParams tab of {type(logger).__name__}', HParams(trainer, logger, tags).log)
                  for logger in trainer.loggers if says_settings and is_tensorboard(logger)]
        self._in_bar = sorted(tags, key=lambda tag: IN_BAR.index(tag) if tag in IN_BAR else len(IN_BAR))[:MOST_IN_BAR]
        more = [*([('The progress bar', self._show_in_bar)] if prog_bar else []), *more]
        self._loggers = Loggers(trainer.loggers, tags, tables, more,
                                lambda: self.file is not None and self.file.found_full)
        self._per_layer = per_layer
        self._beside = beside
        self.watched = {}  # what other callbacks can watch, since Lightning forgets it after the sanity check

    def begin(self):
        """ Say which run it is, where Lightning is about to. """
        if self._trainer.is_global_zero and logs_settings(self._trainer):
            self._loggers.begin()

    def write(self, rows, dashboard=True):
        """
        Hand out what was measured at one moment.

        Args:
            rows (List[dict]): lines of the file, nan where a value is not finite
            dashboard (bool): whether TensorBoard shows them beyond their scalars
        """
        values = {row['metric']: row['value'] for row in rows}
        self.watched.update({f'plasticity/{name}': torch.tensor(value) for name, value in values.items()})
        self.show()
        if not self._trainer.is_global_zero:
            return
        plain_rows = [{**{key: plain(x) if isinstance(x, float) else x for key, x in row.items()}, 'layers': {
            layer: {key: plain(x) for key, x in own.items()} for layer, own in row['layers'].items()}} for row in rows]
        if self.file is not None:
            self.file.add([{**row, 'run': self.run} for row in plain_rows])
            self._put_beside()
        scalars = {f'plasticity/{name}': value for name, value in values.items()}
        if self._per_layer:
            scalars.update({f'plasticity_layers/{row["metric"]}/{layer}': own['value']
                            for row in rows for layer, own in row['layers'].items()
                            if layer in row.get('fresh', row['layers'])})
        self._loggers.log(scalars, rows[0]['step'], plain_rows if dashboard else ())

    @property
    def folder(self):
        """ Path of the file's folder, or None where no file is. """
        is_seen = self.file is not None and self.file.is_local and self.file.is_there
        return self.file.fpath.parent if is_seen else None

    def _show_in_bar(self, scalars, step, rows):
        show_in_progress_bar(self._trainer, {row['metric']: (scalars[f'plasticity/{row["metric"]}'],
                                                             words_of(row['metric']).text(row['value']))
                                             for row in rows if row['metric'] in self._in_bar})

    def show(self):
        """ Put what was measured last where other callbacks look. """
        show_to_callbacks(self._trainer, self.watched)

    def drop(self, is_stale):
        """ Leave out lines of this run from the file, see :meth:`JsonLines.drop`. """
        if self._trainer.is_global_zero and self.file is not None:
            self.file.drop(lambda row: row['run'] == self.run and is_stale(row))

    def close(self):
        """ Write what could not be written before. """
        if self.file is not None:
            self.file.close()
        self._loggers.close()

    def _put_beside(self):
        if self._beside is None or not self.file.is_local:
            return
        beside, self._beside = self._beside, None
        try:
            beside(self.file.fpath.parent)
        except Exception as ex:
            warn(f'the script for the report could not be written ({ex}); training and logging go on')
