"""The parts ``scans``, ``upkeep`` and ``counts`` of a MongoDB store."""

from __future__ import annotations

from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError

from ...errors import UnreadableRecord
from ..base import OTHER_ENDS, is_record_key
from ..parts import COUNT_ALL, Counts, Page, Scans, Tidied, Upkeep
from .driver import Document, Driver, call
from .layout import Layout
from .round_trips import SessionCollection

_AT_ONCE = 1000  # documents per clean-up step, at most: a step has one call's time
_BLOBS_NEXT = "large-values:"  # prefix of clean-up cursors that come after the sessions' keys
_NO_DATES = [
    *("number", "string", "object", "array", "binData", "objectId", "bool", "regex"),
    *("javascript", "timestamp", "minKey", "maxKey"),
]
_SAMPLE = 500  # documents, independent of the collection's size


class MongoDBScans(Scans, Upkeep, Counts):
    """Scans records and large values in the order of their names."""

    def __init__(self, driver: Driver, layout: Layout) -> None:
        self.driver = driver
        self.layout = layout
        #: a further condition for records that are old enough to remove
        self.removable: Document = {}

    @call("scan")
    def scan(
        self, collection: SessionCollection, cursor: str = "", limit: int = 200, begins: str = ""
    ) -> Page:
        now = self.layout.now()
        records, unreadable = [], []
        ids, end = self._ids(collection, cursor, limit, begins)
        try:
            whole = list(collection.find({"_id": {"$in": ids}}))
        except BSONError:  # one malformed document fails the whole batch
            whole = [{"_id": name} for name in ids]
        for document in whole:
            key = document["_id"][len(self.layout.prefix) :]
            try:
                alone = len(document) == 1
                record = (
                    self.layout.read(key, collection)
                    if alone
                    else self.layout.record(key, document)
                )
            except UnreadableRecord:
                unreadable.append(key)
            else:
                if record is not None and now < record.idle_expires_at:
                    records.append(record)
        return Page(records, unreadable, end)

    @call("tidy")
    def tidy(
        self,
        collection: SessionCollection,
        cursor: str = "",
        limit: int = 1000,
        *,
        dry_run: bool = False,
    ) -> Tidied:
        """Removes documents that the TTL index leaves: without a date, or all if it is missing."""
        limit = min(limit, _AT_ONCE)
        if cursor.startswith(_BLOBS_NEXT):
            return self._tidy_blobs(collection, cursor, limit, dry_run)
        ids, end = self._ids(collection, cursor, limit)
        ours = [name for name in ids if is_record_key(name[len(self.layout.prefix) :])]
        found = {}
        for kind, expiry in (
            ("expired sessions", {"$lte": DatetimeMS(self.layout.now())}),
            ("unreadable records", {"$not": {"$type": "date"}}),
        ):
            condition: Document = {"_id": {"$in": ours}, "idle_expires_at": expiry}
            if kind == "expired sessions" and self.removable:
                condition = {"$and": [condition, self.removable]}
            if dry_run:
                found[kind] = collection.count_documents(condition)
            else:
                found[kind] = collection.delete_many(condition).deleted_count
        return Tidied(found, len(ids), end or _BLOBS_NEXT)

    def _tidy_blobs(
        self, collection: SessionCollection, cursor: str, limit: int, dry_run: bool
    ) -> Tidied:
        """Like ``tidy``, for frames of large values. Frames without a date are unreadable anyway.

        These conditions use the TTL index. Items found are gone at the next step, unless
        ``dry_run``.
        """
        skip = int(cursor.removeprefix(_BLOBS_NEXT) or 0)
        blobs, start = collection.of(self.driver.blobs), self.layout.prefix
        ended: Document = {
            "$or": [
                {"expires_at": {"$lte": DatetimeMS(self.layout.now())}},
                {"expires_at": None},
                {"expires_at": {"$type": _NO_DATES}},
            ],
            "_id": {"$gt": start, "$lt": f"{start}\U0010ffff"},
        }
        documents = list(blobs.find(ended, ["expires_at"], skip=skip, limit=limit))
        names: dict[str, set[str]] = {"expired large values": set(), "orphaned large values": set()}
        for document in documents:
            dated = isinstance(document.get("expires_at"), DatetimeMS)
            kind = "expired large values" if dated else "orphaned large values"
            names[kind].add(document["_id"].rpartition(":")[0])
        if documents and not dry_run:
            ids = [document["_id"] for document in documents]
            blobs.delete_many({**ended, "_id": {"$in": ids}})
        end = f"{_BLOBS_NEXT}{skip + limit if dry_run else 0}" if len(documents) == limit else ""
        return Tidied({kind: len(found) for kind, found in names.items()}, len(documents), end)

    def _ids(
        self, collection: SessionCollection, cursor: str, limit: int, begins: str = ""
    ) -> tuple[list[str], str]:
        """The ids after ``cursor`` whose key starts with ``begins``, and the next cursor."""
        start = self.layout.prefix + begins
        names = {"$gt": self.layout.prefix + cursor, "$gte": start, "$lt": f"{start}\U0010ffff"}
        found = collection.find({"_id": names}, ["_id"], sort=[("_id", 1)], limit=limit)
        ids = [document["_id"] for document in found]
        return ids, ids[-1][len(self.layout.prefix) :] if len(ids) == limit else ""

    @call("count")
    def count(self, collection: SessionCollection) -> int:
        """About how many sessions are live. Many sessions are estimated from a random sample."""
        now = DatetimeMS(self.layout.now())
        ours = {
            "_id": {
                "$gt": self.layout.prefix,
                "$lt": self.layout.prefix + "\x7f",
                "$not": {"$regex": f"[{OTHER_ENDS}]$"},
            },
            "successor": None,
            "idle_expires_at": {"$gt": now},
        }
        size = collection.estimated_document_count()
        if size <= COUNT_ALL:
            return int(collection.count_documents(ours))
        sample = [{"$sample": {"size": _SAMPLE}}, {"$match": ours}, {"$count": "live"}]
        found = list(collection.aggregate(sample))
        return int(size * found[0]["live"] / _SAMPLE) if found else 0
