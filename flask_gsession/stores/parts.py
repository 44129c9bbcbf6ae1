"""Parts: the optional abilities of a store, in addition to the seven verbs.

Each part is an attribute of the store (``leases``, ``blobs``, ``scans``, ``upkeep``, ``counts``,
``checks``, ``changes``, ``bulk``, ``edge``, ``journal``): an object with the methods below, or None
if the store lacks that ability.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from .base import Deleted, Record, Replaced, Store
from .journals import Journal

MORE = "more"  # the cursor of a clean-up that has more to do, but needs no position
COUNT_ALL = 2000  # up to so many sessions, stores count one by one


class Leases(Protocol):
    """For a store that can give a live session's lease to one ``owner`` at a time, for session
    locks.

    An owner is a random word, new for each acquisition. A lease expires; it never outlives its
    session, stays with the old key in a rotation, and isn't part of the record: the store's own
    verbs ignore it. Waiting owners form a queue.
    """

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        """Like ``Store.save``. The same step raises ``LeaseLost`` unless the owner ``lease`` holds
        an unexpired lease of the session. ``Gone`` is checked first, then ``LeaseLost``, then
        ``Stale``.
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
        """Like ``Store.replace``, with ``lease`` (of ``key``) as in ``save``. The lease ends."""

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted | bool:
        """Like ``Store.delete`` with a version, with ``lease`` as in ``save``. The lease ends."""

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        """Hold the lease for ``lease_ms`` from now, or wait in the queue for it.

        Returns 0 if the owner holds it now, else how many milliseconds to ``wait_for_release``
        before the next call. Only the first in the queue gets a free lease. An owner that doesn't
        call again within ``WAITER_LIFE`` loses its place. A lease with more than twice its length
        left comes from a clock that was far ahead or has been set back, and counts as free. Raises
        ``Gone`` unless there is a live record under ``key``, and ``QueueFull`` if ``max_waiters``
        others wait already.
        """

    def extend(self, key: str, owner: str, lease_ms: int) -> bool:
        """Extend the lease to ``lease_ms`` from now. False if this owner does not hold it."""

    def release(self, key: str, owner: str) -> bool:
        """Release the lease, or leave the queue. Returns whether this owner held the lease."""

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        """Return when it may be this owner's turn, after ``seconds`` at the latest.

        It may return early for no reason. Holds no connection while it waits.
        """


class Blobs(Protocol):
    """Storage for large values: blobs under random names, written and read in frames.

    A blob never changes once it is written, and its name is never used again. It ends by its own
    expiry, even while a session still refers to it. Each call takes one total time budget, and
    may raise ``StoreUnavailable``; all of them are safe to repeat.
    """

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        """Add a frame at ``offset``, the end of the last one, and keep the blob until
        ``expires_at``.

        Never moves the blob's expiry earlier. ``frame`` is never empty. May raise ``Gone`` for a
        later frame of a blob that doesn't exist. One round trip.
        """

    def read_frame(self, name: str, offset: int, size: int) -> bytes | None:
        """The frame of ``size`` bytes at ``offset``, as it was written. One round trip.

        Returns fewer bytes if fewer are stored, and None if there are none.
        """

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        """Keep the existing blobs until ``expires_at``, or longer if they already expire later."""

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        """Expire these blobs at ``at``, or at once if that is past. Never moves an expiry later."""


class Page(NamedTuple):
    """Some of a store's records, and the ``cursor`` that leads to the next; "" after the last.

    ``unreadable``: the keys of values that are not records.
    """

    records: list[Record]
    unreadable: list[str]
    cursor: str


def has_blob_methods(thing: object) -> bool:
    """Whether ``thing`` has the methods of ``Blobs``."""
    names = ("write_frame", "read_frame", "renew_blobs", "discard_blobs")
    return not isinstance(thing, type) and all(
        callable(getattr(thing, name, None)) for name in names
    )


class Scans(Protocol):
    """For a store that can list all its records, however many it has."""

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        """About ``limit`` of the unexpired records and pointers whose key starts with ``begins``.

        ``cursor`` comes from the previous page. A record that exists during the whole scan appears
        at least once, in any order; one that is created or deleted during the scan may appear or
        not. A page may be empty. Records of other prefixes may be among them: see
        ``is_session_key``.
        """


class Tidied(NamedTuple):
    """The counts of one clean-up step, by kind of leftover. ``cursor`` is as in ``Page``.

    ``seen``: how many items it examined.
    """

    found: dict[str, int]
    seen: int
    cursor: str


#: The kinds in ``Tidied.found``. Items without an expiry get one; all others are removed.
LEFTOVERS = (
    *("expired sessions", "sessions without expiry", "unreadable records"),
    *("orphaned locks", "orphaned large values"),
    *("expired large values", "large values without expiry"),
)
#: Lifetime in milliseconds for a large value with no expiry and no known session. Browsers don't
#: keep cookies for longer.
LOST_EXPIRY = 400 * 86_400_000


class Upkeep(Protocol):
    """For a store in which leftovers such as expired records can accumulate."""

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        """Examine about ``limit`` items and repair or remove leftovers; ``dry_run`` only counts.

        Live sessions stay, even if they are written to at the same time.
        """


class Counts(Protocol):
    """For a store that can estimate the number of sessions without reading all of them."""

    def count(self) -> int:
        """About how many sessions are live, in one step whose work is bounded.

        May include sessions that ended within the last minute, and may estimate large numbers from
        a sample. Raises ``StoreUnavailable``.
        """


class Bulk(Protocol):
    """For a store that can delete several sessions in fewer round trips than one by one."""

    def delete_many(self, keys: Sequence[str]) -> list[Deleted]:
        """Like ``Store.delete`` for each key. Returns the results in the same order.

        Not atomic: after ``StoreUnavailable``, some may have been deleted. A repeat is safe.
        """


class Finding(NamedTuple):
    """The result of a check. ``severity`` is ``"ok"``, ``"warning"`` or ``"error"``."""

    severity: str
    check: str
    found: str = ""
    advice: str = ""


class Checks(Protocol):
    """For a store that can check how its server is set up."""

    def check(self) -> list[Finding]:
        """Findings for an administrator. Raises ``StoreUnavailable``."""


NEVER = float("-inf")


class Subscriber(Protocol):
    """Gets the changes. Both methods may be called in any thread, and must be quick."""

    def changed(self, keys: Iterable[str]) -> None:
        """The records under these keys were written or deleted, or have expired."""

    def lost(self) -> None:
        """Any record may have changed without a notification."""


class Feed:
    """The changes at one server, as reported over one connection. A new connection has a new feed.
    ``exact_as_of``: every change between the start of the connection and this time has been
    reported, by the clock ``flask_gsession.live.listener.now``.
    """

    __slots__ = ("exact_as_of",)

    def __init__(self) -> None:
        self.exact_as_of = NEVER


class Changes(Protocol):
    """For a store that can notify this process when any process changes a record."""

    @property
    def unproven(self) -> str:
        """Why feeds are only hints, without ``exact_as_of``; "" if they have it."""

    @property
    def trouble(self) -> str:
        """The logged reason why no changes arrive; "" while they arrive."""

    @property
    def one_feed(self) -> bool:
        """Whether one feed covers all records, because there is only one server."""

    def subscribe(self, subscriber: Subscriber, interval: float | None = None) -> None:
        """Notify ``subscriber`` of changes, proven complete at least every ``interval`` seconds.

        ``subscriber`` must not refer to the store, which could then not be garbage-collected.
        """

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Stop notifying ``subscriber``. Without any subscriber, there is no connection."""

    def feed(self, key: str) -> Feed | None:
        """The feed that reports changes of this record; None before it exists."""

    def start(self) -> None:
        """Start to listen in a thread, unless it runs; returns immediately."""

    def close(self) -> None:
        """Stop listening until the next use."""


class NearFigures(NamedTuple):
    """How many peeks found a usable record, no record, or one that isn't provably fresh.

    ``age``: how old a record that is used now can be, in seconds; None if none may be used.
    """

    hits: int
    misses: int
    bypasses: int
    age: float | None


class NearRecord(Record):
    """A record in the near cache. The first reader stores the decoded payload in ``body``.

    All readers share ``body``, so none may change it. It counts twice in the cache's bytes.
    """

    body: Any = None


class NearReads(Protocol):
    """For a store that caches records in this process, for reads that need not be exact."""

    #: how many seconds a cached record may lag behind the store
    bound: float

    def peek(self, key: str, version: int | None = None) -> NearRecord | None:
        """The cached record, if it is provably fresh enough. No round trip.

        ``version``: return only this version, because the client has seen it already.
        """

    def load_near(self, key: str) -> Record | None:
        """Like ``Store.load``; the store may cache the record."""

    def figures(self) -> NearFigures:
        """The figures of this process."""


class Reconciler(Protocol):
    """For an edge store: operations that need the application, because it has the keys."""

    def incompatibility(self, centre: Store) -> str:
        """Why this node and the others at the centre can't read each other's records; "" if they
        can.
        """

    def merge(
        self,
        base: Record,
        theirs: Record,
        mine: Record,
        typed: Collection[str],
        node: str,
        number: int,
    ) -> Record | None:
        """The record to save over ``theirs``: with the changes from ``base`` to ``mine``.

        ``typed``: the keys that have a merge policy of their own, besides the settings. The record
        notes that ``node`` has settled everything up to ``number``. Returns None if ``theirs``
        notes that already. Raises ``UnreadableRecord``.
        """

    def end(self, key: str, last: Record) -> None:
        """End the session under ``key`` at the centre, with everything that belongs to it there.

        ``last``: the record as the centre had it, without a payload if that is unknown. The user's
        device ends too, whatever key its session has now.
        """

    def settled(self, base: Record, there: Record, mine: Record) -> None:
        """The changes from ``base`` to ``mine`` are stored in ``there``. May be called twice."""

    def dropped(self, base: Record | None, mine: Record, why: str) -> None:
        """The changes from ``base`` to ``mine`` are lost, because of ``why``."""


class EdgeFigures(NamedTuple):
    """The changes that a node has yet to settle with its centre, and its history.

    ``ends`` and ``changes``: how many sessions wait. ``oldest_at``: when the session with the
    oldest change was last confirmed, in milliseconds since 1970; None if nothing waits. ``lag``:
    how many seconds ago that was. ``settled_at``: when the queue was last empty; 0 for never.
    ``settled`` and ``dropped``: how many sessions since the node was set up. ``trouble``: why the
    last attempt to settle failed; "" if it didn't.
    """

    node: str
    ends: int
    changes: int
    oldest_at: int | None
    lag: float
    settled_at: int
    settled: int
    dropped: int
    trouble: str


class Settled(NamedTuple):
    """How many sessions were settled. ``trouble``: why settling stopped, or which sessions it left
    out. ``reached``: whether the centre answered.
    """

    ends: int = 0
    changes: int = 0
    dropped: int = 0
    trouble: str = ""
    reached: bool = True


class Edge(Protocol):
    """For a store that keeps working while its centre can't be reached."""

    #: the store at the centre, without the copy
    centre: Store
    #: how long copies serve without the centre, in seconds
    offline_for: float
    #: where changes wait: the path of a file, and the prefix of the keys there
    outbox: tuple[str, str]

    @property
    def cut_off(self) -> str:
        """Why this process serves from its copy now; "" if it reaches the centre."""

    def use(self, reconciler: Reconciler) -> None:
        """Settle with this reconciler. The store keeps only a weak reference to it."""

    def figures(self) -> EdgeFigures:
        """The figures of the waiting changes. One read of the local file."""

    def settle(self) -> Settled | None:
        """Check whether the centre is back, and settle with it now.

        Returns None if another process of this node is doing so already.
        """


class Parts(NamedTuple):
    """The parts of one store, by name."""

    leases: Leases | None
    blobs: Blobs | None
    scans: Scans | None
    upkeep: Upkeep | None
    counts: Counts | None
    checks: Checks | None
    changes: Changes | None
    near: NearReads | None
    bulk: Bulk | None
    edge: Edge | None
    journal: Journal | None


def parts_of(store: object) -> Parts:
    """The parts that ``store`` has; all None if it defines none."""
    return Parts(*(getattr(store, name, None) for name in Parts._fields))


class _Itself:
    def __get__(self, store: Any, kind: type | None = None) -> Any:
        return self if store is None else store


#: For a class that has the methods of a part itself: ``counts = itself``.
itself: Any = _Itself()
