"""The part ``leases`` of a MongoDB store: ``Lease`` as update pipelines on the server."""

from __future__ import annotations

from bson import Int64
from pymongo import ReturnDocument

from ...errors import Gone, QueueFull
from ..base import Deleted, Record
from ..lease import LONGEST_LEASE, WAITER_LIFE, poll
from ..parts import Leases
from .driver import Document, call
from .layout import lease_of
from .records import Records
from .round_trips import SessionCollection


class MongoDBLeases(Leases):
    """Lends sessions."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.driver = records.driver
        self.layout = records.layout

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        self._records.save(record, expected_version, lease, shorten=shorten)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str,
        *,
        shorten: bool = False,
    ) -> None:
        self._records.replace(key, record, expected_version, pointer, lease, shorten=shorten)

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted:
        return self._records.delete(key, expected_version, lease)

    @call("acquire")
    def acquire(
        self, collection: SessionCollection, key: str, owner: str, lease_ms: int, max_waiters: int
    ) -> int:
        now = self.layout.now()
        found = collection.find_one_and_update(
            self.layout.live(key),
            _acquisition(owner, now, lease_ms, max_waiters),
            projection=["lease"],
            return_document=ReturnDocument.AFTER,
        )
        if found is None:
            raise Gone
        lease = lease_of(found)
        if lease.owner != owner and owner not in lease.waiters:
            raise QueueFull
        # The server has decided. Applied to the outcome, this computes how long to wait.
        return lease.acquire(owner, now, lease_ms, max_waiters)

    @call("extend")
    def extend(self, collection: SessionCollection, key: str, owner: str, lease_ms: int) -> bool:
        until = Int64(self.layout.now() + lease_ms)
        done = collection.update_one(
            {"_id": self.layout.prefix + key, **self.layout.held(owner)},
            {"$set": {"lease.until": until, "lease.length": Int64(lease_ms)}},
        )
        return bool(done.matched_count)

    @call("release")
    def release(self, collection: SessionCollection, key: str, owner: str) -> bool:
        before = collection.find_one_and_update(
            {"_id": self.layout.prefix + key, "lease": {"$exists": True}},
            _release(owner),
            projection=["lease"],
        )
        return before is not None and lease_of(before).is_held_by(owner, self.layout.now())

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        poll(lambda: self._is_turn_of(key, owner), seconds)

    @call("wait_for_release")
    def _is_turn_of(self, collection: SessionCollection, key: str, owner: str) -> bool:
        found = collection.find_one({"_id": self.layout.prefix + key}, ["lease"])
        return found is None or lease_of(found).is_turn_of(owner, self.layout.now())


def _is(kind: list[str], field: str) -> Document:
    return {"$in": [{"$type": field}, kind]}


def _cleaned(keep: Document | bool) -> list[Document]:
    """The stages that repair a missing or malformed lease, and drop waiters that aren't in
    ``keep``.

    A malformed lease would make each later stage fail.
    """
    text, number = ["string"], ["int", "long"]
    is_waiter = {"$and": [_is(text, "$$this.owner"), _is(number, "$$this.seen"), keep]}
    waiters = "$lease.waiters"
    return [
        {"$set": {"lease": {"$cond": [_is(["object"], "$lease"), "$lease", "$$REMOVE"]}}},
        {
            "$set": {
                "lease": {
                    "owner": {"$cond": [_is(text, "$lease.owner"), "$lease.owner", ""]},
                    "until": {"$cond": [_is(number, "$lease.until"), "$lease.until", Int64(0)]},
                    "length": {"$cond": [_is(number, "$lease.length"), "$lease.length", Int64(0)]},
                    "waiters": {
                        "$filter": {
                            "input": {"$cond": [{"$isArray": [waiters]}, waiters, []]},
                            "cond": is_waiter,
                        }
                    },
                }
            }
        },
    ]


def _acquisition(owner: str, now: int, lease_ms: int, max_waiters: int) -> list[Document]:
    """The pipeline of ``Lease.acquire``."""
    me = {"$literal": owner}
    mine = {"$eq": ["$$this.owner", me]}
    age = {"$abs": {"$subtract": ["$$this.seen", Int64(now)]}}
    seen = {"$lt": [age, WAITER_LIFE]}
    waiters = "$lease.waiters"
    others = {"$filter": {"input": waiters, "cond": {"$ne": ["$$this.owner", me]}}}
    first = {"$ifNull": [{"$first": {"$map": {"input": waiters, "in": "$$this.owner"}}}, me]}
    running = {"$gt": ["$lease.until", Int64(now)]}
    # So late an end comes from a clock that was far ahead, or has been set back.
    length = {"$min": ["$lease.length", LONGEST_LEASE]}
    latest = {"$add": [Int64(now), {"$multiply": [2, length]}]}
    free = {"$or": [{"$not": [running]}, {"$gt": ["$lease.until", latest]}]}
    may_take = {
        "$or": [
            {"$and": [{"$eq": ["$lease.owner", me]}, running]},
            {"$and": [free, {"$eq": [first, me]}]},
        ]
    }
    entry = {"owner": me, "seen": Int64(now)}
    queue = {
        "$switch": {
            "branches": [
                {
                    "case": {"$in": [me, {"$map": {"input": waiters, "in": "$$this.owner"}}]},
                    "then": {"$map": {"input": waiters, "in": {"$cond": [mine, entry, "$$this"]}}},
                },
                {
                    "case": {"$lt": [{"$size": waiters}, max_waiters]},
                    "then": {"$concatArrays": [waiters, [entry]]},
                },
            ],
            "default": waiters,
        }
    }
    return [
        *_cleaned({"$or": [mine, seen]}),
        {
            "$set": {
                "lease": {
                    "$cond": [
                        may_take,
                        {
                            "owner": me,
                            "until": Int64(now + lease_ms),
                            "length": Int64(lease_ms),
                            "waiters": others,
                        },
                        {
                            "owner": "$lease.owner",
                            "until": "$lease.until",
                            "length": "$lease.length",
                            "waiters": queue,
                        },
                    ]
                }
            }
        },
    ]


def _release(owner: str) -> list[Document]:
    """The pipeline of ``Lease.release``. Removes the field if no owner holds it or waits."""
    me = {"$literal": owner}
    mine = {"$eq": ["$lease.owner", me]}
    others = {"$filter": {"input": "$lease.waiters", "cond": {"$ne": ["$$this.owner", me]}}}
    return [
        *_cleaned(True),
        {
            "$set": {
                "lease": {
                    "owner": {"$cond": [mine, "", "$lease.owner"]},
                    "until": {"$cond": [mine, Int64(0), "$lease.until"]},
                    "length": {"$cond": [mine, Int64(0), "$lease.length"]},
                    "waiters": others,
                }
            }
        },
        {
            "$set": {
                "lease": {
                    "$cond": [
                        {"$and": [{"$eq": ["$lease.owner", ""]}, {"$eq": ["$lease.waiters", []]}]},
                        "$$REMOVE",
                        "$lease",
                    ]
                }
            }
        },
    ]
