"""The link of one process to the centre: whether it is up, and when to try again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

from ...errors import CutOff, LogoutUnconfirmed, StoreUnavailable
from ...events import logger
from ...processes import process
from ..base import Clock

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds between two attempts to reach the centre
_JITTER = 0.3


class Link:
    """Up until a call to the centre fails; then every call is refused until ``mark_restored``.

    ``on_cut`` is called when the connection breaks.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.on_cut: Callable[[], object] = bool
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._lock = threading.Lock()
        #: Why the centre can't be reached; "" if it can.
        self.why = ""
        self._pause = _FIRST_PAUSE
        self._try_at = 0.0
        self._since = 0.0

    @property
    def is_cut(self) -> bool:
        """Whether this process treats the centre as out of reach."""
        return bool(self.why)

    def call(self, operation: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call to the centre; raises ``CutOff`` without making it while the link is cut."""
        if self.why:
            process.notice()
            why = self.why
            if why:
                raise CutOff(why)
        try:
            return method(*arguments)
        except LogoutUnconfirmed:
            raise
        except StoreUnavailable as error:
            if not error.contention:
                self.mark_cut(error)
            raise

    def mark_cut(self, error: StoreUnavailable) -> None:
        """Stop asking the centre, because a call failed."""
        with self._lock:
            if self.why:
                return  # many calls may fail at once
            self._since = self._clock()
            self._pause = _FIRST_PAUSE
            self._failed(error)
        logger.warning("This edge is cut off: %s", error.detail)
        self.on_cut()

    def postpone_retry(self, error: StoreUnavailable) -> None:
        """Wait longer before the next attempt, because this one failed too."""
        self.mark_cut(error)
        with self._lock:
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)
            self._failed(error)

    def _failed(self, error: StoreUnavailable) -> None:
        self.why = f"the centre can't be reached: {error.detail}"
        wait = self._pause * random.uniform(1 - _JITTER, 1 + _JITTER)
        self._try_at = self._clock() + wait

    def may_try(self) -> bool:
        """Whether it is time for the next attempt; True once after each pause."""
        with self._lock:
            now = self._clock()
            if not self.why or now < self._try_at:
                return False
            self._try_at = now + self._pause
            return True

    def try_soon(self) -> None:
        """Try again soon, because the centre may be back."""
        self._try_at = 0.0

    def mark_restored(self) -> None:
        """Use the centre again: it answers, and has all ends."""
        with self._lock:
            was_cut, self.why = bool(self.why), ""
            self._pause = _FIRST_PAUSE
            seconds = self._clock() - self._since
        if was_cut:
            logger.warning("This edge reaches its centre again, after %.1f s", seconds)
