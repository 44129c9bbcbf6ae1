"""How records and leases are stored in MongoDB: one document for each session.

The payload is one binary field. The lease of a session and its queue are the field "lease" of the
same document. It ends with the document; a save keeps it, and a rotation leaves it behind.

::

    {"owner": "...", "until": 1700000000000, "waiters": [{"owner": "...", "seen": 1700000000000}]}
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bson import Int64
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError

from ...errors import UnreadableRecord
from ..base import Clock, Record, milliseconds
from ..lease import Lease
from .driver import Document, in_a_thread, reraise_interruption
from .round_trips import SessionCollection

ENDED = ""  # the successor in a marker that a rotation without a pointer leaves
OUTBOX, SINCE = "journal", "journal_at"  # entries for the journal, and when the first was added
_END_SHOWN = 10_000  # milliseconds for which a repeated rotation can find its marker


class Layout:
    """The documents of one prefix, and conditions on them."""

    def __init__(self, prefix: str, clock: Clock) -> None:
        self.prefix = prefix
        self.clock = clock

    def now(self) -> int:
        """The time in milliseconds."""
        return milliseconds(self.clock)

    def live(self, key: str) -> Document:
        now = DatetimeMS(self.now())
        return {"_id": self.prefix + key, "successor": None, "idle_expires_at": {"$gt": now}}

    def is_version(self, key: str, version: int) -> Document:
        return {"_id": self.prefix + key, "version": Int64(version)}

    def held(self, lease: str | None) -> Document:
        """The condition that this owner holds the lease; empty if ``lease`` is None."""
        if lease is None:
            return {}
        return {"lease.owner": lease, "lease.until": {"$gt": self.now()}}

    def end_of(self, key: str, record: Record) -> Record:
        """A short-lived marker under a key that ended by a rotation; ``load`` ignores it."""
        end = self.now() + _END_SHOWN
        return record._replace(
            key=key,
            idle_expires_at=end,
            absolute_expires_at=end,
            payload=b"",
            successor=ENDED,
        )

    def document(self, record: Record) -> Document:
        return {
            "_id": self.prefix + record.key,
            "version": Int64(record.version),
            "created_at": DatetimeMS(record.created_at),
            "idle_expires_at": DatetimeMS(record.idle_expires_at),
            "absolute_expires_at": DatetimeMS(record.absolute_expires_at),
            "payload": record.payload,
            "successor": record.successor,
        }

    def read(self, key: str, collection: SessionCollection) -> Record | None:
        find = partial(collection.find_one, {"_id": self.prefix + key})
        try:
            document = find()
        except BSONError as error:
            reraise_interruption(error)
            # The driver raises this for any exception during decoding, and for a stack overflow. In
            # a new thread neither can happen, so there an error means a damaged document.
            try:
                document = in_a_thread(find)
            except BSONError as again:
                raise UnreadableRecord("corrupt", type(again).__name__) from None
        return None if document is None else self.record(key, document)

    def record(self, key: str, document: Document) -> Record:
        get: Callable[[str], Any] = document.get
        version, payload, successor = get("version"), get("payload"), get("successor")
        created, idle, absolute = map(get, ("created_at", "idle_expires_at", "absolute_expires_at"))
        if not (
            get("_id") == self.prefix + key
            and type(version) in (int, Int64)
            and isinstance(payload, bytes)
            and (successor is None or isinstance(successor, str))
            and isinstance(created, DatetimeMS)
            and isinstance(idle, DatetimeMS)
            and isinstance(absolute, DatetimeMS)
        ):
            raise UnreadableRecord("corrupt", "missing fields or wrong types")
        return Record(key, int(version), int(created), int(idle), int(absolute), payload, successor)


def lease_of(document: Document) -> Lease:
    lease = document.get("lease")
    if not isinstance(lease, dict):
        return Lease()
    try:
        waiters = {waiter["owner"]: waiter["seen"] for waiter in lease.get("waiters", ())}
    except (TypeError, KeyError):
        return Lease()  # malformed; the next owner replaces it
    return Lease.of(lease.get("owner", ""), lease.get("until", 0), lease.get("length", 0), waiters)


def with_outbox(outbox: Document) -> Document:
    """The pipeline fields that append these entries to the document's."""
    if not outbox:
        return {}
    there = {"$ifNull": [f"${OUTBOX}", []]}
    return {
        OUTBOX: {"$concatArrays": [there, outbox[OUTBOX]]},
        SINCE: {"$ifNull": [f"${SINCE}", outbox[SINCE]]},
    }


def replaced_by(document: Document, outbox: Document) -> list[Document]:
    """The update that replaces a document, except for the entries that wait in it."""
    fields = {name: {"$literal": value} for name, value in document.items() if name != "_id"}
    return [{"$set": {**fields, **with_outbox(outbox)}}, {"$unset": ["lease"]}]
