"""The MongoDB driver: one client per process, one context and driver session per call."""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import partial
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar
from urllib.parse import urlsplit

import pymongo
from bson import CodecOptions
from bson.codec_options import DatetimeConversion
from bson.errors import BSONError
from pymongo import MongoClient, ReadPreference
from pymongo.errors import (
    ConfigurationError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    WaitQueueTimeoutError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern
from pymongo.synchronous.pool import Pool
from pymongo.uri_parser import parse_uri
from pymongo.write_concern import WriteConcern

from ...errors import GSessionError, StoreUnavailable
from ...events import logger
from ...processes import process, warn_without_threads
from ..interrupts import Condition, interruption
from ..support import StoreOptions, closing, time_left
from .indexes import NAME, check_expiry_index
from .round_trips import NO_PAYLOADS, SessionCollection

COLLECTION = "gsession"
BLOBS = "gsession_blobs"
DATABASE = "gsession"

_READ_CONCERNS = ("local", "majority", "linearizable")
_HINTS = {
    13: ": the user lacks a permission on the collection, or the URL names no user",
    18: ": wrong user, password or authSource",
}

P = ParamSpec("P")
T = TypeVar("T")

Document = dict[str, Any]
_Client = MongoClient[Document]


def check_url(url: str) -> None:
    """Raises the driver's error for a malformed URL. Asks no server."""
    if url.startswith("mongodb+srv:"):  # fully parsing it would ask the name server
        parts = urlsplit(url)
        if not parts.hostname or "," in parts.netloc or parts.port is not None:
            raise InvalidURI("mongodb+srv takes one host and no port")
    else:
        level = parse_uri(url)["options"].get("readConcernLevel", "local")
        if level not in _READ_CONCERNS:
            raise ConfigurationError(f"readConcernLevel is one of {', '.join(_READ_CONCERNS)}")


class HasDriver(Protocol):
    """An object whose methods can use ``call``: a part of the store, or the records."""

    @property
    def driver(self) -> Driver: ...


H = TypeVar("H", bound=HasDriver)


def call(
    operation: str,
) -> Callable[
    [Callable[Concatenate[H, SessionCollection, P], T]],
    Callable[Concatenate[H, P], T],
]:
    """Decorator for one call of a store: passes the collection, and limits the total time.

    Each call has its own context and driver session. An interrupt can strike the driver between any
    two steps, and may leave behind an old deadline, or a server session that two threads share: the
    server would then mistake one thread's write for a repeat of the other's. No later call uses
    that state.
    """

    def decorate(
        method: Callable[Concatenate[H, SessionCollection, P], T],
    ) -> Callable[Concatenate[H, P], T]:
        def within(caller: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with Call(caller.driver, operation) as collection:
                session = collection.database.client.start_session(causal_consistency=False)
                try:
                    answer = method(caller, SessionCollection(collection, session), *args, **kwargs)
                except (GSessionError, PyMongoError):
                    session.end_session()
                    raise
                session.end_session()  # not after an interrupt, when it may be in the pool already
                return answer

        @functools.wraps(method)
        def call(caller: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return copy_context().run(within, caller, *args, **kwargs)

        del call.__wrapped__  # its signature differs
        return call

    return decorate


class _Pool(Pool):
    """A pool of connections that releases its lock even after an exception from outside.

    To clean up after an exception, PyMongo takes the lock again, so the thread would wait for
    itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.size_cond = Condition(self.lock)
        self._max_connecting_cond = Condition(self.lock)


class Driver:
    """The collections of ``url_or_client``. Given a URL, each process makes its own client."""

    def __init__(self, url_or_client: str | _Client, options: StoreOptions) -> None:
        self.timeout = options.timeout
        self._pool_max = options.pool_max
        self._database = options.database or DATABASE
        self._source = url_or_client
        self._close_client: weakref.finalize[..., object] | None = None
        self._inherited: list[Any] = []
        self.collection: Any = None
        self.collection_to_load: Any = None
        self.blobs: Any = None
        self.direct = False
        self.pid = 0
        self._indexed: set[str] = set()
        #: how many seconds after its expiry the server removes a record
        self.expire_after = 0
        self._lock = threading.Lock()
        process.register(self._begin)
        warn_without_threads("PyMongo notices late that a server went down or came back")
        logging.getLogger("pymongo.command").addFilter(NO_PAYLOADS)

    def _begin(self) -> None:
        """In a forked process, drop everything that another thread of the parent may have used."""
        self._lock = threading.Lock()
        if not isinstance(self._source, str) and hasattr(self._source, "_after_fork"):
            # PyMongo's own hook, which a fork in C doesn't run. Without it the client has no
            # monitors, and both processes share server sessions: a write may then count as a repeat
            # of another.
            self._source._after_fork()

    def connect(self) -> Any:
        process.notice()
        if not self._lock.acquire(timeout=time_left(self.timeout)):
            raise StoreUnavailable("mongodb: another thread is still connecting")
        try:
            if self.pid == os.getpid():
                return self.collection
            if isinstance(self._source, str):
                milliseconds_ = int(self.timeout * 1000)
                client: _Client = MongoClient(
                    self._source,
                    maxPoolSize=self._pool_max,
                    serverSelectionTimeoutMS=milliseconds_,
                    connectTimeoutMS=milliseconds_,
                    _pool_class=_Pool,
                )
                self._keep_client(client)
            else:
                client = self._source
            database = client.get_default_database(self._database)
            self.collection, self.blobs = (
                database.get_collection(
                    name,
                    codec_options=CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_MS),
                    read_preference=ReadPreference.PRIMARY,
                    # A majority acknowledges each save, and so the data read before it. Reading at
                    # "majority" would lag and lose races needlessly.
                    read_concern=ReadConcern("local"),
                    write_concern=WriteConcern("majority"),
                )
                for name in (COLLECTION, BLOBS)
            )
            self.collection_to_load = self.collection
            self.direct = bool(client.options.direct_connection)
            if client.read_concern.level is not None:
                self.collection_to_load = self.collection.with_options(
                    read_concern=client.read_concern
                )
            self.pid = os.getpid()
            return self.collection
        finally:
            self._lock.release()

    def _keep_client(self, client: _Client) -> None:
        """Close ``client`` with this store, and only in the process that made it."""
        if self._close_client is not None and self._close_client.detach() is not None:
            # A parent's open client must not be used, closed or garbage-collected here.
            self._inherited.append(self.collection)
        self._close_client = closing(self, partial(_close, client, self.timeout))

    def ensure_index(self, collection: SessionCollection, field: str = "idle_expires_at") -> None:
        """Create the TTL index, once; after an outage, the next new session tries again.

        Called after a document was written, so a failure now concerns only the index.
        """
        if collection.name in self._indexed:
            return
        is_kept = self.expire_after and field == "idle_expires_at"
        try:
            try:
                if is_kept:
                    self._disable_ttl(collection, field)
                else:
                    collection.create_index(field, expireAfterSeconds=0, name=NAME)
            except OperationFailure as error:
                if is_kept:
                    raise StoreUnavailable(
                        f"mongodb: the TTL index can't be delayed ({_code(error)}), and would "
                        "remove sessions before their end is in the journal: grant the user the "
                        f"right to collMod, or let an administrator change {NAME} to "
                        f"expireAfterSeconds: {self.expire_after}"
                    ) from error
                # An administrator may have made it, under another name.
                advice = check_expiry_index(collection, field)
                if advice:
                    logger.warning(
                        "MongoDB refused to create the TTL index of the sessions (%s): expired "
                        "sessions stay invalid, but are not removed. Let an administrator run: %s",
                        _code(error),
                        advice,
                    )
        except PyMongoError:
            return
        self._indexed.add(collection.name)

    def is_indexed(self) -> bool:
        """Whether ``ensure_index`` has run for the records."""
        return COLLECTION in self._indexed

    def _disable_ttl(self, collection: SessionCollection, field: str) -> None:
        """Make the TTL index remove nothing; queries for expired documents still use it."""
        collection.create_index("journal_at", sparse=True, name="gsession_outbox")
        try:
            collection.create_index(field, expireAfterSeconds=self.expire_after, name=NAME)
        except OperationFailure as error:
            if error.code != 85:  # an index with other options
                raise
            by_field = {"keyPattern": {field: 1}, "expireAfterSeconds": self.expire_after}
            collection.database.command("collMod", collection.name, index=by_field)

    def close(self) -> None:
        if self.pid == os.getpid():
            # Closing takes a while. Calls that begin meanwhile make a new client.
            close, self._close_client = self._close_client, None
            self.pid = 0
            if close is not None:
                close()


def _close(client: _Client, seconds: float) -> None:
    # The driver sends endSessions, and waits for the reply until it considers the server dead.
    with pymongo.timeout(seconds):
        client.close()


def reraise_interruption(error: Exception) -> None:
    struck = interruption(error)
    # The driver may keep only the text of an exception that struck its decoder.
    if struck is not None and not isinstance(struck, BSONError):
        raise struck


def in_a_thread(find: Callable[[], T]) -> T:
    """Run ``find`` in a new thread, which gets no signals and has an empty stack."""
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


class Call:
    """Bounds the time of a call, and translates the driver's errors."""

    __slots__ = ("_budget", "_driver", "_operation")

    def __init__(self, driver: Driver, operation: str) -> None:
        self._driver = driver
        self._operation = operation
        self._budget: AbstractContextManager[None] | None = None

    def __enter__(self) -> Any:
        driver = self._driver
        seconds = time_left(driver.timeout)
        if not seconds:  # the server could still apply a write that nobody waits for
            raise StoreUnavailable(
                f"mongodb: {self._operation}: the caller's time budget is used up"
            )
        try:
            if driver.pid != os.getpid():
                began = time.monotonic()
                driver.connect()
                # For mongodb+srv://, asking the name server may have taken long.
                seconds = max(seconds - (time.monotonic() - began), 0.001)  # 0 would be no limit
        except (PyMongoError, OSError) as error:
            self._fail(error)
        self._budget = pymongo.timeout(seconds)
        self._budget.__enter__()
        return driver.collection

    def __exit__(self, kind: object, error: BaseException | None, traceback: Any) -> None:
        if self._budget is not None:
            self._budget.__exit__(None, None, None)
        # OSError: a closed socket. BSONError: a malformed reply to a write.
        if isinstance(error, (PyMongoError, OSError, BSONError)):
            self._fail(error)

    def _fail(self, error: PyMongoError | OSError | BSONError) -> NoReturn:
        reraise_interruption(error)
        raise StoreUnavailable(
            f"mongodb: {self._operation}: {_reason(error, self._driver.collection)}",
            contention=isinstance(error, WaitQueueTimeoutError),
        ) from error


def _reason(error: Exception, collection: SessionCollection) -> str:
    """The error and its server in one line, without any data that was sent."""
    if not isinstance(error, OperationFailure):
        text = str(error).partition(", Timeout: ")[0].partition(", full error: ")[0]
        text = re.sub(r" \(configured timeouts: [^)]*\)", "", text)
    elif isinstance(error, WriteConcernError):
        text = f"not confirmed by a majority: {_code(error)}"
    else:
        # A server's message can quote the whole command, which must not end up in logs.
        text = _code(error) + _HINTS.get(error.code or 0, "")
        error.args = (text,)
    where = "" if collection is None else _addresses(collection.database.client)
    if not where or any(address in text for address in where.split(",")):
        return f"{type(error).__name__}: {text}"
    return f"{where}: {type(error).__name__}: {text}"


def check_not_secondary(client: _Client) -> None:
    """On a direct connection, the driver accepts replies of secondaries, which may lag behind."""
    for server in client.topology_description.server_descriptions().values():
        if server.server_type_name == "RSSecondary":
            raise StoreUnavailable(
                f"mongodb: load: {_addresses(client)}: a secondary, which may lag behind; name the "
                "replica set in SESSION_STORE (replicaSet=...) instead of directConnection"
            )


def _code(error: OperationFailure) -> str:
    name = (error.details or {}).get("codeName", type(error).__name__)
    return f"{name}, code {error.code}"


def _addresses(client: _Client) -> str:
    """The server that accepts writes, if it is known, else all servers that the client knows."""
    servers = client.topology_description.server_descriptions()
    writable = [address for address, server in servers.items() if server.is_writable]
    return ",".join(
        host if port is None else f"{host}:{port}" for host, port in writable or sorted(servers)
    )
