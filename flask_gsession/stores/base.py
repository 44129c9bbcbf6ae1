"""What a store is: five verbs on opaque records, and nothing of Flask, cookies or values.

A new store is an afternoon's work: implement ``Store``, then run the contract suite of
``flask_gsession.testing`` on it.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from string import ascii_letters, digits
from typing import NamedTuple, Protocol, runtime_checkable

from ..errors import QueueFull

Clock = Callable[[], float]

MAX_POINTERS = 8
KEY_LENGTH = 43  # of a session key
MORE = "more"  # the cursor of a clean-up that need not know where it was
WAITER_LIFE = 2000  # milliseconds after which who waits for a lease and does not ask is dropped
ASK_AGAIN = 700  # milliseconds, at most, between two times of asking
LONGEST_LEASE = 3_600_000  # milliseconds; one that claims to be longer is junk, and free
COUNT_ALL = 2000  # sessions up to which they are counted one by one
#: Under this key stands who cleans up until when, then that it was done. It is no session's: its
#: last letter is none that a digest ends with.
TICKET = "flask-gsession-clean-up".ljust(KEY_LENGTH, "-")
_LONGEST_PAUSE = 0.05  # seconds between two looks at a lease
_NO_KEY_CHARACTERS = dict.fromkeys(map(ord, f"{ascii_letters}{digits}-_"))


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

    def kept_as_long_as(self, other: Record) -> Record:
        """This record with the later idle expiry of both, but none past its own absolute one."""
        later = min(other.idle_expires_at, self.absolute_expires_at)
        return self if later <= self.idle_expires_at else self._replace(idle_expires_at=later)


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


class _Offer(type(Protocol)):  # type: ignore[misc]
    """What ``isinstance`` says of a store: whether it has the methods, also those it passes on.

    From Python 3.12 on, a ``runtime_checkable`` protocol does not see what ``__getattr__`` gives,
    and a store inside a wrapper would silently lose all it can do.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        if Protocol not in cls.__bases__:
            return bool(super().__instancecheck__(instance))
        names = {name for base in cls.__mro__[:-1] for name in vars(base) if name[0] != "_"}
        return all(getattr(instance, name, None) is not None for name in names)


@runtime_checkable
class Store(Protocol, metaclass=_Offer):
    """The contract. Each method is one atomic step and takes one total time budget.

    Every method may raise ``StoreUnavailable``, never a driver's own error. All of them are safe
    to repeat: a write that was applied although its answer got lost is recognised by its version,
    and what came after it (a logout, a rotation, a later write) is not undone.
    """

    def create(self, record: Record) -> None:
        """Store ``record`` if its key is free, else raise ``KeyTaken``."""

    def load(self, key: str) -> Record | None:
        """The record, or a pointer, as it was stored; None when there is none.

        One that has expired by its own times may come, too, or None: ``unexpired`` is for who asks
        for sessions, and the path of the requests compares the times itself.

        Raises ``UnreadableRecord`` when something else is stored there. One round trip.
        """

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        """Replace the live record of ``record.key``. Never creates.

        The idle expiry becomes the later one of the stored record's and ``record``'s, but not later
        than ``record``'s absolute expiry: another request may have renewed the session since it
        was loaded. With ``shorten`` it becomes ``record``'s, also where that is earlier.

        Raises ``Gone`` if there is no live record, ``Stale`` if it has another version. A repeat
        changes nothing.
        """

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        """Move the idle expiry of ``record``, never past its absolute expiry; never creates.

        The version stays. False if the record is not live any more, or has another version (the
        write that made it has moved the expiry already).
        """

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> None:
        """Rotate: ``record`` lives under its own new key, ``pointer`` under the old ``key``.

        Without a pointer the old key is free. Of several racing rotations one succeeds. The idle
        expiry of ``record`` becomes that of the record under ``key`` where that is later, and with
        ``shorten`` not, as in ``save``.
        Raises ``Gone``, ``Stale`` or ``KeyTaken``, and has then changed nothing.
        """

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        """End the session under ``key``; say whether there was one. Follows unexpired pointers.

        With ``expected_version``, raises ``Stale`` or ``Gone`` unless that version is there.
        """

    def close(self) -> None:
        """Release connections that the store opened itself."""


def unexpired(store: Store, key: str, now: int) -> Record | None:
    """What ``store.load(key)`` gives, None where that has expired at ``now``, in milliseconds."""
    record = store.load(key)
    return None if record is None or now >= record.idle_expires_at else record


@runtime_checkable
class Sweeps(Protocol, metaclass=_Offer):
    """A store that must remove expired records itself."""

    def sweep(self, limit: int) -> int:
        """Remove at most ``limit`` expired records; how many were removed."""


@runtime_checkable
class Counts(Protocol, metaclass=_Offer):
    """A store that can say how many sessions there are, without looking at all of them."""

    def count(self) -> int:
        """About how many sessions are live, in one step whose work is bounded.

        It may count what ended within the last minute, and where there are many it may judge from
        a sample. Raises ``StoreUnavailable``.
        """


class Page(NamedTuple):
    """Some of a store's records, and the ``cursor`` that leads to the next; "" after the last.

    ``unreadable``: the keys of what is no record.
    """

    records: list[Record]
    unreadable: list[str]
    cursor: str


@runtime_checkable
class Scans(Protocol, metaclass=_Offer):
    """A store that can go through its records, whichever and however many it has."""

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        """About ``limit`` of the unexpired records and pointers whose key starts with ``begins``.

        With ``cursor`` those after the page that had it. A record that is there from the first page
        to the last comes at least once, in no order; one that comes or goes meanwhile, perhaps.
        A page may be empty. Records of other prefixes may be among them: see ``is_session_key``.
        """


def is_session_key(text: str) -> bool:
    """Whether ``text`` can be a session's key: 43 characters of ``A-Z a-z 0-9 - _``."""
    return len(text) == KEY_LENGTH and not text.translate(_NO_KEY_CHARACTERS) and text != TICKET


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


@runtime_checkable
class Tidies(Protocol, metaclass=_Offer):
    """A store in which things can stay that nobody reads any more."""

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        """Look at about ``limit`` things, and put right what is found; only count, if ``dry_run``.

        Live sessions stay, whoever writes to them meanwhile.
        """


@runtime_checkable
class Blobs(Protocol, metaclass=_Offer):
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


@runtime_checkable
class BlobStore(Store, Blobs, Protocol):
    """A store that keeps large values beside its records."""

    def pop(self, key: str) -> Record | None:
        """As ``Store.delete(key)``; the record that ended, None where there was none.

        Where only that is known, what it held is left out.
        """


class Finding(NamedTuple):
    """What a check found. ``severity`` is ``"ok"``, ``"warning"`` or ``"error"``."""

    severity: str
    check: str
    found: str = ""
    advice: str = ""


@runtime_checkable
class Checks(Protocol, metaclass=_Offer):
    """A store that can say how its server is set up."""

    def check(self) -> list[Finding]:
        """What an administrator should know. Raises ``StoreUnavailable``."""


@runtime_checkable
class Leases(Store, Protocol):
    """A store that can lend a live session to one ``owner`` at a time, for session locks.

    An owner is a random word, drawn for each acquisition. A lease runs out by itself; it never
    outlives its session, stays with the old key in a rotation, and is no part of the record: who
    does not name a lease reads and writes as ever. Those who wait form a queue.
    """

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        """As ``Store.save``. With ``lease``, the same step raises ``LeaseLost`` unless that owner
        holds the lease of the session, and it has not run out; ``Gone`` goes before ``LeaseLost``,
        and ``Stale`` after it.
        """

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        """As ``Store.replace``, with ``lease`` (of ``key``) as in ``save``. The lease ends."""

    def delete(
        self, key: str, expected_version: int | None = None, lease: str | None = None
    ) -> bool:
        """As ``Store.delete``; with a version and ``lease`` as in ``save``. The lease ends."""

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        """Hold the lease for ``lease_ms`` from now, or wait in the queue for it.

        0 when it is held now; else for how many milliseconds to ``wait_for_release`` before asking
        again. Only the first in the queue gets a free lease. Who has not asked for ``WAITER_LIFE``
        loses his place. A lease that would run for more than twice its length from now was begun
        before a clock was set back, or by one far ahead, and is free. Raises ``Gone`` unless
        ``key`` is that of a live record, and ``QueueFull`` if ``max_waiters`` others wait already.
        """

    def extend(self, key: str, owner: str, lease_ms: int) -> bool:
        """Let the lease run for ``lease_ms`` from now; False if this owner does not hold it."""

    def release(self, key: str, owner: str) -> bool:
        """Give the lease back, or leave the queue; whether this owner held it until now."""

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        """Return when it may be this owner's turn, after ``seconds`` at the latest.

        It may be early for no reason. Holds no connection while it waits.
        """


@dataclass(slots=True)
class Lease:
    """Who holds a lease until when, and who waits; for stores that keep it as one value.

    ``length``: for how long it was asked for. ``waiters``: when each asked last, in the order of
    their coming. Times are milliseconds.
    """

    owner: str = ""
    until: int = 0
    length: int = 0
    waiters: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, owner: object, until: object, length: object, waiters: object) -> Lease:
        """A lease as a store has it. Junk counts as none, so that it can't lock a session."""
        if (
            isinstance(owner, str)
            and isinstance(until, int)
            and isinstance(length, int)
            and isinstance(waiters, dict)
            and all(isinstance(name, str) for name in waiters)
            and all(isinstance(seen, int) for seen in waiters.values())
        ):
            return cls(owner, int(until), int(length), waiters)
        return cls()

    def is_held_by(self, owner: str, now: int) -> bool:
        """Whether this owner has the lease, and it has not run out."""
        return self.owner == owner and now < self.until

    def acquire(self, owner: str, now: int, lease_ms: int, max_waiters: int) -> int:
        """As ``Leases.acquire``."""
        self._drop_the_dead(owner, now)
        if self.is_held_by(owner, now) or self.is_turn_of(owner, now):
            self.waiters.pop(owner, None)
            self.hold(owner, now, lease_ms)
            return 0
        if owner not in self.waiters and len(self.waiters) >= max_waiters:
            raise QueueFull
        self.waiters[owner] = now
        oldest = next(iter(self.waiters.values()))
        freed = oldest + WAITER_LIFE if self._is_free(now) else self.until
        return max(1, min(freed - now, ASK_AGAIN))

    def is_turn_of(self, owner: str, now: int) -> bool:
        """Whether this owner may take the lease now."""
        return self._is_free(now) and next(iter(self.waiters), owner) == owner

    def hold(self, owner: str, now: int, lease_ms: int) -> None:
        """Let this owner have the lease for so long from now."""
        self.owner, self.until, self.length = owner, now + lease_ms, lease_ms

    def release(self, owner: str, now: int) -> bool:
        """As ``Leases.release``."""
        held = self.is_held_by(owner, now)
        if self.owner == owner:
            self.owner, self.until, self.length = "", 0, 0
        self.waiters.pop(owner, None)
        return held

    def _is_free(self, now: int) -> bool:
        # What ends so late was begun before a clock was set back, or by one far ahead.
        return now >= self.until or self.until - now > 2 * min(self.length, LONGEST_LEASE)

    def _drop_the_dead(self, owner: str, now: int) -> None:
        for waiter, seen in list(self.waiters.items()):
            if waiter != owner and abs(now - seen) >= WAITER_LIFE:
                del self.waiters[waiter]


class Trips:
    """How many round trips to its server a store has made; None where it counts none."""

    count: int | None = None


_trips: ContextVar[Trips | None] = ContextVar("flask_gsession.trips", default=None)


@contextmanager
def count_trips() -> Iterator[Trips]:
    """Count the round trips that a store tells of while the block runs."""
    trips = Trips()
    before = _trips.set(trips)
    try:
        yield trips
    finally:
        _trips.reset(before)


def trips_are_counted() -> bool:
    """Whether somebody counts the round trips of this call."""
    return _trips.get() is not None


def tell_trip() -> None:
    """For stores: a round trip to the server begins. Counted where a session is debugged."""
    trips = _trips.get()
    if trips is not None:
        trips.count = (trips.count or 0) + 1


def pass_on(wrapper: object, store: object) -> None:
    """Give ``wrapper`` every public method of ``store`` that it has not: what the store can do.

    As attributes of its own, by which ``isinstance`` knows a capability.
    """
    for name in dir(store):
        if not name.startswith("_") and not hasattr(wrapper, name):
            method = getattr(store, name)
            if callable(method):
                setattr(wrapper, name, method)


def poll(ready: Callable[[], bool], seconds: float) -> None:
    """Return when ``ready()`` is true, asking again after growing pauses, or after ``seconds``."""
    end = time.monotonic() + seconds
    pause = 0.002
    while not ready():
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _LONGEST_PAUSE)


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What the settings say to a store that is made from a URL or a client."""

    prefix: str = "gsession:"
    timeout: float = 1.0  # seconds for one call, retries included
    pool_max: int = 100  # connections
    clock: Clock = time.time
    logout_replicas: int = 0  # that must have a logout before it is done, on Redis
