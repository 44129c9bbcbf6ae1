"""Clean-up of expired data in small steps, and a worker that runs it regularly."""

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
from ..processes import is_before_fork, process, runs_threads, warn_without_threads
from ..repository.repository import Repository
from ..stores.base import CLEANUP_KEY, Record, Store, new_version
from ..stores.parts import Tidied, Upkeep, parts_of
from ..stores.support import closing

NAME = "gsession-cleanup"

_LEASE = 60_000  # milliseconds after which another process takes over from a dead one
_FIRST_RETRY = 10.0  # seconds
_JITTER = 0.2
_PAUSE = 0.02  # seconds between two steps
_MAX_JOIN = 10.0  # seconds that an exiting process waits for the current step
_YEAR = 366 * 86_400_000  # milliseconds


def steps(
    upkeep: Upkeep | None, batch: int = 1000, cursor: str = "", *, dry_run: bool = False
) -> Iterator[Tidied]:
    """Clean up a store. Yields the result of each step, which examines about ``batch`` items.

    You can stop after any step, and continue later with its ``cursor``. Without an ``upkeep`` part,
    there are no steps.
    """
    while upkeep is not None:
        step = upkeep.tidy(cursor, batch, dry_run=dry_run)
        yield step
        cursor = step.cursor
        if not cursor:
            return


class CleanupWorker:
    """Cleans up regularly, in a thread. Of all processes on a store, only one does so at a time.

    Starts with the first request in each process, so that it runs in a server's workers and not in
    their parent process, or with ``start()``. Ends with the process.

    ``interval``: seconds from the end of one clean-up to the next, in any process; at least 1.
    ``batch``: how many items one step examines. ``ext``: the ``Session``, if the application has
    several.
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
            raise SettingError("CleanupWorker: interval must be from 1 second to a year")
        if not 1 <= batch <= 10_000:
            raise SettingError("CleanupWorker: batch must be from 1 to 10000")
        self._interval, self._batch, self._ext = interval, batch, ext
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Clean up the store of ``app``. Call ``Session(app)`` first."""
        interfaces: dict[Session, GSessionInterface] = app.extensions.get(EXTENSION, {})
        ext = self._ext or next(iter(interfaces), None)
        if ext is None or ext not in interfaces:
            raise SettingError("CleanupWorker needs a Session: call Session(app) first")
        workers: dict[Session, _Worker] = app.extensions.setdefault(NAME, {})
        if ext in workers:
            raise SettingError(
                "The application has a CleanupWorker for this Session already: create it once"
            )
        interface = interfaces[ext]
        worker = _Worker(interface.repository, interface.store, self._interval, self._batch)
        workers[ext] = worker
        request_started.connect(worker.begin, app)
        warn_without_threads("CleanupWorker does nothing; run flask gsession cleanup from cron")

    def start(self, app: Flask) -> None:
        """Start in this process now, without waiting for its first request."""
        self._worker(app).start()

    def stop(self, app: Flask) -> None:
        """Stop in this process after the current step, until ``start``."""
        self._worker(app).end()

    def run(self, app: Flask) -> float:
        """Clean up now, if it is due and no other process is cleaning up.

        Call this from your own scheduler. Returns the number of seconds until it may be due again.
        """
        return self._worker(app).run()

    def _worker(self, app: Flask) -> _Worker:
        workers: dict[Session, _Worker] = app.extensions.get(NAME, {})
        ext = self._ext or next(iter(workers), None)
        if ext is None or ext not in workers:
            raise SettingError("This CleanupWorker is not on the application: call init_app first")
        return workers[ext]


class _Worker:
    """The worker of one ``Session``. Its thread doesn't keep it alive."""

    def __init__(self, repository: Repository, store: Store, interval: float, batch: int) -> None:
        self._repository, self._store = repository, store
        self._interval, self._batch = interval, batch
        self._failures = 0
        self._pid = 0
        self._stop = threading.Event()
        self._end: weakref.finalize[..., object] | None = None
        self._prepare()
        process.register(self._prepare)

    def _prepare(self) -> None:
        self._beginning = threading.RLock()  # a signal handler may make a request, too

    def begin(self, *_: object, **__: object) -> None:
        """Start the thread of this process unless it runs."""
        if self._pid == getpid() or not (parts_of(self._store).upkeep or self._repository.files):
            return
        if is_before_fork() or not runs_threads():
            return  # the process could fork or freeze in the middle of a step
        process.notice()
        with self._beginning:
            if self._pid == getpid():
                return  # another request was faster
            self._pid = getpid()
            self._stop = threading.Event()
            thread = threading.Thread(
                target=_work, args=(weakref.ref(self), self._stop), name=NAME, daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # the request continues without a clean-up
                logger.warning("Can't start a thread for the clean-up: %s", error)
                return
            self._end = closing(self, partial(_end, self._stop, thread))

    def start(self) -> None:
        """Like ``begin``, even after ``end``."""
        if self._stop.is_set():
            self._pid = 0
        self.begin()

    def end(self) -> None:
        """Stop the thread of this process; requests don't start it again."""
        if self._end is not None and self._pid == getpid():
            self._end()
        if self._pid != getpid():
            self._pid, self._stop = getpid(), threading.Event()
        self._stop.set()

    def run(self, stop: threading.Event | None = None) -> float:
        """Like ``CleanupWorker.run``. ``stop`` ends it after the current step."""
        try:
            wait = self._run(stop or threading.Event())
        except Exception as error:
            self._failures += 1
            wait = min(self._interval, _FIRST_RETRY * 2 ** min(self._failures - 1, 20))
            detail = error.detail if isinstance(error, StoreUnavailable) else repr(error)
            logger.warning("The clean-up failed and will be retried in %.0f s: %s", wait, detail)
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
                if stop.wait(_PAUSE):
                    _log_result("stopped", found, time.monotonic() - began)
                    break  # another process may continue
                ticket = self._renewed(ticket)
            else:
                self._store.save(self._until(ticket, self._interval), ticket.version)
                seconds = time.monotonic() - began
                _log_result("done", found, seconds)
                self._repository.events.emit(CleanedUp, dict(found), seconds)
                return self._interval
        except (Gone, Stale):  # this process was paused, and another one took over
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
        """Take the clean-up ticket. None if another process has it, or no clean-up is due yet.

        ``create`` succeeds in only one process until the record expires.
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


def _log_result(what: str, found: Counter[str], seconds: float) -> None:
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
        thread.join(_MAX_JOIN)
