"""A bound on sessions whose visitors never come back, as those of a flood of requests.

Without a cookie each request may create a session, and each stays for its idle timeout. So a
process that creates many in a minute gives the further ones less time, until a request presents
their token. Nothing is asked of the store, and nobody is refused.
"""

from __future__ import annotations

from collections import OrderedDict

from ..events import logger

_MINUTE = 60_000  # milliseconds
_REMEMBERED = 1000  # sessions


class Newcomers:
    """Counts what one process creates. ``per_minute`` None: everybody gets the full time."""

    def __init__(self, per_minute: int | None, timeout: float) -> None:
        self._most = per_minute
        self._timeout = timeout
        self._minute = self._count = 0
        #: Those that got less time and whose tokens were not presented to this process yet. They
        #: get no more in the request that created them, however often that saves.
        self.unseen: OrderedDict[str, None] = OrderedDict()

    def first_end(self, key: str, now: int, idle_end: int) -> int:
        """When a session that is created now ends unless its visitor comes back; milliseconds."""
        if self._most is None:
            return idle_end
        minute = now // _MINUTE
        if minute != self._minute:
            self._minute, self._count = minute, 0
        self._count += 1
        if self._count <= self._most:
            return idle_end
        if self._count == self._most + 1:
            logger.warning(
                "More than %d sessions were created within a minute in this process "
                "(SESSION_NEWCOMERS_PER_MINUTE): further ones end after %g seconds "
                "(SESSION_NEWCOMER_TIMEOUT) unless their visitors come back",
                self._most,
                self._timeout,
            )
        self.unseen[key] = None
        if len(self.unseen) > _REMEMBERED:
            self.unseen.popitem(last=False)
        return min(idle_end, now + int(self._timeout * 1000))
