"""Sessions in Redis 6.2 or newer (or Valkey): one string per session, one command per operation.

The string is a header of 31 bytes, then the payload::

    1 kind: 1 record, 2 pointer     8 version     6 created     6 idle expiry     6 absolute expiry
    4 CRC-32 of the session key and the 27 bytes before (times: milliseconds since 1970, big endian)

A pointer has its successor's key and a space before the payload.

The key's own time to live is set in the same step as every write. The CRC shows an answer that
belongs to another key, as a client connection gives that lost step after an interrupt.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from struct import Struct
from typing import Any, TypeVar, cast
from zlib import crc32

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from ...errors import (
    Gone,
    KeyTaken,
    LeaseLost,
    QueueFull,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
)
from ..base import MAX_POINTERS, TICKET, Deleted, Record, Replaced, Store, milliseconds
from ..interrupts import reraise_interruption
from ..lease import ASK_AGAIN, WAITER_LIFE, Lease, poll
from ..parts import COUNT_ALL, Finding, Page, Tidied, itself
from ..support import StoreOptions, closing, count_round_trip
from .health import checked, parsed
from .pool import AllInUse, ClientPool, ConnectionPool, hint, packed
from .scans import Node, Scanner
from .servers import PrimaryPool, connections_of
from .wakeup import WakeUps

T = TypeVar("T")

_HEAD = Struct(">BQHIHIHI")  # the times in six bytes each, upper two and lower four
_WHOLE_HEAD = Struct(_HEAD.format + "I")  # with the CRC
_CHECKED, _HEADER = _HEAD.size, _WHOLE_HEAD.size
_LOW = 0xFFFF_FFFF
_RECORD, _POINTER = 1, 2
_STATUSES = (b"K", b"G", b"S", b"T", b"P", b"N", b"L", b"F", b"W", b"D", b"R")
_ERRORS = {b"G": Gone, b"D": Gone, b"S": Stale, b"T": KeyTaken, b"L": LeaseLost, b"F": QueueFull}
# What a repeat may be answered although its first try was applied: others wrote since then, or
# rotated the session, or there is nothing left to delete.
_OVERTAKEN = (b"S", b"T", b"L", b"G")
_DELETED = (b"D", b"N")
_WRITE_SOMETHING = b"redis.call('SET', KEYS[1], '', 'PX', 1) return redis.call('DEL', KEYS[1])"
_WRONG_TYPE = "not a string"
_SCANS = 4  # at most, to sample the keys of a server
_RETRY_PAUSE = 0.02  # seconds
_ASKING = packed(b"ASKING")
# What a server says in passing: while it starts, and while the topology changes.
_PASSING = (ReadOnlyError, BusyLoadingError, AskError, TryAgainError, ClusterDownError)


class _Script:
    def __init__(self, name: str) -> None:
        self.source = files(__package__).joinpath(f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest().encode()

    def lacked(self, error: str) -> str:
        """Which right the user lacks: Redis says only in which line; of two it may be either."""
        line = re.search(r"@user_script: ?(\d+)", error)
        if line is None or "can't run this command" not in error:
            return ""
        calls = self.source.decode().splitlines()[int(line[1]) - 1]
        return " or ".join(f"+{name.lower()}" for name in re.findall(r"call\('(\w+)'", calls))


_SAVE, _RENEW = _Script("save"), _Script("renew")
_REPLACE, _DELETE = _Script("replace"), _Script("delete")
_LEASE, _TIDY = _Script("lease"), _Script("tidy")
_BLOB_WRITE, _BLOB_EXPIRE = _Script("blob_write"), _Script("blob_expire")


class Confirmation:
    """Whether ``replicas`` have the end of a session; ``missing`` says why too few have it."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.missing = ""

    def ask(self, slot: Any, name: bytes, answer: Any, again: bool, deadline: float) -> None:
        """Wait until the replicas have what was done; see Redis' ``WAIT``.

        It waits for the last write of this connection, and so for all before it. A call that found
        nothing left to do, or repeats what another connection may have done, has written nothing.
        """
        status = answer[:1]
        if status not in (b"K", b"N", b"D" if again else b"N"):
            return
        span = b"%d" % max(1, int((deadline - time.monotonic()) * 800))
        self.missing = ""
        try:
            if again or status != b"K":
                count_round_trip()
                slot.ask(packed(b"EVAL", _WRITE_SOMETHING, b"1", name + b":wait"))
            count_round_trip()
            confirmed = slot.ask(packed(b"WAIT", b"%d" % self.replicas, span))
            if type(confirmed) is not int or confirmed < self.replicas:
                why = f"{confirmed} of {self.replicas} replicas answered in time"
                self.missing = f"redis: WAIT: {why}"
        except (RedisError, OSError) as error:
            slot.connection.disconnect()
            reraise_interruption(error)
            self.missing = f"redis: WAIT: {type(error).__name__}: {error}"


class RedisStore(Store):
    """Keeps records in the Redis at ``url``, or behind an existing client, whose pool is used.

    One call takes at most ``options.timeout``. Of a client that was passed in the pool is used as
    it is, and never closed: its own settings bound the time to connect, and ``options.timeout`` the
    wait for each piece of an answer.
    """

    leases = blobs = scans = upkeep = counts = checks = itself
    confirms_logouts = True

    _retries = 3
    _apart = False  # whether leases end, and are taken, in steps of their own

    def __init__(self, url_or_client: str | redis.Redis, options: StoreOptions | None = None):
        options = options or StoreOptions()
        self._clock = options.clock
        self._timeout = options.timeout
        self._prefix = options.prefix
        self._logout_replicas = options.logout_replicas
        self._pool, make = self._open(url_or_client, options)
        self._pool_max = options.pool_max
        self._source = url_or_client
        self._channels = f"{self._prefix}wake:".encode()
        # In the older protocol calls are answers, and come in order with others.
        calls = partial(make, protocol=2)
        self._wake_ups = WakeUps(calls, self._channels, options.timeout)
        closing(self, self._wake_ups.close)
        self._scanner = Scanner(self._prefix, _unpack, lambda: milliseconds(options.clock))

    def _open(
        self, source: str | redis.Redis, options: StoreOptions
    ) -> tuple[Any, Callable[..., Any]]:
        """A pool of connections, of one kind or another, and what makes more of them."""
        if not isinstance(source, str):
            theirs = source.connection_pool
            make = partial(theirs.connection_class, **theirs.connection_kwargs)
            return ClientPool(source), make
        if "+sentinel:" in source[: len("rediss+sentinel:")]:
            pool: ConnectionPool = PrimaryPool(source, options.timeout, options.pool_max)
        else:
            kind, settings = connections_of(source, options.timeout)
            pool = ConnectionPool(partial(kind, **settings), options.pool_max)
        closing(self, pool.close)
        return pool, pool.make

    def create(self, record: Record) -> None:
        self._create(record, self._deadline())

    def _create(self, record: Record, deadline: float) -> bool:
        """As ``create``; whether it was not there yet."""
        name = self._name(record.key)
        request = packed(b"SET", name, _pack(record), b"NX", b"PX", self._life(record))
        if self._call(deadline, _as_it_is, name, request) is not None:
            return True
        there = self._load_unexpired(record.key, deadline)
        if there is None:  # expired by its own times, though not by the server's yet
            self._call(deadline, _as_it_is, name, packed(b"DEL", name))
            if self._call(deadline, _as_it_is, name, request) is not None:
                return True
        if there is None or there.version != record.version:
            raise KeyTaken
        return False

    def load(self, key: str) -> Record | None:
        return self._load(key, self._deadline())

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        deadline = self._deadline()
        keys = [self._name(record.key)]
        holder = []
        if lease is not None:
            keys.append(self._lease_name(record.key))
            holder.append(lease.encode())
        version = _version(record.version)
        later: Record | None = record
        while later is not None:
            record = later
            arguments = [
                _version(expected_version),
                _pack(record),
                self._life(record),
                self._now_text(),
                b"" if shorten else b"%d" % record.idle_expires_at,
                *holder,
            ]
            reply = self._run(deadline, _SAVE, keys, arguments, version)
            later, shorten = _renewed_meanwhile(record, reply)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        try:
            self._renew(record, idle_expires_at, self._deadline())
        except Gone:
            return False
        return True

    def _renew(self, record: Record, idle_expires_at: int, deadline: float) -> None:
        later = min(max(idle_expires_at, record.idle_expires_at), record.absolute_expires_at)
        renewed = record._replace(idle_expires_at=later)
        arguments = [_header(_RECORD, renewed), self._life(renewed), self._now_text()]
        self._run(deadline, _RENEW, [self._name(record.key)], arguments)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> Replaced:
        deadline = self._deadline()
        confirmation = Confirmation(0 if pointer else self._logout_replicas)
        keys = [self._name(key), self._name(record.key), self._lease_name(key)]
        later: Record | None = record
        while later is not None:
            record = later
            left = (b"", b"0") if pointer is None else (_pack(pointer), self._life(pointer))
            arguments = [
                _version(expected_version),
                _pack(record),
                self._life(record),
                self._now_text(),
                *left,
                (lease or "").encode(),
                self._channels,
                b"" if shorten else b"%d" % record.idle_expires_at,
            ]
            version = _version(record.version)
            reply = self._run(deadline, _REPLACE, keys, arguments, version, confirmation)
            later, shorten = _renewed_meanwhile(record, reply)
        return Replaced(confirmation.missing)

    def delete(
        self, key: str, expected_version: int | None = None, lease: str | None = None
    ) -> Deleted:
        deadline, confirmation = self._deadline(), Confirmation(self._logout_replicas)
        if expected_version is not None:
            version = _version(expected_version)
            self._delete(key, deadline, version, lease=lease, confirmation=confirmation)
            return Deleted(True, None, confirmation.missing)
        key, ended = self._pop(key, deadline, confirmation)
        # An answer may have got lost, and with it what was there.
        record = _unpack(key, ended) if ended else None
        return Deleted(ended is not None, record, confirmation.missing)

    def _pop(
        self, key: str, deadline: float, confirmation: Confirmation
    ) -> tuple[str, bytes | None]:
        """Delete a session, through pointers; where it was, and what was there."""
        # What pointers lead to goes first, so that a repeat after a failure still finds it.
        pointers: list[str] = []
        ended = None
        for _ in range(MAX_POINTERS):
            reply = self._delete(key, deadline, confirmation=confirmation)
            if reply[:1] != b"P":
                ended = reply[1:] if reply[:1] == b"K" else None
                break
            pointers.append(key)
            key = _unpack(key, reply[1:]).successor or ""
        for pointer in reversed(pointers):
            self._delete(pointer, deadline, pointers=b"1")
        return key, ended

    def _delete(
        self,
        key: str,
        deadline: float,
        version: bytes = b"",
        pointers: bytes = b"0",
        lease: str | None = None,
        confirmation: Confirmation | None = None,
    ) -> bytes:
        keys = [self._name(key)]
        if lease is not None or not self._apart:
            keys.append(self._lease_name(key))
        owner = (lease or "").encode()
        arguments = [version, self._now_text(), pointers, owner, self._channels]
        return self._run(deadline, _DELETE, keys, arguments, confirmation=confirmation)

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        arguments = [b"%d" % offset, frame, b"%d" % max(1, expires_at - self._now())]
        self._run(self._deadline(), _BLOB_WRITE, [self._blob_name(name)], arguments)

    def read_frame(self, name: str, offset: int, size: int) -> bytes | None:
        blob = self._blob_name(name)
        request = packed(b"GETRANGE", blob, b"%d" % offset, b"%d" % (offset + size - 1))
        return self._call(self._deadline(), _as_it_is, blob, request) or None

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        self._expire_blobs(names, b"later", expires_at)

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        self._expire_blobs(names, b"earlier", at)

    def _expire_blobs(self, names: Sequence[str], which: bytes, at: int) -> None:
        life = b"%d" % max(0, at - self._now())
        blobs = [self._blob_name(name) for name in names]
        for keys in [[blob] for blob in blobs] if self._apart else [blobs]:
            self._run(self._deadline(), _BLOB_EXPIRE, keys, [which, life])

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        name = owner.encode()
        self._wake_ups.expect(name)
        waiting = False
        try:
            reply = self._ask_for_lease(
                key, "acquire", owner, b"%d" % lease_ms, b"%d" % max_waiters, self._wake_ups.channel
            )
            waiting = reply[:1] == b"W"
            return max(1, min(int(reply[1:].partition(b" ")[0]), ASK_AGAIN)) if waiting else 0
        finally:
            if not waiting:
                self._wake_ups.forget(name)

    def extend(self, key: str, owner: str, lease_ms: int) -> bool:
        return self._ask_for_lease(key, "extend", owner, b"%d" % lease_ms)[:1] == b"K"

    def release(self, key: str, owner: str) -> bool:
        self._wake_ups.forget(owner.encode())
        try:
            return self._ask_for_lease(key, "release", owner)[:1] == b"K"
        except LeaseLost:
            return False

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        def may_go_on() -> bool:
            name = self._lease_name(key)
            text = self._call(self._deadline(), _as_it_is, name, packed(b"GET", name))
            return _lease(text).is_turn_of(owner, self._now())

        end = time.monotonic() + seconds
        if not self._wake_ups.wait(owner.encode(), seconds):
            poll(may_go_on, end - time.monotonic())

    def _ask_for_lease(
        self, key: str, operation: str, owner: str, *more: bytes, deadline: float | None = None
    ) -> bytes:
        name = owner.encode()
        keys = [self._lease_name(key)]
        if operation == "acquire" and not self._apart:
            keys.append(self._name(key))
        arguments = [operation.encode(), name, self._now_text(), b"%d" % WAITER_LIFE]
        deadline = deadline or self._deadline()
        return self._run(deadline, _LEASE, keys, [*arguments, self._channels, *more], name)

    def count(self) -> int:
        """About how many sessions are live: of each server at most four short steps of SCAN."""
        return sum(map(self._count_at, self._servers()))

    def _servers(self) -> dict[bytes, str]:
        """The address of each server that holds sessions, by a name that is asked about there."""
        return {b"": ""}

    def _count_at(self, name: bytes) -> int:
        deadline = self._deadline()

        def ask(*words: bytes) -> Any:
            return self._call(deadline, _as_it_is, name, packed(*words))

        start = f"{self._prefix}{{".encode()
        ticket = start + f"{TICKET}}}".encode()
        cursor = b"0"
        seen = ours = 0
        for _ in range(_SCANS):
            cursor, keys = ask(b"SCAN", cursor, b"COUNT", b"%d" % (COUNT_ALL // _SCANS))
            seen += len(keys)
            ours += sum(
                key.startswith(start) and key.endswith(b"}") and key != ticket for key in keys
            )
            if cursor == b"0":
                return int(ours)
        # What comes first in a scan is a fair sample: keys lie by their hash.
        keys_in_all: int = ask(b"DBSIZE")
        return int(keys_in_all * ours / max(1, seen))

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        deadline = self._deadline()

        def load(key: str) -> Record | None:
            return self._load(key, deadline)

        return self._scanner.scan(self._nodes(deadline), cursor, limit, begins, deadline, load)

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        deadline = self._deadline()

        def put_right(name: bytes, life: int) -> bool:
            return self._run(deadline, _TIDY, [name], [b"%d" % life]) == b"K"

        nodes = self._nodes(deadline)
        return self._scanner.tidy(nodes, cursor, limit, deadline, None if dry_run else put_right)

    def _nodes(self, deadline: float) -> list[Node]:
        """The servers that have our keys."""
        return [Node(0, self._pool, lambda: None)]

    def lend_pool(self) -> redis.ConnectionPool | None:
        """A pool of the driver's own to this server, for other packages; None where it is several.

        That of the client that was passed in; else a new one, of as many connections as the
        store's, whose waits are a quarter of what a call may take.
        """
        if isinstance(self._source, redis.Redis):
            return self._source.connection_pool
        if not isinstance(self._source, str) or "+" in self._source.partition(":")[0]:
            return None
        piece = self._timeout / 4
        return redis.BlockingConnectionPool.from_url(
            self._source,
            max_connections=self._pool_max,
            timeout=piece,
            socket_connect_timeout=piece,
            socket_timeout=piece,
            retry=Retry(NoBackoff(), 1),
        )

    def check(self) -> list[Finding]:
        nodes = self._servers()
        findings = []
        for name, address in nodes.items():
            for finding in self._check_at(name):
                where = f"{address}: " if len(nodes) > 1 else ""
                findings.append(finding._replace(found=where + finding.found))
        if isinstance(self._pool, PrimaryPool):
            findings += self._pool.check(self._timeout)
        return findings

    def _check_at(self, name: bytes) -> list[Finding]:
        def ask(*words: bytes) -> Any:
            """The answer, None where the server refuses the command."""
            try:
                return self._call(self._deadline(), _as_it_is, name, packed(*words))
            except StoreUnavailable as error:
                if isinstance(error.__cause__, ResponseError):
                    return None
                raise

        info = ask(b"INFO", b"everything")
        if info is None:
            return [
                Finding(
                    "warning",
                    "server",
                    "it refuses INFO, or this user may not call it",
                    "Its eviction policy, persistence and replicas were not looked at.",
                )
            ]
        now = ask(b"TIME")
        skew = None if now is None else int(now[0]) + int(now[1]) / 1e6 - self._clock()
        return checked(parsed(info), skew, self._logout_replicas)

    def close(self) -> None:
        self._wake_ups.close()
        self._pool.close()

    def _name(self, key: str) -> bytes:
        return f"{self._prefix}{{{key}}}".encode()

    def _lease_name(self, key: str) -> bytes:
        return f"{self._prefix}{{{key}}}:lock".encode()

    def _blob_name(self, name: str) -> bytes:
        return f"{self._prefix}blob:{{{name}}}".encode()

    def _now(self) -> int:
        return milliseconds(self._clock)

    def _now_text(self) -> bytes:
        return b"%d" % self._now()

    def _life(self, record: Record) -> bytes:
        return b"%d" % max(1, record.idle_expires_at - self._now())

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout

    def _load(self, key: str, deadline: float) -> Record | None:
        def parse(value: Any) -> Record | None:
            return None if value is None else _unpack(key, value)

        name = self._name(key)
        # ``packed``, written out: every load comes by here.
        request = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)
        return self._call(deadline, parse, name, request)

    def _load_unexpired(self, key: str, deadline: float) -> Record | None:
        record = self._load(key, deadline)
        return None if record is None or self._now() >= record.idle_expires_at else record

    def _run(
        self,
        deadline: float,
        script: _Script,
        keys: list[bytes],
        arguments: list[bytes],
        echo: bytes = b"",
        confirmation: Confirmation | None = None,
        also: bytes | None = None,
    ) -> bytes:
        """Run a script; its first answering byte says how it went.

        A success must end with ``echo``, as the version that was written, or be ``also``: an answer
        to somebody else's command would not. Then replicas are asked for their ``confirmation``.
        """

        def parse(reply: Any) -> bytes:
            if type(reply) is bytes:
                status = reply[:1]
                if status in _ERRORS or (status in _STATUSES and reply.endswith(echo)):
                    return reply
                if reply == also:
                    return reply
            raise UnreadableRecord("corrupt", "an answer to another command")

        parts = (b"%d" % len(keys), *keys, *arguments)
        try:
            reply = self._call(
                deadline,
                parse,
                keys[0],
                packed(b"EVALSHA", script.sha, *parts),
                lambda: packed(b"EVAL", script.source, *parts),
                confirmation,
            )
        except UnreadableRecord as error:
            if error.detail == _WRONG_TYPE:
                raise
            raise StoreUnavailable(f"redis: {error.detail}") from None
        except StoreUnavailable as error:
            rights = script.lacked(error.detail)
            if not rights:
                raise
            raise StoreUnavailable(f"{error.detail} (the user lacks {rights})") from error
        if reply in _ERRORS:
            raise _ERRORS[reply]
        return reply

    def _call(
        self,
        deadline: float,
        parse: Callable[[Any], T],
        name: bytes,
        request: bytes,
        with_source: Callable[[], bytes] | None = None,
        confirmation: Confirmation | None = None,
    ) -> T:
        """Send one command and return what ``parse`` makes of its answer, before ``deadline``.

        ``name`` is the key that it is about. Where the server does not know the script,
        ``with_source`` is the same command with it. An answer that ``parse`` refuses is asked for
        once more, on another connection: this one may be out of step. Repeats are safe: every
        command here recognises its own earlier effect.
        Only where another writer came in between, a repeat cannot tell a write that was applied
        and overwritten from one that was never applied: that is ``StoreUnavailable`` too.
        """
        tries = 0
        refused = in_doubt = False
        while True:
            try:
                answer = self._attempt(name, request, parse, deadline, confirmation, in_doubt)
                if in_doubt and answer in _OVERTAKEN:
                    raise StoreUnavailable("redis: an answer was lost, then another write came")
                if in_doubt and answer in _DELETED:
                    answer = cast(T, b"K")  # what it was is not known any more
                return answer
            except NoScriptError:
                if with_source is None:
                    raise
                request, with_source = with_source(), None
                continue
            except UnreadableRecord:
                if refused:
                    raise
                refused = in_doubt = True
                continue
            except (AuthenticationError, ResponseError) as error:
                if str(error).startswith("WRONGTYPE"):
                    raise UnreadableRecord("corrupt", _WRONG_TYPE) from None
                if not isinstance(error, _PASSING):
                    raise _unavailable(request, error) from error
                failure: Exception = error
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                reraise_interruption(error)
                failure = error
                in_doubt = True
            except RedisError as error:
                reraise_interruption(error)
                raise _unavailable(request, error) from error
            pause = _RETRY_PAUSE * tries  # at first none: the connection may have been idle long
            if tries == self._retries or time.monotonic() + pause >= deadline:
                raise _unavailable(request, failure) from failure
            tries += 1
            time.sleep(pause)

    def _attempt(
        self,
        name: bytes,
        request: bytes,
        parse: Callable[[Any], T],
        deadline: float,
        confirmation: Confirmation | None,
        again: bool,
        pool: Any = None,  # of any kind, with slots of its own kind
        *,
        asking: bool = False,
    ) -> T:
        if pool is None:
            pool = self._pool
        slot = pool.take(deadline)
        try:
            try:
                if asking:
                    count_round_trip()
                    slot.ask(_ASKING)
                count_round_trip()
                answer = parse(slot.ask(request))
                if confirmation is not None and confirmation.replicas:
                    confirmation.ask(slot, name, answer, again, deadline)
                return answer
            except ReadOnlyError:
                # After a failover: look the primary up anew, for every connection.
                slot.connection.disconnect()
                pool.distrust()
                raise
            except ResponseError:
                raise
            except BaseException as error:
                # Interrupted, or given an answer that is not ours: never reuse this connection.
                slot.connection.disconnect()
                timed_out = isinstance(error, TimeoutError)  # the others may be well
                if isinstance(error, (RedisConnectionError, OSError)) and not timed_out:
                    pool.distrust()
                raise
        finally:
            pool.give(slot)


def _renewed_meanwhile(record: Record, reply: bytes) -> tuple[Record | None, bool]:
    """What to store instead where ``reply`` says that the session is kept for longer by now.

    And whether that may be less than the stored expiry, for it is limited by the absolute one.
    """
    if reply[:1] != b"R":
        return None, False
    stored = int(reply[1:].partition(b" ")[0])
    end = record.absolute_expires_at
    return record._replace(idle_expires_at=min(stored, end)), stored > end


def _as_it_is(answer: Any) -> Any:
    return answer


def _unavailable(request: bytes, error: Exception) -> StoreUnavailable:
    name = request.split(b"\r\n", 3)[2].decode()
    return StoreUnavailable(
        f"redis: {name}: {type(error).__name__}: {error}{hint(error)}",
        contention=isinstance(error, AllInUse),
    )


def _lease(text: bytes | None) -> Lease:
    if text is None:
        return Lease()
    try:
        first, *lines = text.decode("ascii", "replace").splitlines()
        owner, until, length = first.split(" ")
        waiters = (line.split(" ") for line in lines)
        return Lease(owner, int(until), int(length), {who: int(seen) for who, seen, _ in waiters})
    except ValueError:
        return Lease()  # junk, which the next to acquire it replaces


def _version(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _header(kind: int, record: Record) -> bytes:
    created, idle, absolute = record[2:5]
    head = _HEAD.pack(
        kind,
        record.version,
        created >> 32,
        created & _LOW,
        idle >> 32,
        idle & _LOW,
        absolute >> 32,
        absolute & _LOW,
    )
    return head + crc32(head, crc32(record.key.encode("ascii"))).to_bytes(4, "big")


def _pack(record: Record) -> bytes:
    if record.successor is None:
        return _header(_RECORD, record) + record.payload
    return _header(_POINTER, record) + record.successor.encode("ascii") + b" " + record.payload


def _unpack(key: str, value: bytes) -> Record:
    if len(value) < _HEADER:
        raise UnreadableRecord("corrupt", "no record of this library")
    kind, version, c, created, i, idle, a, absolute, check = _WHOLE_HEAD.unpack_from(value)
    if kind != _RECORD and kind != _POINTER:
        if _POINTER < kind < 32:
            raise UnreadableRecord("newer format", f"record kind {kind}")
        raise UnreadableRecord("corrupt", "no record of this library")
    if crc32(value[:_CHECKED], crc32(key.encode("ascii"))) != check:
        raise UnreadableRecord("corrupt", "not this session's own record, or altered")
    successor, payload = None, value[_HEADER:]
    if kind == _POINTER:
        text, _, payload = payload.partition(b" ")
        successor = text.decode("ascii", "replace")
    return Record(
        key,
        version,
        c << 32 | created,
        i << 32 | idle,
        a << 32 | absolute,
        payload,
        successor,
    )
