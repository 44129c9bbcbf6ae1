"""Files that are read again as soon as they are replaced, without a restart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from ...errors import SettingError
from ...events import logger

T = TypeVar("T")


class ReplacedFiles(Generic[T]):
    """The contents of the files at ``paths``, from ``read()``, which may raise ``SettingError``.

    ``name``: a plural name of the files, for the log. Raises ``SettingError`` if they are unusable
    now.
    """

    def __init__(self, paths: Iterable[str], read: Callable[[], T], name: str) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._name = name
        self._unusable = stamp = self._look()
        #: in one tuple, since threads may check at the same time
        self._last = stamp, read()

    def __repr__(self) -> str:
        """Hides the contents."""
        return f"<{type(self).__name__}>"

    @property
    def current(self) -> T:
        return self._last[1]

    def renewed(self) -> bool:
        """Whether ``current`` has changed since the last call. Checks each file's status.

        Unusable files, such as a half-replaced pair, are logged and ignored; the next call checks
        again.
        """
        stamp = self._look()
        known, before = self._last
        if stamp == known:
            return False
        try:
            current = self._read()
        except SettingError as error:
            if stamp != self._unusable:  # log once, not at each call
                self._unusable = stamp
                logger.warning(
                    "%s were replaced, but the old ones stay in use: %s", self._name, error
                )
            return False
        if stamp != self._look():
            return False  # they are being written right now
        self._last = stamp, current
        return current != before

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_stamp_of(path) for path in self._paths]


def _stamp_of(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    # Unpacking and copying may restore an old modification time, and inodes get reused.
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
