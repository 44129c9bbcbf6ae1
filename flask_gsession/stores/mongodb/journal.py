"""The part ``journal`` of a MongoDB store: each session's document has an outbox.

A write adds its entries to the document in the same step. ``recover`` moves them to the journal's
collection, in the one process that holds the ticket of the sweep. An ended session stays as a
marker until its entries have been moved. The TTL index removes nothing, since it ignores entries.

A rotation leaves its entry in the old document. The new document names the old one, and its entries
are moved later, so that the entries of one session stay in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from bson import Int64
from bson.binary import Binary
from bson.datetime_ms import DatetimeMS
from pymongo import DeleteOne, UpdateOne
from pymongo.errors import BulkWriteError, DuplicateKeyError

from ...errors import KeyTaken, UnreadableRecord
from ..base import KEY_LENGTH, MAX_POINTERS, OTHER_ENDS, Deleted, Record, new_version
from ..journals import Entries, Journal, JournalFigures
from .driver import Document, call
from .indexes import NEVER
from .layout import ENDED, OUTBOX, SINCE, with_outbox
from .records import Records
from .round_trips import SessionCollection
from .scans import MongoDBScans

JOURNAL = "gsession_journal"
_AT_ONCE = 200  # documents whose entries are moved in one step
_STEPS = 50  # at most, before the rest of the sweep
_TRIMMED = 128  # old entries are removed in batches of about this size
_OTHERS = f"[{OTHER_ENDS}]$"
_AFTER = "journal_after"
_FIELDS = [OUTBOX, SINCE, _AFTER, "successor", "idle_expires_at"]  # of a document with entries


class MongoDBJournal(Journal):
    """Entries of one prefix, numbered one by one as they are moved."""

    def __init__(self, records: Records, scans: MongoDBScans) -> None:
        self._records = records
        self._scans = scans
        self.driver = records.driver
        self.layout = records.layout
        self._most = 0

    def begin(self, most: int) -> None:
        self._most = most
        self.driver.expire_after = NEVER
        self._records.mark = partial(self._marker, ())
        self._scans.removable = {
            SINCE: None,
            "$or": [{"successor": {"$ne": None}}, {"_id": {"$regex": _OTHERS}}],
        }

    # Writes.

    @call("create")
    def create(
        self, collection: SessionCollection, record: Record, entries: Sequence[bytes]
    ) -> None:
        self.driver.ensure_index(collection)
        document = {**self.layout.document(record), **self._outbox(entries)}
        try:
            collection.insert_one(document)
        except DuplicateKeyError:
            there = self.layout.read(record.key, collection)
            if there is not None and there.version == record.version:
                return
            if there is None or there.successor != ENDED:
                raise KeyTaken from None
            # The key's earlier session has ended. Its entries come first.
            self.recover()
            condition = {**self.layout.is_version(record.key, there.version), SINCE: None}
            collection.delete_one(condition)
            try:
                collection.insert_one(document)
            except DuplicateKeyError:
                raise KeyTaken from None

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        self._put_off()
        self._records.save(record, expected_version, lease, shorten=shorten)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        self._put_off()
        return self._records.renew(record, idle_expires_at)

    def _put_off(self) -> None:
        if not self.driver.is_indexed():
            self._ensure_index()

    @call("create index")
    def _ensure_index(self, collection: SessionCollection) -> None:
        self.driver.ensure_index(collection)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        entries: Sequence[bytes],
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        self._put_off()
        self._records.replace(
            key,
            record,
            expected_version,
            pointer,
            lease,
            shorten=shorten,
            outbox=self._outbox(entries),
            after={_AFTER: self.layout.prefix + key},
        )

    @call("delete")
    def end(
        self,
        collection: SessionCollection,
        key: str,
        expected_version: int,
        entries: Sequence[bytes],
        lease: str | None = None,
    ) -> Deleted:
        condition = {
            **self.layout.live(key),
            "version": Int64(expected_version),
            **self.layout.held(lease),
        }
        marker = self._marker(entries)
        if collection.update_one(condition, marker).matched_count == 0:
            self._records.explain(key, collection, lease)
        return Deleted(True)

    def _marker(self, entries: Sequence[bytes]) -> list[Document]:
        """The update that removes everything from a session but its entries."""
        now = DatetimeMS(self.layout.now())
        fields = {
            "version": Int64(new_version()),
            "idle_expires_at": now,
            "payload": b"",
            "successor": {"$literal": ENDED},
            **with_outbox(self._outbox(entries)),
        }
        return [{"$set": fields}, {"$unset": ["lease"]}]

    def _outbox(self, entries: Sequence[bytes]) -> Document:
        if not entries:
            return {}
        since = DatetimeMS(self.layout.now())
        return {OUTBOX: [Binary(entry) for entry in entries], SINCE: since}

    # The sweep.

    @call("scan")
    def due(self, collection: SessionCollection, limit: int) -> list[Record]:
        found = []
        for document in collection.find(self._due(), sort=[("idle_expires_at", 1)], limit=limit):
            key = document["_id"][len(self.layout.prefix) :]
            try:
                found.append(self.layout.record(key, document))
            except UnreadableRecord:
                end = int(document["idle_expires_at"])
                found.append(Record(key, 0, 0, end, 0, b""))
        return found

    def _due(self) -> Document:
        return {
            "idle_expires_at": {"$lte": DatetimeMS(self.layout.now())},
            "successor": None,
            "_id": {**self._ours(), "$not": {"$regex": _OTHERS}},
        }

    def _ours(self) -> Document:
        """The condition for ids of this prefix, and not of longer ones that begin with it."""
        start = self.layout.prefix
        whole = f"^.{{{len(start) + KEY_LENGTH}}}$"
        return {"$gt": start, "$lt": f"{start}\x7f", "$regex": whole}

    def expire(self, expired: Sequence[tuple[Record, bytes]]) -> int:
        removed = self._mark(expired) if expired else 0
        self.recover()
        return removed

    @call("delete")
    def _mark(self, collection: SessionCollection, expired: Sequence[tuple[Record, bytes]]) -> int:
        now = DatetimeMS(self.layout.now())
        marks = []
        for record, entry in expired:
            condition: Document = {
                "_id": self.layout.prefix + record.key,
                "successor": None,
                "idle_expires_at": {"$eq": DatetimeMS(record.idle_expires_at), "$lte": now},
            }
            if record.version:
                condition["version"] = Int64(record.version)
            marks.append(UpdateOne(condition, self._marker([entry])))
        return int(collection.bulk_write(marks, ordered=False).matched_count)

    def recover(self) -> int:
        moved = 0
        for _ in range(_STEPS):
            done = self._move()
            moved += done
            if done < _AT_ONCE:
                break
        self._remove_old()
        return moved

    @call("delete")
    def _remove_old(self, collection: SessionCollection) -> None:
        """Remove the pointers, rosters and other records that the TTL index would remove."""
        now = DatetimeMS(self.layout.now())
        condition = {"idle_expires_at": {"$lte": now}, **self._scans.removable}
        collection.delete_many({"$and": [condition, {"_id": self._ours()}]})

    @call("journal")
    def _move(self, collection: SessionCollection) -> int:
        """Move the entries of some documents. Returns the number of documents."""
        condition = {SINCE: {"$type": "date"}, "_id": self._ours()}
        waiting = list(collection.find(condition, _FIELDS, sort=[(SINCE, 1)], limit=_AT_ONCE))
        if not waiting:
            return 0
        documents = self._in_order(collection, waiting)
        self._add(
            collection, [bytes(entry) for each in documents for entry in each.get(OUTBOX, [])]
        )
        done: list[UpdateOne | DeleteOne] = []
        now = self.layout.now()
        for document in documents:
            same = {"_id": document["_id"], OUTBOX: document.get(OUTBOX, [])}
            # Keep a marker until its time is up: a repeat of the rotation looks for it.
            if document.get("successor") == ENDED and int(document["idle_expires_at"]) <= now:
                done.append(DeleteOne({**same, "successor": ENDED}))
            else:
                done.append(UpdateOne(same, {"$unset": {OUTBOX: "", SINCE: "", _AFTER: ""}}))
        result = collection.bulk_write(done, ordered=False)
        if result.matched_count + result.deleted_count < len(documents):
            # Remove only the entries that were moved: new ones may have been added.
            moved = [
                UpdateOne({"_id": each["_id"]}, {"$pull": {OUTBOX: {"$in": each.get(OUTBOX, [])}}})
                for each in documents
            ]
            collection.bulk_write(moved, ordered=False)
        return len(waiting)

    def _in_order(
        self, collection: SessionCollection, waiting: Sequence[Document]
    ) -> list[Document]:
        """Sort documents: each comes after the one it was rotated from, if that waits too."""
        found = {each["_id"]: each for each in waiting}
        for _ in range(MAX_POINTERS):
            before = {each.get(_AFTER) for each in found.values()} - {None, *found}
            if not before:
                break
            condition = {SINCE: {"$type": "date"}, "_id": {"$in": list(before)}}
            more = list(collection.find(condition, _FIELDS))
            found.update((each["_id"], each) for each in more)
            if not more:
                break
        ordered: dict[str, Document] = {}
        for name in found:
            chain: list[str] = []
            while name in found and name not in ordered and name not in chain:
                chain.append(name)
                name = found[name].get(_AFTER, "")
            ordered.update((each, found[each]) for each in reversed(chain))
        return list(ordered.values())

    # The journal.

    @call("journal")
    def append(
        self, collection: SessionCollection, entries: Sequence[bytes], key: str | None = None
    ) -> None:
        if key is not None:  # to come after the entries that wait in its document
            update = [{"$set": with_outbox(self._outbox(entries))}]
            if collection.update_one({"_id": self.layout.prefix + key}, update).matched_count:
                return
        self._add(collection, entries)

    def _add(self, collection: SessionCollection, entries: Sequence[bytes]) -> None:
        journal, left = self._journal(collection), list(entries)
        while left:
            last = self._edge(journal, -1)
            numbered = enumerate(left, last + 1)
            documents = [
                {"_id": self._id(number), "number": Int64(number), "entry": Binary(entry)}
                for number, entry in numbered
            ]
            try:
                journal.insert_many(documents)
                done = len(left)
            except BulkWriteError as error:  # another process adds entries at the same time
                if any(each.get("code") != 11000 for each in error.details["writeErrors"]):
                    raise
                done = error.details["nInserted"]
            after = last + done
            if after // _TRIMMED != last // _TRIMMED and after > self._most:
                oldest = {"$gte": self._id(0), "$lte": self._id(after - self._most)}
                journal.delete_many({"_id": oldest})
            left = left[done:]

    def _journal(self, collection: SessionCollection) -> SessionCollection:
        return collection.of(
            collection.database[JOURNAL].with_options(
                codec_options=collection.codec_options,
                read_preference=collection.read_preference,
                read_concern=collection.read_concern,
                write_concern=collection.write_concern,
            )
        )

    # Prefixes have no braces, so these ids can't belong to a longer prefix that begins with this
    # one.

    def _id(self, number: int) -> str:
        return f"{self.layout.prefix}{{events}}{number:020d}"

    def _id_end(self) -> str:
        return f"{self.layout.prefix}{{events}}:"

    def _consumer(self, name: str) -> str:
        return f"{self.layout.prefix}{{consumers}}{name}"

    def _edge(self, journal: SessionCollection, direction: int) -> int:
        """The first or last number; 0 if there is none."""
        numbers = {"$gt": self._id(0), "$lt": self._id_end()}
        found = journal.find_one({"_id": numbers}, ["number"], sort=[("_id", direction)])
        return 0 if found is None else int(found["number"])

    @call("journal")
    def read(self, collection: SessionCollection, after: int, limit: int) -> Entries:
        numbers = {"$gt": self._id(after), "$lt": self._id_end()}
        found = self._journal(collection).find({"_id": numbers}, sort=[("_id", 1)], limit=limit)
        entries = [(int(each["number"]), bytes(each["entry"])) for each in found]
        return Entries(entries, entries[0][0] if entries else after + 1)

    @call("journal")
    def acknowledge(self, collection: SessionCollection, consumer: str, number: int) -> None:
        self._journal(collection).update_one(
            {"_id": self._consumer(consumer)}, {"$max": {"number": Int64(number)}}, upsert=True
        )

    @call("journal")
    def acknowledged(self, collection: SessionCollection, consumer: str) -> int | None:
        found = self._journal(collection).find_one({"_id": self._consumer(consumer)})
        return None if found is None else int(found["number"])

    @call("journal")
    def forget(self, collection: SessionCollection, consumer: str) -> bool:
        done = self._journal(collection).delete_one({"_id": self._consumer(consumer)})
        return bool(done.deleted_count)

    @call("journal")
    def figures(self, collection: SessionCollection) -> JournalFigures:
        journal, start = self._journal(collection), self._consumer("")
        due = int(collection.count_documents(self._due()))
        oldest: Any = None
        if due:
            oldest = collection.find_one(
                self._due(), ["idle_expires_at"], sort=[("idle_expires_at", 1)]
            )
        names = {"$gte": start, "$lt": f"{start}\x7f"}
        consumers = {
            each["_id"].removeprefix(start): int(each["number"])
            for each in journal.find({"_id": names})
        }
        first, last = self._edge(journal, 1), self._edge(journal, -1)
        when = 0 if oldest is None else int(oldest["idle_expires_at"])
        return JournalFigures(first, last, due, when, consumers)
