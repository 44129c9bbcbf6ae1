"""Changes of sessions in Redis, pushed by the server to a connection that tracks our prefix.

``CLIENT TRACKING`` in broadcast mode reports every write, deletion and expiry of a key on the
connection that asked for it, so a later answer on that connection can't overtake them. It needs
RESP3, which every supported server speaks; the parser below works with any redis-py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from socket import SHUT_RDWR
from typing import Any

from redis.crc import key_slot
from redis.exceptions import RedisError, ResponseError

from ...errors import StoreUnavailable
from ...live.listener import Heard
from ..base import KEY_LENGTH
from .commands import Commands, packed
from .driver import connect
from .pool import described, hint

_PIECE = 65_536  # bytes received at once
_PING = packed(b"PING")
_HELLO = packed(b"HELLO", b"3")
_SLOTS = 16_384
_RIGHTS = " (the user needs +client|tracking +hello +ping, and in a cluster +exists)"
_ONLY = ""  # the name of the only server


class RedisSource:
    """The server of a store, or the primary that ``commands.pool`` finds.

    ``make`` creates a connection.
    """

    unproven = ""
    one_feed = True

    def __init__(self, commands: Commands, make: Callable[..., Any]) -> None:
        self._commands = commands
        self._make = make
        self.timeout = commands.timeout
        self.moved: Callable[[], object] = bool
        self.shifted: Callable[[], object] = bool
        # Leaves out the keys of large values, so fewer changes arrive.
        self._begin = commands.names.start

    def servers(self) -> Iterable[Hashable]:
        self._commands.pool.look(time.monotonic() + self.timeout)
        return (_ONLY,)

    def server_of(self, key: str) -> Hashable:
        return _ONLY

    def open(self, server: Hashable) -> RedisChanges:
        pool = self._commands.pool
        pool.moved = self.moved
        connection = self._make(protocol=2)
        changes = self._connect(connection, _PING)
        # Earlier connections may lead to a server that was replaced.
        try:
            pool.follow(connection)
        except (OSError, AttributeError) as error:  # the connection is lost already
            changes.close()
            raise _unheard(error) from error
        return changes

    def _connect(self, connection: Any, beat: bytes) -> RedisChanges:
        changes = RedisChanges(connection, self._begin, beat, self.timeout)
        try:
            changes.begin()
        except BaseException:
            changes.close()
            raise
        return changes


class ClusterSource(RedisSource):
    """The primaries of a cluster."""

    one_feed = False

    def servers(self) -> Iterable[Hashable]:
        try:
            return self._commands.pool.look(time.monotonic() + self.timeout)  # type: ignore[no-any-return]  # addresses
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"redis: {described(error)}") from error

    def server_of(self, key: str) -> Hashable:
        return self._commands.pool.known_owner(key_slot(self._commands.names.record(key)))  # type: ignore[no-any-return]  # an address

    def open(self, server: Hashable) -> RedisChanges:
        cluster = self._commands.pool
        cluster.shifted = self.shifted
        connection = cluster.make_at(server, protocol=2)
        return self._connect(connection, packed(b"EXISTS", self._name_at(server)))

    def _name_at(self, server: Hashable) -> bytes:
        """A key in one of the slots of this server.

        A beat that asks for this key fails if the server was replaced or is cut off from the
        cluster.
        """
        for number in range(_SLOTS):
            name = b"%b%d}" % (self._begin, number)
            if self._commands.pool.known_owner(key_slot(name)) == server:
                return name
        raise StoreUnavailable("redis: this node of the cluster no longer serves any slot")


class RedisChanges:
    """One connection that receives changes. ``begin``: the first bytes of all keys of records."""

    def __init__(self, connection: Any, begin: bytes, beat: bytes, timeout: float) -> None:
        self._connection = connection
        self._prefix = begin
        self._beat = beat
        self._timeout = timeout
        self._unread = b""

    def begin(self) -> None:
        """Connect, and ask the server to push changes."""
        track = packed(b"CLIENT", b"TRACKING", b"ON", b"BCAST", b"PREFIX", self._prefix)
        deadline = time.monotonic() + self._timeout
        try:
            self._allow(self._timeout)
            connect(self._connection)
            for request in (_HELLO, track):
                self._connection._sock.sendall(request)
                self._answer(deadline)
        except (RedisError, OSError) as error:
            raise _unheard(error) from error

    def _answer(self, deadline: float) -> None:
        while True:
            for message in self._messages():
                if not isinstance(message, _Push):
                    return
            self._receive(deadline - time.monotonic())

    def beat(self) -> None:
        """Send a command; its answer comes after all changes until now."""
        try:
            self._allow(self._timeout)
            self._connection._sock.sendall(self._beat)
        except (RedisError, OSError, AttributeError) as error:
            raise _unheard(error) from error

    def read(self, seconds: float) -> Heard:
        """The changes and answers within ``seconds``; returns early if there are any."""
        keys: list[str] = []
        answers, more = 0, False
        try:
            self._receive(seconds)
            for message in self._messages():
                if not isinstance(message, _Push):
                    answers += 1
                elif message[0] == b"invalidate":
                    if message[1] is None:  # the server, or one of its databases, was emptied
                        more = True
                    else:
                        self._add(message[1], keys)
        except TimeoutError:
            pass  # nothing came within ``seconds``
        except (RedisError, OSError, AttributeError, ValueError) as error:
            raise _unheard(error) from error
        return Heard(keys, answers, more)

    def _add(self, names: list[bytes], keys: list[str]) -> None:
        start = len(self._prefix)
        for name in names:
            if name[-1:] == b"}" and len(name) == start + KEY_LENGTH + 1:
                keys.append(name[start:-1].decode("ascii", "replace"))

    def shut(self) -> None:
        """Shut the socket, so that the reading thread notices and closes the connection."""
        socket = self._connection._sock
        if socket is not None:
            with suppress(OSError):
                socket.shutdown(SHUT_RDWR)

    def close(self) -> None:
        self._connection.disconnect()

    def _allow(self, seconds: float) -> None:
        self._connection.deadline.at = time.monotonic() + seconds

    def _receive(self, seconds: float) -> None:
        self._allow(seconds)
        piece = self._connection._sock.recv(_PIECE)
        if not piece:
            raise ConnectionError("the server closed the connection")
        self._unread += piece

    def _messages(self) -> list[Any]:
        """The complete messages received so far. Raises ``ResponseError`` for an error message."""
        data, at, messages = self._unread, 0, []
        with suppress(_Incomplete):
            while at < len(data):
                message, at = _parsed(data, at)
                if isinstance(message, ResponseError):
                    raise message
                messages.append(message)
        self._unread = data[at:]
        return messages


def _unheard(error: Exception) -> StoreUnavailable:
    advice = _RIGHTS if "NOPERM" in str(error) else hint(error)
    return StoreUnavailable(f"redis: CLIENT TRACKING: {described(error)}{advice}")


class _Push(list[Any]):
    """A message that isn't a reply to a command."""


class _Incomplete(Exception):
    """The rest of a message is still to come."""


def _parsed(data: bytes, at: int) -> tuple[Any, int]:
    """The RESP3 value that begins at ``at``, and where the next one begins."""
    end = data.find(b"\r\n", at)
    if end < 0:
        raise _Incomplete
    kind, text, at = data[at : at + 1], data[at + 1 : end], end + 2
    if kind in b"$=!":
        length = int(text)
        if length < 0:
            return None, at
        end = at + length
        if len(data) < end + 2:
            raise _Incomplete
        value = data[at:end]
        return (ResponseError(value.decode(errors="replace")) if kind == b"!" else value), end + 2
    if kind in b"*>~%|":
        count = int(text) * (2 if kind in b"%|" else 1)
        if count < 0:
            return None, at
        values: list[Any] = _Push() if kind == b">" else []
        for _ in range(count):
            value, at = _parsed(data, at)
            values.append(value)
        return values, at
    if kind == b"-":
        return ResponseError(text.decode(errors="replace")), at
    if kind in b"+:_#,(":
        return (None if kind == b"_" else text), at
    raise ValueError("the server doesn't speak RESP3")
