"""The queue of a lock, for stores that keep a lease and its waiters as one value."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import QueueFull

WAITER_LIFE = 2000  # milliseconds after which a waiter that does not ask is dropped
ASK_AGAIN = 700  # milliseconds, at most, between two attempts
LONGEST_LEASE = 3_600_000  # milliseconds; a longer one is malformed, and counts as free
_LONGEST_PAUSE = 0.05  # seconds between two checks of a lease


@dataclass(slots=True)
class Lease:
    """A lease's holder, its end and its queue; for stores that keep them as one value.

    ``length``: its requested length. ``waiters``: when each last asked, in order of arrival. Times
    are milliseconds.
    """

    owner: str = ""
    until: int = 0
    length: int = 0
    waiters: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, owner: object, until: object, length: object, waiters: object) -> Lease:
        """Parse a stored lease. Malformed text counts as no lease, so it can't lock a session."""
        if (
            isinstance(owner, str)
            and isinstance(until, int)
            and isinstance(length, int)
            and isinstance(waiters, dict)
            and all(isinstance(name, str) for name in waiters)
            and all(isinstance(seen, int) for seen in waiters.values())
        ):
            return cls(owner, int(until), int(length), waiters)
        return cls()

    def is_held_by(self, owner: str, now: int) -> bool:
        """Whether this owner has the lease, and it has not expired."""
        return self.owner == owner and now < self.until

    def acquire(self, owner: str, now: int, lease_ms: int, max_waiters: int) -> int:
        """Like ``Leases.acquire``."""
        self._drop_silent_waiters(owner, now)
        if self.is_held_by(owner, now) or self.is_turn_of(owner, now):
            self.waiters.pop(owner, None)
            self.hold(owner, now, lease_ms)
            return 0
        if owner not in self.waiters and len(self.waiters) >= max_waiters:
            raise QueueFull
        self.waiters[owner] = now
        oldest = next(iter(self.waiters.values()))
        freed = oldest + WAITER_LIFE if self._is_free(now) else self.until
        return max(1, min(freed - now, ASK_AGAIN))

    def is_turn_of(self, owner: str, now: int) -> bool:
        """Whether this owner may take the lease now."""
        return self._is_free(now) and next(iter(self.waiters), owner) == owner

    def hold(self, owner: str, now: int, lease_ms: int) -> None:
        """Give this owner the lease for ``lease_ms`` from ``now``."""
        self.owner, self.until, self.length = owner, now + lease_ms, lease_ms

    def release(self, owner: str, now: int) -> bool:
        """Like ``Leases.release``."""
        held = self.is_held_by(owner, now)
        if self.owner == owner:
            self.owner, self.until, self.length = "", 0, 0
        self.waiters.pop(owner, None)
        return held

    def _is_free(self, now: int) -> bool:
        # So late an end comes from a clock that was far ahead, or has been set back.
        return now >= self.until or self.until - now > 2 * min(self.length, LONGEST_LEASE)

    def _drop_silent_waiters(self, owner: str, now: int) -> None:
        for waiter, seen in list(self.waiters.items()):
            if waiter != owner and abs(now - seen) >= WAITER_LIFE:
                del self.waiters[waiter]


def poll(ready: Callable[[], bool], seconds: float) -> None:
    """Return when ``ready()`` is true, asking again after growing pauses, or after ``seconds``."""
    end = time.monotonic() + seconds
    pause = 0.002
    while not ready():
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _LONGEST_PAUSE)
