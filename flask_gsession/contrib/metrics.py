"""Metrics for Prometheus: what the store was asked, how long that took, what happened to sessions.

Every label has a closed set of values: a hundred thousand sessions are as many series as one.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from os import getpid
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from flask import Flask, current_app, request
from werkzeug.serving import is_running_from_reloader

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_flask_exporter import (  # type: ignore[import-untyped]  # it ships no types
        PrometheusMetrics,
    )
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.metrics needs the package {error.name}: install the extra, "
        "flask-gsession[metrics]"
    ) from None

from ..errors import (
    Gone,
    KeyTaken,
    LeaseLost,
    QueueFull,
    SettingError,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
)
from ..events import (
    CircuitClosed,
    CircuitOpened,
    CleanedUp,
    CleanupFailed,
    Event,
    Events,
    LargeValueLost,
    LockAcquired,
    LockExpired,
    LockRefused,
    LockReleased,
    SessionConflicted,
    SessionCreated,
    SessionDestroyed,
    SessionRefused,
    SessionRenewed,
    SessionRevoked,
    SessionRotated,
    SessionSaved,
    WriteDropped,
    logger,
)
from ..extension import NAME as EXTENSION
from ..extension import Session
from ..interface import GSessionInterface
from ..stores import Counts
from ..stores.base import LEFTOVERS, pass_on
from .metrics_gathering import Gathering, counted, observed

NAME = "gsession-metrics"

_SECONDS = "flask_gsession.seconds"
_TIMED = (
    *("create", "load", "save", "renew", "replace", "delete", "pop"),
    *("write_frame", "read_frame", "renew_blobs", "discard_blobs"),
    *("acquire", "extend", "release"),
)
_STATUSES: dict[type[BaseException], str] = {
    Gone: "gone",
    Stale: "stale",
    KeyTaken: "taken",
    LeaseLost: "lease lost",
    QueueFull: "queue full",
    UnreadableRecord: "unreadable",
    StoreUnavailable: "unavailable",
}
_LIFE: dict[type[Event], str] = {
    SessionCreated: "created",
    SessionSaved: "saved",
    SessionRenewed: "renewed",
    SessionRotated: "rotated",
    SessionDestroyed: "destroyed",
    SessionRevoked: "revoked",
}
_UNREADABLE = {"corrupt", "newer format", "unknown encryption key"}
_UNSIGNED = {"malformed", "bad signature", "two cookies", "too many cookies"}
_REFUSALS = {*_UNSIGNED, "unknown", "expired", *_UNREADABLE}
_LEFTOVERS = set(LEFTOVERS)
_LOST = ("missing", "truncated", "altered", "not encrypted", "unknown encryption key")
_CONFLICTS = ("refused", "transaction", "too many races")
_STORE_BUCKETS = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
_WAIT_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30)
_LONGEST_WAIT = 86_400 * 24  # seconds, that a thread can wait for
_SIZE_BUCKETS = tuple(256 * 4**power for power in range(9))  # to 16 MiB

Count = Callable[..., object]

# Not by way of the proxy's attributes, each of which costs half a microsecond.
_current_request: Callable[[], Any] = request._get_current_object  # type: ignore[attr-defined]


class SessionMetrics:
    """Counts what sessions do, for the metrics of prometheus-flask-exporter.

    ``metrics``: the application's own ``PrometheusMetrics``; its page shows ours as well. Without
    one, and without a ``registry`` of prometheus-client, the application gets one at ``path``.
    ``ext``: the ``Session``, where the application has several.
    ``count_every``: after how many seconds the live sessions are counted again, in a thread of its
    own, from the first request on; None for never. Stores without ``count()`` are not counted.

    Applications that share a registry share the figures.
    """

    def __init__(
        self,
        app: Flask | None = None,
        metrics: Any = None,
        *,
        registry: CollectorRegistry | None = None,
        ext: Session | None = None,
        path: str = "/metrics",
        count_every: float | None = 60.0,
    ) -> None:
        if count_every is not None and not 0 < count_every < _LONGEST_WAIT:
            raise SettingError("count_every is how many seconds, above 0, or None")
        self._metrics, self._registry, self._ext, self._path = metrics, registry, ext, path
        self._count_every = count_every
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Begin to count on ``app``, which has its ``Session`` already.

        Raises ``SettingError`` where it has not, or where it is counted already.
        """
        interfaces: dict[Session, GSessionInterface] = app.extensions.get(EXTENSION, {})
        ext = self._ext or next(iter(interfaces), None)
        if ext is None or ext not in interfaces:
            raise SettingError("SessionMetrics comes after Session: call Session(app) first")
        counted: dict[Session, object] = app.extensions.setdefault(NAME, {})
        if ext in counted:
            raise SettingError("The application has SessionMetrics for this Session already")
        figures = _figures(self._registry_for(app))
        keeper = interfaces[ext].keeper
        store: Any = keeper.store
        live = self._live_count(interfaces[ext], figures)
        up = _Up(figures, keeper.settings.cookie_name, live)
        timed: Any = _TimedStore(store, figures, up)
        keeper.store = timed
        if keeper.spill is not None and keeper.spill.blobs is store:
            keeper.spill.blobs = timed
        if keeper.leases is not None:
            keeper.leases = timed
        keeper.events = _CountedEvents(keeper.events, figures)
        reference = weakref.ref(app)
        for kind, is_open in ((CircuitOpened, 1), (CircuitClosed, 0)):
            ext.on(kind, _circuit(reference, figures, is_open))
        if not counted:
            app.teardown_request(figures.observe_request)
        counted[ext] = live

    def _live_count(self, interface: GSessionInterface, figures: _Figures) -> _LiveCount | None:
        if self._count_every is None or not isinstance(interface.store, Counts):
            return None
        cookie = interface.keeper.settings.cookie_name
        gauge = partial(figures.live.labels, cookie)  # no series before there is a figure
        return _LiveCount(interface.store, gauge, self._count_every)

    def _registry_for(self, app: Flask) -> CollectorRegistry:
        if self._metrics is not None:
            registry = self._metrics.registry
        elif self._registry is not None:
            return self._registry
        else:
            registry = CollectorRegistry()
            PrometheusMetrics(app, path=self._path, group_by="url_rule", registry=registry)
        if is_running_from_reloader() and not os.environ.get("DEBUG_METRICS"):
            logger.warning(
                "Under the reloader of the development server prometheus-flask-exporter has no "
                "page of metrics; set DEBUG_METRICS=1 for one, or run without the reloader"
            )
        return registry  # type: ignore[no-any-return]  # untyped


def _one_of(known: set[str], word: str) -> str:
    """``word``, or a word for all others: a store of somebody else's may say anything."""
    return word if word in known else "other"


def _drop(reason: str) -> str:
    if reason.startswith("ended before "):
        return "ended"
    return _one_of({"store unavailable", *_UNREADABLE}, reason)


class _Figures:
    """The metrics on one registry; with ``in_files`` they are those of several workers."""

    def __init__(self, registry: CollectorRegistry, *, in_files: bool = False) -> None:
        self.gathering = Gathering() if in_files else None
        self._endpoints: dict[str, Callable[[float], object]] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gsession_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, mode: Any, *labels: str) -> Gauge:
            return Gauge(
                f"gsession_{name}", text, labels, registry=registry, multiprocess_mode=mode
            )

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"gsession_{name}", text, labels, registry=registry, buckets=buckets)

        self.operations = counter("operations", "Calls of the session store", "operation", "status")
        self.durations = histogram(
            "operation_duration_seconds",
            "Duration of the calls of the session store",
            _STORE_BUCKETS,
            "operation",
        )
        self._requests = histogram(
            "request_seconds",
            "Time that a request spent on the session store, for those that needed it",
            _STORE_BUCKETS,
            "endpoint",
        )
        self.up = gauge(
            "store_up", "Whether the store answered the last call, in every process", "livemin",
            "session",
        )  # fmt: skip
        self.live = gauge(
            "sessions_live", "About how many sessions are live", "livemostrecent", "session"
        )
        self.circuits = gauge(
            "circuits_open", "Processes that do not ask the store at present", "livesum",
            "operations",
        )  # fmt: skip
        life = counter("sessions", "What happened to stored sessions", "event")
        refused = counter("refused", "Tokens that led to no session", "reason")
        dropped = counter("writes_dropped", "Changes that were not stored", "reason")
        conflicts = counter(
            "conflicts", "Changes that were refused because of another request", "reason"
        )
        races = counter("retries", "Writes tried again because another request was faster")
        merges = counter("merges", "Saves onto what another request had stored meanwhile")
        sizes = histogram("payload_bytes", "Size of the saved payloads", _SIZE_BUCKETS)
        lost = counter("large_values_lost", "Large values that could not be read", "reason")
        locks = counter("locks", "What became of locks of sessions", "event")
        waits = histogram(
            "lock_wait_seconds", "Waiting time of those who got a lock", _WAIT_BUCKETS
        )

        runs = counter("cleanups", "What became of clean-ups by a worker", "status")
        leftovers = counter("leftovers", "What clean-ups by a worker found", "kind")

        def cleaned(found: dict[str, int], _: float) -> None:
            runs.labels("done").inc()
            for kind, number in found.items():
                leftovers.labels(_one_of(_LEFTOVERS, kind)).inc(number)

        observe_size = self.observing(sizes)

        def saved(_: str, payload_bytes: int, conflicts: int) -> None:
            observe_size(payload_bytes)
            if conflicts:
                races.inc(conflicts)
                merges.inc()

        def acquired(_: str, waited: float) -> None:
            waits.observe(waited)

        def counts(child: Any) -> Count:
            count = self.counting(child)
            return lambda *_: count()

        self.receivers: dict[type[Event], list[Count]] = {
            kind: [counts(life.labels(name))] for kind, name in _LIFE.items()
        }
        self.receivers[SessionSaved].append(saved)
        self.receivers[LockAcquired] = [counts(locks.labels("acquired")), acquired]
        self.receivers[LockReleased] = [counts(locks.labels("released"))]
        self.receivers[LockExpired] = [counts(locks.labels("expired"))]
        self.receivers[LockRefused] = [lambda _, reason, waited: locks.labels(reason).inc()]
        self.receivers[SessionRefused] = [
            lambda reason, _: refused.labels(_one_of(_REFUSALS, reason)).inc()
        ]
        self.receivers[WriteDropped] = [lambda _, reason: dropped.labels(_drop(reason)).inc()]
        self.receivers[LargeValueLost] = [
            lambda key, reason, _: lost.labels(_one_of(set(_LOST), reason)).inc()
        ]
        self.receivers[CleanedUp] = [cleaned]
        self.receivers[CleanupFailed] = [counts(runs.labels("failed"))]
        for leftover in LEFTOVERS:
            leftovers.labels(leftover)
        for status in ("done", "failed"):
            runs.labels(status)
        self.receivers[SessionConflicted] = [lambda _, reason: conflicts.labels(reason).inc()]
        for reason in _CONFLICTS:
            conflicts.labels(reason)
        for reason in _LOST:
            lost.labels(reason)
        for operations in ("loads", "writes"):
            self.circuits.labels(operations).set(0)
        for reason in ("unknown", "expired", "bad signature"):
            refused.labels(reason)
        for reason in ("store unavailable", "ended"):
            dropped.labels(reason)
        for reason in ("too many waiters", "wait over"):
            locks.labels(reason)
        self.stores: dict[str, WeakSet[_Up]] = defaultdict(WeakSet)  # by the cookie

    def observe_request(self, error: BaseException | None) -> None:
        """At the end of a request: what it spent on the store."""
        seconds = request.environ.pop(_SECONDS, None)
        if seconds is not None:
            endpoint = request.endpoint or ""
            if endpoint not in self._endpoints:
                self._endpoints[endpoint] = self.observing(self._requests.labels(endpoint))
            self._endpoints[endpoint](seconds)

    def counting(self, counter: Counter) -> Callable[[], object]:
        """What counts one more."""
        if self.gathering is None:
            return counter.inc
        return partial(self.gathering.add, counted(counter), 1)

    def observing(self, histogram: Histogram) -> Callable[[float], object]:
        """What adds an amount."""
        if self.gathering is None:
            return histogram.observe
        return partial(self.gathering.add, observed(histogram))

    def timing(self, operation: str, status: str) -> Callable[[float, float], object]:
        """What adds a store call: how long it took, and when it ended."""
        observe = self.durations.labels(operation).observe
        count = self.operations.labels(operation, status).inc
        if self.gathering is None:

            def add(seconds: float, now: float) -> None:
                observe(seconds)
                count()

            return add
        observe_all = observed(self.durations.labels(operation))

        def put(amounts: Sequence[float]) -> None:
            observe_all(amounts)
            count(len(amounts))

        return partial(self.gathering.add, put)


class _Up:
    """Whether a store answers. The gauge is of all the stores of sessions with this cookie."""

    def __init__(self, figures: _Figures, cookie: str, live: _LiveCount | None) -> None:
        self._gauge = figures.up.labels(cookie)
        self._stores = figures.stores[cookie]
        self._live = live
        self.pid = 0  # of the process that began to count
        self.is_up = True
        self._stores.add(self)
        self._tell()

    def answered(self, up: bool) -> None:
        """The store was asked, and did or did not answer."""
        begins = self.pid != getpid()
        changes = up is not self.is_up
        self.pid, self.is_up = getpid(), up
        if begins or changes:
            self._tell()
        if begins and self._live is not None:
            self._live.begin()

    def _tell(self) -> None:
        self._gauge.set(all(store.is_up for store in list(self._stores)))


class _LiveCount:
    """Counts the live sessions of a store now and then, in a thread of each process that asks it.

    The thread does not keep the store, and ends with it.
    """

    def __init__(self, store: Counts, gauge: Callable[[], Gauge], every: float) -> None:
        self._store, self._gauge, self._every = store, gauge, every
        self._pid = 0
        self._fails = False

    def begin(self) -> None:
        """Count from now on, where this process does not yet."""
        if self._pid == getpid():
            return
        self._pid = getpid()
        stop = threading.Event()
        arguments = (weakref.ref(self), stop, self._every)
        thread = threading.Thread(
            target=_keep_counting, args=arguments, name="gsession-count", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # no thread can be had: the request is more important
            logger.warning("The live sessions are not counted: %s", error)
            return
        weakref.finalize(self, stop.set)

    def count(self) -> None:
        """Ask the store once; the gauge is NaN where that fails."""
        try:
            number: float = self._store.count()
        except Exception as error:
            number = math.nan
            if not self._fails:
                logger.warning("The live sessions could not be counted: %s", error)
        self._fails = math.isnan(number)
        self._gauge().set(number)


def _keep_counting(live: weakref.ref[_LiveCount], stop: threading.Event, every: float) -> None:
    while True:
        counting = live()
        if counting is None:
            return
        counting.count()
        del counting
        if stop.wait(every):
            return


def _circuit(app: weakref.ref[Flask], figures: _Figures, is_open: int) -> Callable[[Any], None]:
    def changed(event: Any) -> None:
        if not current_app or current_app._get_current_object() is app():  # type: ignore[attr-defined]
            figures.circuits.labels(event.operations).set(is_open)

    return changed


class _CountedEvents(Events):
    """Counts events, and passes them on to those who had subscribed, or do so later."""

    def __init__(self, events: Events, figures: _Figures) -> None:
        self._events = events
        self._receivers = figures.receivers

    def emit(self, event: type[Event], *details: object) -> None:
        for receiver in self._receivers.get(event, ()):
            receiver(*details)
        self._events.emit(event, *details)


class _TimedStore:
    """Has every method of the contract and of the capabilities that the store has."""

    def __init__(self, store: object, figures: _Figures, up: _Up) -> None:
        for name in _TIMED:
            if hasattr(store, name):
                operation = "delete" if name == "pop" else name
                setattr(self, name, _timed(getattr(store, name), operation, figures, up))
        pass_on(self, store)


def _timed(call: Callable[..., Any], name: str, figures: _Figures, up: _Up) -> Callable[..., Any]:
    ok = figures.timing(name, "ok")
    absent = figures.timing(name, "absent") if name == "load" else ok
    figures.operations.labels(name, "unavailable")  # begins at 0, for rates
    answered = up.answered

    def timed(*arguments: Any) -> Any:
        start = perf_counter()
        try:
            answer = call(*arguments)
        except BaseException as error:
            status = _STATUSES.get(type(error), "error")
            spent(figures.timing(name, status), start)
            if not getattr(error, "contention", False):
                answered(status != "unavailable")
            raise
        spent(absent if answer is None else ok, start)
        if not up.is_up or up.pid != getpid():
            answered(True)
        return answer

    def spent(add: Callable[[float, float], object], start: float) -> None:
        end = perf_counter()
        seconds = end - start
        add(seconds, end)
        try:
            environ = _current_request().environ
        except RuntimeError:  # outside of requests
            return
        environ[_SECONDS] = environ.get(_SECONDS, 0.0) + seconds

    return timed


_of_registries: WeakKeyDictionary[CollectorRegistry, _Figures] = WeakKeyDictionary()
_of_process: list[_Figures] = []


def _figures(registry: CollectorRegistry) -> _Figures:
    """The metrics on that registry: one set, however many applications count in it.

    With PROMETHEUS_MULTIPROC_DIR all registries of a process write to the same files, so there is
    one set in the process.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        if not _of_process:
            _of_process.append(_Figures(registry, in_files=True))
        return _of_process[0]
    if registry not in _of_registries:
        _of_registries[registry] = _Figures(registry)
    return _of_registries[registry]
