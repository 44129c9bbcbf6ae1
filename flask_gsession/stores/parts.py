"""Parts: the optional abilities of a store, in addition to the seven verbs.

Each part is an attribute of the store (``leases``, ``blobs``, ``scans``, ``upkeep``, ``counts``,
``checks``, ``changes``, ``bulk``, ``edge``, ``journal``): an object with the methods below, or None
where the store can't do that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from .base import Deleted, Record, Replaced, Store
from .journals import Journal

MORE = "more"  # the cursor of a clean-up that has more to do, but needs no position
COUNT_ALL = 2000  # sessions up to which they are counted one by one


class Leases(Protocol):
    """For a store that can lend a live session to one ``owner`` at a time, for session locks.

    An owner is a random word, drawn for each acquisition. A lease expires; it never outlives its
    session, stays with the old key in a rotation, and isn't part of the record: the store's own
    verbs ignore it. Waiting owners form a queue.
    """

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        """As ``Store.save``. The same step raises ``LeaseLost`` unless the owner ``lease`` holds
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
        """As ``Store.replace``, with ``lease`` (of ``key``) as in ``save``. The lease ends."""

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted | bool:
        """As ``Store.delete`` of a version, with ``lease`` as in ``save``. The lease ends."""

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        """Hold the lease for ``lease_ms`` from now, or wait in the queue for it.

        Returns 0 if it is held now, else how many milliseconds to ``wait_for_release`` before
        asking again. Only the first in the queue gets a free lease. An owner that has not asked for
        ``WAITER_LIFE`` loses its place. A lease with more than twice its length left comes from a
        clock that was far ahead or has been set back, and counts as free. Raises ``Gone``
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
    expiry, even while a session still refers to it. Each call takes one total time budget, and
    may raise ``StoreUnavailable``; all of them are safe to repeat.
    """

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        """Add a frame at ``offset``, the end of the last one, and keep the blob until then.

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
        """Expire these blobs at ``at`` unless they expire earlier; at once if ``at`` is past."""


class Page(NamedTuple):
    """Some of a store's records, and the ``cursor`` that leads to the next; "" after the last.

    ``unreadable``: the keys of values that are not records.
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
    """For a store that can go through all its records, however many it has."""

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        """About ``limit`` of the unexpired records and pointers whose key starts with ``begins``.

        With ``cursor`` those after the page that had it. A record that is there from the first page
        to the last comes at least once, in no order; one created or deleted during the scan may.
        A page may be empty. Records of other prefixes may be among them: see ``is_session_key``.
        """


class Tidied(NamedTuple):
    """The counts of one clean-up step, by kind of leftover; ``cursor`` is as in ``Page``.

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
#: Lifetime in milliseconds for a large value with no expiry and no known session: browsers keep
#: no cookie longer.
LOST_EXPIRY = 400 * 86_400_000


class Upkeep(Protocol):
    """For a store that can accumulate leftovers, such as expired records."""

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
        """As ``Store.delete`` of each key; the results in the same order.

        Not atomic: after ``StoreUnavailable``, some may have been deleted. A repeat is safe.
        """


class Finding(NamedTuple):
    """The result of a check. ``severity`` is ``"ok"``, ``"warning"`` or ``"error"``."""

    severity: str
    check: str
    found: str = ""
    advice: str = ""


class Checks(Protocol):
    """For a store that can say how its server is set up."""

    def check(self) -> list[Finding]:
        """Findings for an administrator. Raises ``StoreUnavailable``."""


NEVER = float("-inf")


class Hearer(Protocol):
    """Hears of changes. Both methods are called in any thread; be quick."""

    def changed(self, keys: Iterable[str]) -> None:
        """The records under these keys were written or deleted, or have expired."""

    def lost(self) -> None:
        """Any record may have changed unheard."""


class Feed:
    """The changes at one server, as heard over one connection. After a cut there is another feed.

    ``exact_as_of``: everything that was written there between the begin of the connection and
    this moment, by the clock ``flask_gsession.live.listener.now``, has been passed on.
    """

    __slots__ = ("exact_as_of",)

    def __init__(self) -> None:
        self.exact_as_of = NEVER


class Changes(Protocol):
    """For a store that can soon notify a process which records any process has changed."""

    @property
    def unproven(self) -> str:
        """Why feeds don't say as of when they are exact, and are only hints; "" if they do."""

    @property
    def trouble(self) -> str:
        """Why nothing is heard at present, as it was logged; "" if all is well."""

    @property
    def one_feed(self) -> bool:
        """Whether one feed speaks for every record: there is only one server."""

    def hear(self, hearer: Hearer, interval: float | None = None) -> None:
        """Let ``hearer`` hear of changes, proven complete at least every ``interval`` seconds.

        ``hearer`` must not refer to the store, which could not be collected then.
        """

    def leave(self, hearer: Hearer) -> None:
        """Stop that. While nobody hears, there is no connection."""

    def feed(self, key: str) -> Feed | None:
        """The feed on which changes of this record are heard; None before it exists."""

    def start(self) -> None:
        """Start to listen in a thread, unless it runs; returns immediately."""

    def close(self) -> None:
        """Stop listening until the next use."""


class NearFigures(NamedTuple):
    """How many peeks found a usable record, no record, or an unusable one.

    ``age``: the maximum age in seconds of a record that is used now; None: none may be used.
    """

    hits: int
    misses: int
    bypasses: int
    age: float | None


class NearRecord(Record):
    """A record that is kept near, with its decoded payload once a reader has left it in ``body``.

    All readers get the same ``body``, so none may change it. Counts twice in a cache's bytes.
    """

    body: Any = None


class NearReads(Protocol):
    """For a store that keeps records near, in this process, for reads that need not be exact."""

    #: seconds that a record may be older than the one in the store
    bound: float

    def peek(self, key: str, version: int | None = None) -> NearRecord | None:
        """The record if it is kept and proven to be fresh enough. Asks nobody.

        With ``version`` only that one: a client has seen it already.
        """

    def load_near(self, key: str) -> Record | None:
        """As ``Store.load``; the store may keep the record."""

    def figures(self) -> NearFigures:
        """The figures of this process."""


class Reconciler(Protocol):
    """For an edge store: operations that only the application can do, as it has the keys."""

    def greet(self, centre: Store) -> str:
        """Why this node and the others at the centre can't read each other; "" if they can."""

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
        says that ``node`` has settled everything up to ``number``. None if ``theirs`` says so.
        Raises ``UnreadableRecord``.
        """

    def end(self, key: str, last: Record) -> None:
        """End the session under ``key`` at the centre, and what belongs to it there.

        ``last``: the record as the centre had it, or without a payload if that isn't known. Its
        user's device ends too, whatever key the session has now.
        """

    def settled(self, base: Record, there: Record, mine: Record) -> None:
        """The changes from ``base`` to ``mine`` are stored in ``there``. May be called twice."""

    def dropped(self, base: Record | None, mine: Record, why: str) -> None:
        """The changes from ``base`` to ``mine`` are given up."""


class EdgeFigures(NamedTuple):
    """The changes that a node has yet to settle with its centre, and its past.

    ``ends`` and ``changes``: sessions that wait. ``oldest_at``: when the change that waits longest
    was last confirmed, in milliseconds since 1970; None if nothing waits. ``lag``: how many seconds
    ago that was. ``settled_at``: when nothing was left to settle; 0 for never. ``settled`` and
    ``dropped``: sessions since the node began. ``trouble``: why the last attempt to settle failed;
    "" if it didn't.
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
    """The sessions that were settled. ``trouble``: why it stopped, or which sessions it left out.

    ``reached``: whether the centre was asked and answered.
    """

    ends: int = 0
    changes: int = 0
    dropped: int = 0
    trouble: str = ""
    reached: bool = True


class Edge(Protocol):
    """For a store that keeps working while its centre can't be reached."""

    #: the store at the centre, which is asked directly
    centre: Store
    #: how long a copy serves without the centre, in seconds
    offline_for: float
    #: where changes wait: the path of a file, and the prefix of the keys there
    outbox: tuple[str, str]

    @property
    def cut_off(self) -> str:
        """Why this process serves from its copy now; "" if it reaches the centre."""

    def use(self, reconciler: Reconciler) -> None:
        """Settle by this reconciler. The store keeps no strong reference to it."""

    def figures(self) -> EdgeFigures:
        """The figures of the waiting changes. One look at the local file."""

    def settle(self) -> Settled | None:
        """Look whether the centre is back, and settle with it now.

        None if another process of this node does so already.
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
