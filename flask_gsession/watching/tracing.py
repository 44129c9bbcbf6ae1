"""Records everything that a request does with its session, for the debug dump.

None of this runs for a session that isn't traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..events import Event, Events
from ..repository.refusals import Refusals
from ..repository.repository import Repository
from ..request.tracking import NO_CHANGES, TrackedValues
from ..stores.wrappers import Call, compose
from ..values.merge import Change
from ..values.references import reference_in, refers


def size_of(raw: bytes) -> int:
    """The size of an encoded value or of the large value that it refers to."""
    return reference_in(raw).length if refers(raw) else len(raw)


class Written(NamedTuple):
    """The bytes of an encoded value; ``before`` is None for a new key."""

    before: int | None
    after: int


class Refusal(NamedTuple):
    """Why a token was refused; ``because`` has more detail than the event's reason."""

    reason: str
    handle: str | None
    because: str


class Trace:
    """The store calls, events and keys of one session in one request.

    ``one_session``: whether debugging is on for this session (``flask gsession debug``), and not
    for the application.
    """

    def __init__(self, *, one_session: bool = False) -> None:
        self.one_session = one_session
        self.reported = False
        self.calls: list[Call] = []
        self.events: list[Event] = []
        self.refusal: Refusal | None = None
        self.failure: str | None = None
        # Each in the order of use.
        self.read: dict[str, int] = {}  # bytes by key
        self.absent: dict[str, None] = {}
        self.touched: dict[str, None] = {}  # set or removed by the request, stored or not
        self.written: dict[str, Written] = {}
        self.deleted: dict[str, None] = {}
        self.types: dict[str, str] = {}

    def stored(self, key: str, before: bytes | None, after: bytes | None) -> None:
        """Note that a change of this key was stored."""
        if after is None:
            self.deleted[key] = None
            self.written.pop(key, None)
        else:
            first = self.written.get(key)
            was = None if before is None else size_of(before)
            self.written[key] = Written(first.before if first else was, size_of(after))
            self.deleted.pop(key, None)


def traced(repository: Repository, trace: Trace) -> Repository:
    """The application's repository, with its store and events traced for one session."""
    copied = repository.through(compose(repository.store, trace=trace.calls))
    copied.use_events(TracedEvents(repository.events, trace))
    copied.refusals = TracedRefusals(copied.refusals, trace)
    return copied


class TracedRefusals:
    """Records why a token was refused, and forwards the refusal."""

    def __init__(self, refusals: Refusals, trace: Trace) -> None:
        self._refusals = refusals
        self._trace = trace

    def note(self, reason: str, key: str | None, detail: str = "") -> None:
        """See ``Refusals``."""
        self._trace.refusal = Refusal(reason, key, detail)
        self._refusals.note(reason, key, detail)


class TracedEvents(Events):
    """Records the events of one session, and forwards them."""

    def __init__(self, events: Events, trace: Trace) -> None:
        self._events = events
        self._trace = trace

    def emit(self, event: type[Event], *details: object) -> None:
        self._trace.events.append(event(*details))
        self._events.emit(event, *details)


class TracedValues(TrackedValues, eq=False, kw_only=True):
    """Values that record which keys were read and changed."""

    _trace: Trace

    def __getitem__(self, key: str) -> Any:
        try:
            value = super().__getitem__(key)
        except KeyError:
            self._trace.absent[key] = None
            raise
        self._trace.types[key] = type(value).__name__
        self._note_read(key)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._trace.touched[key] = None
        self._trace.types[key] = type(value).__name__

    def __delitem__(self, key: str) -> None:
        touched = key in self._trace.touched
        self._trace.touched[key] = None  # so that the lookup doesn't count as a read
        try:
            super().__delitem__(key)
        except KeyError:
            if not touched:
                del self._trace.touched[key]
            raise

    def __contains__(self, key: object) -> bool:
        there = super().__contains__(key)
        if isinstance(key, str):
            if there:
                self._note_read(key)
            else:
                self._trace.absent[key] = None
        return there

    def raw(self, key: str) -> bytes | None:
        raw = super().raw(key)
        if raw is None:
            self._trace.absent[key] = None
        else:
            self._note_read(key)
        return raw

    def rebase(
        self,
        stored: dict[str, bytes],
        now: Callable[[], int] | None = None,
        saved: Mapping[str, Change] = NO_CHANGES,
    ) -> None:
        for key, change in saved.items():
            self._trace.stored(key, change.base, stored.get(key))
        super().rebase(stored, now, saved)

    def _note_read(self, key: str) -> None:
        # A value that the request has just set is not a read from the session.
        if key not in self._trace.touched and key in self.stored:
            self._trace.read.setdefault(key, size_of(self.stored[key]))
