"""Sessions in Redis 6.2 or newer (or Valkey): one string per session, one command per operation.

The string is a header of 31 bytes, then the payload, or for a pointer the successor's key::

    1 kind: 1 record, 2 pointer     8 version     6 created     6 idle expiry     6 absolute expiry
    4 CRC-32 of the session key and the 27 bytes before (times: milliseconds since 1970, big endian)

The key's own time to live is set in the same step as every write. The CRC shows an answer that
belongs to another key, as a client connection gives that lost step after an interrupt.
"""

from __future__ import annotations

import hashlib
import time
from importlib.resources import files
from typing import Any
from zlib import crc32

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from ..errors import Gone, KeyTaken, Stale, StoreUnavailable, UnreadableRecord
from .base import Record, StoreOptions, milliseconds

_HEADER = 31
_RECORD, _POINTER = 1, 2
_RETRIES = 2
_RETRY_PAUSE = 0.02  # seconds


class _Script:
    def __init__(self, name: str) -> None:
        self.source = files(__package__).joinpath(f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()


_SAVE, _RENEW = _Script("save"), _Script("renew")
_REPLACE, _DELETE = _Script("replace"), _Script("delete")


class RedisStore:
    """Keeps records in the Redis at ``url``, or behind an existing client, whose pool is used.

    A client that was passed in is never closed. Its own settings bound the time to connect; the
    wait for each answer is bounded by ``options.timeout`` either way.
    """

    def __init__(self, url_or_client: str | redis.Redis, options: StoreOptions | None = None):
        options = options or StoreOptions()
        self._clock = options.clock
        self._timeout = options.timeout
        self._prefix = options.prefix
        self._owns_pool = isinstance(url_or_client, str)
        if isinstance(url_or_client, str):
            self._pool: redis.ConnectionPool = redis.BlockingConnectionPool.from_url(
                url_or_client,
                max_connections=options.pool_max,
                timeout=options.timeout / 2,
                socket_connect_timeout=options.timeout / 4,
                socket_timeout=options.timeout / 4,
                retry=Retry(NoBackoff(), 0),
            )
        else:
            self._pool = url_or_client.connection_pool

    def create(self, record: Record) -> None:
        command = ("SET", self._name(record.key), _pack(record), "NX", "PX", self._life(record))
        if self._call(*command) is not None:
            return
        there = self.load(record.key)
        if there is None:  # expired by its own times, though not by the server's yet
            self._call("DEL", self._name(record.key))
            if self._call(*command) is not None:
                return
        if there is None or there.version != record.version:
            raise KeyTaken

    def load(self, key: str) -> Record | None:
        value = self._call("GET", self._name(key))
        if value is None:
            return None
        try:
            record = _unpack(key, value)
        except UnreadableRecord:
            # The connections may be out of step: drop them, and ask once more.
            self._pool.disconnect()
            value = self._call("GET", self._name(key))
            if value is None:
                return None
            record = _unpack(key, value)
        if milliseconds(self._clock) >= record.idle_expires_at:
            return None
        return record

    def save(self, record: Record, expected_version: int) -> None:
        self._run(
            _SAVE,
            [self._name(record.key)],
            [
                expected_version.to_bytes(8, "big"),
                _pack(record),
                self._life(record),
                milliseconds(self._clock),
            ],
            record,
        )

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        if not record.is_live(milliseconds(self._clock)):
            return False
        later = min(max(idle_expires_at, record.idle_expires_at), record.absolute_expires_at)
        renewed = record._replace(idle_expires_at=later)
        try:
            self._run(
                _RENEW,
                [self._name(record.key)],
                [_header(_RECORD, record), _header(_RECORD, renewed), self._life(renewed)],
            )
        except Gone:
            return False
        return True

    def replace(
        self, key: str, record: Record, expected_version: int, grace_until: int | None
    ) -> None:
        pointer, pointer_life = b"", 0
        if grace_until is not None:
            old = record._replace(key=key).pointer(record, grace_until)
            pointer, pointer_life = _pack(old), self._life(old)
        self._run(
            _REPLACE,
            [self._name(key), self._name(record.key)],
            [
                expected_version.to_bytes(8, "big"),
                _pack(record),
                self._life(record),
                milliseconds(self._clock),
                pointer,
                pointer_life,
            ],
            record,
        )

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        expected = b"" if expected_version is None else expected_version.to_bytes(8, "big")
        now = milliseconds(self._clock)
        reply = self._run(_DELETE, [self._name(key)], [expected, now, 0])
        if reply[:1] == b"P":
            found = self.delete(reply[1:].decode("ascii"))
            self._run(_DELETE, [self._name(key)], [b"", now, 1])
            return found
        return reply == b"K"

    def close(self) -> None:
        if self._owns_pool:
            self._pool.disconnect()

    def _name(self, key: str) -> str:
        return f"{self._prefix}{{{key}}}"

    def _life(self, record: Record) -> int:
        return max(1, record.idle_expires_at - milliseconds(self._clock))

    def _run(
        self, script: _Script, keys: list[str], args: list[Any], record: Record | None = None
    ) -> bytes:
        """Run a script; its first answering byte says how it went.

        With ``record``, a success must name the version that was written: an answer to
        somebody else's command would not.
        """
        for _ in range(2):
            try:
                reply = self._call("EVALSHA", script.sha, len(keys), *keys, *args)
            except NoScriptError:
                reply = self._call("EVAL", script.source, len(keys), *keys, *args)
            if type(reply) is bytes and reply[:1] in (b"K", b"G", b"S", b"T", b"P", b"N"):
                if reply[:1] == b"G":
                    raise Gone
                if reply[:1] == b"S":
                    raise Stale
                if reply[:1] == b"T":
                    raise KeyTaken
                if record is None or reply[1:] == record.version.to_bytes(8, "big"):
                    return reply
            self._pool.disconnect()  # out of step; the scripts are safe to repeat
        raise StoreUnavailable("redis: answers do not belong to the commands sent")

    def _call(self, *command: Any) -> Any:
        """Send one command and return its answer, all within ``options.timeout``.

        Repeats are safe: every command here recognises its own earlier effect.
        """
        deadline = time.monotonic() + self._timeout
        retries = _RETRIES
        while True:
            try:
                return self._attempt(command, deadline)
            except NoScriptError:
                raise
            except (AuthenticationError, ResponseError) as error:
                if str(error).startswith("WRONGTYPE"):
                    raise UnreadableRecord("corrupt", "not a string") from None
                if not isinstance(error, (ReadOnlyError, BusyLoadingError)):
                    raise _unavailable(command, error) from error
                failure: Exception = error
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                failure = error
            except RedisError as error:
                raise _unavailable(command, error) from error
            pause = _RETRY_PAUSE * (_RETRIES - retries + 1)
            if retries == 0 or time.monotonic() + pause >= deadline:
                raise _unavailable(command, failure) from failure
            retries -= 1
            time.sleep(pause)

    def _attempt(self, command: tuple[Any, ...], deadline: float) -> Any:
        connection: Any = self._pool.get_connection()
        try:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RedisTimeoutError("no time left after waiting for a connection")
            connection.send_command(*command)
            return connection.read_response(disable_decoding=True, timeout=left)
        except ReadOnlyError:
            connection.disconnect()  # after a failover: look the primary up anew
            raise
        except ResponseError:
            raise
        except BaseException:
            # Whatever interrupted us, the answer may still come: never reuse this connection.
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)


def _unavailable(command: tuple[Any, ...], error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"redis: {command[0]}: {type(error).__name__}: {error}")


def _header(kind: int, record: Record) -> bytes:
    head = b"".join(
        (
            kind.to_bytes(1, "big"),
            record.version.to_bytes(8, "big"),
            record.created_at.to_bytes(6, "big"),
            record.idle_expires_at.to_bytes(6, "big"),
            record.absolute_expires_at.to_bytes(6, "big"),
        )
    )
    return head + crc32(head, crc32(record.key.encode("ascii"))).to_bytes(4, "big")


def _pack(record: Record) -> bytes:
    if record.successor is None:
        return _header(_RECORD, record) + record.payload
    return _header(_POINTER, record) + record.successor.encode("ascii")


def _unpack(key: str, value: bytes) -> Record:
    kind = value[0] if len(value) >= _HEADER else 0
    if kind > _POINTER and kind < 32:
        raise UnreadableRecord("newer format", f"record kind {kind}")
    if kind not in (_RECORD, _POINTER):
        raise UnreadableRecord("corrupt", "no record of this library")
    record = Record(
        key,
        int.from_bytes(value[1:9], "big"),
        int.from_bytes(value[9:15], "big"),
        int.from_bytes(value[15:21], "big"),
        int.from_bytes(value[21:27], "big"),
        value[_HEADER:] if kind == _RECORD else b"",
        value[_HEADER:].decode("ascii", "replace") if kind == _POINTER else None,
    )
    if _header(kind, record) != value[:_HEADER]:
        raise UnreadableRecord("corrupt", "not this session's own record, or altered")
    return record
