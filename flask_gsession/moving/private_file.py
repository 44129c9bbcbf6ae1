"""Writes a file of sessions that only its owner can read, and that gets its name when complete."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..stores import file_locks
from ..stores.rights import NO_FOLLOW, NO_WAIT

_SUFFIX = ".part"


@contextmanager
def private_file(
    file: Path, beginning: bytes, removed: Callable[[Path], object]
) -> Iterator[BinaryIO]:
    """Write to a hidden file beside ``file``, which gets its name at the end of the block.

    Removes hidden files that killed processes left, if they start with ``beginning``, and calls
    ``removed`` with each. Raises ``OSError``.
    """
    part: Path | None = None
    try:
        remove_leftovers(file, beginning, removed)
        descriptor, part = _create_part(file)
        with open(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
            part.replace(file)
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def remove_leftovers(file: Path, beginning: bytes, removed: Callable[[Path], object]) -> None:
    """Remove the hidden files of killed processes. A running process has its file locked."""
    name = re.compile(re.escape(_prefix(file)) + r"\w{8}" + re.escape(_SUFFIX), re.ASCII)
    try:
        siblings = list(file.parent.iterdir())
    except OSError:  # a folder may allow writing, but not listing
        return
    for part in siblings:
        if not name.fullmatch(part.name):
            continue
        with suppress(OSError):
            descriptor = os.open(part, os.O_RDWR | NO_FOLLOW | NO_WAIT)
            try:
                file_locks.lock(descriptor, wait=False)
                head = os.read(descriptor, len(beginning))
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and beginning.startswith(head):
                    part.unlink()
                    removed(part)
            finally:
                os.close(descriptor)


def _create_part(file: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(_SUFFIX, _prefix(file), file.parent)  # 0600
        with suppress(OSError):  # some file systems have no locks
            file_locks.lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # otherwise another export has removed it as a leftover
            return descriptor, Path(name)
        os.close(descriptor)


def _prefix(file: Path) -> str:
    return f".{file.name[:40]}."
