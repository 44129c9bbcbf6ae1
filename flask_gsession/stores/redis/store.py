"""Sessions in Redis 6.2 or newer (or Valkey): one string per session, one command per operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from ...live.listener import Listener
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


class RedisStore(Records):
    """Keeps records in the Redis at ``url``, or behind an existing client, whose pool is used.

    One call takes at most ``options.timeout``. If you pass in a client, its pool is used as it is,
    and never closed: its own settings bound the time to connect, and ``options.timeout`` the wait
    for each piece of a reply. For a Sentinel client, the store makes its own connections to the
    primary: see :class:`SentinelClientPool`.
    """

    def __init__(self, url_or_client: str | redis.Redis, options: StoreOptions | None = None):
        options = options or StoreOptions()
        pool = _pool_of(url_or_client, options)
        if isinstance(pool, ConnectionPool):
            closing(self, pool.close)
        super().__init__(Commands(pool, options), options.logout_replicas)
        # The parts have records of their own, since a store in a reference cycle is closed late.
        records = Records(self.commands, options.logout_replicas)
        self._begin(url_or_client, options, records, pool.make)
        self.leases = RedisLeases(records, self._wake_ups)
        self.blobs = RedisBlobs(self.commands)
        self.journal = self._journal = RedisJournal(records)
        if not options.logout_replicas:  # replicas confirm each logout on its own
            self.bulk = RedisBulk(records)

    def _begin(
        self,
        source: object,
        options: StoreOptions,
        records: Records,
        make: Callable[..., Any],
        changes: type[RedisSource] = RedisSource,
    ) -> None:
        """The setup that Redis and Cluster stores share. ``make`` makes wake-up connections."""
        self._source, self._options, self._records = source, options, records
        # With RESP2, published messages arrive as replies, in order with the other replies.
        calls = partial(make, protocol=2)
        self._wake_ups = WakeUps(calls, self.names.channels, options.timeout)
        closing(self, self._wake_ups.close)
        self.scans = self.upkeep = self.counts = RedisScans(records)
        self.checks = RedisChecks(self.commands, options.logout_replicas)
        self.changes = self._listener = Listener(changes(self.commands, make))
        closing(self, self._listener.close)

    def close(self) -> None:
        self._listener.close()
        self._wake_ups.close()
        self.commands.pool.close()

    def strings(self) -> RedisStrings:
        """The strings that another package keeps on this server, by their whole names."""
        if self._journal.begun:  # a new session must be journaled in the same script
            return RedisStrings(self._records)
        return RedisTogether(self._records)

    def lend_pool(self) -> redis.ConnectionPool | None:
        """A connection pool of the driver for other packages; None for a cluster.

        It is the pool of the client that was passed in, or else a new one of the same size as the
        store's, with a quarter of a call's time budget as its timeout.
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
