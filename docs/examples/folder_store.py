"""A complete store: sessions as files in a folder, for the workers of one machine."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from flask_gsession.errors import Gone, KeyTaken, Stale, StoreUnavailable, UnreadableRecord
from flask_gsession.stores.base import (
    MAX_POINTERS,
    Clock,
    Deleted,
    Record,
    Store,
    milliseconds,
    too_many_pointers,
)
from flask_gsession.stores.parts import MORE, Tidied, itself


class FolderStore(Store):
    """Keeps each record in a file of ``folder`` that is named by its key.

    Readers never wait: a record is replaced by renaming a finished file over it. Writers
    take turns at a lock file, and wait for it at most ``timeout`` seconds. Nothing is
    forced to the disk: a power cut may undo the last writes, a logout included.
    """

    upkeep = itself

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        clock: Clock = time.time,
        timeout: float = 1.0,
    ) -> None:
        self._folder = Path(folder)
        self._clock = clock
        self._timeout = timeout

    def create(self, record: Record) -> None:
        with self._writing():
            there = self._unexpired(record.key)
            if there is None:
                self._write(record)
            elif there.version != record.version:
                raise KeyTaken

    def load(self, key: str) -> Record | None:
        with _translated():
            return self._unexpired(key)

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        with self._writing():
            there = self._unexpired(record.key)
            # A repeat after a lost answer finds its own version: done already.
            if there is None or there.version != record.version:
                old = self._expect(there, expected_version)
                self._write(record if shorten else record.kept_as_long_as(old))

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        with self._writing():
            there = self._unexpired(record.key)
            if there is None or there.version != record.version:
                return False
            later = max(idle_expires_at, there.idle_expires_at)
            later = min(later, there.absolute_expires_at)
            self._write(there._replace(idle_expires_at=later))
            return True

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> None:
        with self._writing():
            taken = self._unexpired(record.key)
            if taken is not None and taken.version == record.version:
                return
            old = self._expect(self._unexpired(key), expected_version)
            if taken is not None:
                raise KeyTaken
            # The new record first: a crash in between leaves one that nobody can reach,
            # since its token has not left the server.
            self._write(record if shorten else record.kept_as_long_as(old))
            if pointer is None:
                self._remove(key)
            else:
                self._write(pointer)

    def delete(self, key: str, expected_version: int | None = None) -> Deleted:
        with self._writing():
            record = self._unexpired(key)
            if expected_version is not None:
                self._expect(record, expected_version)
            chain = [key]
            while record is not None and record.successor is not None:
                if len(chain) == MAX_POINTERS:
                    raise too_many_pointers()
                successor = record.successor
                record = None if successor in chain else self._unexpired(successor)
                chain.append(successor)
            # The pointers last: after a crash in between, a repeat finds the session.
            for link in reversed(chain):
                self._remove(link)
            return Deleted(record is not None, record)

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        """The part ``upkeep``: remove about ``limit`` expired records, or count them all."""
        expired = 0
        with self._writing(), os.scandir(self._folder) as entries:
            for entry in entries:
                if expired == limit and not dry_run:
                    break
                if entry.name.startswith("."):
                    continue
                with suppress(UnreadableRecord):
                    if self._unexpired(entry.name) is None:
                        expired += 1
                        if not dry_run:
                            self._remove(entry.name)
        more = MORE if expired == limit and not dry_run else ""
        return Tidied({"expired sessions": expired}, expired, more)

    def close(self) -> None:
        """Nothing stays open between two calls."""

    def _unexpired(self, key: str) -> Record | None:
        try:
            data = (self._folder / key).read_bytes()
        except FileNotFoundError:
            return None
        try:
            record = msgspec.msgpack.decode(data, type=Record)
        except msgspec.DecodeError as error:
            raise UnreadableRecord("corrupt", type(error).__name__) from None
        if record.key != key:
            raise UnreadableRecord("corrupt", "another session's record")
        return record if milliseconds(self._clock) < record.idle_expires_at else None

    def _write(self, record: Record) -> None:
        new = self._folder / ".new"  # one is enough: there is one writer at a time
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.msgpack.encode(record))
        new.replace(self._folder / record.key)

    def _remove(self, key: str) -> None:
        (self._folder / key).unlink(missing_ok=True)

    @staticmethod
    def _expect(record: Record | None, version: int) -> Record:
        if record is None or record.successor is not None:
            raise Gone
        if record.version != version:
            raise Stale
        return record

    @contextmanager
    def _writing(self) -> Iterator[None]:
        deadline = time.monotonic() + self._timeout
        with _translated():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._folder / ".lock").open("ab") as lock:
                while not _locked(lock.fileno()):
                    if time.monotonic() >= deadline:
                        raise StoreUnavailable("folder: the lock was not free in time")
                    time.sleep(0.005)
                yield  # closing the file releases the lock


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _translated() -> Iterator[None]:
    """No error of the file system leaves the store untranslated."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"folder: {error.strerror}") from error
