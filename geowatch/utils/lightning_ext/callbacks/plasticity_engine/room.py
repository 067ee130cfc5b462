"""
Writers that the host uses too wait while a disk is full.

TensorBoard's writer has a thread that ends with its first error, which each
later call of the host's logger raises. So an event of ours is only handed to
it while there is room, and is on disk before we go on. What cannot be had: that
nobody else fills the disk in the microseconds between the two.
"""
import collections
import shutil
from pathlib import Path

from .say import warn

# Bytes: far more than one measurement takes, and what others have still to write of theirs.
LEAST = 1 << 22


class Room:
    """
    The room that is left for one logger.

    Args:
        folder (str | PathLike | None): where it writes, which may be a remote place
        is_full (Callable[[], bool]): whether a file of ours beside it has just found a full disk or quota

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.room import Room
        >>> Room('.', lambda: True).is_there, Room('s3://bucket', lambda: False).is_there
        (False, True)
    """

    def __init__(self, folder, is_full):
        self._folder = None if folder is None or '://' in str(folder) else Path(folder).absolute()
        self._is_full = is_full
        self._warned = False

    @property
    def is_there(self):
        """ Whether there is some, as far as that can be seen; where there is none, one warning says so. """
        found = not self._is_full() and free_bytes(self._folder) >= LEAST
        if not found and not self._warned:
            self._warned = True
            warn(f'{self._folder or "the disk"} is full: TensorBoard gets what is measured as soon as there is room, '
                 'so that it is not our event at which its writer breaks')
        return found


def free_bytes(folder):
    """ Bytes that are left in a folder (Path | None), which may not be there yet; inf where that is not known. """
    if folder is None:
        return float('inf')
    try:
        return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    except OSError:
        return float('inf')


class Patient:
    """
    A writer that keeps what it gets while there is no room.

    Args:
        write (Callable): called with (scalars, step, rows)
        room (Room):
        settle (Callable[[], None]): puts on disk what was written; nothing where another writer of the same
            logger comes next and does
        most (int): measurements that are kept, the last ones
        choose (Callable): called with the same as the writer; returns what it writes of it, or None for nothing

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.room import Patient
        >>> import types
        >>> room, seen = types.SimpleNamespace(is_there=False), []
        >>> writer = Patient(lambda scalars, step, rows: seen.append(step), room)
        >>> writer({}, 3, [])
        >>> room.is_there = True
        >>> writer({}, 4, [])
        >>> seen, len(writer.waiting)
        ([3, 4], 0)
    """

    def __init__(self, write, room, settle=lambda: None, most=1000, choose=lambda *measured: measured):
        self.waiting = collections.deque(maxlen=most)
        self._write = write
        self._choose = choose
        self._settle = settle
        self._room = room

    def __call__(self, scalars, step, rows):
        chosen = self._choose(scalars, step, rows)
        if chosen is not None:
            self.waiting.append(chosen)
            self.try_again()

    def try_again(self):
        """ Write what waits, if there is room now. """
        if self.waiting and self._room.is_there:
            while self.waiting:
                self._write(*self.waiting.popleft())
            self._settle()
