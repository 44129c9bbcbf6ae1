"""Storages from the package ``limits``, with time budgets and clear errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from importlib.util import find_spec
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from limits import RateLimitItem
from limits.errors import ConfigurationError, StorageError
from limits.storage import (
    MemoryStorage,
    MongoDBStorageBase,
    RedisStorage,
    Storage,
    storage_from_string,
)
from limits.strategies import STRATEGIES

from ..config import warn
from ..errors import SettingError, StoreUnavailable
from ..events import logger
from ..stores import Store, StoreOptions, open_store
from ..stores.wrappers.wrapper import innermost

T = TypeVar("T")

_EXPIRY = "expireAt"  # the field of a count in MongoDB
_UNDO = """
if tonumber(redis.call('get', KEYS[1]) or 0) >= tonumber(ARGV[1]) then
    redis.call('decrby', KEYS[1], ARGV[1])
end
"""


class Backend:
    """A strategy on a storage. Failures raise ``StoreUnavailable``.

    ``storage``: a storage, or a function that connects to one, called on first use.
    """

    def __init__(self, storage: Storage | Callable[[], Storage], strategy: str) -> None:
        self._strategy = strategy
        self._make = storage if not isinstance(storage, Storage) else None
        self._storage: Storage
        self._errors: tuple[type[Exception], ...]
        if isinstance(storage, Storage):
            self._open(storage)

    def _open(self, storage: Storage) -> None:
        try:
            self._limiter = STRATEGIES[self._strategy](storage)
        except NotImplementedError:
            raise SettingError(
                f"A {type(storage).__name__} doesn't support {self._strategy!r}: use "
                'strategy="fixed-window", or another storage'
            ) from None
        errors = storage.base_exceptions
        drivers = errors if isinstance(errors, tuple) else (errors,)
        self._errors = (*drivers, *_cluster_errors(storage), StorageError, OSError)
        self._budget: Callable[[], AbstractContextManager[object]] = getattr(
            storage, "budget", nullcontext
        )
        self._storage = storage
        self._make = None

    def _ready(self) -> None:
        make = self._make
        if make is not None:  # two threads may each make one, which is cheaper than a lock
            try:
                storage = make()
            except Exception as error:
                raise _unavailable(error) from error
            self._open(storage)

    def hit(self, item: RateLimitItem, key: str, cost: int) -> bool:
        """Count ``cost`` and return True, or return False if less than that is left."""

        def count() -> bool:
            allowed = self._limiter.hit(item, key, cost=cost)
            if not allowed and self._strategy == "fixed-window":
                self._undo(item, key, cost)  # this strategy also counts refused hits
            return allowed

        return self._run(count)

    def look(self, item: RateLimitItem, key: str) -> tuple[float, int]:
        """The seconds until the limit recovers, and the remaining number of hits."""
        reset, remaining = self._run(lambda: self._limiter.get_window_stats(item, key))
        return min(max(0.0, reset - time.time()), item.get_expiry()), remaining

    def undo(self, item: RateLimitItem, key: str, cost: int) -> None:
        """Undo a hit if it is still in its window."""
        self._run(lambda: self._undo(item, key, cost))

    def _run(self, call: Callable[[], T]) -> T:
        """Call the storage within its time budget, which an interrupt can't leak to other calls."""
        self._ready()

        def in_time() -> T:
            with self._budget():
                return call()

        try:
            return copy_context().run(in_time)
        except self._errors as error:
            raise _unavailable(error) from error

    def can_undo(self) -> bool:
        """Whether hits in this storage can be undone."""
        if self._make is not None:
            return True  # a Redis Cluster without a connection yet
        return isinstance(self._storage, (MemoryStorage, RedisStorage, MongoDBStorageBase))

    def _undo(self, item: RateLimitItem, key: str, cost: int) -> None:
        name, storage = item.key_for(key), self._storage
        if isinstance(storage, RedisStorage):
            self._undo_on_redis(storage, name, cost)
        elif isinstance(storage, MongoDBStorageBase):
            self._undo_on_mongodb(storage, name, cost)
        elif isinstance(storage, MemoryStorage):
            self._undo_in_memory(storage, name, cost, item.get_expiry())

    # In a moving window, the latest entries are at the head.

    def _undo_on_redis(self, storage: Any, name: str, cost: int) -> None:
        connection = storage.get_connection()
        if self._strategy == "moving-window":
            connection.ltrim(storage.prefixed_key(name), cost, -1)
            return
        if self._strategy == "sliding-window-counter":
            name = storage._current_window_key(name)
        connection.eval(_UNDO, 1, storage.prefixed_key(name), cost)

    def _undo_on_mongodb(self, storage: Any, name: str, cost: int) -> None:
        if self._strategy == "moving-window":
            # $slice refuses a length of 0
            length = {"$max": [1, {"$size": {"$ifNull": ["$entries", []]}}]}
            rest = {"$slice": [{"$ifNull": ["$entries", []]}, cost, length]}
            storage.windows.update_one({"_id": name}, [{"$set": {"entries": rest}}])
            return
        fixed = self._strategy == "fixed-window"
        collection = storage.counters if fixed else storage.windows
        field = "count" if fixed else "currentCount"
        collection.update_one({"_id": name, field: {"$gte": cost}}, {"$inc": {field: -cost}})

    def _undo_in_memory(self, storage: MemoryStorage, name: str, cost: int, expiry: int) -> None:
        if self._strategy == "moving-window":
            with storage.locks[name]:
                del storage.events.get(name, [])[:cost]
            return
        if self._strategy == "sliding-window-counter":
            _, name = storage.sliding_window_keys(name, expiry, time.time())
        storage.decr(name, cost)


def _cluster_errors(storage: Storage) -> list[type[Exception]]:
    """Errors of the Redis Cluster driver outside its own base class."""
    if not isinstance(storage, RedisStorage):
        return []
    known = vars(storage.dependency.exceptions)
    names = ("RedisClusterException", "ValkeyClusterException")
    return [known[name] for name in names if name in known]


def _unavailable(error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"rate limits: {type(error).__name__}: {error}")


def storage_of(store: Store, prefix: str) -> Storage:
    """A storage on the server of the session store."""
    store = innermost(store)
    pool = store.lend_pool() if hasattr(store, "lend_pool") else None
    if pool is not None:
        return RedisStorage("redis://", connection_pool=pool, key_prefix=f"{prefix}limits")
    if hasattr(store, "lend_collection"):
        return _MongoDBCounts(lambda: store.lend_collection("count"))
    if type(store).__name__ not in ("SQLiteStore", "MemoryStore"):
        raise SettingError(
            "SessionLimits can't count in this session store: pass a storage, such as "
            'storage="redis://localhost:6379/1"'
        )
    if type(store).__name__ == "SQLiteStore":
        warn(
            "Rate limits count in each process separately, since the sessions are in SQLite: "
            "several workers allow several times as much. Pass a storage to SessionLimits, "
            'or storage="memory://" to silence this warning'
        )
    return MemoryStorage()


def storage_at(storage: object, options: StoreOptions) -> Storage | Callable[[], Storage]:
    """The storage object or URL passed to ``SessionLimits``, without connecting to a server.

    ``options``: the session store's, for timeouts that the URL doesn't set.
    """
    if isinstance(storage, Storage):
        return storage
    if not isinstance(storage, str):
        given = storage.__name__ if isinstance(storage, type) else type(storage).__name__
        kind = "the class " if isinstance(storage, type) else "a "
        raise SettingError(
            f"SessionLimits: storage is {kind}{given}; allowed: the URL of a storage, or an object "
            "of limits.storage (not of limits.aio)"
        )
    scheme = storage.partition(":")[0]
    try:
        if scheme in ("mongodb", "mongodb+srv"):
            return storage_of(open_store(storage, options)[0], options.prefix)
        if scheme in ("redis+cluster", "valkey+cluster"):
            return _cluster_at(storage, options.timeout)
        made = storage_from_string(storage) if not scheme.startswith("async+") else None
    except (ConfigurationError, ValueError, TypeError, AssertionError) as error:
        lacks = str(error) if "prerequisite not available" in str(error) else ""
        raise SettingError(
            f"SessionLimits: limits refused the storage, a {scheme} URL "
            f"({lacks or type(error).__name__})"
        ) from None
    if not isinstance(made, Storage):
        raise SettingError(
            f"SessionLimits: the storage, a {scheme} URL, is for asyncio; leave out the async+"
        )
    return made


def _cluster_at(url: str, timeout: float) -> Callable[[], Storage]:
    """A function that connects to a cluster: the driver connects when it is created."""
    driver = url.partition("+")[0]
    hosts = urlsplit(url).netloc.rpartition("@")[2].split(",")
    if find_spec(driver) is None or not all(urlsplit(f"//{host}").port for host in hosts):
        raise SettingError(
            f"SessionLimits: a {driver}+cluster URL needs one or more host:port, separated by "
            f"commas, and the package {driver}"
        )
    piece = timeout / 4  # like the connections of the session store
    return lambda: cast(
        Storage, storage_from_string(url, socket_timeout=piece, socket_connect_timeout=piece)
    )


class _MongoDBCounts(MongoDBStorageBase):
    """Counts with the session store's client, within its time budget. Never closes the client.

    Writes (w=1) and reads use only the primary, whatever options the client has. A failover may
    lose some counts.
    """

    def __init__(self, lend: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__(
            "mongodb://",
            counter_collection_name="gsession_limit_counters",
            window_collection_name="gsession_limits",
        )
        self.budget = lend
        self._prepared: dict[str, object] = {}  # by collection: the client it was made with

    @property
    def counters(self) -> Any:
        """The collection of the fixed windows."""
        return self._collection("counters")

    @property
    def windows(self) -> Any:
        """The collection of the moving and sliding windows."""
        return self._collection("windows")

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count ``amount`` in a moving window, if there is room."""
        # False means a duplicate key: the window is full, or a parallel request of the same client
        # was first. A second try shows which.
        acquire = super().acquire_entry
        return acquire(key, limit, expiry, amount) or acquire(key, limit, expiry, amount)

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """The start of a moving window, and its number of hits."""
        start, count = super().get_moving_window(key, limit, expiry)
        return (time.time() if start is None else start), count  # None: all entries have expired

    def _collection(self, kind: str) -> Any:
        with self.budget() as sessions:
            collection = sessions.database.get_collection(
                self._collection_mapping[kind],
                codec_options=type(sessions.codec_options)(),
                read_preference=self.lib.ReadPreference.PRIMARY,
                read_concern=type(sessions.read_concern)("local"),
                write_concern=self.lib.WriteConcern(1),
            )
            client = sessions.database.client
            if self._prepared.get(kind) is not client and self._ensure_index(collection):
                self._prepared[kind] = client
            return collection

    def _ensure_index(self, collection: Any) -> bool:
        """Create the index that removes old counts. Returns False to try again later.

        Without the index, old counts don't count either.
        """
        try:
            collection.create_index(_EXPIRY, expireAfterSeconds=0)
        except self.lib_errors.OperationFailure as error:
            if error.timeout:
                return False
            try:
                found = collection.index_information()
            except self.lib_errors.OperationFailure:
                found = {}
            ours = {name: each for name, each in found.items() if each["key"] == [(_EXPIRY, 1)]}
            if any("expireAfterSeconds" in each for each in ours.values()):
                return True
            drops = "".join(f"db.{collection.name}.dropIndex({name!r}); " for name in ours)
            logger.warning(
                "MongoDB refused to create the TTL index of the rate limits (code %s), so old "
                "counts are not removed. Have an administrator run: %sdb.%s.createIndex({%s: 1}, "
                "{expireAfterSeconds: 0})",
                error.code,
                drops,
                collection.name,
                _EXPIRY,
            )
        return True

    def _init_mongo_client(self, uri: str | None, **options: Any) -> Any:
        raise NotImplementedError  # the store has a client

    def __del__(self) -> None:
        """Override the base class, which would close the client."""
