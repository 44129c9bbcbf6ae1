"""Keeps forks and gRPC calls apart.

gRPC survives a fork only if no thread is inside a call: a child that is forked during a call may
crash or hang. So a fork waits for running calls, and calls wait for a fork. Both waits are short,
since each call has a deadline. Streams are ended before a fork, and begin again after it. Calls
whose callers were interrupted are ended, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import Protocol, TypeVar

from ...errors import StoreUnavailable
from ...processes import at_fork
from ...weak import WeakObjects

T = TypeVar("T")

_LONGEST_WAIT = 2.0  # seconds, for running calls in other threads
_PAUSE = 0.001  # seconds


class Stream(Protocol):
    """A stream, or anything else that has threads inside gRPC."""

    def end_before_fork(self) -> None:
        """End it, and remove it from the guard."""


class ForkGuard:
    """Lets calls and forks take turns."""

    def __init__(self) -> None:
        self.calls: dict[int, bool] = {}
        self.streams: WeakObjects[Stream] = WeakObjects()
        self.forking = False

    def run(self, call: Callable[[], T]) -> T:
        """Make a call as soon as no fork is under way."""
        thread, calls = get_ident(), self.calls
        calls[thread] = (
            True  # before the check, since a fork first announces itself, then checks this
        )
        try:
            while self.forking:
                calls.pop(thread, None)
                time.sleep(_PAUSE)
                calls[thread] = True
            return call()
        finally:
            calls.pop(thread, None)

    def add(self, stream: Stream) -> None:
        """End ``stream`` before a fork."""
        self.streams.add(stream)

    def remove(self, stream: Stream) -> None:
        """Forget a stream that has ended."""
        self.streams.discard(stream)

    def before_fork(self) -> None:
        self.forking = True
        self._end_streams()
        own, over = get_ident(), time.monotonic() + _LONGEST_WAIT
        while self.calls.keys() - {own} and time.monotonic() < over:
            time.sleep(_PAUSE)
        self._end_streams()  # those that were just beginning

    def _end_streams(self) -> None:
        for stream in self.streams:
            with suppress(StoreUnavailable):  # the others still have to end
                stream.end_before_fork()

    def after_fork(self) -> None:
        self.forking = False

    def begin_in_child(self) -> None:
        self.calls.clear()
        self.streams.clear()
        self.forking = False


guard = ForkGuard()
at_fork(
    before=guard.before_fork,
    after_in_parent=guard.after_fork,
    after_in_child=guard.begin_in_child,
)
