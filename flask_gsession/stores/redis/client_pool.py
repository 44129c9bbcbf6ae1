"""Lends connections from a Redis client that the application created."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from .driver import (
    LENDS_CLOSED,
    PUSHED,
    as_driver_error,
    check_client,
    is_closed_or_unread,
    lend,
    read_within,
)
from .pool import ConnectionPool, bounded, is_refusal


class ClientSlot:
    """A connection from an existing client's pool."""

    __slots__ = ("connection", "deadline")

    def __init__(self, connection: Any, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline

    def ask(self, request: bytes) -> Any:
        """Send a packed command, and return its reply as bytes. Raises the server's errors."""
        left = self.deadline - monotonic()
        if left <= 0:
            raise RedisTimeoutError("no time left after waiting for a connection")
        self.connection.send_packed_command((request,))
        try:
            while True:
                answer = read_within(self.connection, left)
                if not isinstance(answer, PUSHED):
                    return answer
                left = max(self.deadline - monotonic(), 0.001)
        except ResponseError as error:
            raise as_driver_error(error) from None

    def ask_all(self, requests: bytes, count: int) -> list[Any]:
        """Send ``count`` packed commands at once. Returns replies and errors of the server."""
        self.connection.send_packed_command((requests,))
        return [self._answer() for _ in range(count)]

    def _answer(self) -> Any:
        try:
            while True:
                answer = self.connection.read_response(disable_decoding=True)
                if not isinstance(answer, PUSHED):
                    return answer
        except ResponseError as error:
            return as_driver_error(error)


class ClientPool:
    """Lends connections from an existing client's pool. Its settings limit the time to connect."""

    def __init__(self, client: redis.Redis) -> None:
        self._pool = client.connection_pool
        check_client(self._pool.connection_kwargs)
        self.make: Callable[[], Any] = partial(
            bounded(self._pool.connection_class), **self._pool.connection_kwargs
        )
        #: called when a connection leads to another server than the followed one
        self.moved: Callable[[], object] = bool
        self._peer: Any = None

    def take(self, deadline: float, name: bytes = b"") -> ClientSlot:
        """A connection from the client's pool."""
        try:
            connection = lend(self._pool)
        except (redis.RedisError, OSError):
            raise
        except BaseException:
            # Interrupted while connecting: the pool keeps the half-made connection. Drop it.
            self._pool.disconnect(inuse_connections=False)
            raise
        if LENDS_CLOSED and is_closed_or_unread(connection):
            connection.disconnect()
        if self._peer is not None and _peer_of(connection) != self._peer:
            self._peer = None
            self.moved()
        return ClientSlot(connection, deadline)

    def give(self, slot: ClientSlot) -> None:
        """Release the connection of a command that was answered."""
        self._pool.release(slot.connection)

    def give_failed(self, slot: ClientSlot, error: BaseException) -> None:
        """Release the connection of a command that failed; close it if it may be out of step."""
        try:
            if not is_refusal(error):
                slot.connection.disconnect()
        finally:  # also after an interrupt, or the client's pool would lose a place
            self.give(slot)

    def invalidate(self) -> None:
        """Does nothing: the client checks a connection before it lends it."""

    def look(self, deadline: float) -> None:
        """Does nothing: the client knows its server."""

    def follow(self, connection: Any) -> None:
        """Call ``moved`` if a connection leads to another server."""
        self._peer = _peer_of(connection)

    def close(self) -> None:
        """Does nothing: the client belongs to the application."""


def _peer_of(connection: Any) -> Any:
    try:
        return connection._sock.getpeername()
    except (AttributeError, OSError):  # it is not connected
        return None


class SentinelClientPool(ConnectionPool):
    """Our own connections to the primary that a Sentinel client finds.

    From 5.3 to 8.0.1, the driver's pool loses the place of each connection that it drops: at each
    failover, and at each attempt to connect while no sentinel answers. In the end it has no places
    left.
    """

    def __init__(self, client: redis.Redis, size: int) -> None:
        pool = client.connection_pool
        check_client(pool.connection_kwargs)
        self._client = client  # keeps its pool alive, which connections refer to weakly
        # Commands are retried on another connection, so connecting isn't retried.
        options = {**pool.connection_kwargs, "retry": Retry(NoBackoff(), 0)}
        super().__init__(partial(bounded(pool.connection_class), **options), size)
