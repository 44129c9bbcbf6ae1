"""Shortens sessions whose visitors never come back, as in a flood of requests.

Each request without a cookie may create a session, which stays for its idle timeout. A process that
creates many within a minute therefore gives further sessions less time, until a request presents
their token. This costs no round trip and refuses no visitor.
"""

from __future__ import annotations

from collections import OrderedDict

from ..events import logger

_MINUTE = 60_000  # milliseconds
_REMEMBERED = 1000  # sessions


class Newcomers:
    """Counts the sessions that this process creates. Without ``per_minute``, nothing is limited."""

    def __init__(self, per_minute: int | None, timeout: float) -> None:
        self._most = per_minute
        self._timeout = timeout
        self._minute = self._count = 0
        #: Sessions with less time, whose tokens this process hasn't seen yet. The request that
        #: created them doesn't give them more time, however often it saves.
        self.unseen: OrderedDict[str, None] = OrderedDict()

    def first_end(self, key: str, now: int, idle_end: int) -> int:
        """When a new session ends unless its visitor comes back, in milliseconds."""
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
