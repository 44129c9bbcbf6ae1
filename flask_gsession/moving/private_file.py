"""A file with sessions in it: readable by its owner only, and under its name only when complete."""

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
    """Write to a hidden file beside ``file``, which is renamed at the end of the block.

    Earlier hidden files of processes that were killed are removed if they start with
    ``beginning``; ``removed`` is called with each. Raises ``OSError``.
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
    """Remove the hidden files of killed processes; a running process holds a lock on its own."""
    name = re.compile(re.escape(_prefix(file)) + r"\w{8}" + re.escape(_SUFFIX), re.ASCII)
    try:
        siblings = list(file.parent.iterdir())
    except OSError:  # a folder may allow writing and not listing
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
        with suppress(OSError):  # not every file system has locks
            file_locks.lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # else another export removed it as a leftover
            return descriptor, Path(name)
        os.close(descriptor)


def _prefix(file: Path) -> str:
    return f".{file.name[:40]}."
