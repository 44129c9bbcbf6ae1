"""Server-sent events: a stream to one browser, and the limits on streams."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..processes import process
from .hints import Notify, Watch
from .messages import Message
from .states import State

_RETRY = (200, 2000)  # milliseconds until a browser reconnects
_JITTER = 0.2  # share of a stream's lifetime, so that browsers don't all reconnect at once
#: Sent while nothing changes, to find clients that are gone.
HEARTBEAT = b":\n\n"

Show = Callable[[State], dict[str, Any]]


class TooManyStreams(Exception):
    """There are too many streams: for this user (``of_user``), or in this process."""

    def __init__(self, of_user: bool) -> None:
        super().__init__()
        self.of_user = of_user


class Limits(NamedTuple):
    """The limits on the streams of this process: ``most`` in all, ``most_of_user`` for user
    ``who``.

    ``is_gone``: whether the client of this stream is gone.
    """

    who: str
    most: int
    most_of_user: int
    is_gone: Callable[[], bool] = bool


class Slots:
    """Counts the streams of this process."""

    def __init__(self) -> None:
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._lock = threading.RLock()  # a finalizer may end a stream
        self._taken: dict[object, Limits] = {}

    def take(self, limits: Limits) -> object:
        """Take a slot, freeing slots of vanished clients if needed. Raises ``TooManyStreams``."""
        process.notice()
        with self._lock:
            try:
                self._check(limits)
            except TooManyStreams:
                for slot, other in list(self._taken.items()):
                    if other.is_gone():
                        self.free(slot)  # does nothing if the stream has ended
                self._check(limits)
            slot = object()
            self._taken[slot] = limits
            return slot

    def _check(self, limits: Limits) -> None:
        taken = list(
            self._taken.values()
        )  # a copy, since another thread or a finalizer may free a slot
        if sum(other.who == limits.who for other in taken) >= limits.most_of_user:
            raise TooManyStreams(of_user=True)
        if len(taken) >= limits.most:
            raise TooManyStreams(of_user=False)

    def free(self, slot: object) -> None:
        """Free a slot. You may call this twice."""
        self._taken.pop(slot, None)

    def __len__(self) -> int:
        return len(self._taken)


#: All applications of a process share its threads.
slots = Slots()


class Stream(Iterator[bytes]):
    """The body of a response: sends ``show(state)`` whenever it changes, and messages.

    It ends with the session, when the token is rotated, after about ``life`` seconds, and when the
    process shuts down. ``after``: the id of the last message that the browser has, or None. Raises
    ``TooManyStreams`` and ``StoreUnavailable``.
    """

    def __init__(
        self,
        watch: Callable[[Notify, Callable[[], bool]], Watch],
        show: Show,
        limits: Limits,
        *,
        heartbeat: float,
        life: float,
        after: int | None,
    ) -> None:
        self._slot: object = None
        self._watch: Watch | None = None
        self._slot = slots.take(limits)
        self._show = show
        self._heartbeat = heartbeat
        self._until = time.monotonic() + life * random.uniform(1 - _JITTER, 1)
        self._sent = b""
        self._last = after
        # The watch must not refer to the stream, which closes itself when it is garbage-collected.
        woken = self._woken = threading.Event()
        try:
            self._watch = watch(lambda *_: woken.set(), limits.is_gone)
        except BaseException:
            self.close()
            raise
        session = self._watch.state.session
        self._handle = None if session is None else session.handle
        self._ended = False

    def __next__(self) -> bytes:
        while self._watch is not None and not self._ended:
            if not self._sent:
                retry = b"retry: %d\n" % random.randint(*_RETRY)
                return retry + self._events(self._watch.state)
            wait = min(self._heartbeat, self._until - time.monotonic())
            woken = wait > 0 and self._woken.wait(wait)
            self._woken.clear()  # before reading the state
            if self._watch.closed or time.monotonic() >= self._until:
                break
            events = self._events(self._watch.state)
            if events or not woken:
                return events or HEARTBEAT
        self.close()
        raise StopIteration

    def _events(self, state: State) -> bytes:
        session = state.session
        if session is not None and session.handle != self._handle:
            self._ended = True  # after a rotation, the browser reconnects with its new token
            return b""
        self._ended = session is None
        messages = () if state.user is None else state.user.messages
        if self._last is None:
            self._last = last_of(messages)
        text = json.dumps(self._show(state), separators=(",", ":")).encode()
        parts = []
        if text != self._sent:
            self._sent = text
            parts.append(b"event: state\nid: %d\ndata: %b\n\n" % (self._last, text))
        for message in newer(messages, self._last):
            self._last = message.id
            parts.append(b"event: message\nid: %d\ndata: %b\n\n" % (message.id, as_json(message)))
        return b"".join(parts)

    def close(self) -> None:
        """Release the watch and the slot. Servers call this at the end of a response."""
        slot, self._slot = self._slot, None
        if slot is not None:
            if self._watch is not None:
                self._watch.close()
            slots.free(slot)

    def __del__(self) -> None:
        self.close()


def last_of(messages: tuple[Message, ...]) -> int:
    """The id of the last message; 0 without messages."""
    return messages[-1].id if messages else 0


def newer(messages: tuple[Message, ...], after: int) -> list[Message]:
    """The messages after the one with this id."""
    return [message for message in messages if message.id > after]


def as_json(message: Message) -> bytes:
    """A message in the form that pages get."""
    head = json.dumps({"id": message.id, "name": message.name})[:-1].encode()
    return b'%b, "data": %b}' % (head, message.data)
