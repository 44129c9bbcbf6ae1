"""What a store can do beside the seven verbs: its parts.

Each part is an attribute of the store (``leases``, ``blobs``, ``scans``, ``upkeep``, ``counts``,
``checks``): an object with the methods below, or None where the store can't do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from .base import Deleted, Record, Replaced

MORE = "more"  # the cursor of a clean-up that need not know where it was
COUNT_ALL = 2000  # sessions up to which they are counted one by one


class Leases(Protocol):
    """For a store that can lend a live session to one ``owner`` at a time, for session locks.

    An owner is a random word, drawn for each acquisition. A lease runs out by itself; it never
    outlives its session, stays with the old key in a rotation, and is no part of the record: the
    store's own verbs don't ask for it. Owners that wait form a queue.
    """

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        """As ``Store.save``. The same step raises ``LeaseLost`` unless the owner ``lease`` holds
        the lease of the session, and it has not run out; ``Gone`` goes before ``LeaseLost``, and
        ``Stale`` after it.
        """

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str,
        *,
        shorten: bool = False,
    ) -> Replaced | None:
        """As ``Store.replace``, with ``lease`` (of ``key``) as in ``save``. The lease ends."""

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted | bool:
        """As ``Store.delete`` of a version, with ``lease`` as in ``save``. The lease ends."""

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        """Hold the lease for ``lease_ms`` from now, or wait in the queue for it.

        0 when it is held now; else for how many milliseconds to ``wait_for_release`` before asking
        again. Only the first in the queue gets a free lease. An owner that has not asked for
        ``WAITER_LIFE`` loses its place. A lease that would run for more than twice its length from
        now was begun before a clock was set back, or by one far ahead, and is free. Raises ``Gone``
        unless there is a live record under ``key``, and ``QueueFull`` if ``max_waiters`` others
        wait already.
        """

    def extend(self, key: str, owner: str, lease_ms: int) -> bool:
        """Let the lease run for ``lease_ms`` from now; False if this owner does not hold it."""

    def release(self, key: str, owner: str) -> bool:
        """Give the lease back, or leave the queue; whether this owner held it until now."""

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        """Return when it may be this owner's turn, after ``seconds`` at the latest.

        It may be early for no reason. Holds no connection while it waits.
        """


class Blobs(Protocol):
    """A place for large values: blobs under random names, written and read in frames.

    A blob never changes once it is written, and its name is never used again. It ends by its own
    expiry, whatever becomes of those who refer to it. Each call takes one total time budget, and
    may raise ``StoreUnavailable``; all of them are safe to repeat.
    """

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        """Add a frame at ``offset``, where the last one ended, and keep the blob until then.

        It is kept for longer where it already was to be. ``frame`` is never empty. May raise
        ``Gone`` for a later frame of a blob that is not there. One round trip.
        """

    def read_frame(self, name: str, offset: int, size: int) -> bytes | None:
        """The frame of ``size`` bytes at ``offset``, less where less is there; None for nothing.

        Asked for as it was written. One round trip.
        """

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        """Keep those that are there until then, or as long as they are kept already."""

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        """Let these go at that time, or when they go already; at once where it is over."""


class Page(NamedTuple):
    """Some of a store's records, and the ``cursor`` that leads to the next; "" after the last.

    ``unreadable``: the keys of what is no record.
    """

    records: list[Record]
    unreadable: list[str]
    cursor: str


def is_place(thing: object) -> bool:
    """Whether ``thing`` has the methods of ``Blobs``."""
    names = ("write_frame", "read_frame", "renew_blobs", "discard_blobs")
    return not isinstance(thing, type) and all(
        callable(getattr(thing, name, None)) for name in names
    )


class Scans(Protocol):
    """For a store that can go through its records, whichever and however many it has."""

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        """About ``limit`` of the unexpired records and pointers whose key starts with ``begins``.

        With ``cursor`` those after the page that had it. A record that is there from the first page
        to the last comes at least once, in no order; one that comes or goes meanwhile, perhaps.
        A page may be empty. Records of other prefixes may be among them: see ``is_session_key``.
        """


class Tidied(NamedTuple):
    """What one step of a clean-up found and put right, by kind; ``cursor`` is as in ``Page``.

    ``seen``: how many things it looked at.
    """

    found: dict[str, int]
    seen: int
    cursor: str


#: The kinds of things in ``Tidied.found``. What has no expiry gets one, the others are removed.
LEFTOVERS = (
    *("expired sessions", "sessions without expiry", "unreadable records"),
    *("orphaned locks", "orphaned large values"),
    *("expired large values", "large values without expiry"),
)
#: What a large value gets that has no expiry and does not say whose it is, in milliseconds:
#: browsers keep no cookie for longer.
LOST_EXPIRY = 400 * 86_400_000


class Upkeep(Protocol):
    """For a store in which things can stay that nobody reads any more, expired records included."""

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        """Look at about ``limit`` things, and put right what is found; only count, if ``dry_run``.

        Live sessions stay, whatever is written to them meanwhile.
        """


class Counts(Protocol):
    """For a store that can say how many sessions there are, without looking at all of them."""

    def count(self) -> int:
        """About how many sessions are live, in one step whose work is bounded.

        It may count what ended within the last minute, and where there are many it may judge from
        a sample. Raises ``StoreUnavailable``.
        """


class Finding(NamedTuple):
    """What a check found. ``severity`` is ``"ok"``, ``"warning"`` or ``"error"``."""

    severity: str
    check: str
    found: str = ""
    advice: str = ""


class Checks(Protocol):
    """For a store that can say how its server is set up."""

    def check(self) -> list[Finding]:
        """What an administrator should know. Raises ``StoreUnavailable``."""


class Parts(NamedTuple):
    """The parts of one store, by name."""

    leases: Leases | None
    blobs: Blobs | None
    scans: Scans | None
    upkeep: Upkeep | None
    counts: Counts | None
    checks: Checks | None


def parts_of(store: object) -> Parts:
    """The parts that ``store`` has. One that is no ``Store`` and names none has none."""
    return Parts(*(getattr(store, name, None) for name in Parts._fields))


class _Itself:
    def __get__(self, store: Any, kind: type | None = None) -> Any:
        return self if store is None else store


#: For a class that has the methods of a part itself: ``counts = itself``.
itself: Any = _Itself()
