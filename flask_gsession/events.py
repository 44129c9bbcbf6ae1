"""Events of sessions. Metrics, debugging and applications subscribe to them.

No event holds a token or a stored value. ``handle`` is the public handle of the session.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ref

from blinker import Signal
from flask import Flask

from . import signals

logger = logging.getLogger("flask_gsession")
#: ``SessionBound.how`` of sign-ins; other sessions were signed in before, or elsewhere.
SIGN_INS = ("sign-in", "remember-me")


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events."""


@dataclass(frozen=True, slots=True)
class SessionCreated(Event):
    """A session was stored for the first time."""

    handle: str


@dataclass(frozen=True, slots=True)
class SessionSaved(Event):
    """A session's changes were stored. ``conflicts`` counts the races that were lost before."""

    handle: str
    payload_bytes: int
    conflicts: int


@dataclass(frozen=True, slots=True)
class SessionRenewed(Event):
    """The idle expiry of a session was moved."""

    handle: str


@dataclass(frozen=True, slots=True)
class SessionRotated(Event):
    """A session got a new token. ``previous`` is its earlier handle."""

    handle: str
    previous: str


@dataclass(frozen=True, slots=True)
class SessionDestroyed(Event):
    """The application ended a session."""

    handle: str


@dataclass(frozen=True, slots=True)
class SessionRevoked(SessionDestroyed):
    """``flask gsession revoke`` ended a session."""


@dataclass(frozen=True, slots=True)
class SessionBound(Event):
    """A session was bound to a user. ``device_id`` stays the same through rotations.

    ``how``: ``"sign-in"``; ``"remember-me"``, by a cookie, so without proof of identity; ``"earlier
    version"``, for a session that Flask-Login signed in before you upgraded; or ``"import"``.
    """

    user_id: str
    device_id: str
    handle: str
    how: str = "sign-in"


@dataclass(frozen=True, slots=True)
class SessionUnbound(Event):
    """A session was unbound from its user, by a sign-out or by another user's sign-in."""

    user_id: str
    device_id: str


@dataclass(frozen=True, slots=True)
class SignInRejected(Event):
    """A session could not be bound to a user.

    ``reason``: ``"revoked"`` (the user's sessions were revoked during the sign-in) or ``"full"``.
    """

    user_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class UserConfirmed(Event):
    """The user of a session confirmed who they are, for example by a password.

    ``method``: as passed to ``session.confirm``, or ``"sign-in"`` where Flask-Login or
    Flask-Security reported it. ``handle``: before the rotation; None for a new session. The user
    and the device are None if the session isn't bound.
    """

    user_id: str | None
    device_id: str | None
    handle: str | None
    method: str


@dataclass(frozen=True, slots=True)
class DeviceLimitReached(Event):
    """A user has more devices than allowed. ``ended`` devices were ended; 0: the sign-in failed."""

    user_id: str
    limit: int
    ended: int


@dataclass(frozen=True, slots=True)
class DeviceRevoked(Event):
    """A session of a user was revoked, or ended as the oldest of too many.

    ``reason``: as passed to ``ext.users.revoke`` and similar methods, or ``"limit"``, or ``"not a
    member"`` (the user's roster doesn't contain the session, for example because it was revoked
    before a failover). ``by``: a user id, or whatever the caller passed; None if unknown.
    """

    user_id: str
    device_id: str
    handle: str
    reason: str | None
    by: str | None


@dataclass(frozen=True, slots=True)
class UserValuesForgotten(Event):
    """``ext.users.forget`` deleted the values of a user. ``by``: a user id; None if unknown."""

    user_id: str
    by: str | None


@dataclass(frozen=True, slots=True)
class SessionRefused(Event):
    """There was no session for a request's token.

    ``reason``: ``"malformed"``, ``"bad signature"``, ``"two cookies"`` (both signed by us),
    ``"too many cookies"``, ``"expired"`` (but still in the store), ``"unknown"`` (ended, never
    issued, or expired and removed), ``"revoked"`` (not in its user's roster), ``"corrupt"``,
    ``"newer format"`` or ``"unknown encryption key"``. ``handle`` is None if this application did
    not sign the token.
    """

    reason: str
    handle: str | None = None


@dataclass(frozen=True, slots=True)
class SessionConflicted(Event):
    """Changes conflicted with a parallel request's, and could not be merged.

    ``reason``: ``"refused"`` by the merge policy of a key, ``"transaction"`` (``run`` and the
    decorator then run it again), ``"too many races"``, or ``"unknown outcome"`` of an interrupted
    write that another request wrote over. Merged changes aren't a conflict:
    ``SessionSaved.conflicts`` counts the lost races before the save.
    """

    handle: str
    reason: str


@dataclass(frozen=True, slots=True)
class SessionImported(Event):
    """An old session was taken over from another library or store.

    ``source``: ``"flask-session"``, ``"cookie"`` (Flask's own) or ``"gsession"`` (another
    Flask-GSession store). ``dropped``: the keys with values that a session can't store.
    """

    handle: str
    source: str
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImportRefused(Event):
    """A request can't take over an old session, which stays where it is.

    ``source``: as in ``SessionImported``. ``reason``: for example, that a pickle contains more than
    plain data.
    """

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class WriteDropped(Event):
    """Changes were not stored because the session had ended or the store was down."""

    handle: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class StoredValueInvalid(Event):
    """A typed key ignored its stored value.

    ``reason``: ``"invalid"``, ``"newer version"``, ``"no upgrader"``, or ``"upgrade failed with "``
    and the type of the error.
    """

    key: str
    reason: str
    handle: str | None


@dataclass(frozen=True, slots=True)
class LargeValueLost(Event):
    """A large value could not be read, and is absent from then on.

    ``reason``: ``"missing"``, ``"truncated"``, ``"altered"``, ``"not encrypted"`` or
    ``"unknown encryption key"``. With the last two, it stays in the store for workers with other
    settings.
    """

    key: str
    reason: str
    handle: str | None


@dataclass(frozen=True, slots=True)
class CircuitOpened(Event):
    """The circuit breaker opened: the store failed too often in a row.

    From now on, one call per ``SESSION_BREAKER_PAUSE`` is tried, and the others fail at once.
    ``operations``: ``"loads"``, ``"writes"``, ``"old sessions"`` or ``"rate limits"``. ``detail``
    comes from the last failure.
    """

    operations: str
    detail: str


@dataclass(frozen=True, slots=True)
class CircuitClosed(Event):
    """The circuit breaker closed: the store answers again, after ``seconds``."""

    operations: str
    seconds: float


@dataclass(frozen=True, slots=True)
class LockAcquired(Event):
    """A request got the lock of a session. ``waited`` is in seconds."""

    handle: str
    waited: float


@dataclass(frozen=True, slots=True)
class LockReleased(Event):
    """A request released the lock of a session. ``held`` is in seconds."""

    handle: str
    held: float


@dataclass(frozen=True, slots=True)
class LockExpired(Event):
    """A lock expired before its holder was done. ``held`` is in seconds."""

    handle: str
    held: float


@dataclass(frozen=True, slots=True)
class LockRefused(Event):
    """A request did not get the lock. ``waited`` is in seconds.

    ``reason``: ``"too many waiters"`` or ``"wait over"``.
    """

    handle: str
    reason: str
    waited: float


@dataclass(frozen=True, slots=True)
class AccessDenied(Event):
    """Another service made a call that the grants file doesn't allow.

    ``service``: its name in the file, or "" if the file doesn't list the caller. ``what``: the
    call, and the missing grant.
    """

    service: str
    what: str


@dataclass(frozen=True, slots=True)
class CleanedUp(Event):
    """A ``CleanupWorker`` finished. ``found`` counts the leftovers by kind.

    ``flask_gsession.stores.parts.LEFTOVERS`` lists the kinds.
    """

    found: dict[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class CleanupFailed(Event):
    """A clean-up by a ``CleanupWorker`` failed; it will try again later."""

    detail: str


E = TypeVar("E", bound=Event)

_SIGNALS: dict[type[Event], Signal] = {
    SessionCreated: signals.session_created,
    SessionRotated: signals.session_rotated,
    SessionDestroyed: signals.session_destroyed,
    SessionRevoked: signals.session_destroyed,
    SessionConflicted: signals.session_conflict,
    SessionRefused: signals.session_refused,
}


def _with_derived(event: type[Event]) -> Iterator[type[Event]]:
    yield event
    for derived in event.__subclasses__():
        yield from _with_derived(derived)


class Events:
    """Passes events on to the subscribers of their type, and sends blinker signals."""

    def __init__(self) -> None:
        #: a type's list includes the subscribers to its base types
        self._subscribers: dict[type[Event], list[Callable[[Any], object]]] = {}
        self._app: Callable[[], Flask | None] = lambda: None

    def of(self, app: Flask) -> Events:
        """The events of one application: the same subscribers, and signals in its name."""
        events = Events()
        events._subscribers = self._subscribers
        events._app = ref(app)
        return events

    def subscribe(self, event: type[E], receiver: Callable[[E], object]) -> None:
        """Call ``receiver`` with every event of this type, or of a type derived from it."""
        if not (isinstance(event, type) and issubclass(event, Event)):
            raise TypeError(f"{event!r} is not an event type; see flask_gsession.events")
        for kind in dict.fromkeys(_with_derived(event)):
            self._subscribers.setdefault(kind, []).append(receiver)

    def emit(self, event: type[Event], *details: object) -> None:
        """Create the event and call its subscribers. Without subscribers, no event is created.

        If a subscriber raises, the error is logged and the request continues.
        """
        signal = _SIGNALS.get(event)
        if signal is not None and signal.receivers:
            self._send(signal, event, details)
        for receiver in self._subscribers.get(event, ()):
            try:
                receiver(event(*details))
            except Exception:
                logger.exception("A subscriber to %s failed", event.__name__)

    def _send(self, signal: Signal, event: type[Event], details: tuple[object, ...]) -> None:
        app = self._app()
        if app is not None:
            try:
                signal.send(app, _async_wrapper=app.ensure_sync, event=event(*details))
            except Exception:
                logger.exception("A receiver of the signal for %s failed", event.__name__)
