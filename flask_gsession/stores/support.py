"""Helpers for store authors: options, closing, round trips, deadlines, details of a write."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from .base import Clock


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """The settings passed to a store that is made from a URL or a client."""

    prefix: str = "gsession:"
    timeout: float = 1.0  # seconds for one call, retries included
    pool_max: int = 100  # connections
    clock: Clock = time.time
    logout_replicas: int = 0  # that must confirm a logout, on Redis
    own_connections: bool = False  # to the server of a Redis client, with our own timeouts
    database: str = ""  # of MongoDB, unless the URL or client names one
    edge_sync: float = 30.0  # seconds between two checks of an edge's queue; 0: no thread


def closing(owner: object, close: Callable[[], object]) -> weakref.finalize[..., object]:
    """Call ``close`` once ``owner`` is collected or the interpreter exits, in this process only.

    A forked worker must not close what its parent opened. ``close`` must not refer to ``owner``.
    """
    return weakref.finalize(owner, _close_in, os.getpid(), close)


def _close_in(pid: int, close: Callable[[], object]) -> None:
    if pid == os.getpid():
        close()


class RoundTrips:
    """The number of round trips that a store has made to its server; None if it doesn't count."""

    count: int | None = None

    def add(self) -> None:
        """Count one more."""
        self.count = (self.count or 0) + 1


#: Set only while a session is debugged.
round_trips: ContextVar[RoundTrips | None] = ContextVar("flask_gsession.trips", default=None)


@contextmanager
def count_round_trips() -> Iterator[RoundTrips]:
    """Count the round trips of stores while the block runs."""
    trips = RoundTrips()
    before = round_trips.set(trips)
    try:
        yield trips
    finally:
        round_trips.reset(before)


def round_trips_are_counted() -> bool:
    """Whether the round trips of this call are counted."""
    return round_trips.get() is not None


def count_round_trip() -> None:
    """For stores: call this before each round trip to the server."""
    trips = round_trips.get()
    if trips is not None:
        trips.add()


#: When the caller stops waiting, in the time of ``time.monotonic``: see ``ending_by``.
time_limit: ContextVar[float | None] = ContextVar("flask_gsession.time_limit", default=None)


class ending_by:  # a class, since a generator costs more in each call of a server
    """Makes store calls in the block end by ``until``, even if their own time budget is longer.

    Their caller won't wait any longer. ``until``: a time of ``time.monotonic``; None: only their
    own budget counts.
    """

    __slots__ = ("_before", "_until")

    def __init__(self, until: float | None) -> None:
        self._until = until

    def __enter__(self) -> None:
        self._before = time_limit.set(self._until)

    def __exit__(self, *_: object) -> None:
        time_limit.reset(self._before)


def deadline(seconds: float) -> float:
    """For stores: when a call with this time budget that begins now has to end."""
    end, until = time.monotonic() + seconds, time_limit.get()
    return end if until is None or end < until else until


def time_left(seconds: float) -> float:
    """For stores: how many of the ``seconds`` a call that begins now may take."""
    until = time_limit.get()
    return seconds if until is None else max(0.0, min(seconds, until - time.monotonic()))


class Mergeable(NamedTuple):
    """Whether a store may queue a write and merge it later.

    ``refused``: the name of the write in error messages, if it can't be merged; else "". ``typed``:
    the keys with a merge policy of their own, which isn't in the settings.
    """

    refused: str = ""
    typed: frozenset[str] = frozenset()


_ANY = Mergeable()
_mergeable: ContextVar[Mergeable] = ContextVar("flask_gsession.mergeable", default=_ANY)


@contextmanager
def mergeable(write: Mergeable) -> Iterator[None]:
    """Describe the writes in this block."""
    before = _mergeable.set(write)
    try:
        yield
    finally:
        _mergeable.reset(before)


def this_write() -> Mergeable:
    """The description of the current write."""
    return _mergeable.get()


class EndReason(NamedTuple):
    """The reason for the end of a session, and the user who ended it, for the journal."""

    reason: str
    by: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether the user of the session ends it."""
        return self is _LOGGED_OUT


_LOGGED_OUT = EndReason("logged out")
_because: ContextVar[EndReason] = ContextVar("flask_gsession.because", default=_LOGGED_OUT)


@contextmanager
def because(reason: str | None, by: str | None = None) -> Iterator[None]:
    """Journal this reason for sessions that end in the block, unless an outer block gave one."""
    before = _because.get()
    if before is not _LOGGED_OUT or reason is None:
        yield
        return
    token = _because.set(EndReason(reason, by))
    try:
        yield
    finally:
        _because.reset(token)


def reason_of_end() -> EndReason:
    """The reason for an end of a session at this moment."""
    return _because.get()
