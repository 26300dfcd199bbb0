"""Who works on a folder: a lock that the system releases when its holder dies, however it dies."""

import errno
import json
import os
import socket
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cospadi.errors import UsageError
from cospadi.files.durable import storing

_PATIENCE = 0.5
"""Seconds to wait: a process that only looks whether there is a holder takes the lock for an instant."""
_HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes], shared: bool = False) -> None:
        file.seek(2**30)  # beyond the text, which others must be able to read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
else:
    import fcntl

    def _lock(file: IO[bytes], shared: bool = False) -> None:
        fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; None for what it has not said."""

    pid: int | None
    host: str | None

    def __str__(self) -> str:
        return "another process" if self.pid is None else f"process {self.pid} on host {self.host}"


class Lock:
    """A lock on a folder, held until it is released or the process ends.

    The file stays when the lock is free: that it exists says nothing.

    Parameters
    ----------
    path : Path
        The lock's file, in the folder; made if missing.

    Raises
    ------
    UsageError
        Another process holds it, which the text names.
    StorageError
        The file cannot be written, or its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        with storing(path):
            self._file = path.open("a+b")
        try:
            self._acquire(path)
        except BaseException:
            self._file.close()
            raise
        _held.add(self)

    def release(self) -> None:
        """Let others have it."""
        self._file.close()

    def _acquire(self, path: Path) -> None:
        patience = time.monotonic() + _PATIENCE
        while not _try(self._file, path):
            if time.monotonic() > patience:
                raise UsageError(f"{path.parent} is in use by {_read(self._file)}: wait until it ends, or end it")
            time.sleep(_PATIENCE / 10)
        # Whoever held it may have deleted the folder: then this is the lock of a file without a name.
        if not path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
            raise UsageError(f"{path.parent} was finished and deleted by another process just now")
        with storing(path):
            self._file.truncate(0)
            self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            self._file.flush()


def holder(path: Path) -> Holder | None:
    """Give who holds the lock of a file; None when nobody does."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        return None if _try(file, path, shared=True) else _read(file)


def _try(file: IO[bytes], path: Path, shared: bool = False) -> bool:
    try:
        _lock(file, shared)
    except OSError as error:
        if error.errno in _HELD:
            return False
        with storing(path):
            raise
    return True


def _read(file: IO[bytes]) -> Holder:
    file.seek(0)
    try:
        data = json.loads(file.read(1000))
        pid, host = data["pid"], data["host"]
    # It may not have been written yet, or by something else.
    except (ValueError, KeyError, TypeError, RecursionError):
        return Holder(None, None)
    return Holder(pid, host) if type(pid) is int and type(host) is str and host.isprintable() else Holder(None, None)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget() -> None:
    """Close the locks of the parent process in a forked child, which may outlive it and would keep them held."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
