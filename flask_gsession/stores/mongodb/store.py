"""Sessions in MongoDB 5.0 or newer: one document per session, the payload as one binary field.

Writes are acknowledged by a majority, loads ask the primary, by default for what it has itself. A
TTL index removes what has expired; since its sweep is up to a minute late, expiry is also checked
on every read and write.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import partial
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar
from urllib.parse import urlsplit

import pymongo
from bson import CodecOptions, Int64
from bson.codec_options import DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError
from pymongo import MongoClient, ReadPreference, ReturnDocument
from pymongo.errors import (
    ConfigurationError,
    DuplicateKeyError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    WaitQueueTimeoutError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern
from pymongo.uri_parser import parse_uri
from pymongo.write_concern import WriteConcern

from ...errors import (
    Gone,
    GSessionError,
    KeyTaken,
    LeaseLost,
    QueueFull,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
)
from ...events import logger
from ...processes import process, warn_without_threads
from ..base import (
    MAX_POINTERS,
    TICKET,
    Deleted,
    Record,
    Store,
    is_session_key,
    milliseconds,
    too_many_pointers,
)
from ..interrupts import interruption
from ..lease import LONGEST_LEASE, WAITER_LIFE, Lease, poll
from ..parts import COUNT_ALL, Finding, Page, Tidied, itself
from ..support import StoreOptions, closing
from .health import checked
from .round_trips import NO_PAYLOADS, SessionCollection

COLLECTION = "gsession"
BLOBS = "gsession_blobs"
DATABASE = "gsession"

_ENDED = ""  # the successor in what a rotation without a pointer leaves
_END_SHOWN = 10_000  # milliseconds for which that tells a repeat that it was done
_AT_ONCE = 1000  # documents that a step of a clean-up looks at, at most: it has one call's time
_BLOBS_NEXT = "large-values:"  # begins the cursors of a clean-up after those that are keys
_NO_DATES = [
    *("number", "string", "object", "array", "binData", "objectId", "bool", "regex"),
    *("javascript", "timestamp", "minKey", "maxKey"),
]
_SAMPLE = 500  # documents, whatever their number
_READ_CONCERNS = ("local", "majority", "linearizable")
_HINTS = {
    13: ": the user lacks a right on the collection, or there is no user",
    18: ": no such user, another password, or another authSource",
}

P = ParamSpec("P")
T = TypeVar("T")

_Document = dict[str, Any]
_Client = MongoClient[_Document]


def check_url(url: str) -> None:
    """Raises what the driver raises for a URL it cannot read. Asks no server."""
    if url.startswith("mongodb+srv:"):  # parsing it whole would ask the name server
        parts = urlsplit(url)
        if not parts.hostname or "," in parts.netloc or parts.port is not None:
            raise InvalidURI("mongodb+srv takes one host and no port")
    else:
        level = parse_uri(url)["options"].get("readConcernLevel", "local")
        if level not in _READ_CONCERNS:
            raise ConfigurationError(f"readConcernLevel is one of {', '.join(_READ_CONCERNS)}")


def _call(
    operation: str,
) -> Callable[
    [Callable[Concatenate[MongoDBStore, SessionCollection, P], T]],
    Callable[Concatenate[MongoDBStore, P], T],
]:
    """One call of a store: the method gets the collection, and the call's time for all it does.

    It runs in a context and a driver session of its own. An interrupt can strike the driver between
    any two steps; whatever state that leaves behind, no later call meets it: neither a deadline
    that is over, nor a server session that two threads use, one of whose writes would be taken for
    a repeat of the other's and do nothing.
    """

    def decorate(
        method: Callable[Concatenate[MongoDBStore, SessionCollection, P], T],
    ) -> Callable[Concatenate[MongoDBStore, P], T]:
        def within(store: MongoDBStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with _Call(store, operation) as collection:
                session = collection.database.client.start_session(causal_consistency=False)
                try:
                    answer = method(store, SessionCollection(collection, session), *args, **kwargs)
                except (GSessionError, PyMongoError):
                    session.end_session()
                    raise
                session.end_session()  # not after an interrupt: it may be in the pool already
                return answer

        @functools.wraps(method)
        def call(store: MongoDBStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return copy_context().run(within, store, *args, **kwargs)

        del call.__wrapped__  # it has another signature
        return call

    return decorate


class MongoDBStore(Store):
    """Keeps records in the collection ``gsession`` of the URL's database (default ``gsession``).

    ``url_or_client``: a URL, or an existing ``MongoClient``, which is then never closed. A client
    made from a URL is made at first use, anew in each forked worker.
    """

    leases = blobs = scans = upkeep = counts = checks = itself

    def __init__(self, url_or_client: str | _Client, options: StoreOptions | None = None):
        options = options or StoreOptions()
        self._clock = options.clock
        self._timeout = options.timeout
        self._prefix = options.prefix
        self._pool_max = options.pool_max
        self._source = url_or_client
        self._close_client: weakref.finalize[..., object] | None = None
        self._inherited: list[Any] = []
        self._collection_of_client: Any = None
        self._collection_to_load: Any = None
        self._blobs_of_client: Any = None
        self._direct = False
        self._pid = 0
        self._indexed: set[str] = set()
        self._lock = threading.Lock()
        process.register(self._begin)
        warn_without_threads("PyMongo notices late that a server went down or came back")
        logging.getLogger("pymongo.command").addFilter(NO_PAYLOADS)

    @_call("create")
    def create(self, collection: SessionCollection, record: Record) -> None:
        for _ in range(2):
            try:
                collection.insert_one(self._document(record))
                self._ensure_index(collection)
                return
            except DuplicateKeyError:
                there = self._read(record.key, collection)
                if there is None:
                    continue
                if self._now() < there.idle_expires_at and there.successor != _ENDED:
                    if there.version == record.version:
                        return
                    raise KeyTaken from None
                collection.delete_one(self._is_version(record.key, there.version))
        raise KeyTaken

    @_call("load")
    def load(self, collection: SessionCollection, key: str) -> Record | None:
        record = self._read(key, collection.of(self._collection_to_load))
        if self._direct:
            _check_not_secondary(collection.database.client)
        return None if record is not None and record.successor == _ENDED else record

    @_call("save")
    def save(
        self,
        collection: SessionCollection,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        document = self._document(record)
        del document["_id"]
        given, end = document["idle_expires_at"], document["absolute_expires_at"]
        if not shorten:
            later = {"$max": ["$idle_expires_at", given]}
            document["idle_expires_at"] = {"$min": [later, end]}
        # As a pipeline, for the comparison: a payload that is bytes needs no quotes there.
        done = collection.update_one(
            {
                **self._live(record.key),
                "version": Int64(expected_version),
                **self._held(lease),
            },
            [{"$set": document}],
        )
        if done.matched_count == 0:
            self._explain(record.key, collection, lease, record.version)

    @_call("renew")
    def renew(self, collection: SessionCollection, record: Record, idle_expires_at: int) -> bool:
        later = min(idle_expires_at, record.absolute_expires_at)
        done = collection.update_one(
            {**self._live(record.key), "version": Int64(record.version)},
            {"$max": {"idle_expires_at": DatetimeMS(later)}},
        )
        return bool(done.matched_count)

    @_call("replace")
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
    ) -> None:
        # Two documents, two steps. Between them the new record cannot be reached by anybody: its
        # token has not left the server. The second step decides, atomically, who succeeds. It
        # always leaves a pointer, by which a repeat knows that it was this rotation, and not a
        # logout, that ended the session under the old key.
        repeated = False
        try:
            collection.insert_one(self._document(record))
        except DuplicateKeyError:
            there = self._read(record.key, collection)
            if there is None or there.version != record.version:
                raise KeyTaken from None
            repeated = True
        left = self._document(pointer or self._end_of(key, record))
        while True:
            old = {
                **self._live(key),
                "version": Int64(expected_version),
                **self._held(lease),
            }
            if not shorten:
                old["idle_expires_at"]["$lte"] = DatetimeMS(record.idle_expires_at)
            if collection.replace_one(old, left).matched_count == 1:
                return
            there = self._read(key, collection)
            if shorten or there is None or there.idle_expires_at <= record.idle_expires_at:
                break
            # Somebody renewed the session meanwhile: what the new record has must not be earlier.
            later = min(there.idle_expires_at, record.absolute_expires_at)
            shorten = later < there.idle_expires_at
            record = record._replace(idle_expires_at=later)
            if there.version != expected_version or there.successor is not None:
                break
            collection.update_one(
                self._is_version(record.key, record.version),
                {"$max": {"idle_expires_at": DatetimeMS(later)}},
            )
        if (
            repeated
            and there is not None
            and there.version == left["version"]
            and there.successor == left["successor"]
        ):
            return
        collection.delete_one(self._is_version(record.key, record.version))
        self._explain(key, collection, lease)

    @_call("delete")
    def delete(
        self,
        collection: SessionCollection,
        key: str,
        expected_version: int | None = None,
        lease: str | None = None,
    ) -> Deleted:
        if expected_version is not None:
            condition = {
                **self._live(key),
                "version": Int64(expected_version),
                **self._held(lease),
            }
            if collection.delete_one(condition).deleted_count == 0:
                self._explain(key, collection, lease)
            return Deleted(True)
        key, document = self._pop(key, collection)
        if not document:  # nothing, or it is only known that there was something
            return Deleted(document is not None)
        return Deleted(True, self._record(key, document))

    def _pop(self, key: str, collection: SessionCollection) -> tuple[str, _Document | None]:
        """Delete a session, through pointers; where it was, and what was there."""
        # What pointers lead to goes first, so that a repeat after a failure still finds it.
        pointers: dict[str, Record] = {}
        ended: _Document | None = None
        for _ in range(MAX_POINTERS):
            try:
                ended = collection.find_one_and_delete(self._live(key))
            except BSONError as error:
                _reraise_interruption(error)
                ended = {}
            # That there is nothing must be known to a majority: only this waits for one.
            if ended is None and collection.delete_one(self._live(key)).deleted_count:
                ended = {}
            there = None if ended is not None else self._read(key, collection)
            if there is None or there.successor == _ENDED:
                break
            pointers[key] = there
            if not there.successor or self._now() >= there.idle_expires_at:
                break
            key = there.successor
            if key in pointers:
                break
        else:
            raise too_many_pointers()
        for pointer in reversed(pointers.values()):
            collection.delete_one(self._is_version(pointer.key, pointer.version))
        return key, ended

    @_call("write_frame")
    def write_frame(
        self, collection: SessionCollection, name: str, offset: int, frame: bytes, expires_at: int
    ) -> None:
        end = DatetimeMS(expires_at)
        document = {"_id": self._frame_id(name, offset), "expires_at": end, "frame": frame}
        blobs = collection.of(self._blobs_of_client)
        blobs.replace_one({"_id": document["_id"]}, document, upsert=True)
        self._ensure_index(blobs, "expires_at")

    @_call("read_frame")
    def read_frame(
        self, collection: SessionCollection, name: str, offset: int, size: int
    ) -> bytes | None:
        now = DatetimeMS(self._now())
        wanted = {"_id": self._frame_id(name, offset), "expires_at": {"$gt": now}}
        found = collection.of(self._blobs_of_client).find_one(wanted, ["frame"])
        frame = None if found is None else found.get("frame")
        return frame if isinstance(frame, bytes) else None

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        self._move_expiry(names, {"$max": {"expires_at": DatetimeMS(expires_at)}})

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        if at > self._now():
            self._move_expiry(names, {"$min": {"expires_at": DatetimeMS(at)}})
        else:
            self._delete_blobs(names)

    @_call("discard_blobs")
    def _delete_blobs(self, collection: SessionCollection, names: Sequence[str]) -> None:
        collection.of(self._blobs_of_client).delete_many(self._frames_of(names))

    @_call("renew_blobs")
    def _move_expiry(
        self, collection: SessionCollection, names: Sequence[str], update: _Document
    ) -> None:
        live = {"expires_at": {"$gt": DatetimeMS(self._now())}}
        collection.of(self._blobs_of_client).update_many({**self._frames_of(names), **live}, update)

    def _frame_id(self, name: str, offset: int) -> str:
        return f"{self._prefix}{name}:{offset:010}"

    def _frames_of(self, names: Sequence[str]) -> _Document:
        start = (f"{self._prefix}{name}" for name in names)
        return {"$or": [{"_id": {"$gt": f"{each}:", "$lt": f"{each};"}} for each in start]}

    @_call("acquire")
    def acquire(
        self, collection: SessionCollection, key: str, owner: str, lease_ms: int, max_waiters: int
    ) -> int:
        now = self._now()
        found = collection.find_one_and_update(
            self._live(key),
            _acquisition(owner, now, lease_ms, max_waiters),
            projection=["lease"],
            return_document=ReturnDocument.AFTER,
        )
        if found is None:
            raise Gone
        lease = _lease(found)
        if lease.owner != owner and owner not in lease.waiters:
            raise QueueFull
        # The server has decided; asked again on the outcome, this says how long to wait.
        return lease.acquire(owner, now, lease_ms, max_waiters)

    @_call("extend")
    def extend(self, collection: SessionCollection, key: str, owner: str, lease_ms: int) -> bool:
        until = Int64(self._now() + lease_ms)
        done = collection.update_one(
            {"_id": self._prefix + key, **self._held(owner)},
            {"$set": {"lease.until": until, "lease.length": Int64(lease_ms)}},
        )
        return bool(done.matched_count)

    @_call("release")
    def release(self, collection: SessionCollection, key: str, owner: str) -> bool:
        before = collection.find_one_and_update(
            {"_id": self._prefix + key, "lease": {"$exists": True}},
            _release(owner),
            projection=["lease"],
        )
        return before is not None and _lease(before).is_held_by(owner, self._now())

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        poll(lambda: self._is_turn_of(key, owner), seconds)

    @_call("wait_for_release")
    def _is_turn_of(self, collection: SessionCollection, key: str, owner: str) -> bool:
        found = collection.find_one({"_id": self._prefix + key}, ["lease"])
        return found is None or _lease(found).is_turn_of(owner, self._now())

    def close(self) -> None:
        if self._close_client is not None and self._pid == os.getpid():
            self._close_client()
        self._pid = 0

    def _now(self) -> int:
        return milliseconds(self._clock)

    def _live(self, key: str) -> _Document:
        now = DatetimeMS(self._now())
        return {"_id": self._prefix + key, "successor": None, "idle_expires_at": {"$gt": now}}

    def _is_version(self, key: str, version: int) -> _Document:
        return {"_id": self._prefix + key, "version": Int64(version)}

    def _held(self, lease: str | None) -> _Document:
        """The condition that this owner holds the lease; none where none is asked for."""
        if lease is None:
            return {}
        return {"lease.owner": lease, "lease.until": {"$gt": self._now()}}

    def _explain(
        self,
        key: str,
        collection: SessionCollection,
        lease: str | None = None,
        mine: int | None = None,
    ) -> None:
        """Why a write did nothing; returns if it was the repeat of one that had landed."""
        there = self._read(key, collection)
        if there is None or not there.is_live(self._now()):
            raise Gone
        if there.version == mine:
            return
        if lease is not None:
            condition = {"_id": self._prefix + key, **self._held(lease)}
            if collection.find_one(condition, ["_id"]) is None:
                raise LeaseLost
        raise Stale

    def _end_of(self, key: str, record: Record) -> Record:
        """What stands for a while under a key that ended by a rotation; nobody loads it."""
        end = self._now() + _END_SHOWN
        return record._replace(
            key=key,
            idle_expires_at=end,
            absolute_expires_at=end,
            payload=b"",
            successor=_ENDED,
        )

    def _document(self, record: Record) -> _Document:
        return {
            "_id": self._prefix + record.key,
            "version": Int64(record.version),
            "created_at": DatetimeMS(record.created_at),
            "idle_expires_at": DatetimeMS(record.idle_expires_at),
            "absolute_expires_at": DatetimeMS(record.absolute_expires_at),
            "payload": record.payload,
            "successor": record.successor,
        }

    def _read(self, key: str, collection: SessionCollection) -> Record | None:
        find = partial(collection.find_one, {"_id": self._prefix + key})
        try:
            document = find()
        except BSONError as error:
            _reraise_interruption(error)
            # The driver says so of any exception that strikes while it decodes, and of a full
            # stack. Where neither can be, what it says is about the document.
            try:
                document = _undisturbed(find)
            except BSONError as again:
                raise UnreadableRecord("corrupt", type(again).__name__) from None
        return None if document is None else self._record(key, document)

    def _record(self, key: str, document: _Document) -> Record:
        get: Callable[[str], Any] = document.get
        version, payload, successor = get("version"), get("payload"), get("successor")
        created, idle, absolute = map(get, ("created_at", "idle_expires_at", "absolute_expires_at"))
        if not (
            get("_id") == self._prefix + key
            and type(version) in (int, Int64)
            and isinstance(payload, bytes)
            and (successor is None or isinstance(successor, str))
            and isinstance(created, DatetimeMS)
            and isinstance(idle, DatetimeMS)
            and isinstance(absolute, DatetimeMS)
        ):
            raise UnreadableRecord("corrupt", "fields missing or of wrong types")
        return Record(key, int(version), int(created), int(idle), int(absolute), payload, successor)

    @_call("scan")
    def scan(
        self, collection: SessionCollection, cursor: str = "", limit: int = 200, begins: str = ""
    ) -> Page:
        now = self._now()
        records, unreadable = [], []
        ids, end = self._ids(collection, cursor, limit, begins)
        try:
            whole = list(collection.find({"_id": {"$in": ids}}))
        except BSONError:  # one of them spoils the batch
            whole = [{"_id": name} for name in ids]
        for document in whole:
            key = document["_id"][len(self._prefix) :]
            try:
                alone = len(document) == 1
                record = self._read(key, collection) if alone else self._record(key, document)
            except UnreadableRecord:
                unreadable.append(key)
            else:
                if record is not None and now < record.idle_expires_at:
                    records.append(record)
        return Page(records, unreadable, end)

    @_call("tidy")
    def tidy(
        self,
        collection: SessionCollection,
        cursor: str = "",
        limit: int = 1000,
        *,
        dry_run: bool = False,
    ) -> Tidied:
        """Removes what the TTL index leaves: what has no date, and all where there is no index."""
        limit = min(limit, _AT_ONCE)
        if cursor.startswith(_BLOBS_NEXT):
            return self._tidy_blobs(collection, cursor, limit, dry_run)
        ids, end = self._ids(collection, cursor, limit)
        ours = [name for name in ids if is_session_key(name[len(self._prefix) :])]
        found = {}
        for kind, expiry in (
            ("expired sessions", {"$lte": DatetimeMS(self._now())}),
            ("unreadable records", {"$not": {"$type": "date"}}),
        ):
            condition = {"_id": {"$in": ours}, "idle_expires_at": expiry}
            if dry_run:
                found[kind] = collection.count_documents(condition)
            else:
                found[kind] = collection.delete_many(condition).deleted_count
        return Tidied(found, len(ids), end or _BLOBS_NEXT)

    def _tidy_blobs(
        self, collection: SessionCollection, cursor: str, limit: int, dry_run: bool
    ) -> Tidied:
        """The same for frames of large values; those without a date are not read any more.

        The conditions are such that the TTL index finds them. What was found is gone at the next
        step, unless it is only counted.
        """
        skip = int(cursor.removeprefix(_BLOBS_NEXT) or 0)
        blobs, start = collection.of(self._blobs_of_client), self._prefix
        ended: _Document = {
            "$or": [
                {"expires_at": {"$lte": DatetimeMS(self._now())}},
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
        """The ids behind ``cursor`` whose key starts with ``begins``; the cursor after them."""
        start = self._prefix + begins
        names = {"$gt": self._prefix + cursor, "$gte": start, "$lt": f"{start}\U0010ffff"}
        found = collection.find({"_id": names}, ["_id"], sort=[("_id", 1)], limit=limit)
        ids = [document["_id"] for document in found]
        return ids, ids[-1][len(self._prefix) :] if len(ids) == limit else ""

    @_call("check")
    def check(self, collection: SessionCollection) -> list[Finding]:
        return checked(collection, self._blobs_of_client, self._clock())

    @_call("count")
    def count(self, collection: SessionCollection) -> int:
        """About how many sessions are live: beyond a few, from the size and a random sample."""
        now = DatetimeMS(self._now())
        ours = {
            "_id": {
                "$gt": self._prefix,
                "$lt": self._prefix + "\x7f",
                "$ne": self._prefix + TICKET,
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

    def lend_collection(self, operation: str) -> AbstractContextManager[Any]:
        """The collection of the sessions, within the time of one call, for other packages.

        What the driver raises in the ``with`` block becomes ``StoreUnavailable``, which names the
        ``operation``. An interrupt may leave the time of the block to this context: run it in one
        of its own (``contextvars.copy_context``).
        """
        return _Call(self, operation)

    def _begin(self) -> None:
        """In a forked process: leave what another thread of the parent may have held or used."""
        self._lock = threading.Lock()
        if not isinstance(self._source, str) and hasattr(self._source, "_after_fork"):
            # PyMongo's own hook, which a fork in C doesn't run. Without it the client has no
            # monitors, and shares the server's sessions: of two writes one is taken for a repeat.
            self._source._after_fork()

    def _connect(self) -> Any:
        process.notice()
        if not self._lock.acquire(timeout=self._timeout):
            raise StoreUnavailable("mongodb: another thread is still connecting")
        try:
            if self._pid == os.getpid():
                return self._collection_of_client
            if isinstance(self._source, str):
                milliseconds_ = int(self._timeout * 1000)
                client: _Client = MongoClient(
                    self._source,
                    maxPoolSize=self._pool_max,
                    serverSelectionTimeoutMS=milliseconds_,
                    connectTimeoutMS=milliseconds_,
                )
                self._keep_client(client)
            else:
                client = self._source
            database = client.get_default_database(DATABASE)
            self._collection_of_client, self._blobs_of_client = (
                database.get_collection(
                    name,
                    codec_options=CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_MS),
                    read_preference=ReadPreference.PRIMARY,
                    # What is saved after a read is acknowledged by a majority, and so is what was
                    # read; the majority's view alone would lag and lose races it need not lose.
                    read_concern=ReadConcern("local"),
                    write_concern=WriteConcern("majority"),
                )
                for name in (COLLECTION, BLOBS)
            )
            self._collection_to_load = self._collection_of_client
            self._direct = bool(client.options.direct_connection)
            if client.read_concern.level is not None:
                self._collection_to_load = self._collection_of_client.with_options(
                    read_concern=client.read_concern
                )
            self._pid = os.getpid()
            return self._collection_of_client
        finally:
            self._lock.release()

    def _keep_client(self, client: _Client) -> None:
        """Close ``client`` with this store, and only in the process that made it."""
        if self._close_client is not None:
            self._close_client.detach()
            # A parent's client: neither used nor closed here, so not collected either.
            self._inherited.append(self._collection_of_client)
        self._close_client = closing(self, partial(_close, client, self._timeout))

    def _ensure_index(self, collection: SessionCollection, field: str = "idle_expires_at") -> None:
        """Make the TTL index, once; after an outage the next session that is created tries again.

        Called when a document was written: what fails now is about the index alone.
        """
        if collection.name in self._indexed:
            return
        try:
            collection.create_index(field, expireAfterSeconds=0, name="gsession_expiry")
        except OperationFailure as error:
            logger.warning(
                "MongoDB refused to create the TTL index of the sessions (%s): expired "
                "sessions stay invalid, but are not removed. Let an administrator run: "
                "db.%s.createIndex({%s: 1}, {expireAfterSeconds: 0, "
                "name: 'gsession_expiry'})",
                _code(error),
                collection.name,
                field,
            )
        except PyMongoError:
            return
        self._indexed.add(collection.name)


def _close(client: _Client, seconds: float) -> None:
    # The driver says goodbye, and waits for the answer until it thinks that the server is dead.
    with pymongo.timeout(seconds):
        client.close()


def _reraise_interruption(error: Exception) -> None:
    struck = interruption(error)
    # Of what struck the decoder, the driver may have kept only the words.
    if struck is not None and not isinstance(struck, BSONError):
        raise struck


def _undisturbed(find: Callable[[], T]) -> T:
    """What ``find`` returns in a thread of its own: no signal strikes there, the stack is empty."""
    outcome: list[T | BaseException] = []
    context = copy_context()

    def run() -> None:
        try:
            outcome.append(context.run(find))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="gsession-read", daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


class _Call:
    """The time that a call may take, and what the driver raises meanwhile, translated."""

    __slots__ = ("_budget", "_operation", "_store")

    def __init__(self, store: MongoDBStore, operation: str) -> None:
        self._store = store
        self._operation = operation
        self._budget: AbstractContextManager[None] | None = None

    def __enter__(self) -> Any:
        store = self._store
        seconds = store._timeout
        try:
            if store._pid != os.getpid():
                began = time.monotonic()
                store._connect()
                # Of mongodb+srv:// a name server was asked, and may have taken long.
                seconds = max(seconds - (time.monotonic() - began), 0.001)  # 0 would be no limit
        except (PyMongoError, OSError) as error:
            self._fail(error)
        self._budget = pymongo.timeout(seconds)
        self._budget.__enter__()
        return store._collection_of_client

    def __exit__(self, kind: object, error: BaseException | None, traceback: Any) -> None:
        if self._budget is not None:
            self._budget.__exit__(None, None, None)
        # OSError: of a socket that was closed. BSONError: of an answer to a write.
        if isinstance(error, (PyMongoError, OSError, BSONError)):
            self._fail(error)

    def _fail(self, error: PyMongoError | OSError | BSONError) -> NoReturn:
        _reraise_interruption(error)
        raise StoreUnavailable(
            f"mongodb: {self._operation}: {_reason(error, self._store._collection_of_client)}",
            contention=isinstance(error, WaitQueueTimeoutError),
        ) from error


def _reason(error: Exception, collection: SessionCollection) -> str:
    """What went wrong and where, in one line, and nothing of what was sent."""
    if not isinstance(error, OperationFailure):
        text = str(error).partition(", Timeout: ")[0].partition(", full error: ")[0]
        text = re.sub(r" \(configured timeouts: [^)]*\)", "", text)
    elif isinstance(error, WriteConcernError):
        text = f"not confirmed by a majority: {_code(error)}"
    else:
        # A server's own words can hold the whole command; whoever logs the cause would show them.
        text = _code(error) + _HINTS.get(error.code or 0, "")
        error.args = (text,)
    where = "" if collection is None else _addresses(collection.database.client)
    if not where or any(address in text for address in where.split(",")):
        return f"{type(error).__name__}: {text}"
    return f"{where}: {type(error).__name__}: {text}"


def _check_not_secondary(client: _Client) -> None:
    """On a direct connection the driver lets secondaries answer, who may not know of a logout."""
    for server in client.topology_description.server_descriptions().values():
        if server.server_type_name == "RSSecondary":
            raise StoreUnavailable(
                f"mongodb: load: {_addresses(client)}: a secondary, which may be behind; name the "
                "replica set in SESSION_STORE (replicaSet=...) instead of directConnection"
            )


def _code(error: OperationFailure) -> str:
    name = (error.details or {}).get("codeName", type(error).__name__)
    return f"{name}, code {error.code}"


def _addresses(client: _Client) -> str:
    """The server that takes writes, as far as it is known, else all that the client knows of."""
    servers = client.topology_description.server_descriptions()
    writable = [address for address, server in servers.items() if server.is_writable]
    return ",".join(
        host if port is None else f"{host}:{port}" for host, port in writable or sorted(servers)
    )


# The lease of a session and its queue are the field "lease" of the session's own document. It goes
# with the document; a save does not touch it, and a rotation leaves it behind.
#
#   {"owner": "...", "until": 1700000000000, "waiters": [{"owner": "...", "seen": 1700000000000}]}


def _lease(document: _Document) -> Lease:
    lease = document.get("lease")
    if not isinstance(lease, dict):
        return Lease()
    try:
        waiters = {waiter["owner"]: waiter["seen"] for waiter in lease.get("waiters", ())}
    except (TypeError, KeyError):
        return Lease()  # junk, which the next to acquire it replaces
    return Lease.of(lease.get("owner", ""), lease.get("until", 0), lease.get("length", 0), waiters)


def _is(kind: list[str], field: str) -> _Document:
    return {"$in": [{"$type": field}, kind]}


def _cleaned(keep: _Document | bool) -> list[_Document]:
    """The stages that make the field a lease where it is missing or junk, with the waiters that
    are to be kept. Else junk would make each later step fail.
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


def _acquisition(owner: str, now: int, lease_ms: int, max_waiters: int) -> list[_Document]:
    """The pipeline that does on the server what ``Lease.acquire`` says."""
    me = {"$literal": owner}
    mine = {"$eq": ["$$this.owner", me]}
    age = {"$abs": {"$subtract": ["$$this.seen", Int64(now)]}}
    seen = {"$lt": [age, WAITER_LIFE]}
    waiters = "$lease.waiters"
    others = {"$filter": {"input": waiters, "cond": {"$ne": ["$$this.owner", me]}}}
    first = {"$ifNull": [{"$first": {"$map": {"input": waiters, "in": "$$this.owner"}}}, me]}
    running = {"$gt": ["$lease.until", Int64(now)]}
    # What ends later was begun before a clock was set back, or by one far ahead.
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


def _release(owner: str) -> list[_Document]:
    """The pipeline of ``Lease.release``; nothing is left where nobody holds or waits."""
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
