"""What the metrics show of a store between two requests: whether it answers, and its sessions.

Without this, a process whose last request met an outage would show the outage until its next
request, however long the store has been well again.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import weakref
from collections.abc import Callable
from os import getpid
from pathlib import Path
from time import monotonic
from typing import Any

from flask import Flask, current_app
from prometheus_client import Gauge
from prometheus_client.multiprocess import mark_process_dead

from ..errors import StoreUnavailable
from ..events import CircuitClosed, CircuitOpened, Event, logger
from ..processes import is_before_fork, runs_threads, warn_without_threads
from ..stores import Counts, Record, Store

LIMITS = "gsession-limits"  # the extension whose circuit this asks about, where there is one

_EVERY = 1.0  # seconds between two looks at a store that did not answer


class StoreWatch:
    """Keeps the gauges of one store right, in a thread of each process that uses the store.

    ``store``: asked once a second while it is down or has an open circuit, with a load and a write
    that find nothing. ``up``: the gauge for all stores of sessions with this cookie, ``peers``.
    ``counts``: counts the live sessions, ``every`` so many seconds, for the gauge that ``live``
    returns; None for never. The thread holds neither the store nor the application, and ends with
    them.
    """

    def __init__(
        self,
        app: Flask,
        store: Store,
        up: Gauge,
        peers: weakref.WeakSet[StoreWatch],
        circuits: Gauge,
        counts: Counts | None,
        live: Callable[[], Gauge],
        every: float,
    ) -> None:
        self._app = weakref.ref(app)
        self._store, self._up, self._peers, self._circuits = store, up, peers, circuits
        self._counts, self._live, self._every = counts, live, every
        self._open: set[str] = set()  # what circuits of this process do not let through
        self._thread_pid = 0
        self._wake = threading.Event()
        self._end: weakref.finalize[..., object] | None = None
        self._ask_at = self._count_at = 0.0
        self._count_fails = False
        self.pid = 0  # of the process that began to use the store
        self.is_up = True
        peers.add(self)
        self._show()
        warn_without_threads(
            "the metrics do not count the live sessions, and show the recovery of a store only at "
            "the next request"
        )

    def answered(self, up: bool) -> None:
        """The store was asked, and did or did not answer."""
        begins = self.pid != getpid() and not is_before_fork()
        changes = up is not self.is_up
        if begins:
            self._open.clear()  # those were of the parent process
            _forget_dead_workers()
            self.pid = getpid()
        self.is_up = up
        if begins or changes:
            self._show()
        if not up:
            self._look_again(changes)
        elif begins and self._counts is not None:
            self._begin()

    def listen(self, on: Callable[[type[Event], Callable[[Any], object]], object]) -> None:
        """Hear of the circuits of this application; ``on`` subscribes to an event."""
        reference, app = weakref.ref(self), self._app

        def changed(event: CircuitOpened | CircuitClosed) -> None:
            watch = reference()
            ours = not current_app or current_app._get_current_object() is app()  # type: ignore[attr-defined]
            if watch is not None and ours:
                watch._circuit(type(event), event.operations)

        for kind in (CircuitOpened, CircuitClosed):
            on(kind, changed)

    def _circuit(self, kind: type[Event], operations: str) -> None:
        if kind is CircuitOpened:
            self._open.add(operations)
            self._look_again(True)
        else:
            self._open.discard(operations)
        self._circuits.labels(operations).set(kind is CircuitOpened)

    def before_page(self) -> None:
        """The metrics are about to be shown. Where no thread can ask the store, ask it here."""
        if self._in_trouble() and monotonic() >= self._ask_at and not runs_threads():
            self._ask()

    def turn(self) -> float | None:
        """Do what is due; return the seconds until something is due again, None for never."""
        counted = self._count()
        if self._in_trouble() and (counted or monotonic() >= self._ask_at):
            self._ask()
        due = [self._count_at] if self._counts is not None else []
        if self._in_trouble():
            due.append(self._ask_at)
        return max(0.0, min(due) - monotonic()) if due else None

    def _in_trouble(self) -> bool:
        return not self.is_up or bool(self._open)

    def _show(self) -> None:
        self._up.set(all(watch.is_up for watch in list(self._peers)))

    def _look_again(self, soon: bool) -> None:
        if soon:
            self._ask_at = monotonic() + _EVERY
        self._begin()
        if soon:
            self._wake.set()

    def _ask(self) -> None:
        """Ask with calls that change nothing, one for each circuit.

        An answer closes a circuit; of the session store both must answer.
        """
        self._ask_at = monotonic() + _EVERY
        app = self._app()
        if app is None:
            return
        with app.app_context():
            limits = app.extensions.get(LIMITS)
            if limits is not None and "rate limits" in self._open:
                _answers(lambda: limits.probe())
            nobody = Record(secrets.token_urlsafe(32), 1, 0, 1, 1, b"", None)
            loads = _answers(lambda: self._store.load(nobody.key))
            if _answers(lambda: self._store.renew(nobody, 1)) and loads and not self.is_up:
                self.answered(True)

    def _count(self) -> bool:
        """Count the live sessions if it is time; say whether the store answered.

        The gauge is NaN where it did not.
        """
        if self._counts is None or monotonic() < self._count_at:
            return False
        try:
            number: float = self._counts.count()
        except Exception as error:
            number = math.nan
            if not self._count_fails:
                logger.warning("The live sessions could not be counted: %s", error)
        self._count_fails = math.isnan(number)
        self._live().set(number)
        self._count_at = monotonic() + self._every
        return not self._count_fails

    def _begin(self) -> None:
        """Start the thread, where this process has none yet."""
        if self._thread_pid == getpid() or is_before_fork() or not runs_threads():
            return
        self._thread_pid = getpid()
        if self._end is not None:
            self._end.detach()
        self._wake = threading.Event()  # a thread of the parent process may hold its lock
        self._count_at = 0.0
        thread = threading.Thread(
            target=_keep_watching,
            args=(weakref.ref(self), self._wake),
            name="gsession-watch",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:  # no thread can be had: the request is more important
            logger.warning("The metrics do not watch the session store: %s", error)
            return
        self._end = weakref.finalize(self, self._wake.set)
        self._end.atexit = False


def _keep_watching(watch: weakref.ref[StoreWatch], wake: threading.Event) -> None:
    while True:
        wake.clear()
        watching = watch()
        if watching is None:
            return
        pause = watching.turn()
        del watching
        wake.wait(pause)


def _answers(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except StoreUnavailable:
        return False
    except Exception as error:  # an answer, although a wrong one
        logger.debug("The metrics' question to the store: %r", error)
    return True


def _forget_dead_workers() -> None:
    """Remove the gauges of workers that ended, in case no hook of the server does.

    Or a worker that was killed in an outage would show it for ever.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder or os.name != "posix":
        return
    for file in Path(folder).glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        try:
            if pid.isdigit() and not _is_running(int(pid)):
                mark_process_dead(int(pid), folder)  # type: ignore[no-untyped-call]
        except OSError:  # another worker has just done it
            continue


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
