"""Sessions in Redis 6.2 or newer (or Valkey): one string per session, one command per operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from ...errors import Gone
from ...live.listener import Listener
from ..base import Deleted, Record, Replaced, Store
from ..support import StoreOptions, closing
from .blobs import RedisBlobs
from .bulk import RedisBulk
from .changes import RedisSource
from .client_pool import ClientPool, SentinelClientPool
from .commands import Commands
from .foreign import RedisStrings, RedisTogether
from .health import RedisChecks
from .journal import RedisJournal
from .leases import RedisLeases
from .pool import ConnectionPool
from .records import Records
from .scans import RedisScans
from .servers import PrimaryPool, connections_like, connections_of
from .wakeup import WakeUps

_PLAIN_POOLS = (redis.ConnectionPool, redis.BlockingConnectionPool)


class RedisStore(Store):
    """Keeps records in the Redis at ``url``, or behind an existing client, whose pool is used.

    One call takes at most ``options.timeout``. If you pass in a client, its pool is used as it is,
    and never closed: its own settings bound the time to connect, and ``options.timeout`` the wait
    for each piece of an answer. For a Sentinel client, we make our own connections to its primary:
    see :class:`SentinelClientPool`.
    """

    confirms_logouts = True

    def __init__(self, url_or_client: str | redis.Redis, options: StoreOptions | None = None):
        options = options or StoreOptions()
        pool = _pool_of(url_or_client, options)
        if isinstance(pool, ConnectionPool):
            closing(self, pool.close)
        records = Records(Commands(pool, options), options.logout_replicas)
        self._begin(url_or_client, options, records, pool.make)
        self.leases = RedisLeases(records, self._wake_ups)
        self.blobs = RedisBlobs(records.commands)
        self.journal = self._journal = RedisJournal(records)
        if not options.logout_replicas:  # their confirmation is asked for one by one
            self.bulk = RedisBulk(records)

    def _begin(
        self,
        source: object,
        options: StoreOptions,
        records: Records,
        make: Callable[..., Any],
        changes: type[RedisSource] = RedisSource,
    ) -> None:
        """Set up what Redis and Cluster stores share; ``make`` makes wake-up connections."""
        self._source, self._options = source, options
        self._records, self._commands = records, records.commands
        # In the older protocol, pushed messages are answers, and come in order with others.
        calls = partial(make, protocol=2)
        self._wake_ups = WakeUps(calls, records.names.channels, options.timeout)
        closing(self, self._wake_ups.close)
        self.scans = self.upkeep = self.counts = RedisScans(records)
        self.checks = RedisChecks(self._commands, options.logout_replicas)
        self.changes = self._listener = Listener(changes(self._commands, make))
        closing(self, self._listener.close)

    def create(self, record: Record) -> None:
        self._records.create(record, self._commands.deadline())

    def load(self, key: str) -> Record | None:
        return self._records.load(key, self._commands.deadline())

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        self._records.save(record, expected_version, None, shorten)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        try:
            self._records.renew(record, idle_expires_at, self._commands.deadline())
        except Gone:
            return False
        return True

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> Replaced:
        return self._records.replace(key, record, expected_version, pointer, None, shorten)

    def delete(self, key: str, expected_version: int | None = None) -> Deleted:
        if expected_version is None:
            return self._records.delete(key)
        return self._records.delete_version(key, expected_version, None)

    def close(self) -> None:
        self._listener.close()
        self._wake_ups.close()
        self._commands.pool.close()

    def strings(self) -> RedisStrings:
        """The strings that another package keeps on this server, by their whole names."""
        if self._journal.begun:  # whose sessions no other script may create
            return RedisStrings(self._records)
        return RedisTogether(self._records)

    def lend_pool(self) -> redis.ConnectionPool | None:
        """A connection pool of the driver for other packages; None for a cluster.

        The pool of the client that was passed in; else a new one of the same size as the store's,
        with a quarter of the time budget of a call as its timeout.
        """
        piece = self._options.timeout / 4
        if isinstance(self._source, redis.Redis):
            pool = self._source.connection_pool
            if not isinstance(pool, SentinelConnectionPool):
                return pool
            return redis.BlockingConnectionPool(  # type: ignore[no-untyped-call]  # loses no places
                connection_class=pool.connection_class,
                max_connections=self._options.pool_max,
                timeout=piece,
                **pool.connection_kwargs,
            )
        if not isinstance(self._source, str) or "+" in self._source.partition(":")[0]:
            return None
        return redis.BlockingConnectionPool.from_url(
            self._source,
            max_connections=self._options.pool_max,
            timeout=piece,
            socket_connect_timeout=piece,
            socket_timeout=piece,
            retry=Retry(NoBackoff(), 1),
        )


def _pool_of(source: str | redis.Redis, options: StoreOptions) -> Any:
    """A pool of connections, of any kind; its ``make`` makes more of them."""
    if not isinstance(source, str):
        pool = source.connection_pool
        if options.own_connections and type(pool) in _PLAIN_POOLS:
            return ConnectionPool(connections_like(pool, options.timeout), options.pool_max)
        if isinstance(pool, SentinelConnectionPool):
            return SentinelClientPool(source, options.pool_max)
        return ClientPool(source)
    if "+sentinel:" in source[: len("rediss+sentinel:")]:
        return PrimaryPool(source, options.timeout, options.pool_max)
    kind, settings = connections_of(source, options.timeout)
    return ConnectionPool(partial(kind, **settings), options.pool_max)
