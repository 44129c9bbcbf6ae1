"""Forwards changes of records over gRPC, and proves up to when they are complete.

The store's listener knows up to what time, by this machine's clock, it has received every change.
We answer a watcher's beat once that time is later than the beat's arrival, and after all changes
received by then. So its beat proves to the watcher the same as the store's beats prove here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc

from ..live.listener import now
from ..protocol import gsession_pb2 as pb
from ..stores.parts import Changes, Feed, Subscriber
from .server import Refused

_PROBE = "probe"  # any key, since all keys have one feed
_FASTER = 4  # beats to the store for each beat of the watcher
_SHORTEST, _LONGEST = 0.005, 10.0  # seconds between beats
_LOOK_AGAIN = 0.25  # seconds between checks while no beat waits
_MOST_KEYS = 50_000  # waiting for a slow watcher
_PIECE = 500  # keys in a message


def watch(
    changes: Changes,
    requests: Iterator[Any],
    timeout: float,
    is_over: Callable[[], bool],
    number: int = 0,
) -> Iterator[Any]:
    """The replies to a watcher. Raises ``Refused`` at the end. ``is_over``: whether the call has
    ended. ``number``: this server's number, for watchers that request it.
    """
    if changes.unproven or not getattr(changes, "one_feed", False):
        why = changes.unproven or "the store has several servers"
        raise Refused(grpc.StatusCode.FAILED_PRECONDITION, f"changes can't be proven: {why}")
    first = next(requests, None)
    interval = 1.0 if first is None else min(max(first.interval, _SHORTEST), _LONGEST)
    relay = Relay()
    changes.subscribe(relay, interval / _FASTER)
    try:
        changes.start()
        feed = _begun(changes, timeout, is_over)
        threading.Thread(
            target=relay.read, args=(requests,), name="gsession-watched", daemon=True
        ).start()
        named = first is not None and first.name_server
        yield pb.WatchReply(started=True, server=number if named else None)
        while not is_over():
            keys, beats = relay.wait(feed, interval / _FASTER)
            # Proofs by this feed stay valid. A new feed begins after a gap.
            for start in range(0, len(keys), _PIECE):
                yield pb.WatchReply(keys=keys[start : start + _PIECE])
            for beat in beats:
                yield pb.WatchReply(beat=beat)
            if changes.feed(_PROBE) is not feed:
                relay.end("changes may have been lost")
    finally:
        changes.unsubscribe(relay)
    raise Refused(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")


def _begun(changes: Changes, timeout: float, is_over: Callable[[], bool]) -> Feed:
    """The feed that reports changes from now on."""
    until = now() + timeout
    while now() < until and not is_over():
        feed = changes.feed(_PROBE)
        if feed is not None:
            return feed
        threading.Event().wait(_SHORTEST)
    raise Refused(grpc.StatusCode.UNAVAILABLE, "no changes of the store arrive")


class Relay(Subscriber):
    """The changes and beats that wait for one watcher."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._keys: dict[str, None] = {}
        self._beats: deque[tuple[int, float]] = deque()
        self._ended = ""

    def changed(self, keys: Iterable[str]) -> None:
        with self._changed:
            self._keys.update(dict.fromkeys(keys))
            if len(self._keys) > _MOST_KEYS:
                self._end("the watcher is too slow")
            self._changed.notify()

    def lost(self) -> None:
        self.end("changes may have been lost")

    def end(self, why: str) -> None:
        """Make the next ``wait`` raise ``Refused``."""
        with self._changed:
            self._end(why)

    def _end(self, why: str) -> None:
        self._ended = self._ended or why
        self._changed.notify()

    def read(self, requests: Iterator[Any]) -> None:
        """Read the watcher's beats until it leaves."""
        try:
            for request in requests:
                if request.HasField("beat"):
                    with self._changed:
                        self._beats.append((request.beat, now()))
                        self._changed.notify()
        except Exception:  # gRPC raises a bare Exception when the call has ended
            pass
        self.end("the watcher has left")

    def wait(self, feed: Feed, pause: float) -> tuple[list[str], list[int]]:
        """The changed keys, and the beats that may be answered after them.

        If beats wait, returns after ``pause`` seconds at the latest. Raises ``Refused``.
        """
        with self._changed:
            if not self._keys and not self._ended and not self._due(feed):
                self._changed.wait(pause if self._beats else _LOOK_AGAIN)
            if self._ended:
                raise Refused(grpc.StatusCode.UNAVAILABLE, self._ended)
            due = self._due(feed)  # before taking the keys, which then are complete for these beats
            beats = [self._beats.popleft()[0] for _ in range(due)]
            keys, self._keys = list(self._keys), {}
        return keys, beats

    def _due(self, feed: Feed) -> int:
        as_of = feed.exact_as_of
        return sum(at <= as_of for _, at in self._beats)
