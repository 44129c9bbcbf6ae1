"""The part ``journal`` of a Redis store: a stream, and an index of when sessions are due.

On one server, one script writes the session, its place in the index and the entries. The server
itself removes a session only ``HOLD`` after it has expired; by then a sweep has journaled its end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from zlib import crc32

from redis.exceptions import RedisError

from ...errors import StoreUnavailable, UnreadableRecord
from ..base import Deleted, Record, Replaced
from ..interrupts import reraise_interruption
from ..journals import Entries, Journal, JournalFigures
from .commands import Commands, Script, packed
from .confirmation import Confirmation
from .layout import pack, unpack, version
from .pool import ask_all, described, hint
from .records import DELETE, RENEW, REPLACE, SAVE, Records

#: How long an expired session stays on the server if no sweep removes it, in milliseconds.
HOLD = 30 * 86_400_000
BUCKETS = 16  # of the due index
_BATCH = 100  # sessions in one pipeline, which blocks the server for a few milliseconds


class Journaled(Script):
    """A script, followed by the script that journals its effect."""

    def __init__(self, script: Script, header: int = 0) -> None:
        # The position of the value with the session's expiry, counted from 1; 0: none.
        self.header = header
        end = Script("journal_enter").source
        super().set_source(b"local function write(KEYS, ARGV)\n%b\nend\n%b" % (script.source, end))


_CREATE = Journaled(Script("journal_create"), 1)
_APPEND = Journaled(Script("journal_append"))
_EXPIRE = Journaled(Script("journal_expire"))
_ACKNOWLEDGE, _PLACE = Script("journal_ack"), Script("journal_place")
_JOURNALED = {
    SAVE: Journaled(SAVE, 2),
    RENEW: Journaled(RENEW, 1),
    REPLACE: Journaled(REPLACE, 2),
    DELETE: Journaled(DELETE),
}


class JournalNames:
    """The keys of a journal; the part in braces decides the slot in a Cluster."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.stream = f"{prefix}journal:{{events}}".encode()
        self.consumers = f"{prefix}journal:{{events}}:consumers".encode()

    def due(self, key: str) -> bytes:
        return self.bucket(crc32(key.encode()) % BUCKETS)

    def bucket(self, number: int) -> bytes:
        return f"{self._prefix}journal:{{due:{number}}}".encode()


class RedisJournal(Journal):
    """The journal on one server: each change is one script."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._commands = records.commands
        self._names = JournalNames(records.names.prefix)
        self._most = 0
        self.begun = False

    def begin(self, most: int) -> None:
        self._most, self.begun = most, True

    def create(self, record: Record, entries: Sequence[bytes]) -> None:
        write = self._write(record.key, "", entries)
        arguments = [pack(record), b"%d" % write.life(record, write.now())]
        names = [self._records.names.record(record.key)]
        mine = version(record.version)
        write.run(self._commands.deadline(), _CREATE, names, arguments, mine)

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        records = self._within(record.key, "", ())
        records.save(record, expected_version, shorten=shorten, lease=lease)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        records = self._within(record.key, "", ())
        return records.renew(record, idle_expires_at)

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
    ) -> Replaced:
        records = self._within(record.key, key, entries)
        return records.replace(key, record, expected_version, pointer, shorten=shorten, lease=lease)

    def end(
        self, key: str, expected_version: int, entries: Sequence[bytes], lease: str | None = None
    ) -> Deleted:
        return self._within("", key, entries).delete(key, expected_version, lease=lease)

    def due(self, limit: int) -> list[Record]:
        found: list[Record] = []
        for number in range(BUCKETS):
            if len(found) >= limit:
                break
            found += self._due_in(self._names.bucket(number), min(_BATCH, limit - len(found)))
        return found

    def _due_in(self, bucket: bytes, limit: int) -> list[Record]:
        now = self._commands.now()
        request = packed(
            *(b"ZRANGEBYSCORE", bucket, b"-inf", b"%d" % now, b"WITHSCORES"),
            *(b"LIMIT", b"0", b"%d" % limit),
        )
        answer = self._call(bucket, request)
        scored = _pairs(answer)
        keys = [name.decode("ascii", "replace") for name, _ in scored]
        scores = [int(float(score)) for _, score in scored]
        names = [self._records.names.record(key) for key in keys]
        values = self._all(names, [packed(b"GET", name) for name in names])
        found = []
        for key, score, value in zip(keys, scores, values, strict=True):
            record = self._examined(bucket, key, score, value, now)
            if record is not None:
                found.append(record)
        return found

    def _examined(self, bucket: bytes, key: str, score: int, value: Any, now: int) -> Record | None:
        """The session, if it has expired. Otherwise, corrects its place in the index."""
        nothing = Record(key, 0, 0, score, 0, b"")
        if value is None:
            if now >= score + HOLD:
                return nothing  # no sweep came in time: the server has removed the record
            self._call(bucket, packed(b"ZREM", bucket, key.encode()))
            return None
        try:
            record: Record = unpack(key, value)
        except UnreadableRecord:
            return nothing
        if record.successor is not None:
            self._pointer(bucket, record)
            return None
        if now < record.idle_expires_at:
            self._place(key, record.idle_expires_at)
            return None
        return record

    def _place(self, key: str, due: int) -> None:
        """Let the sweep look for this session at ``due``, even if the server is full."""
        arguments = [b"%d" % due, key.encode()]
        self._commands.run(self._commands.deadline(), _PLACE, [self._names.due(key)], arguments)

    def _pointer(self, bucket: bytes, record: Record) -> None:
        """Remove the leftover place of a session that was rotated."""
        self._call(bucket, packed(b"ZREM", bucket, record.key.encode()))

    def expire(self, expired: Sequence[tuple[Record, bytes]]) -> int:
        removed = 0
        for start in range(0, len(expired), _BATCH):
            batch = expired[start : start + _BATCH]
            removed += self._expire(*batch[0])  # also loads the script on the server
            names, requests = [], []
            for record, entry in batch[1:]:
                keys, arguments = self._to_expire(record)
                write = self._write("", record.key, [entry])
                keys, arguments = write.more(_EXPIRE, keys, arguments)
                names.append(keys[0])
                requests.append(
                    packed(b"EVALSHA", _EXPIRE.sha, b"%d" % len(keys), *keys, *arguments)
                )
            for (record, entry), answer in zip(batch[1:], self._all(names, requests), strict=True):
                if answer == b"K":
                    removed += 1
                elif answer != b"N":
                    removed += self._expire(record, entry)
        return removed

    def _expire(self, record: Record, entry: bytes) -> bool:
        write = self._write("", record.key, [entry])
        keys, arguments = self._to_expire(record)
        return write.run(self._commands.deadline(), _EXPIRE, keys, arguments) == b"K"

    def _to_expire(self, record: Record) -> tuple[list[bytes], list[bytes]]:
        names, key = self._records.names, record.key
        keys = [names.record(key), names.lease(key), self._names.due(key)]
        return keys, [version(record.version), b"%d" % self._commands.now(), key.encode()]

    def recover(self) -> int:
        return 0

    def append(self, entries: Sequence[bytes], key: str | None = None) -> None:
        if entries:
            write, names = self._write("", "", entries), [self._names.consumers]
            write.run(self._commands.deadline(), _APPEND, names, [])

    def read(self, after: int, limit: int) -> Entries:
        start, count = b"%d-0" % (after + 1), b"%d" % limit
        stream = self._names.stream
        answer = self._call(stream, packed(b"XRANGE", stream, start, b"+", b"COUNT", count))
        entries = [(_number(name), fields[1]) for name, fields in answer]
        return Entries(entries, entries[0][0] if entries else after + 1)

    def acknowledge(self, consumer: str, number: int) -> None:
        arguments = [consumer.encode(), b"%d" % number]
        deadline = self._commands.deadline()
        self._commands.run(deadline, _ACKNOWLEDGE, [self._names.consumers], arguments)

    def acknowledged(self, consumer: str) -> int | None:
        name = self._names.consumers
        number = self._call(name, packed(b"HGET", name, consumer.encode()))
        return None if number is None else int(number)

    def forget(self, consumer: str) -> bool:
        name = self._names.consumers
        return bool(self._call(name, packed(b"HDEL", name, consumer.encode())) == 1)

    def figures(self) -> JournalFigures:
        stream, names = self._names.stream, self._names
        first = self._call(stream, packed(b"XRANGE", stream, b"-", b"+", b"COUNT", b"1"))
        last = self._call(stream, packed(b"XREVRANGE", stream, b"+", b"-", b"COUNT", b"1"))
        now, due, oldest = b"%d" % self._commands.now(), 0, 0
        for number in range(BUCKETS):
            bucket = names.bucket(number)
            count = self._call(bucket, packed(b"ZCOUNT", bucket, b"-inf", now))
            if not count:
                continue
            due += count
            earliest = packed(b"ZRANGE", bucket, b"0", b"0", b"WITHSCORES")
            ((_, earliest_score),) = _pairs(self._call(bucket, earliest))
            score = int(float(earliest_score))
            oldest = min(oldest or score, score)
        consumers = self._call(names.consumers, packed(b"HGETALL", names.consumers))
        numbers = {name.decode(): int(number) for name, number in _pairs(consumers)}
        return JournalFigures(
            _number(first[0][0]) if first else 0,
            _number(last[0][0]) if last else 0,
            due,
            oldest,
            numbers,
        )

    def _call(self, name: bytes, request: bytes) -> Any:
        return self._commands.ask(self._commands.deadline(), name, request)

    def _all(self, names: Sequence[bytes], requests: Sequence[bytes]) -> Sequence[Any]:
        """The replies to these requests, with errors as objects."""
        if not requests:
            return []
        try:
            return ask_all(self._commands.pool, self._commands.deadline(), requests)
        except (RedisError, OSError) as error:
            reraise_interruption(error)
            detail = f"redis: journal: {described(error)}{hint(error)}"
            raise StoreUnavailable(detail) from error

    def _write(self, enters: str, removes: str, entries: Sequence[bytes]) -> _Write:
        return _Write(self._commands, self._names, self._most, enters, removes, entries)

    def _within(self, enters: str, removes: str, entries: Sequence[bytes]) -> Records:
        """Records whose scripts also update the index and journal these entries."""
        write: Any = self._write(enters, removes, entries)
        return Records(write, self._records.logout_replicas)


class _Write:
    """Takes the place of ``Commands`` in a write, and journals its effect in the same script.

    ``enters`` and ``removes``: keys for the due index, or "".
    """

    def __init__(
        self,
        commands: Commands,
        names: JournalNames,
        most: int,
        enters: str,
        removes: str,
        entries: Sequence[bytes],
    ) -> None:
        self._commands = commands
        self._journal = names
        self._most = most
        self._enters, self._removes, self._entries = enters, removes, entries
        self.names = commands.names
        self.deadline, self.now = commands.deadline, commands.now

    def life(self, record: Record, now: int) -> int:
        return held_life(record, now)

    def run(
        self,
        deadline: float,
        script: Script,
        keys: list[bytes],
        arguments: list[bytes],
        echo: bytes = b"",
        confirmation: Confirmation | None = None,
        also: bytes | None = None,
    ) -> bytes:
        journaled = script if isinstance(script, Journaled) else _JOURNALED[script]
        keys, arguments = self.more(journaled, keys, arguments)
        return self._commands.run(deadline, journaled, keys, arguments, echo, confirmation, also)

    def more(
        self, script: Journaled, keys: list[bytes], arguments: list[bytes]
    ) -> tuple[list[bytes], list[bytes]]:
        """The keys and arguments of the write and of the journal."""
        names = self._journal
        return (
            [
                *keys,
                names.due(self._enters) if self._enters else names.stream,
                names.due(self._removes) if self._removes else names.stream,
                names.stream,
            ],
            [
                *arguments,
                self._enters.encode() if script.header else b"",
                b"%d" % script.header,
                self._removes.encode(),
                b"%d" % (time.time() * 1000),
                b"%d" % self._most,
                *self._entries,
                b"%d" % len(self._entries),
            ],
        )


def held_life(record: Record, now: int) -> int:
    """The milliseconds to keep a session for, so that a sweep finds it after it has expired."""
    hold = HOLD if record.successor is None else 0
    return max(1, record.idle_expires_at - now + hold)


def _pairs(answer: Any) -> list[tuple[bytes, Any]]:
    """The pairs in a flat list, as in the older protocol, or in a list of lists or a map."""
    if isinstance(answer, dict):
        return list(answer.items())
    if answer and isinstance(answer[0], (list, tuple)):
        return [(name, value) for name, value in answer]
    return list(zip(answer[::2], answer[1::2], strict=True))


def _number(name: bytes) -> int:
    return int(name.partition(b"-")[0])
