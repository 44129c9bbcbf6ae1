"""How far ahead each use sets the idle expiry, and how often.

A span is one renewal interval longer than the idle timeout. Uses move the expiry only once per
interval, and a session that was used just before the next move must not expire early.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from ..config import LiveSettings, Settings
from .permanent import is_permanent


class Span(NamedTuple):
    """How far ahead the idle expiry is set, and the least by which it moves, in milliseconds."""

    length: int
    step: int


class IdleSpans(Protocol):
    """The spans of one kind of record."""

    #: the span of a record without an idle lifetime of its own or ``session.permanent``
    usual: Span

    def of(self, values: Mapping[str, bytes], lifetime: int | None) -> Span:
        """The span of a record with these values, and with an idle lifetime of its own, if any."""


class SessionSpans:
    """The spans of sessions: from the settings, permanent, or with a lifetime of their own."""

    def __init__(self, settings: Settings, live: LiveSettings) -> None:
        self._settings = settings
        self._live = live
        self.usual = self._span(settings.idle_timeout)
        self._permanent = (settings.idle_timeout, self.usual)

    def of(self, values: Mapping[str, bytes], lifetime: int | None) -> Span:
        """See ``IdleSpans``."""
        if lifetime is not None:
            return self._span(lifetime / 1000)
        return self._of_permanent() if is_permanent(values) else self.usual

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
        self.usual = span

    def of(self, values: Mapping[str, bytes], lifetime: int | None) -> Span:
        """See ``IdleSpans``."""
        return self.usual
