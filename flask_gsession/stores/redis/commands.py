"""Sends commands to Redis on connections of a pool, and repeats one whose reply is lost."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import RedisError

from ...errors import (
    Gone,
    KeyTaken,
    LeaseLost,
    QueueFull,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
)
from ..base import Record
from ..support import StoreOptions, round_trips, time_limit
from .failures import Failures, raise_explained
from .layout import Names
from .pool import Node

if TYPE_CHECKING:
    from .confirmation import Confirmation

A = TypeVar("A")
T = TypeVar("T")

_SIZES = [b"\r\n$%d\r\n" % size for size in range(256)]  # of short parts of a command
_STATUSES = (b"K", b"G", b"S", b"T", b"P", b"N", b"L", b"F", b"W", b"D", b"R")
_ERRORS = {b"G": Gone, b"D": Gone, b"S": Stale, b"T": KeyTaken, b"L": LeaseLost, b"F": QueueFull}


def packed(*parts: bytes) -> bytes:
    """Pack a command, without hiredis, which crashes if a signal arrives while it packs."""
    return _packed(b"*%d" % len(parts), parts)


def _packed(begin: bytes, parts: Iterable[bytes]) -> bytes:
    pieces = [begin]
    for part in parts:
        size = len(part)
        pieces += (_SIZES[size] if size < 256 else b"\r\n$%d\r\n" % size, part)
    pieces.append(b"\r\n")
    return b"".join(pieces)


class Script:
    """A Lua script of this folder, and the SHA-1 under which servers know it."""

    def __init__(self, name: str) -> None:
        self.set_source(files(__package__).joinpath(f"{name}.lua").read_bytes())

    def set_source(self, source: bytes) -> None:
        """Use this source, and the SHA-1 of it."""
        self.source = source
        self.sha = hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()
        self._begin = b"\r\n$7\r\nEVALSHA\r\n$40\r\n" + self.sha

    def packed(self, parts: Sequence[bytes]) -> bytes:
        """The command that runs it on a server that knows it.

        ``parts``: the number of keys, the keys, the arguments.
        """
        return _packed(b"*%d%b" % (2 + len(parts), self._begin), parts)

    def missing_right(self, error: str) -> str:
        """The right that the Redis user lacks, or "" for any other error.

        Redis names only the line of the script, which may need two rights.
        """
        line = re.search(r"@user_script: ?(\d+)", error)
        if line is None or "can't run this command" not in error:
            return ""
        calls = self.source.decode().splitlines()[int(line[1]) - 1]
        return " or ".join(f"+{name.lower()}" for name in re.findall(r"call\('(\w+)'", calls))


class Commands:
    """Sends commands over ``pool``, each within the time budget of one store call.

    ``retries``: how often to repeat a command whose reply is lost.
    """

    def __init__(self, pool: Any, options: StoreOptions, retries: int = 3) -> None:
        self.pool = pool
        self.clock = options.clock
        self.timeout = options.timeout
        self.names = Names(options.prefix)
        self.retries = retries

    def deadline(self) -> float:
        """When a call that begins now has to end."""
        end, limit = monotonic() + self.timeout, time_limit.get()
        return end if limit is None or end < limit else limit

    def now(self) -> int:
        """The time in milliseconds."""
        return int(self.clock() * 1000)

    def life(self, record: Record, now: int) -> int:
        """The milliseconds to keep the record for."""
        return max(1, record.idle_expires_at - now)

    def servers(self) -> dict[bytes, str]:
        """The address of each server that holds sessions, by a key that belongs there."""
        return {b"": ""}

    def nodes(self, deadline: float) -> list[Node]:
        """The servers that hold our keys."""
        return [Node(0, self.pool, lambda: None)]

    def call(
        self,
        deadline: float,
        name: bytes,
        request: bytes,
        parse: Callable[[A, Any], T],
        about: A,
        with_source: Callable[[], bytes] | None = None,
        confirmation: Confirmation | None = None,
    ) -> T:
        """Send one command, and return ``parse(about, reply)``.

        ``name`` is the key of the command. ``with_source`` packs the same command with the source
        of the script, for a server that doesn't know it.

        Sends the command again if the reply is lost, or if ``parse`` raises ``UnreadableRecord``,
        since the connection may be out of step. Every command here recognises its own earlier
        effect. But if there was another write in between, the first attempt may have been applied
        and overwritten, or never applied: then this raises ``StoreUnavailable``.
        """
        pool, failures = self.pool, None
        while True:
            try:
                slot = pool.take(deadline, name)
                try:
                    trips = round_trips.get()
                    if trips is not None:
                        trips.add()
                    reply = parse(about, slot.ask(request))
                    if confirmation is not None:
                        again = failures is not None and failures.in_doubt
                        confirmation.ask(slot, name, reply, again, deadline)
                except BaseException as error:
                    pool.give_failed(slot, error)
                    raise
                pool.give(slot)
                return reply if failures is None else failures.reply_of_call(reply)
            except (RedisError, OSError, UnreadableRecord) as error:
                failures = failures or Failures(self.retries, deadline)
                request = failures.next_request(error, request, with_source)
                pool = self.pool_after(error)

    def ask(self, deadline: float, name: bytes, request: bytes) -> Any:
        """Like ``call``, but returns any reply as it is."""
        return self.call(deadline, name, request, _unparsed, None)

    def pool_after(self, error: Exception) -> Any:
        """The pool to try next."""
        return self.pool

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
        """Run a script, and return its reply, whose first byte is its status.

        A successful reply ends with ``echo``, such as the written version, or equals ``also``; any
        other belongs to another command. After a success, asks replicas for their
        ``confirmation``.
        """
        parts = (b"%d" % len(keys), *keys, *arguments)
        try:
            reply = self.call(
                deadline,
                keys[0],
                script.packed(parts),
                _reply_of_script,
                (echo, also),
                lambda: packed(b"EVAL", script.source, *parts),
                confirmation,
            )
        except (UnreadableRecord, StoreUnavailable) as error:
            raise_explained(error, script.missing_right(error.detail))
        if reply in _ERRORS:
            raise _ERRORS[reply]
        return reply


def _reply_of_script(expected: tuple[bytes, bytes | None], reply: Any) -> bytes:
    echo, also = expected
    if type(reply) is bytes:
        status = reply[:1]
        if status in _ERRORS or (status in _STATUSES and reply.endswith(echo)) or reply == also:
            return reply
    raise UnreadableRecord("corrupt", "reply to another command")


def _unparsed(_: object, reply: Any) -> Any:
    return reply
