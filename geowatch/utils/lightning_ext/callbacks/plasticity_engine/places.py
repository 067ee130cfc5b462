"""
Which file a run writes to: one of its own, also where runs share a folder or the folder is remote.
"""
import os
import time
import uuid
from pathlib import Path

from .lines import FILE_NAME, JsonLines


def new_run() -> str:
    """
    A name that no other run has, in order of time.

    Returns:
        str: for people to tell runs apart, and for nothing else

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.places import new_run
        >>> new_run() == new_run()
        False
    """
    return f'{time.strftime("%Y%m%d-%H%M%S")}-{uuid.uuid4().hex[:6]}'


def open_lines(trainer, log_dir, run, nth=0):
    """
    The file of a run.

    It lies in the log folder. Where the logger has none of its own, several
    runs may share it: the first one to come has it, and each other has a
    folder below it, named after the logger's name and version as for
    checkpoints, or after the run.

    Args:
        trainer (Trainer):
        log_dir (str | PathLike | None): of the trainer
        run (str): see :func:`new_run`
        nth (int): which of the monitors of this trainer writes there

    Returns:
        JsonLines | None: None if there is no log folder

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.places import open_lines
        >>> import pytorch_lightning as pl
        >>> import ubelt as ub
        >>> dpath = ub.Path.appdir('geowatch/tests/places').delete().ensuredir()
        >>> trainer = pl.Trainer(logger=False, accelerator='cpu', default_root_dir=dpath)
        >>> files = []
        >>> for run in ('a', 'b', 'a'):
        >>>     lines = open_lines(trainer, dpath, run)
        >>>     lines.add([{'metric': 'erank', 'run': run}])
        >>>     files.append(lines.fpath)
        >>> [fpath.relative_to(dpath).as_posix() for fpath in files]
        ['plasticity.jsonl', 'b/plasticity.jsonl', 'plasticity.jsonl']
    """
    if log_dir is None:
        return None
    base = os.path.join(log_dir, f'monitor_{nth + 1}') if nth else str(log_dir)
    for folder in _folders(trainer.loggers, str(log_dir), base, run):
        lines = _lines_in(folder)
        if _has_own_folder(trainer.loggers, log_dir) or lines.claim(run):
            return lines
    return lines


def _has_own_folder(loggers, log_dir):
    """ Whether the logger keeps runs apart: its log folder is not that of all its runs. """
    own = getattr(loggers[0], 'log_dir', None) if loggers else None
    return own is not None and str(own) == str(log_dir) != str(loggers[0].save_dir)


def _folders(loggers, log_dir, base, run):
    yield base
    if loggers:
        name, version = loggers[0].name, loggers[0].version
        version = version if isinstance(version, str) else f'version_{version}'
        base = os.path.join(base, str(name), version)
        yield base
    yield os.path.join(base, run)


def _lines_in(folder):
    if '://' not in folder:
        # A relative folder is where it was before the run went elsewhere.
        return JsonLines(Path(folder).absolute() / FILE_NAME)
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem
    files, path = url_to_fs(f'{folder}/{FILE_NAME}')
    return JsonLines(path) if isinstance(files, LocalFileSystem) else RemoteLines(f'{folder}/{FILE_NAME}', files, path)


class RemoteLines(JsonLines):
    """
    The same in a place that fsspec knows, such as s3:// or gs://.

    Args:
        url (str): for people
        files (AbstractFileSystem): of fsspec
        path (str): in it

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.places import RemoteLines
        >>> import fsspec
        >>> files = fsspec.filesystem('memory')
        >>> lines = RemoteLines('memory://places/a.jsonl', files, '/places/a.jsonl')
        >>> lines.add([{'step': 1}])
        >>> lines.add([{'step': 2}])
        >>> files.cat('/places/a.jsonl')
        b'{"step": 1}\\n{"step": 2}\\n'
        >>> files.rm('/places', recursive=True)
    """
    failures = Exception  # each store has its own
    is_local = False

    def __init__(self, url, files, path):
        super().__init__(path)
        self.fpath = url
        self._files = files
        self._path = path

    def claim(self, run):
        try:
            if not self._files.exists(self._path):
                self._files.makedirs(self._files._parent(self._path), exist_ok=True)
                self._files.touch(self._path)
                return True
            return self._is_of(run, self._read())
        except self.failures:
            return True  # writing will say so

    def _append(self, data):
        try:
            with self._files.open(self._path, 'ab') as file:
                file.write(data)
        except (NotImplementedError, ValueError):  # most stores have whole objects only
            before = self._files.cat_file(self._path) if self._files.exists(self._path) else b''
            self._files.pipe_file(self._path, before + data)

    def _read(self):
        return self._files.cat_file(self._path).decode(errors='replace') if self._files.exists(self._path) else ''

    def _replace(self, text):
        self._files.pipe_file(self._path, text.encode())
