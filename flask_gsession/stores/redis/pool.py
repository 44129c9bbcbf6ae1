"""The connections of a process to one Redis: a bounded number, most recently used first."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from os import getpid
from time import monotonic
from typing import Any, NamedTuple
from weakref import ref

from redis._parsers import _HiredisParser
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ...processes import process
from ..interrupts import Condition
from .driver import (
    as_driver_error,
    connect,
    is_closed_or_unread,
)

_PIECE = 16_384  # bytes received at once, where an answer is small
_TOO_LATE = "the time for this command is over"
_STRING = ord("$")
#: Redis before 7.0 reports an error of a command in a script as an error of the script.
_IN_SCRIPT = re.compile(r"^Error running script .*@user_script: ?\d+: -?([A-Z]{2,} .*)", re.DOTALL)
#: One line of ASCII, without quotation marks except around the name of a command. An
#: apostrophe within a word is not a quotation mark.
_WORDS = re.compile(
    r"(?:[ !#-&(-_a-~]|(?<=[a-z])'(?=[a-z])|(?<=command |run the )(['`])[A-Za-z|]{1,40}\1){0,300}"
)
_LOOK_FOR_LOST = 0.1  # seconds
_IDLE = 1.0  # seconds after which a server is likely to have closed a connection


def hint(error: Exception) -> str:
    """A hint for an error of the server that doesn't name the setting to check."""
    if isinstance(error, AuthenticationError):
        return " (is the user or the password in SESSION_STORE missing or wrong?)"
    if re.search("access (one of the keys|a key)", str(error)):  # as Redis 7 and 8 put it
        return " (may the user access keys that begin with SESSION_KEY_PREFIX?)"
    return ""


def described(error: Exception) -> str:
    """The type and the message of an error. Cuts off anything that the server quotes in it.

    A server's message can quote the arguments of the refused command, values included, and they
    would end up in logs. So this also cuts ``error`` itself.
    """
    if isinstance(error, (ResponseError, InvalidResponse)):
        words = _WORDS.match(str(error))
        error.args = (words[0].strip() if words else "",)
    return f"{type(error).__name__}: {error}"


class AllInUse(RedisTimeoutError):
    """No connection became free in time."""


class _Deadline:
    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at: float | None = None  # of time.monotonic


class _BoundedSocket:
    """A socket with one deadline for sending and receiving.

    The client's own timeout starts again with each received piece, so a slow trickle would never
    end.
    """

    __slots__ = ("_deadline", "_socket")

    def __init__(self, socket: Any, deadline: _Deadline) -> None:
        self._socket = socket
        self._deadline = deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def exchange(self, request: bytes) -> bytes:
        """Send a command; return the first piece of its answer."""
        left = self._deadline.at - monotonic()  # type: ignore[operator]  # set by ``take``
        if left <= 0:
            raise TimeoutError(_TOO_LATE)
        socket = self._socket
        socket.settimeout(left)  # once for both: a request hardly ever waits to be sent
        socket.sendall(request)
        piece: bytes = socket.recv(_PIECE)
        if not piece:
            raise RedisConnectionError("the server closed the connection")
        return piece

    def recv(self, *arguments: Any) -> Any:
        self._set_timeout()
        return self._socket.recv(*arguments)

    def recv_into(self, *arguments: Any) -> Any:
        self._set_timeout()
        return self._socket.recv_into(*arguments)

    def sendall(self, *arguments: Any) -> None:
        self._set_timeout()
        self._socket.sendall(*arguments)

    def _set_timeout(self) -> None:
        """Limit the next step to the time that is left, if there is a deadline."""
        at = self._deadline.at
        if at is not None:
            left = at - monotonic()
            if left <= 0:
                raise TimeoutError(_TOO_LATE)
            self._socket.settimeout(left)


class _Bounded:
    """A mixin for the client's connection classes, whose sockets then keep to a deadline."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.deadline = _Deadline()
        self._to_connect: float | None = getattr(self, "socket_connect_timeout", None)
        #: called with the address that a new connection leads to
        self.on_connected: Callable[[Any], object] | None = None

    def _connect(self) -> _BoundedSocket:
        at = self.deadline.at
        if at is not None and self._to_connect is not None:
            left = max(0.001, at - monotonic())
            self.socket_connect_timeout = min(self._to_connect, left)
        socket = super()._connect()  # type: ignore[misc]
        if self.on_connected is not None:
            self.on_connected(socket.getpeername())
        return _BoundedSocket(socket, self.deadline)

    def ask(self, request: bytes) -> Any:
        """Like ``Slot.ask``, in any state: connects if needed, and lets the client parse."""
        connection: Any = self
        if connection._sock is None:
            connect(connection)
        connection._sock.sendall(request)
        return self.answer()

    def answer(self, begin: bytes = b"") -> Any:
        """The reply that starts with ``begin``, parsed by the client. Raises server errors."""
        parser = self._parser  # type: ignore[attr-defined]  # of the client's class
        if begin:
            parser._reader.feed(begin)
        answer = parser.read_response(disable_decoding=True)
        if isinstance(answer, ResponseError):
            within = _IN_SCRIPT.search(str(answer))
            raise as_driver_error(parser.parse_error(within[1]) if within else answer)
        return answer

    def ask_all(self, requests: bytes, count: int) -> list[Any]:
        """Send ``count`` packed commands at once. Returns replies and errors of the server."""
        connection: Any = self
        if connection._sock is None:
            connect(connection)
        connection._sock.sendall(requests)
        read = connection._parser.read_response
        return [as_driver_error(read(disable_decoding=True)) for _ in range(count)]


def bounded(connection_class: type) -> type:
    """The client's connection class, with sockets that keep to a deadline."""
    return type(connection_class.__name__, (_Bounded, connection_class), {})


class _Returned(Condition):
    """Tells waiting threads that a slot has come back. A pool that was closed has another one."""

    waiting = 0  # threads


class Slot:
    """The right to one connection, and the connection, once there is one."""

    __slots__ = ("__weakref__", "connection", "returned")

    def __init__(self, returned: _Returned | None) -> None:
        self.returned = returned  # none for a connection of no pool
        self.connection: Any = None

    def __del__(self) -> None:
        if self.connection is not None:
            self.connection.disconnect()

    def ask(self, request: bytes) -> Any:
        """Send a packed command, and return its reply as bytes. Raises the server's errors."""
        connection = self.connection
        socket, parser = connection._sock, connection._parser
        # An unread reply comes before the new one: the client's parser keeps that order.
        if socket is None or type(parser) is not _HiredisParser or parser._reader.has_data():
            return connection.ask(request)
        piece = socket.exchange(request)
        # A single complete string is parsed here; the client parses everything else.
        if piece[0] == _STRING:
            end = piece.find(b"\r\n")
            if end > 1 and piece[1:end] == b"%d" % (len(piece) - end - 4):
                return piece[end + 2 : -2]
        return connection.answer(piece)

    def ask_all(self, requests: bytes, count: int) -> list[Any]:
        """Send ``count`` packed commands at once. Returns replies and errors of the server."""
        return list(self.connection.ask_all(requests, count))


# ``ReadOnlyError``: since a failover, the connection leads to a replica.
_GONE = (RedisConnectionError, OSError, ReadOnlyError)


def is_refusal(error: BaseException) -> bool:
    """Whether the server answered with an error, so that the connection is in order."""
    return isinstance(error, ResponseError) and not isinstance(error, ReadOnlyError)


class _Lent:
    """What a pool lends until it is closed: its slots, of which some are idle."""

    __slots__ = ("idle", "returned", "slots")

    def __init__(self, size: int) -> None:
        self.returned = returned = _Returned()
        self.idle = deque(Slot(returned) for _ in range(size))
        self.slots = [ref(slot) for slot in self.idle]


class ConnectionPool:
    """Lends connections that ``make`` makes, at most ``size`` at a time.

    The pool checks a connection only if it was idle for a while. A caller that finds a connection
    closed by the server returns it with ``give_failed`` and tries again. Forked processes share
    nothing.

    An interrupt can make a thread lose its slot between any two steps. The lost slot is then
    garbage-collected, and a waiting thread replaces it.
    """

    def __init__(self, make: Callable[[], Any], size: int) -> None:
        self.make = make
        self._size = size
        #: called when a connection leads to another server than the followed one
        self.moved: Callable[[], object] = bool
        self._peer: Any = None
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        """Forget every connection. Each is closed when it is garbage-collected or returned."""
        # In one step, since other threads take and return slots, or close the pool, too.
        self._lent = _Lent(self._size)

    def take(self, deadline: float, name: bytes = b"") -> Slot:
        """Lend a slot; its connection may not be connected yet.

        ``name``: the key of the command, from which a Cluster finds the node.
        """
        if getpid() != process.pid:  # every command comes through here
            process.notice()
        try:
            slot = self._lent.idle.pop()
        except IndexError:
            slot = self._wait(deadline)
        connection = slot.connection
        if connection is None:
            connection = slot.connection = self.make()
            connection.on_connected = self._check_peer
        elif deadline - connection.deadline.at > _IDLE and is_closed_or_unread(connection):
            connection.disconnect()  # otherwise a write would be in doubt, though never sent
        connection.deadline.at = deadline
        return slot

    def _wait(self, deadline: float) -> Slot:
        slot = None
        while slot is None:
            slot = self._wait_until_closed(self._lent, deadline)
        return slot

    def _wait_until_closed(self, lent: _Lent, deadline: float) -> Slot | None:
        """The next idle slot, or None if another thread has closed the pool meanwhile."""
        returned = lent.returned
        with returned:
            returned.waiting += 1
            try:
                while lent is self._lent:
                    try:
                        return lent.idle.pop()
                    except IndexError:
                        pass
                    for number, slot in enumerate(lent.slots):
                        if slot() is None:
                            made = Slot(returned)
                            lent.slots[number] = ref(made)
                            return made
                    left = deadline - monotonic()
                    if left <= 0:
                        raise AllInUse(f"all {self._size} connections were in use")
                    returned.wait(min(left, _LOOK_FOR_LOST))
            finally:
                returned.waiting -= 1
        return None

    def give(self, slot: Slot) -> None:
        """Return the slot of a command that was answered."""
        lent, returned = self._lent, slot.returned
        if returned is lent.returned:
            lent.idle.append(slot)  # if the pool was closed just now, the slot is dropped with it
            if returned.waiting:
                with returned:
                    returned.notify()
        elif slot.connection is not None:
            slot.connection.disconnect()

    def give_failed(self, slot: Slot, error: BaseException) -> None:
        """Return the slot of a command that failed.

        Closes the connection unless the server refused the command: after an interrupt or a
        malformed reply, the next command could read the wrong reply. If the server went away,
        closes the idle connections too.
        """
        if not is_refusal(error):
            slot.connection.disconnect()
            timed_out = isinstance(error, TimeoutError)  # the idle ones may be in order
            if isinstance(error, _GONE) and not timed_out:
                self.invalidate()
        self.give(slot)

    def invalidate(self) -> None:
        """Close all idle connections: the server closed one of them, so probably all."""
        idle = self._lent.idle
        for _ in range(len(idle)):
            try:
                slot = idle.popleft()
            except IndexError:
                return
            if slot.connection is not None:
                slot.connection.disconnect()
            self.give(slot)

    def look(self, deadline: float) -> None:
        """Does nothing: there is one server."""

    def follow(self, connection: Any) -> None:
        """Lend only new connections, and call ``moved`` if one leads to another server."""
        self._peer = connection._sock.getpeername()
        self.close()

    def _check_peer(self, peer: Any) -> None:
        if self._peer is not None and peer != self._peer:
            self._peer = None
            self.moved()

    def close(self) -> None:
        """Close idle connections now, and the others when they are returned."""
        process.notice()
        lent = self._lent
        self._start()
        with lent.returned:
            lent.returned.notify_all()
        while True:
            try:
                slot = lent.idle.pop()  # unless another thread was faster
            except IndexError:
                return
            if slot.connection is not None:
                slot.connection.disconnect()


def ask_all(pool: Any, deadline: float, requests: Sequence[bytes]) -> list[Any]:
    """Send these commands at once; return their replies, with the server's errors as objects."""
    slot = pool.take(deadline)
    try:
        answers: list[Any] = slot.ask_all(b"".join(requests), len(requests))
    except BaseException as error:
        pool.give_failed(slot, error)
        raise
    pool.give(slot)
    return answers


class Node(NamedTuple):
    """A server that takes writes: the first slot it serves, and the connections to it.

    Call ``failed`` when it doesn't answer.
    """

    first: int
    pool: Any
    failed: Callable[[], object]
