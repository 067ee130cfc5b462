"""
Where results go: loggers, what other callbacks watch, and a file with a line for each measurement.
"""
import contextlib
import errno
import json
import math
import traceback
from functools import partial
from pathlib import Path

import torch

from .dashboard import Dashboard, is_tensorboard
from .lightning import show_in_progress_bar, show_to_callbacks
from .room import Patient, Room
from .say import say, warn

FILE_NAME = 'plasticity.jsonl'
# What others beside us would be told as well.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


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


class JsonLines:
    """
    A file to which lines of JSON are added, each on disk as soon as it is there.

    What cannot be written, since the disk is full or the folder is gone, is
    kept and tried again with the next lines, and when the file is closed; one
    warning says so, and another what is lost in the end. Of more than `most`
    characters the oldest lines are given up.

    Args:
        fpath (str | PathLike):

    Attributes:
        found_full (bool): whether the last write failed for want of room

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sinks import JsonLines
        >>> import ubelt as ub
        >>> fpath = ub.Path.appdir('geowatch/tests/json_lines').delete() / 'a.jsonl'
        >>> JsonLines(fpath).add([{'step': 1}, {'step': 2}])
        >>> JsonLines(fpath).drop(lambda row: row['step'] > 1)
        >>> fpath.read_text()
        '{"step": 1}\\n'
    """

    most = 1 << 26
    failures = OSError
    is_local = True

    def __init__(self, fpath):
        self.fpath = Path(fpath)
        self.found_full = False
        self._waiting = ''
        self._warned = False

    def claim(self, run):
        """
        Make the file, unless it is there already.

        Args:
            run (str): that will write to it

        Returns:
            bool: whether it is this run's: new, or with lines of it, or of no run at all
        """
        try:
            self.fpath.parent.mkdir(parents=True, exist_ok=True)
            self.fpath.open('x').close()
        except FileExistsError:
            with contextlib.suppress(OSError):
                return self._is_of(run, self._read())
        except OSError:
            pass  # writing will say so
        return True

    @staticmethod
    def _is_of(run, text):
        # One that is empty was made by a run that is about to write.
        return f'"run": {json.dumps(run)}' in text or bool(text) and '"metric"' not in text

    def add(self, rows):
        """
        Args:
            rows (List[dict]): plain data
        """
        # The words of a user's metric may be anything.
        self._waiting += ''.join(json.dumps(row, default=str) + '\n' for row in rows)
        try:
            self._append(self._waiting.encode())
            self._waiting, self.found_full = '', False
        except self.failures as ex:
            self.found_full = getattr(ex, 'errno', None) in _FULL
            if len(self._waiting) > self.most:
                self._waiting = self._waiting[self._waiting.find('\n', -self.most // 2) + 1:]
            if not self._warned:
                self._warned = True
                warn(f'{self.fpath} cannot be written now ({ex}); training and logging go on, and what was measured '
                     'is kept and tried again')

    def close(self):
        """ Try once more to write what is kept. """
        if self._waiting:
            self.add([])
        if self._waiting:
            warn(f'{self._waiting.count(chr(10))} lines of {self.fpath} could not be written and are lost')

    @property
    def is_there(self):
        """ Whether there is such a file, as far as this process may see. """
        try:
            return self.fpath.exists()
        except OSError:
            return False

    def _append(self, data):
        self.fpath.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which would be written once more when the file is closed.
        with open(self.fpath, 'ab+', buffering=0) as file:
            self._mend(file)
            start = file.seek(0, 2)
            try:
                while data:
                    data = data[file.write(data):]
            except OSError:
                file.truncate(start)  # half of it would be there twice
                raise

    def _read(self):
        return self.fpath.read_text(errors='replace') if self.fpath.exists() else ''

    def _replace(self, text):
        part = self.fpath.with_suffix('.part')
        part.write_text(text)
        part.replace(self.fpath)

    @staticmethod
    def _mend(file):
        """ A killed run may leave half a line, which would spoil the file for all that read it. """
        if not file.tell():
            return
        file.seek(-1, 2)
        if file.read(1) != b'\n':
            file.seek(0)
            text = file.readall()
            start = text.rfind(b'\n') + 1
            try:
                json.loads(text[start:])
                file.write(b'\n')  # only its end is missing
            except (ValueError, RecursionError):
                file.truncate(start)

    def drop(self, is_stale):
        """
        Leave out the lines of steps that will be trained again.

        Args:
            is_stale (Callable[[dict], bool]): of a row
        """
        def stays(line):
            try:
                return not is_stale(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                return line.endswith('\n')  # somebody else's
        try:
            lines = self._read().splitlines(keepends=True)
            kept = [line for line in lines if stays(line)]
            if len(kept) < len(lines):
                self._replace(''.join(kept))
        except self.failures as ex:
            warn(f'lines in {self.fpath} of steps that are trained again stay there ({ex})')


class Loggers:
    """
    The loggers of a trainer, less those that have failed.

    Args:
        loggers (List[Logger]): of Lightning
        tags (List[str]): what will be logged, for the dashboard of TensorBoard
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

    def __init__(self, loggers, tags=(), more=(), is_full=lambda: False):
        self._writers = []
        for logger in loggers:
            name, write = type(logger).__name__, partial(_log_scalars, logger)
            if is_tensorboard(logger):
                room, settle = Room(logger.save_dir, is_full), partial(_flush, logger)
                dashboard = Patient(Dashboard(logger, tags).log, settle, room, most=1)
                self._writers += [(name, Patient(write, settle, room)), (f'The dashboard of {name}', dashboard)]
            else:
                self._writers.append((name, write))
        self._writers += more

    def log(self, scalars, step, rows=()):
        """
        Args:
            scalars (Dict[str, float]): by tag
            step (int): on the x-axis
            rows (List[dict]): the same with the layers, as in plasticity.jsonl
        """
        self._each(lambda write: write(scalars, step, rows))

    def close(self):
        """ Write what waits for room, if there is some now. """
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

    Attributes:
        file (JsonLines | None): where lines go, once it is known
        run (str | None): which its lines are of

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sinks import JsonLines, Sinks
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

    def __init__(self, trainer, tags, per_layer=False, prog_bar=False, beside=None):
        self.file = self.run = None
        self._trainer = trainer
        self._loggers = Loggers(trainer.loggers, tags, [('The progress bar', self._show_in_bar)] if prog_bar else [],
                                lambda: self.file is not None and self.file.found_full)
        self._per_layer = per_layer
        self._beside = beside
        self.watched = {}  # what other callbacks can watch, since Lightning forgets it after the sanity check

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
        show_in_progress_bar(self._trainer, {row['metric']: scalars[f'plasticity/{row["metric"]}'] for row in rows})

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
