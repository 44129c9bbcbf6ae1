"""Strings that another package keeps on the Redis server of our store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...errors import UnreadableRecord
from ..base import Record
from ..foreign import Foreign, ForeignValues, Together
from .commands import Script, packed
from .layout import pack, unpack, version
from .records import Records

_LOAD, _TAKE_OVER = Script("foreign_load"), Script("take_over")
_NO_EXPIRY, _BATCH = -1, b"500"


class RedisStrings(ForeignValues):
    """Strings under names without our prefix."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._commands = records.commands

    def load(self, name: str) -> Foreign | None:
        return self._load([name.encode()])[0]

    def delete(self, name: str) -> None:
        key = name.encode()
        self._commands.ask(self._commands.deadline(), key, packed(b"DEL", key))

    def names(self, prefix: str) -> Iterator[str]:
        pattern = re.sub(rb"([\\*?\[\]^-])", rb"\\\1", prefix.encode()) + b"*"
        ask, deadline = self._commands.ask, self._commands.deadline
        for server in self._commands.servers():
            cursor = b"0"
            while True:
                request = packed(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _BATCH)
                cursor, names = ask(deadline(), server, request)
                yield from (name.decode("utf-8", "replace") for name in names)
                if cursor == b"0":
                    break

    def _load(self, keys: list[bytes]) -> tuple[Foreign | None, bytes | None]:
        now = self._commands.now()
        parts = (b"%d" % len(keys), *keys)
        value, life, *beside = self._commands.call(
            self._commands.deadline(),
            keys[0],
            packed(b"EVALSHA", _LOAD.sha, *parts),
            _values_of,
            keys[0],
            lambda: packed(b"EVAL", _LOAD.source, *parts),
        )
        expiry = None if life == _NO_EXPIRY else now + life
        return None if value is None else Foreign(value, expiry), beside[0] if beside else None


class RedisTogether(RedisStrings, Together):
    """The same on a server without slots, where one script can also use our records."""

    def load_both(self, name: str, key: str) -> tuple[Foreign | None, Record | None]:
        foreign, beside = self._load([name.encode(), self._records.names.record(key)])
        return foreign, None if beside is None else unpack(key, beside)

    def create_both(self, record: Record, mark: Record) -> Record | None:
        commands, names = self._commands, self._records.names
        keys = [names.record(record.key), names.record(mark.key)]
        mine = version(mark.version)
        now = commands.now()
        lives = [b"%d" % commands.life(each, now) for each in (record, mark)]
        values = [pack(record), lives[0], pack(mark), lives[1], mine]
        parts = (b"%d" % len(keys), *keys, *values)
        return commands.call(
            commands.deadline(),
            keys[1],
            packed(b"EVALSHA", _TAKE_OVER.sha, *parts),
            _mark_there,
            mark,
            lambda: packed(b"EVAL", _TAKE_OVER.source, *parts),
        )


def _values_of(name: bytes, reply: Any) -> list[Any]:
    # The script returns the name as well, so that a reply to another command is detected.
    if type(reply) is not list or len(reply) < 3 or reply[0] != name:
        raise UnreadableRecord("corrupt", "reply to another command")
    return reply[1:]


def _mark_there(mark: Record, reply: Any) -> Record | None:
    if type(reply) is bytes:
        if reply == b"K" + version(mark.version):
            return None
        if reply[:1] == b"P":
            return unpack(mark.key, reply[1:])
    raise UnreadableRecord("corrupt", "reply to another command")
