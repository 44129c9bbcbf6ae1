"""Large values as files, in a folder, a bucket or any other file system of ``fsspec``.

::

    gsession                 a marker file, to detect a mount point without its disk
    gsession%3A.3f/          the prefix of the store's keys, and the first characters of the names
        3f9a...c1/           a blob
            000000000000     its frames, named by their offset in bytes

Files don't expire, so each blob has an entry in the session store, which does. ``tidy`` removes
files whose entry has expired, and leaves files of other prefixes alone.

In a local folder, only the owner can read the files and folders that we create (0600 and 0700),
whatever the permissions of the folder itself.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec  # type: ignore[import-untyped]  # it ships no types

from ..errors import Gone, StoreUnavailable
from ..processes import process
from .base import milliseconds
from .interrupts import signal_interruption
from .parts import Blobs, Finding, Tidied, itself
from .rights import NO_FOLLOW, OTHERS, others_may_replace, secure
from .support import StoreOptions

FRAME_BYTES = 4 * 1024 * 1024  # each frame is a file, so frames are larger than in other stores
_YOUNG = 3_600_000  # milliseconds; younger files may still be in use
_ENTRY = b"\1"
_LONGEST_PREFIX = 200  # characters of a file's name
_NAME = re.compile("[0-9a-f]{32}")
ORPHANS = "orphaned large values"
# Buckets have no folders, only names with slashes. Making a folder could make the bucket itself.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}


def check_url(url: str) -> None:
    """Raises fsspec's error for a URL that it can't open. Doesn't connect."""
    scheme, colon, _ = url.rpartition("::")[2].partition("://")
    if not colon:
        raise ValueError("not a URL")
    fsspec.get_filesystem_class(scheme)


def is_relative(url: str) -> bool:
    """Whether the URL names a folder of this machine by a relative path."""
    scheme, _, path = url.rpartition("::")[2].partition("://")
    return scheme in ("file", "local") and not path.startswith("/")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            "the name of a large value becomes part of a path: only 32 hexadecimal digits are safe"
        )


def _is_local(fs: Any) -> bool:
    return "file" in fs.protocol


def _make_folder(fs: Any, folder: str) -> None:
    if not _is_local(fs):
        fs.makedirs(folder, exist_ok=True)
        return
    for path in (os.path.dirname(folder), folder):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            problem = secure(path)
            if problem:
                raise StoreUnavailable(f"files: write: a folder {problem}") from None


def _write(fs: Any, path: str, data: bytes) -> None:
    if not _is_local(fs):
        fs.pipe_file(path, data)
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_FOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)


class FileBlobs(Blobs):
    """Stores blobs in the folder that ``url`` names. The store ``entries`` records which are live.

    The file system's own timeouts apply. Creates a missing folder on this machine, for its owner
    only.
    """

    frame_bytes = FRAME_BYTES
    upkeep = checks = itself

    def __init__(self, url: str, entries: Blobs, options: StoreOptions | None = None) -> None:
        self._url = url
        self._bucket = url.rpartition("::")[2].partition("://")[0] in _BUCKETS
        self._entries = entries
        options = options or StoreOptions()
        self._clock = options.clock
        self._begins = quote(options.prefix, safe="")[:_LONGEST_PREFIX] + "."
        self._root = ""
        self._begin()
        process.register(self._begin)
        self._marked = False

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._fs: Any = None  # made at first use
        _reset_event_loop()

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        _check_name(name)
        if self._bucket and offset and self._entries.read_frame(name, 0, 1) is None:
            raise Gone
        self._entries.write_frame(name, 0, _ENTRY, expires_at)
        with self._filesystem("write") as fs:
            try:
                if not self._marked:
                    self._mark(fs)
                folder = self._folder(name)
                if offset == 0 and not self._bucket:
                    _make_folder(fs, folder)
                _write(fs, f"{folder}/{offset:012}", bytes(frame))
            except FileNotFoundError:
                if self._bucket:
                    raise StoreUnavailable("files: write: there is no such bucket") from None
                raise Gone from None

    def read_frame(self, name: str, offset: int, size: int) -> bytes | None:
        _check_name(name)
        with self._filesystem("read") as fs:
            try:
                frame = fs.cat_file(f"{self._folder(name)}/{offset:012}")
            except (FileNotFoundError, NotADirectoryError):
                if not fs.exists(f"{self._root}/gsession"):
                    raise StoreUnavailable(
                        "files: read: the folder of large values doesn't exist"
                    ) from None
                return None
            return bytes(frame)

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        for name in names:
            _check_name(name)
        self._entries.renew_blobs(names, expires_at)

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        for name in names:
            _check_name(name)
        if at <= milliseconds(self._clock):
            for name in names:
                self._remove(name)
        self._entries.discard_blobs(names, at)

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        """Remove files that are older than an hour and belong to no live blob."""
        if cursor and not _NAME.fullmatch(cursor):
            raise ValueError("malformed cursor of a clean-up of files")
        orphans = seen = 0
        last = cursor
        for name in self._names(cursor):
            if seen == limit:
                return Tidied({ORPHANS: orphans}, seen, last)
            seen, last = seen + 1, name
            if self._entries.read_frame(name, 0, 1) is None and self._is_old(name):
                orphans += 1
                if not dry_run:
                    self._remove(name)
        return Tidied({ORPHANS: orphans}, seen, "")

    def check(self) -> list[Finding]:
        """Check whether other users of this machine can read or replace the files."""
        with self._filesystem("look at") as fs:
            if not _is_local(fs) or not os.path.isdir(self._root):
                return []
            root = self._root
            if others_may_replace(root):
                mode = stat.S_IMODE(os.stat(root).st_mode)
                advice = f"Other users may replace files in it: chmod go-w {root}"
                return [Finding("error", "folder of large values", f"{mode:o}", advice)]
            with os.scandir(root) as entries:
                shared = [
                    entry.name
                    for entry in entries
                    if entry.name.startswith(self._begins)
                    and entry.stat(follow_symlinks=False).st_mode & OTHERS
                ]
            # If others can't enter the root, its contents are protected.
            if shared and os.stat(root).st_mode & OTHERS:
                found = f"{len(shared)} folders are open to others, such as {shared[0]}"
                advice = (
                    f"Other users may read large values: chmod -R go-rwx {root}/{self._begins}*"
                )
                return [Finding("error", "folder of large values", found, advice)]
            return [Finding("ok", "folder of large values")]

    def _names(self, after: str) -> Iterator[str]:
        with self._filesystem("list"):  # sets the root, if this is the first use
            root = self._root
        for part in self._list(root):
            start = part.removeprefix(self._begins)
            ours = start != part and re.fullmatch("[0-9a-f]{2}", start)
            if ours and start >= after[:2]:
                for name in self._list(f"{root}/{part}"):
                    if _NAME.fullmatch(name) and name > after:
                        yield name

    def _list(self, folder: str) -> list[str]:
        with self._filesystem("list") as fs:
            try:
                found = fs.ls(folder, detail=False, refresh=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def _is_old(self, name: str) -> bool:
        folder = self._folder(name)
        with self._filesystem("look at") as fs:
            for file in self._list(folder):
                try:
                    changed: datetime = fs.modified(f"{folder}/{file}")
                except (FileNotFoundError, NotImplementedError):
                    continue
                if changed.tzinfo is None:
                    changed = changed.replace(tzinfo=UTC)
                if changed.timestamp() * 1000 > milliseconds(self._clock) - _YOUNG:
                    return False
        return True

    def _remove(self, name: str) -> None:
        folder = self._folder(name)
        with self._filesystem("remove") as fs, suppress(FileNotFoundError):
            if not self._bucket:
                fs.rm(folder, recursive=True)
                return
            for file in self._list(folder):  # one by one: s3fs reports no errors of a batch
                fs.rm_file(f"{folder}/{file}")

    def _folder(self, name: str) -> str:
        return f"{self._root}/{self._begins}{name[:2]}/{name}"

    def _mark(self, fs: Any) -> None:
        marker = f"{self._root}/gsession"
        if not fs.exists(marker):
            if _is_local(fs):
                os.makedirs(self._root, mode=0o700, exist_ok=True)
            elif not self._bucket:
                fs.makedirs(self._root, exist_ok=True)
            _write(fs, marker, b"Large values of sessions: see flask-gsession.\n")
        self._marked = True

    @contextmanager
    def _filesystem(self, operation: str) -> Iterator[Any]:
        """The file system of this process. Translates its errors."""
        try:
            process.notice()
            fs = self._fs
            if fs is None:
                with self._lock:
                    fs, root = fsspec.core.url_to_fs(self._url)
                    self._root = root.rstrip("/")
                    self._fs = fs
            fs.invalidate_cache()  # other processes write there too
            yield fs
        except (Gone, StoreUnavailable):
            raise
        except Exception as error:  # each file system has its own errors
            struck = signal_interruption(error)
            if struck is not None:
                raise struck from None
            said = getattr(error, "strerror", None)  # without paths and addresses
            what = f"{type(error).__name__}: {said}" if said else type(error).__name__
            raise StoreUnavailable(f"files: {operation}: {what}") from error


def _reset_event_loop() -> None:
    """Let fsspec restart the thread of its event loop if this process lacks it.

    fsspec itself does so only after a fork that Python sees. Without this, calls would wait
    forever.
    """
    asyn = sys.modules.get("fsspec.asyn")
    thread = None if asyn is None else asyn.iothread[0]
    if asyn and thread and not Path(f"/proc/self/task/{thread.native_id}").exists():
        asyn.reset_lock()
