"""Checks the durations that callers give: seconds, or a ``timedelta``."""

from __future__ import annotations

import math
from datetime import timedelta

_MAX_GRACE = 3600.0
_LONGEST_TTL = 10 * 366 * 86400.0


def ttl_in_milliseconds(ttl: object) -> int:
    """The ``ttl`` of a key. Raises ``ValueError`` unless it is above 0, at most ten years."""
    seconds = _seconds(ttl, "ttl")
    if not 0 < seconds <= _LONGEST_TTL:
        raise ValueError(
            f"ttl is {seconds} seconds; allowed are more than 0, and at most {_LONGEST_TTL:.0f}"
        )
    return math.ceil(seconds * 1000)


def grace_in_seconds(grace: object) -> float:
    """The grace of a rotation. Raises ``ValueError`` unless it is 0 to 3600 seconds."""
    if isinstance(grace, timedelta):
        grace = grace.total_seconds()
    if isinstance(grace, bool) or not isinstance(grace, (int, float)):
        raise ValueError("grace must be a number of seconds or a timedelta: 0 to 3600 seconds")
    if not 0 <= grace <= _MAX_GRACE:
        raise ValueError(f"grace is {grace}; allowed are 0 to {_MAX_GRACE:g} seconds")
    return grace


def lifetime_in_milliseconds(lifetime: object, longest: float) -> int:
    """A session's own idle timeout. Raises ``ValueError`` unless it is 1 to ``longest`` seconds.

    ``longest``: the absolute timeout.
    """
    seconds = _seconds(lifetime, "the lifetime")
    if not 1 <= seconds <= longest:
        raise ValueError(
            f"the lifetime is {seconds} seconds; allowed are 1 to {longest:.0f} "
            "(SESSION_ABSOLUTE_TIMEOUT)"
        )
    return int(seconds * 1000)


def _seconds(duration: object, name: str) -> float:
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise ValueError(f"{name} must be a number of seconds or a timedelta")
    return seconds
