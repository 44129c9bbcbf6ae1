"""The store contract: seven verbs on opaque records. A store knows no Flask, cookies or values.

To write a store, implement ``Store`` and run the contract suite of ``flask_gsession.testing`` on
it. Optional abilities are in ``parts``; a store around another one extends ``wrappers.Wrapper``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from string import ascii_letters, digits
from typing import TYPE_CHECKING, NamedTuple

from ..errors import StoreUnavailable

if TYPE_CHECKING:
    from .journals import Journal
    from .parts import (
        Blobs,
        Bulk,
        Changes,
        Checks,
        Counts,
        Edge,
        Leases,
        NearReads,
        Scans,
        Upkeep,
    )

Clock = Callable[[], float]

#: The most rotations within the grace of the first one.
MAX_POINTERS = 1000
KEY_LENGTH = 43  # of a session key
#: The key of the clean-up ticket: a process holds it while it cleans up, then marks it done. It
#: cannot collide with a session key: a digest never ends with ``-``, as this key does, nor with
#: ``_``, as the key of a user's roster does.
CLEANUP_KEY = "flask-gsession-clean-up".ljust(KEY_LENGTH, "-")
#: The last characters of the keys of records that aren't sessions.
OTHER_ENDS = "-_"
_NO_KEY_CHARACTERS = dict.fromkeys(map(ord, f"{ascii_letters}{digits}-_"))


class Record(NamedTuple):
    """The value that a store holds under one session key. Times: milliseconds since 1970, UTC.

    ``version`` is random for each write, so that a writer recognises its own. ``idle_expires_at``
    is never past ``absolute_expires_at``, so the record ends at that time. A record with a
    ``successor`` is a pointer: the session was rotated to that key. A chain of pointers is at most
    ``MAX_POINTERS`` long; a longer one can't be followed.
    """

    key: str
    version: int
    created_at: int
    idle_expires_at: int
    absolute_expires_at: int
    payload: bytes
    successor: str | None = None

    def __repr__(self) -> str:
        """Without the payload, so that logs and error trackers never hold session values."""
        what = f"{len(self.payload)} bytes" if self.successor is None else f"to {self.successor}"
        return f"<Record {self.key}, version {self.version}: {what}>"

    def is_live(self, now: int) -> bool:
        """Whether the record is neither expired at ``now`` nor a pointer."""
        return self.successor is None and now < self.idle_expires_at

    def kept_as_long_as(self, other: Record) -> Record:
        """This record with the later idle expiry of both, at most its own absolute expiry."""
        if other.idle_expires_at <= self.idle_expires_at:  # the fast path: every save calls this
            return self
        later = min(other.idle_expires_at, self.absolute_expires_at)
        return self if later <= self.idle_expires_at else self._replace(idle_expires_at=later)


class Deleted(NamedTuple):
    """The result of ``Store.delete``; true if there was a session.

    ``record``: the deleted record, if the store still had it. ``unconfirmed``: why too few replicas
    confirmed the logout; empty if enough did, or if none need to.
    """

    found: bool
    record: Record | None = None
    unconfirmed: str = ""

    def __bool__(self) -> bool:
        return self.found


class Replaced(NamedTuple):
    """The result of ``Store.replace``. ``unconfirmed``: as in ``Deleted``, for the old key."""

    unconfirmed: str = ""


class Store:
    """The contract: seven verbs, and optional parts.

    Each verb is one atomic step within one time budget. It may raise ``StoreUnavailable``, but
    never a driver's own error. Each is safe to repeat: a write that was applied although its reply
    was lost is recognised by its version, and a repeat never undoes a later write, logout or
    rotation.

    A part is an object, ``itself`` if the store has the methods, or None if the store lacks the
    ability.
    """

    leases: Leases | None = None
    blobs: Blobs | None = None
    scans: Scans | None = None
    upkeep: Upkeep | None = None
    counts: Counts | None = None
    checks: Checks | None = None
    changes: Changes | None = None
    near: NearReads | None = None
    bulk: Bulk | None = None
    edge: Edge | None = None
    journal: Journal | None = None
    #: Whether the store honours ``StoreOptions.logout_replicas``.
    confirms_logouts = False

    def create(self, record: Record) -> None:
        """Store ``record`` if its key holds no live record. Otherwise raises ``KeyTaken``."""
        raise NotImplementedError

    def load(self, key: str) -> Record | None:
        """Return the record or pointer as stored, or None.

        May return an expired record instead of None: requests check the times themselves, and other
        callers use ``unexpired``.

        Raises ``UnreadableRecord`` when something else is stored there. One round trip.
        """
        raise NotImplementedError

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        """Replace the live record of ``record.key``. Never creates.

        The idle expiry becomes the later one of the stored record's and ``record``'s, but not later
        than ``record``'s absolute expiry: another request may have renewed the session since it
        was loaded. With ``shorten``, it becomes ``record``'s, even if that is earlier.

        Raises ``Gone`` if there is no live record, ``Stale`` if it has another version. A repeat
        changes nothing.
        """
        raise NotImplementedError

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        """Move the idle expiry of ``record``, never past its absolute expiry; never creates.

        The version stays. Returns False if the record is not live any more, or has another version:
        then the write of that version has moved the expiry already.
        """
        raise NotImplementedError

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> Replaced | None:
        """Rotate: store ``record`` under its own new key, and ``pointer`` under the old ``key``.

        Without a pointer the old key becomes free. Of several racing rotations exactly one
        succeeds. As in ``save``, the record under ``key`` passes on its idle expiry if that is
        later, unless ``shorten``. Raises ``Gone``, ``Stale`` or ``KeyTaken`` before it changes
        anything. A store without replicas may return None.
        """
        raise NotImplementedError

    def delete(self, key: str, expected_version: int | None = None) -> Deleted | bool:
        """End the session under ``key``, following unexpired pointers. Returns whether there was
        one.

        With ``expected_version``, raises ``Stale`` or ``Gone`` unless that version is there.
        A store that returns a bool leaves the large values of the session to their own expiry.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release connections that the store opened itself."""


VERBS = ("create", "load", "save", "renew", "replace", "delete", "close")


def is_store(thing: object) -> bool:
    """Whether ``thing`` has the seven verbs. It need not be a ``Store``; ``__getattr__`` counts."""
    return not isinstance(thing, type) and all(
        callable(getattr(thing, verb, None)) for verb in VERBS
    )


def unexpired(store: Store, key: str, now: int) -> Record | None:
    """``store.load(key)``, or None if that has expired at ``now`` (milliseconds)."""
    record = store.load(key)
    return None if record is None or now >= record.idle_expires_at else record


def new_version() -> int:
    """A version for a write: 63 random bits, never 0."""
    return int.from_bytes(os.urandom(8), "big") >> 1 or 1


def too_many_pointers() -> StoreUnavailable:
    """The error of ``delete`` for a chain that is too long; raised before anything is deleted."""
    return StoreUnavailable(
        f"more than {MAX_POINTERS} rotations within their grace period: can't follow this token"
    )


def milliseconds(clock: Clock) -> int:
    return int(clock() * 1000)


def is_session_key(text: str) -> bool:
    """Whether ``text`` can be a session's key: 43 characters of ``A-Z a-z 0-9 - _``.

    The last one is a letter or digit. Keys that end with ``-`` or ``_`` belong to other records,
    such as the clean-up ticket and the rosters of users.
    """
    return is_record_key(text) and text[-1] not in OTHER_ENDS


def is_record_key(text: str) -> bool:
    """Whether ``text`` can be the key of a session, or of another record."""
    return len(text) == KEY_LENGTH and not text.translate(_NO_KEY_CHARACTERS)
