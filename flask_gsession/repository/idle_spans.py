"""How far ahead of a use the idle expiry lies, and how often a use moves it.

A span is one renewal interval longer than the idle timeout. The expiry moves only once per
interval, and must not come early for a session that was used just before a move was due.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from ..config import LiveSettings, Settings
from .permanent import PERMANENT, is_permanent


class Span(NamedTuple):
    """The distance of the idle expiry, and its smallest step, in milliseconds."""

    length: int
    step: int


class IdleSpans(Protocol):
    """The spans of one kind of record."""

    def of(self, values: Mapping[str, bytes], lifetime: int | None) -> Span:
        """The span of a record with these values, and with an idle lifetime of its own, if any."""


class SessionSpans:
    """The spans of sessions: the settings', a permanent session's, or a session's own."""

    def __init__(self, settings: Settings, live: LiveSettings) -> None:
        self._settings = settings
        self._live = live
        self._usual = self._span(settings.idle_timeout)
        self._permanent = (settings.idle_timeout, self._usual)

    def of(self, values: Mapping[str, bytes], lifetime: int | None) -> Span:
        """See ``IdleSpans``."""
        if lifetime is None and PERMANENT not in values:  # every save comes by here
            return self._usual
        if lifetime is not None:
            return self._span(lifetime / 1000)
        return self._of_permanent() if is_permanent(values) else self._usual

    def _of_permanent(self) -> Span:
        known, span = self._permanent
        idle = self._live.permanent_lifetime()
        if idle != known:
            span = self._span(idle)
            self._permanent = (idle, span)
        return span

    def _span(self, idle: float) -> Span:
        step = self._settings.renew_interval_for(idle)
        return Span(int((idle + step) * 1000), max(1, int(step * 1000)))


class FixedSpan:
    """One span for every record."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def of(self, values: Mapping[str, bytes], lifetime: int | None) -> Span:
        """See ``IdleSpans``."""
        return self._span
