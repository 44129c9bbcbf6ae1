"""Updates the metrics of a store between requests: whether it answers, and its live sessions.

Without it, a process whose last request met an outage would report the outage until its next
request, even if the store has recovered.
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

from ..errors import CutOff, StoreUnavailable
from ..events import CircuitClosed, CircuitOpened, Event, logger
from ..processes import is_before_fork, process, runs_threads, warn_without_threads
from ..stores import Counts, Record, Store
from ..weak import WeakObjects

LIMITS = "gsession-limits"  # the key of SessionLimits in app.extensions; it has a circuit, too

_INTERVAL = 1.0  # seconds between two probes of a store that didn't answer


class StoreWatch:
    """Keeps the gauges of one store current, in a thread of each process that uses the store.

    ``store``: probed once a second while it is down or has an open circuit, with a load and a write
    of a key that doesn't exist. ``up``: the gauge for ``peers``, all stores with this cookie name.
    ``counts``: counts the live sessions at intervals of ``every`` seconds, for the gauge that
    ``live`` returns; None: never. The thread keeps neither the store nor the application alive, and
    ends with them.
    """

    def __init__(
        self,
        app: Flask,
        store: Store,
        up: Gauge,
        peers: WeakObjects[StoreWatch],
        circuits: Gauge,
        counts: Counts | None,
        live: Callable[[], Gauge],
        every: float,
    ) -> None:
        self._app = weakref.ref(app)
        self._store, self._up, self._peers, self._circuits = store, up, peers, circuits
        self._counts, self._live, self._every = counts, live, every
        self._open: set[str] = set()  # the operations whose circuit is open in this process
        self._thread_pid = 0
        self._wake = threading.Event()
        self._end: weakref.finalize[..., object] | None = None
        self._probe_at = self._count_at = 0.0
        self._count_fails = False
        self.pid = 0  # the process that uses the store
        self.is_up = True
        self._start()
        process.register(self._start)
        peers.add(self)
        self._show()
        warn_without_threads(
            "the metrics don't count live sessions, and show a store's recovery only at the "
            "next request"
        )

    def _start(self) -> None:
        self._beginning = threading.RLock()  # a signal handler may use the store, too

    def answered(self, up: bool) -> None:
        """Note whether the store has answered a call."""
        begins = self.pid != getpid() and not is_before_fork()
        changes = up is not self.is_up
        if begins:
            self._open.clear()  # inherited from the parent process
            _forget_dead_workers()
            self.pid = getpid()
        self.is_up = up
        if begins or changes:
            self._show()
        if not up:
            self._schedule(changes)
        elif begins and self._counts is not None:
            self._begin()

    def listen(self, on: Callable[[type[Event], Callable[[Any], object]], object]) -> None:
        """Subscribe to the circuits of this application with ``on``."""
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
            self._schedule(True)
        else:
            self._open.discard(operations)
        self._circuits.labels(operations).set(kind is CircuitOpened)

    def before_page(self) -> None:
        """Called before a page of metrics. Probes the store if no thread can."""
        if self._in_trouble() and monotonic() >= self._probe_at and not runs_threads():
            self._probe()

    def turn(self) -> float | None:
        """Count and probe if due. Returns the seconds until the next turn; None: never."""
        counted = self._count()
        if self._in_trouble() and (counted or monotonic() >= self._probe_at):
            self._probe()
        due = [self._count_at] if self._counts is not None else []
        if self._in_trouble():
            due.append(self._probe_at)
        return max(0.0, min(due) - monotonic()) if due else None

    def _in_trouble(self) -> bool:
        return not self.is_up or bool(self._open)

    def _show(self) -> None:
        self._up.set(all(watch.is_up for watch in self._peers))

    def _schedule(self, soon: bool) -> None:
        if soon:
            self._probe_at = monotonic() + _INTERVAL
        self._begin()
        if soon:
            self._wake.set()

    def _probe(self) -> None:
        """Make a call without effect through each circuit; an answer closes the circuit.

        The session store is up if both of its circuits answer.
        """
        self._probe_at = monotonic() + _INTERVAL
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
        """Count the live sessions if due. Returns whether the store answered.

        If it didn't, the gauge is NaN.
        """
        if self._counts is None or monotonic() < self._count_at:
            return False
        try:
            number: float = self._counts.count()
        except Exception as error:
            number = math.nan
            if not self._count_fails:
                logger.warning("Could not count the live sessions: %s", error)
        self._count_fails = math.isnan(number)
        self._live().set(number)
        self._count_at = monotonic() + self._every
        return not self._count_fails

    def _begin(self) -> None:
        """Start the thread unless it runs in this process."""
        if self._thread_pid == getpid() or is_before_fork() or not runs_threads():
            return
        process.notice()
        with self._beginning:
            if self._thread_pid == getpid():
                return
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
            self._end = weakref.finalize(self, self._wake.set)
            self._end.atexit = False
            try:
                thread.start()
            except RuntimeError as error:  # the request continues without it
                logger.warning(
                    "Can't start a thread for the metrics of the session store: %s", error
                )
            self._thread_pid = getpid()


def _keep_watching(watch: weakref.ref[StoreWatch], wake: threading.Event) -> None:
    while True:
        wake.clear()
        watching = watch()
        if watching is None or watching._wake is not wake:  # a signal interrupted its start
            return
        pause = watching.turn()
        del watching
        wake.wait(pause)


def _answers(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except CutOff:  # the edge itself answers
        return True
    except StoreUnavailable:
        return False
    except Exception as error:  # it answers, even if wrongly
        logger.debug("A probe of the session store failed: %r", error)
    return True


def _forget_dead_workers() -> None:
    """Remove the gauges of workers that ended, in case no server hook does.

    Otherwise a worker that was killed during an outage would report it forever.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder or os.name != "posix":
        return
    for file in Path(folder).glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        try:
            if pid.isdigit() and not _is_running(int(pid)):
                mark_process_dead(int(pid), folder)  # type: ignore[no-untyped-call]
        except OSError:  # another worker has just removed it
            continue


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
