"""
Where results go: loggers, and a file with a line for each measurement.
"""
import json
import math
import traceback
import warnings
from functools import partial
from pathlib import Path

from ._dashboard import Dashboard, is_tensorboard


def plain(number):
    """
    A number as JSON can hold it.

    Args:
        number (float):

    Returns:
        float | int | None: None for what is not finite

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._sinks import plain
        >>> plain(float('nan')), plain(16.0), plain(0.5)
        (None, 16.0, 0.5)
    """
    return number if math.isfinite(number) else None


class JsonLines:
    """
    A file to which lines of JSON are added, each on disk as soon as it is there.

    What cannot be written, since the disk is full or the folder is gone, is
    kept and tried again with the next lines; one warning says so. Of more than
    `most` characters the oldest lines are given up.

    Args:
        fpath (str | PathLike):

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._sinks import JsonLines
        >>> import ubelt as ub
        >>> fpath = ub.Path.appdir('geowatch/tests/json_lines').delete() / 'a.jsonl'
        >>> JsonLines(fpath).add([{'step': 1}, {'step': 2}])
        >>> JsonLines(fpath).drop(lambda row: row['step'] > 1)
        >>> fpath.read_text()
        '{"step": 1}\\n'
    """

    most = 1 << 26

    def __init__(self, fpath):
        self.fpath = Path(fpath)
        self._waiting = ''
        self._warned = False

    def add(self, rows):
        """
        Args:
            rows (List[dict]): plain data
        """
        self._waiting += ''.join(json.dumps(row) + '\n' for row in rows)
        try:
            self.fpath.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer, which would be written once more when the file is closed.
            with open(self.fpath, 'ab+', buffering=0) as file:
                self._mend(file)
                start, data = file.seek(0, 2), self._waiting.encode()
                try:
                    while data:
                        data = data[file.write(data):]
                except OSError:
                    file.truncate(start)  # half of it would be there twice
                    raise
            self._waiting = ''
        except OSError as ex:
            if len(self._waiting) > self.most:
                self._waiting = self._waiting[self._waiting.find('\n', -self.most // 2) + 1:]
            if not self._warned:
                self._warned = True
                warnings.warn(f'PlasticityMonitor: {self.fpath} cannot be written now ({ex}); training and logging '
                              'go on, and what was measured is kept and tried again', stacklevel=2)

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
            except ValueError:
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
            except (ValueError, TypeError, KeyError):
                return line.endswith('\n')  # somebody else's
        try:
            if self.fpath.exists():
                lines = self.fpath.read_text(errors='replace').splitlines(keepends=True)
                kept = [line for line in lines if stays(line)]
                if len(kept) < len(lines):
                    part = self.fpath.with_suffix('.part')
                    part.write_text(''.join(kept))
                    part.replace(self.fpath)
        except OSError as ex:
            warnings.warn(f'PlasticityMonitor: lines in {self.fpath} of steps that are trained again stay there '
                          f'({ex})', stacklevel=2)


class Loggers:
    """
    The loggers of a trainer, less those that have failed.

    Args:
        loggers (List[Logger]): of Lightning
        tags (List[str]): what will be logged, for the dashboard of TensorBoard

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._sinks import Loggers
        >>> from pytorch_lightning.loggers import CSVLogger
        >>> import ubelt as ub
        >>> logger = CSVLogger(ub.Path.appdir('geowatch/tests/loggers'))
        >>> Loggers([logger]).log({'plasticity/erank': 3.0}, step=4)
        >>> logger.experiment.metrics[-1]['step']
        4
    """

    def __init__(self, loggers, tags=()):
        self._writers = [(type(logger).__name__, partial(_log_scalars, logger)) for logger in loggers]
        self._writers += [(f'The dashboard of {type(logger).__name__}', Dashboard(logger, tags).log)
                          for logger in loggers if is_tensorboard(logger)]

    def log(self, scalars, step, rows=()):
        """
        Args:
            scalars (Dict[str, float]): by tag
            step (int): on the x-axis
            rows (List[dict]): the same with the layers, as in plasticity.jsonl
        """
        for writer in list(self._writers):
            name, write = writer
            try:
                write(scalars, step, rows)
            except Exception:
                self._writers.remove(writer)
                print(f'PlasticityMonitor: {name} has failed and gets no more of its values:')
                traceback.print_exc()


def _log_scalars(logger, scalars, step, rows):
    logger.log_metrics(scalars, step=step)
