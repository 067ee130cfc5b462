"""
A file to which lines of JSON are added, whatever happens to the disk.
"""
import contextlib
import errno
import json
from pathlib import Path

from .say import warn

FILE_NAME = 'plasticity.jsonl'
# What others beside us would be told as well.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


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
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lines import JsonLines
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
