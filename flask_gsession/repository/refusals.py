"""Counts tokens that led to no session, and logs the reason."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ..events import Events, SessionRefused, logger
from ..stores.base import Record

_NO_WARNING = ("unknown", "expired")  # an attacker could flood the log


class Refusals(Protocol):
    """Handles tokens that led to no session."""

    def note(self, reason: str, key: str | None, detail: str = "") -> None:
        """Handle one. ``key``: the session's, if the token had our signature."""


class SessionRefusals:
    """Emits ``SessionRefused`` for each token, and logs a warning for most reasons."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def note(self, reason: str, key: str | None, detail: str = "") -> None:
        """See ``Refusals``."""
        if key is not None and reason not in _NO_WARNING:
            logger.warning(
                "Session %s refused: %s%s", key, reason, f" ({detail})" if detail else ""
            )
        self._events.emit(SessionRefused, reason, key)


class Absence(NamedTuple):
    """Why there is no session: the reason, as in ``SessionRefused``, and a detail for the log."""

    reason: str
    detail: str


def why_absent(record: Record | None, *, rotated: bool) -> Absence:
    """Why there is no session, as far as the store still knows.

    ``record``: the expired record, if the store has it. ``rotated``: a pointer led to it.
    """
    if record is None:
        why = "not in the store: logged out, revoked, never issued, or expired and removed"
        return Absence(
            "unknown", "the session was rotated, and has ended since" if rotated else why
        )
    if record.successor is not None:
        after = f"; the session continues as {record.successor}" if record.successor else ""
        return Absence("unknown", f"rotated, and the grace period is over{after}")
    if record.idle_expires_at == record.absolute_expires_at:
        return Absence("expired", "it reached its absolute timeout")
    return Absence("expired", "it wasn't used within its idle timeout")
