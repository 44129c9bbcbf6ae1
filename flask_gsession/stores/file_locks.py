"""File locks between processes. Windows has none."""

from __future__ import annotations

import errno
import os
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None


def lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock the open file for this process, until it is closed or unlocked.

    Raises ``BlockingIOError`` if another process has the lock and ``wait`` is false, and another
    ``OSError`` if the file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(descriptor: int) -> None:
    """Release the lock, even if a forked child has the file open."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
