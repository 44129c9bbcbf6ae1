"""What a store is: five verbs on opaque records, and nothing of Flask, cookies or values.

A new store is an afternoon's work: implement ``Store``, then run the contract suite of
``flask_gsession.testing`` on it.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

Clock = Callable[[], float]

MAX_POINTERS = 8


class Record(NamedTuple):
    """What a store holds under one session key. Times are milliseconds since 1970, UTC.

    ``version`` is drawn at random for each write, so that a writer recognises its own.
    ``idle_expires_at`` is never past ``absolute_expires_at``, so it is when the record ends.
    A record with a ``successor`` is a pointer: the session was rotated to that key. A chain of
    pointers is at most ``MAX_POINTERS`` long; what is longer leads nowhere.
    """

    key: str
    version: int
    created_at: int
    idle_expires_at: int
    absolute_expires_at: int
    payload: bytes
    successor: str | None = None

    def is_live(self, now: int) -> bool:
        """Whether the record is neither expired at ``now`` nor a pointer."""
        return self.successor is None and now < self.idle_expires_at


def new_version() -> int:
    """A version for a write: 63 random bits, never 0."""
    return int.from_bytes(os.urandom(8), "big") >> 1 or 1


def milliseconds(clock: Clock) -> int:
    """The clock's time in milliseconds."""
    return int(clock() * 1000)


def closing(owner: object, close: Callable[[], object]) -> weakref.finalize[..., object]:
    """Call ``close`` once ``owner`` is collected, or the interpreter ends: in this process only.

    A forked worker must not close what its parent opened. ``close`` must not hold ``owner``.
    """
    return weakref.finalize(owner, _close_in, os.getpid(), close)


def _close_in(pid: int, close: Callable[[], object]) -> None:
    if pid == os.getpid():
        close()


@runtime_checkable
class Store(Protocol):
    """The contract. Each method is one atomic step and takes one total time budget.

    Every method may raise ``StoreUnavailable``, never a driver's own error. All of them are safe
    to repeat: a write that was applied although its answer got lost is recognised by its version.
    """

    def create(self, record: Record) -> None:
        """Store ``record`` if its key is free, else raise ``KeyTaken``."""

    def load(self, key: str) -> Record | None:
        """The record, or a pointer; None when absent or expired by the record's own times.

        Raises ``UnreadableRecord`` when something else is stored there. One round trip.
        """

    def save(self, record: Record, expected_version: int) -> None:
        """Replace the live record of ``record.key``, its expiry included. Never creates.

        Raises ``Gone`` if there is no live record, ``Stale`` if it has another version.
        """

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        """Move the idle expiry of ``record``, never past its absolute expiry; never creates.

        The version stays. False if the record is not live any more, or has another version (the
        write that made it has moved the expiry already).
        """

    def replace(
        self, key: str, record: Record, expected_version: int, pointer: Record | None
    ) -> None:
        """Rotate: ``record`` lives under its own new key, ``pointer`` under the old ``key``.

        Without a pointer the old key is free. Of several racing rotations one succeeds.
        Raises ``Gone``, ``Stale`` or ``KeyTaken``, and has then changed nothing.
        """

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        """End the session under ``key``; say whether there was one. Follows unexpired pointers.

        With ``expected_version``, raises ``Stale`` or ``Gone`` unless that version is there.
        """

    def close(self) -> None:
        """Release connections that the store opened itself."""


@runtime_checkable
class Sweeps(Protocol):
    """A store that must remove expired records itself."""

    def sweep(self, limit: int) -> int:
        """Remove at most ``limit`` expired records; how many were removed."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What the settings say to a store that is made from a URL or a client."""

    prefix: str = "gsession:"
    timeout: float = 1.0  # seconds for one call, retries included
    pool_max: int = 100  # connections
    clock: Clock = time.time
