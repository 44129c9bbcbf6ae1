"""Files that count from the moment they are replaced, while everything runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from ...errors import SettingError
from ...events import logger

T = TypeVar("T")


class ReplacedFiles(Generic[T]):
    """The contents of the files at ``paths``, by ``read``, which raises ``SettingError``.

    ``name``: what they are, in the plural, for the log. Raises ``SettingError`` if they can't be
    used now.
    """

    def __init__(self, paths: Iterable[str], read: Callable[[], T], name: str) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._name = name
        self._unusable = stamp = self._look()
        #: in one, since threads may look at the same time
        self._last = stamp, read()

    def __repr__(self) -> str:
        """Without their contents."""
        return f"<{type(self).__name__}>"

    @property
    def current(self) -> T:
        return self._last[1]

    def renewed(self) -> bool:
        """Whether ``current`` is new since the last call. Costs a look at each file.

        Files that can't be used, such as a half-replaced pair, are logged and don't count: the next
        call looks again.
        """
        stamp = self._look()
        known, before = self._last
        if stamp == known:
            return False
        try:
            current = self._read()
        except SettingError as error:
            if stamp != self._unusable:  # once, not at each call
                self._unusable = stamp
                logger.warning("%s were replaced, but the old ones stay: %s", self._name, error)
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
    # Unpacking and copying may set the old time of change, beside an inode that was used before.
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
