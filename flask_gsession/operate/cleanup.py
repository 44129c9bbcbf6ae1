"""Clean-up: what nobody reads any more goes, in small steps; and a worker that sees to it."""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from os import getpid

from flask import Flask, request_started

from ..errors import Gone, KeyTaken, SettingError, Stale, StoreError, StoreUnavailable
from ..events import CleanedUp, CleanupFailed, logger
from ..extension import NAME as EXTENSION
from ..extension import Session
from ..interface import GSessionInterface
from ..processes import is_before_fork, runs_threads, warn_without_threads
from ..repository.repository import Repository
from ..stores.base import CLEANUP_KEY, Record, Store, new_version
from ..stores.parts import Tidied, Upkeep, parts_of
from ..stores.support import closing

NAME = "gsession-cleanup"

_LEASE = 60_000  # milliseconds, after which who died while cleaning up is replaced
_FIRST_RETRY = 10.0  # seconds
_JITTER = 0.2
_BREATH = 0.02  # seconds between two steps
_FAREWELL = 10.0  # seconds that the end of the process waits for a step to end
_YEAR = 366 * 86_400_000  # milliseconds


def steps(
    upkeep: Upkeep | None, batch: int = 1000, cursor: str = "", *, dry_run: bool = False
) -> Iterator[Tidied]:
    """Clean a store up, and give what each step found; a step looks at about ``batch`` things.

    Can be left after any step; ``cursor`` is that of the step to go on after. No steps where the
    store has no such part.
    """
    while upkeep is not None:
        step = upkeep.tidy(cursor, batch, dry_run=dry_run)
        yield step
        cursor = step.cursor
        if not cursor:
            return


class CleanupWorker:
    """Cleans up now and then, in a thread; of all the processes on a store one at a time.

    It begins in each process with the first request there, so that it runs in the workers of a
    server and not in the process that forks them; or with ``start()``. It ends with the process.

    ``interval``: seconds from the end of a clean-up to the next, whoever does it; at least 1.
    ``batch``: how many things one step looks at. ``ext``: the ``Session``, where the application
    has several.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        interval: float = 3600.0,
        batch: int = 1000,
        ext: Session | None = None,
    ) -> None:
        if not 1 <= interval <= _YEAR / 1000:
            raise SettingError("CleanupWorker: interval is how many seconds, 1 to a year")
        if not 1 <= batch <= 10_000:
            raise SettingError("CleanupWorker: batch is 1 to 10000")
        self._interval, self._batch, self._ext = interval, batch, ext
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Look after the store of ``app``, which has its ``Session`` already."""
        interfaces: dict[Session, GSessionInterface] = app.extensions.get(EXTENSION, {})
        ext = self._ext or next(iter(interfaces), None)
        if ext is None or ext not in interfaces:
            raise SettingError("CleanupWorker comes after Session: call Session(app) first")
        workers: dict[Session, _Worker] = app.extensions.setdefault(NAME, {})
        if ext in workers:
            raise SettingError("The application has a CleanupWorker for this Session already")
        interface = interfaces[ext]
        worker = _Worker(interface.repository, interface.store, self._interval, self._batch)
        workers[ext] = worker
        request_started.connect(worker.begin, app)
        warn_without_threads("CleanupWorker does nothing; have cron run flask gsession cleanup")

    def start(self, app: Flask) -> None:
        """Begin in this process now, not with its first request."""
        self._worker(app).start()

    def stop(self, app: Flask) -> None:
        """End in this process, after the step that is under way, until ``start``."""
        self._worker(app).end()

    def run(self, app: Flask) -> float:
        """Clean up here and now, if it is due and nobody is at it.

        For those who have a scheduler of their own. Returns after how many seconds it may be due.
        """
        return self._worker(app).run()

    def _worker(self, app: Flask) -> _Worker:
        workers: dict[Session, _Worker] = app.extensions.get(NAME, {})
        ext = self._ext or next(iter(workers), None)
        if ext is None or ext not in workers:
            raise SettingError("This CleanupWorker is not on the application: call init_app first")
        return workers[ext]


class _Worker:
    """The worker of one ``Session``. Its thread does not keep it."""

    def __init__(self, repository: Repository, store: Store, interval: float, batch: int) -> None:
        self._repository, self._store = repository, store
        self._interval, self._batch = interval, batch
        self._failures = 0
        self._pid = 0
        self._stop = threading.Event()
        self._end: weakref.finalize[..., object] | None = None

    def begin(self, *_: object, **__: object) -> None:
        """Start the thread of this process, where there is none."""
        if self._pid == getpid() or not (parts_of(self._store).upkeep or self._repository.files):
            return
        if is_before_fork() or not runs_threads():
            return  # this process would be forked, or stand still, in the middle of a step
        self._pid = getpid()
        self._stop = threading.Event()
        thread = threading.Thread(
            target=_work, args=(weakref.ref(self), self._stop), name=NAME, daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # no thread can be had: the request is more important
            logger.warning("No thread for the clean-up: %s", error)
            return
        self._end = closing(self, partial(_end, self._stop, thread))

    def start(self) -> None:
        """As ``begin``, also after ``end``."""
        if self._stop.is_set():
            self._pid = 0
        self.begin()

    def end(self) -> None:
        """Stop the thread of this process; no request begins it again."""
        if self._end is not None and self._pid == getpid():
            self._end()
        if self._pid != getpid():
            self._pid, self._stop = getpid(), threading.Event()
        self._stop.set()

    def run(self, stop: threading.Event | None = None) -> float:
        """As ``CleanupWorker.run``; ``stop`` ends it after a step."""
        try:
            wait = self._run(stop or threading.Event())
        except Exception as error:
            self._failures += 1
            wait = min(self._interval, _FIRST_RETRY * 2 ** min(self._failures - 1, 20))
            detail = error.detail if isinstance(error, StoreUnavailable) else repr(error)
            logger.warning("The clean-up failed, and is tried again in %.0f s: %s", wait, detail)
            self._repository.events.emit(CleanupFailed, detail)
        else:
            self._failures = 0
        return wait * random.uniform(1, 1 + _JITTER)

    def _run(self, stop: threading.Event) -> float:
        ticket = self._take_ticket()
        if ticket is None:
            return self._until_due()
        began = time.monotonic()
        found: Counter[str] = Counter()
        try:
            for step in self._steps():
                found.update(step.found)
                if stop.wait(_BREATH):
                    _tell("stopped", found, time.monotonic() - began)
                    break  # somebody else shall go on
                ticket = self._renewed(ticket)
            else:
                self._store.save(self._until(ticket, self._interval), ticket.version)
                seconds = time.monotonic() - began
                _tell("done", found, seconds)
                self._repository.events.emit(CleanedUp, dict(found), seconds)
                return self._interval
        except (Gone, Stale):  # this process stood still, and another one took over
            return self._interval
        except BaseException:
            with suppress(StoreError):
                self._store.delete(CLEANUP_KEY, ticket.version)
            raise
        self._store.delete(CLEANUP_KEY, ticket.version)
        return self._interval

    def _steps(self) -> Iterator[Tidied]:
        yield from steps(parts_of(self._store).upkeep, self._batch)
        if self._repository.files is not None:
            yield from steps(self._repository.files, self._batch)

    def _take_ticket(self) -> Record | None:
        """Be the one who cleans up; None where another is, or was a while ago.

        The promise of ``create`` is enough for it: of many one succeeds, until the record expires.
        """
        now = self._repository.now()
        ticket = Record(CLEANUP_KEY, new_version(), now, now + _LEASE, now + _YEAR, b"clean-up")
        try:
            self._store.create(ticket)
        except KeyTaken:
            return None
        return ticket

    def _until_due(self) -> float:
        there = self._store.load(CLEANUP_KEY)
        left = there.idle_expires_at - self._repository.now() if there else 0
        return min(max(left / 1000, 1.0), self._interval)

    def _renewed(self, ticket: Record) -> Record:
        now = self._repository.now()
        if ticket.idle_expires_at - now > _LEASE * 2 // 3:
            return ticket
        if not self._store.renew(ticket, now + _LEASE):
            raise Gone
        return ticket._replace(idle_expires_at=now + _LEASE)

    def _until(self, ticket: Record, seconds: float) -> Record:
        end = min(self._repository.now() + int(seconds * 1000), ticket.absolute_expires_at)
        return ticket._replace(version=new_version(), idle_expires_at=end)


def _tell(what: str, found: Counter[str], seconds: float) -> None:
    kinds = ", ".join(f"{kind}: {number}" for kind, number in found.items() if number)
    level = logging.INFO if kinds else logging.DEBUG
    logger.log(level, "Clean-up %s in %.1f s: %s", what, seconds, kinds or "nothing to do")


def _work(reference: weakref.ref[_Worker], stop: threading.Event) -> None:
    wait = 0.0
    while not stop.wait(wait):
        worker = reference()
        if worker is None:
            return
        wait = worker.run(stop)
        del worker


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(_FAREWELL)
