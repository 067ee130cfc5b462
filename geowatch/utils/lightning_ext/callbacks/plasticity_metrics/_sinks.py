"""
Where results go: loggers, and a file with a line for each measurement.
"""
import json
import math
import traceback
import warnings
from pathlib import Path


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
    kept and tried again with the next lines; one warning says so.

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
            with open(self.fpath, 'ab+') as file:
                # Not onto the half of a line that a killed run has left.
                if file.tell() and not self._ends_a_line(file):
                    self._waiting = '\n' + self._waiting
                start = file.tell()
                try:
                    file.write(self._waiting.encode())
                    file.flush()
                except OSError:
                    file.truncate(start)  # half of it would be there twice
                    raise
            self._waiting = ''
        except OSError as ex:
            self._waiting = self._waiting.lstrip('\n')
            if not self._warned:
                self._warned = True
                warnings.warn(f'PlasticityMonitor: {self.fpath} cannot be written now ({ex}); training and logging '
                              'go on, and what was measured is kept and tried again', stacklevel=2)

    @staticmethod
    def _ends_a_line(file):
        file.seek(-1, 2)
        return file.read() == b'\n'

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

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._sinks import Loggers
        >>> from pytorch_lightning.loggers import CSVLogger
        >>> import ubelt as ub
        >>> logger = CSVLogger(ub.Path.appdir('geowatch/tests/loggers'))
        >>> Loggers([logger]).log({'plasticity/erank': 3.0}, step=4)
        >>> logger.experiment.metrics[-1]['step']
        4
    """

    def __init__(self, loggers):
        self._loggers = list(loggers)

    def log(self, scalars, step):
        """
        Args:
            scalars (Dict[str, float]): by tag
            step (int): on the x-axis
        """
        for logger in list(self._loggers):
            try:
                logger.log_metrics(scalars, step=step)
            except Exception:
                self._loggers.remove(logger)
                print(f'PlasticityMonitor: {type(logger).__name__} has failed and gets no more of its values:')
                traceback.print_exc()
