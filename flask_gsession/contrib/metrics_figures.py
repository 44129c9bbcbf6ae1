"""The Prometheus metrics, and the events that change them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

from flask import request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..events import (
    SIGN_INS,
    AccessDenied,
    CleanedUp,
    CleanupFailed,
    DeviceLimitReached,
    DeviceRevoked,
    Event,
    ImportRefused,
    LargeValueLost,
    LockAcquired,
    LockExpired,
    LockRefused,
    LockReleased,
    SessionBound,
    SessionConflicted,
    SessionCreated,
    SessionDestroyed,
    SessionImported,
    SessionRefused,
    SessionRenewed,
    SessionRevoked,
    SessionRotated,
    SessionSaved,
    SessionUnbound,
    SignInRejected,
    UserConfirmed,
    WriteDropped,
)
from ..stores.parts import LEFTOVERS
from ..weak import WeakObjects
from .metrics_gathering import Gathering, counted, observed
from .metrics_watch import StoreWatch

#: The key in the WSGI environment for the time that the request spent in the store.
SECONDS = "flask_gsession.seconds"

_LIFE: dict[type[Event], str] = {
    SessionImported: "imported",
    SessionCreated: "created",
    SessionSaved: "saved",
    SessionRenewed: "renewed",
    SessionRotated: "rotated",
    SessionDestroyed: "destroyed",
    SessionRevoked: "revoked",
}
_OF_USERS: dict[type[Event], str] = {
    SessionUnbound: "signed_out",
    UserConfirmed: "confirmed",
    DeviceRevoked: "revoked",
    DeviceLimitReached: "limit_reached",
}
_UNREADABLE = {"corrupt", "newer format", "unknown encryption key"}
_UNSIGNED = {"malformed", "bad signature", "two cookies", "too many cookies"}
_REFUSALS = {*_UNSIGNED, "unknown", "expired", "revoked", *_UNREADABLE}
_NOT_SIGNED_IN = {"revoked", "full"}
_LEFTOVERS = set(LEFTOVERS)
_LOST = ("missing", "truncated", "altered", "not encrypted", "unknown encryption key")
_CONFLICTS = ("refused", "transaction", "too many races", "unknown outcome")
_STORE_BUCKETS = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
_WAIT_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30)
_SIZE_BUCKETS = tuple(256 * 4**power for power in range(9))  # to 16 MiB

Count = Callable[..., object]


class Figures:
    """The metrics on one registry. With ``in_files``, several workers share them.

    ``receivers``: the functions to call with the details of each event.
    """

    def __init__(self, registry: CollectorRegistry, *, in_files: bool = False) -> None:
        self.gathering = Gathering() if in_files else None
        self.receivers: defaultdict[type[Event], list[Count]] = defaultdict(list)
        self.stores: dict[str, WeakObjects[StoreWatch]] = defaultdict(WeakObjects)  # by cookie name
        self._registry = registry
        self._endpoints: dict[str, Callable[[float], object]] = {}
        self._add_store()
        self._add_sessions()
        self._add_users()
        self._add_writes()
        self._add_locks()
        self._add_cleanups()
        self._add_denials()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"gsession_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, mode: Any, label: str) -> Gauge:
        return Gauge(
            f"gsession_{name}", text, [label], registry=self._registry, multiprocess_mode=mode
        )

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"gsession_{name}", text, labels, registry=self._registry, buckets=buckets)

    def _add_store(self) -> None:
        self.operations = self._counter(
            "operations", "Calls of the session store", "operation", "status"
        )
        self.durations = self._histogram(
            "operation_duration_seconds",
            "Duration of the calls of the session store",
            _STORE_BUCKETS,
            "operation",
        )
        self._requests = self._histogram(
            "request_seconds",
            "Time that a request spent in the session store, if it used it",
            _STORE_BUCKETS,
            "endpoint",
        )
        self.up = self._gauge(
            "store_up", "Whether the store answers, in every process", "livemin", "session"
        )
        self.live = self._gauge(
            "sessions_live", "Approximate number of live sessions", "livemostrecent", "session"
        )
        self.circuits = self._gauge(
            "circuits_open", "Processes with an open circuit to the store", "livesum",
            "operations",
        )  # fmt: skip
        for operations in ("loads", "writes"):
            self.circuits.labels(operations).set(0)
        self.near = self._counter("near_reads", "Reads from the near cache", "result")
        self.near_age = self._gauge(
            "near_age_seconds",
            "How old a record from the near cache is at most",
            "livemax",
            "session",
        )

        self.edge_cut_off = self._gauge(
            "edge_cut_off", "Processes of an edge that don't reach the centre", "livesum", "session"
        )
        self.edge_queue = self._gauge(
            "edge_queue", "Ends and changed sessions that wait for the centre", "max", "kind"
        )
        self.edge_lag = self._gauge(
            "edge_lag_seconds", "How old the copy under the oldest waiting change is", "max",
            "session",
        )  # fmt: skip
        self.edge_dropped = self._gauge(
            "edge_dropped", "Sessions whose changes this edge has dropped", "max", "session"
        )

    @cached_property
    def journal(self) -> tuple[Gauge, Gauge, Gauge]:
        """Events kept, expired sessions waiting, backlogs. Created only for a journal."""
        return (
            self._gauge("journal_events", "Events that the journal keeps", "max", "session"),
            self._gauge(
                "journal_due", "Expired sessions that wait for their event", "max", "session"
            ),
            self._gauge(
                "journal_behind", "Events that a consumer has not acknowledged", "max", "consumer"
            ),
        )

    def _add_sessions(self) -> None:
        life = self._counter("sessions", "Events of stored sessions", "event")
        for kind, name in _LIFE.items():
            self._counts(kind, life.labels(name))
        refused = self._counter("refused", "Tokens without a usable session", "reason")
        for reason in ("unknown", "expired", "bad signature"):
            refused.labels(reason)
        self.receivers[SessionRefused].append(
            lambda reason, _: refused.labels(_one_of(_REFUSALS, reason)).inc()
        )
        self._counts(ImportRefused, refused.labels("old session"))
        lost = self._counter("large_values_lost", "Large values that could not be read", "reason")
        for reason in _LOST:
            lost.labels(reason)
        self.receivers[LargeValueLost].append(
            lambda key, reason, _: lost.labels(_one_of(set(_LOST), reason)).inc()
        )

    def _add_users(self) -> None:
        users = self._counter("user_sessions", "Events of sessions bound to a user", "event")
        for kind, name in _OF_USERS.items():
            self._counts(kind, users.labels(name))
        for name in ("signed_in", "bound", *(f"refused_{reason}" for reason in _NOT_SIGNED_IN)):
            users.labels(name)

        def bound(user_id: str, device_id: str, handle: str, how: str = SIGN_INS[0]) -> None:
            users.labels("signed_in" if how in SIGN_INS else "bound").inc()

        def refused(user_id: str, reason: str) -> None:
            users.labels(f"refused_{_one_of(_NOT_SIGNED_IN, reason)}").inc()

        self.receivers[SessionBound].append(bound)
        self.receivers[SignInRejected].append(refused)

    def _add_writes(self) -> None:
        races = self._counter("retries", "Writes retried because another request was faster")
        merges = self._counter("merges", "Saves merged with the changes of another request")
        observe_size = self.observing(
            self._histogram("payload_bytes", "Size of the saved payloads", _SIZE_BUCKETS)
        )

        def saved(_: str, payload_bytes: int, conflicts: int) -> None:
            observe_size(payload_bytes)
            if conflicts:
                races.inc(conflicts)
                merges.inc()

        self.receivers[SessionSaved].append(saved)
        dropped = self._counter("writes_dropped", "Changes that were not stored", "reason")
        for reason in ("store unavailable", "ended"):
            dropped.labels(reason)
        self.receivers[WriteDropped].append(lambda _, reason: dropped.labels(_drop(reason)).inc())
        conflicts = self._counter(
            "conflicts", "Changes refused because of another request", "reason"
        )
        for reason in _CONFLICTS:
            conflicts.labels(reason)
        self.receivers[SessionConflicted].append(lambda _, reason: conflicts.labels(reason).inc())

    def _add_locks(self) -> None:
        locks = self._counter("locks", "Events of session locks", "event")
        waits = self._histogram(
            "lock_wait_seconds", "Time that requests waited until they got a lock", _WAIT_BUCKETS
        )
        self._counts(LockAcquired, locks.labels("acquired"))
        self._counts(LockReleased, locks.labels("released"))
        self._counts(LockExpired, locks.labels("expired"))
        for reason in ("too many waiters", "wait over"):
            locks.labels(reason)
        self.receivers[LockAcquired].append(lambda _, waited: waits.observe(waited))
        self.receivers[LockRefused].append(lambda _, reason, waited: locks.labels(reason).inc())

    def _add_cleanups(self) -> None:
        runs = self._counter("cleanups", "Clean-ups by a CleanupWorker", "status")
        leftovers = self._counter("leftovers", "Leftovers that a CleanupWorker found", "kind")
        done = runs.labels("done")
        for leftover in LEFTOVERS:
            leftovers.labels(leftover)

        def cleaned(found: dict[str, int], _: float) -> None:
            done.inc()
            for kind, number in found.items():
                leftovers.labels(_one_of(_LEFTOVERS, kind)).inc(number)

        self.receivers[CleanedUp].append(cleaned)
        self._counts(CleanupFailed, runs.labels("failed"))

    def _add_denials(self) -> None:
        denied = self._counter("access_denied", "Calls of services that were refused", "service")
        denied.labels("unknown")
        # All names of services come from the grants file, so they are few.
        self.receivers[AccessDenied].append(
            lambda service, what: denied.labels(service or "unknown").inc()
        )

    def _counts(self, kind: type[Event], child: Any) -> None:
        count = self.counting(child)
        self.receivers[kind].append(lambda *_: count())

    def observe_request(self, error: BaseException | None) -> None:
        """Record the time that a request spent in the store, at its end."""
        seconds = request.environ.pop(SECONDS, None)
        if seconds is not None:
            endpoint = request.endpoint or ""
            if endpoint not in self._endpoints:
                self._endpoints[endpoint] = self.observing(self._requests.labels(endpoint))
            self._endpoints[endpoint](seconds)

    def counting(self, counter: Counter) -> Callable[[], object]:
        """A function that adds one to ``counter``."""
        if self.gathering is None:
            return counter.inc
        return partial(self.gathering.add, counted(counter), 1)

    def adding(self, counter: Counter) -> Callable[[float], object]:
        """A function that adds an amount to ``counter``."""
        if self.gathering is None:
            return counter.inc
        return partial(self.gathering.add, counted(counter))

    def observing(self, histogram: Histogram) -> Callable[[float], object]:
        """A function that adds an amount to ``histogram``."""
        if self.gathering is None:
            return histogram.observe
        return partial(self.gathering.add, observed(histogram))

    def timing(self, operation: str, status: str) -> Callable[[float, float], object]:
        """A function that records a store call by its duration and its end."""
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


def _one_of(known: set[str], word: str) -> str:
    """``word``, or ``"other"`` if it isn't known: a third-party store may use any word."""
    return word if word in known else "other"


def _drop(reason: str) -> str:
    if reason.startswith("ended before "):
        return "ended"
    return _one_of({"store unavailable", *_UNREADABLE}, reason)


_of_registries: WeakKeyDictionary[CollectorRegistry, Figures] = WeakKeyDictionary()
_of_process: list[Figures] = []


def figures_of(registry: CollectorRegistry) -> Figures:
    """The metrics on a registry, which several applications may share.

    With PROMETHEUS_MULTIPROC_DIR, all registries of a process write to the same files, so they
    share one set.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        if not _of_process:
            _of_process.append(Figures(registry, in_files=True))
        return _of_process[0]
    if registry not in _of_registries:
        _of_registries[registry] = Figures(registry)
    return _of_registries[registry]
