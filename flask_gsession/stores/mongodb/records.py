"""The verbs on records in MongoDB; a write may name a lease."""

from __future__ import annotations

from collections.abc import Callable

from bson import Int64
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError
from pymongo.errors import DuplicateKeyError

from ...errors import Gone, KeyTaken, LeaseLost, Stale
from ..base import MAX_POINTERS, Deleted, Record, too_many_pointers
from .driver import Document, Driver, call, check_not_secondary, reraise_interruption
from .layout import ENDED, SINCE, Layout, replaced_by
from .round_trips import SessionCollection


class Records:
    """Keeps records."""

    def __init__(self, driver: Driver, layout: Layout) -> None:
        self.driver = driver
        self.layout = layout
        #: with a journal: the update that ends a session whose document still has entries
        self.mark: Callable[[], list[Document]] | None = None

    @call("create")
    def create(self, collection: SessionCollection, record: Record) -> None:
        for _ in range(2):
            try:
                collection.insert_one(self.layout.document(record))
                self.driver.ensure_index(collection)
                return
            except DuplicateKeyError:
                there = self.layout.read(record.key, collection)
                if there is None:
                    continue
                if self.layout.now() < there.idle_expires_at and there.successor != ENDED:
                    if there.version == record.version:
                        return
                    raise KeyTaken from None
                collection.delete_one(self.layout.is_version(record.key, there.version))
        raise KeyTaken

    @call("load")
    def load(self, collection: SessionCollection, key: str) -> Record | None:
        record = self.layout.read(key, collection.of(self.driver.collection_to_load))
        if self.driver.direct:
            check_not_secondary(collection.database.client)
        return None if record is not None and record.successor == ENDED else record

    @call("save")
    def save(
        self,
        collection: SessionCollection,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        document = self.layout.document(record)
        del document["_id"]
        given, end = document["idle_expires_at"], document["absolute_expires_at"]
        if not shorten:
            later = {"$max": ["$idle_expires_at", given]}
            document["idle_expires_at"] = {"$min": [later, end]}
        # A pipeline, since the expiry is compared. A payload of bytes needs no quoting there.
        done = collection.update_one(
            {
                **self.layout.live(record.key),
                "version": Int64(expected_version),
                **self.layout.held(lease),
            },
            [{"$set": document}],
        )
        if done.matched_count == 0:
            self.explain(record.key, collection, lease, record.version)

    @call("renew")
    def renew(self, collection: SessionCollection, record: Record, idle_expires_at: int) -> bool:
        later = min(idle_expires_at, record.absolute_expires_at)
        done = collection.update_one(
            {**self.layout.live(record.key), "version": Int64(record.version)},
            {"$max": {"idle_expires_at": DatetimeMS(later)}},
        )
        return bool(done.matched_count)

    @call("replace")
    def replace(
        self,
        collection: SessionCollection,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str | None = None,
        *,
        shorten: bool = False,
        outbox: Document | None = None,
        after: Document | None = None,
    ) -> None:
        """Like ``Store.replace``. For the journal, ``outbox`` is added to the old document, and
        ``after`` are fields of the new one.
        """
        # Two documents, two steps. Between them no client can reach the new record, since its token
        # hasn't left the server. The second step decides atomically which rotation wins. It always
        # leaves a pointer, so that a repeat knows that this rotation, and not a logout, ended the
        # session under the old key.
        repeated = False
        try:
            document = self.layout.document(record)
            if after is not None:
                document.update(after)
            collection.insert_one(document)
        except DuplicateKeyError:
            there = self.layout.read(record.key, collection)
            if there is None or there.version != record.version:
                raise KeyTaken from None
            repeated = True
        left = self.layout.document(pointer or self.layout.end_of(key, record))
        while True:
            old = {
                **self.layout.live(key),
                "version": Int64(expected_version),
                **self.layout.held(lease),
            }
            if not shorten:
                old["idle_expires_at"]["$lte"] = DatetimeMS(record.idle_expires_at)
            if outbox is None:
                done = collection.replace_one(old, left)
            else:
                done = collection.update_one(old, replaced_by(left, outbox))
            if done.matched_count == 1:
                return
            there = self.layout.read(key, collection)
            if shorten or there is None or there.idle_expires_at <= record.idle_expires_at:
                break
            # Another request renewed the session: the new record must not expire earlier.
            later = min(there.idle_expires_at, record.absolute_expires_at)
            shorten = later < there.idle_expires_at
            record = record._replace(idle_expires_at=later)
            if there.version != expected_version or there.successor is not None:
                break
            collection.update_one(
                self.layout.is_version(record.key, record.version),
                {"$max": {"idle_expires_at": DatetimeMS(later)}},
            )
        if (
            repeated
            and there is not None
            and there.version == left["version"]
            and there.successor == left["successor"]
        ):
            return
        collection.delete_one(self.layout.is_version(record.key, record.version))
        self.explain(key, collection, lease)

    @call("delete")
    def delete(
        self,
        collection: SessionCollection,
        key: str,
        expected_version: int | None = None,
        lease: str | None = None,
    ) -> Deleted:
        if expected_version is not None:
            condition = {
                **self.layout.live(key),
                "version": Int64(expected_version),
                **self.layout.held(lease),
            }
            if collection.delete_one(condition).deleted_count == 0:
                self.explain(key, collection, lease)
            return Deleted(True)
        key, document = self._pop(key, collection)
        if not document:  # no session, or only a marker of one
            return Deleted(document is not None)
        return Deleted(True, self.layout.record(key, document))

    def _pop(self, key: str, collection: SessionCollection) -> tuple[str, Document | None]:
        """Delete a session, through pointers; returns its key and record."""
        # Successors are deleted before their pointers, so that a repeat still finds them.
        pointers: dict[str, Record] = {}
        ended: Document | None = None
        for _ in range(MAX_POINTERS):
            try:
                if self.mark is None:
                    ended = collection.find_one_and_delete(self.layout.live(key))
            except BSONError as error:
                reraise_interruption(error)
                ended = {}
            # Only this read waits for a majority, which must agree that there is no session.
            if ended is None and self._remove(collection, self.layout.live(key)):
                ended = {}
            there = None if ended is not None else self.layout.read(key, collection)
            if there is None or there.successor == ENDED:
                break
            pointers[key] = there
            if not there.successor or self.layout.now() >= there.idle_expires_at:
                break
            key = there.successor
            if type(key) is not str or key in pointers:  # a forged pointer, or a circle
                break
        else:
            raise too_many_pointers()
        for pointer in reversed(pointers.values()):
            self._remove(collection, self.layout.is_version(pointer.key, pointer.version))
        return key, ended

    def _remove(self, collection: SessionCollection, condition: Document) -> bool:
        """Delete a document, or leave it to the journal while entries wait in it."""
        if self.mark is not None:
            waiting = {**condition, SINCE: {"$type": "date"}}
            if collection.update_one(waiting, self.mark()).matched_count:
                return True
        return bool(collection.delete_one(condition).deleted_count)

    def explain(
        self,
        key: str,
        collection: SessionCollection,
        lease: str | None = None,
        mine: int | None = None,
    ) -> None:
        """Raise the error for a write that did nothing. Return if it repeats an applied write."""
        there = self.layout.read(key, collection)
        if there is None or not there.is_live(self.layout.now()):
            raise Gone
        if there.version == mine:
            return
        if lease is not None:
            condition = {"_id": self.layout.prefix + key, **self.layout.held(lease)}
            if collection.find_one(condition, ["_id"]) is None:
                raise LeaseLost
        raise Stale
