"""Blinker signals for the main events of a session, to use like Flask's own signals.

The sender is the application, and the keyword ``event`` holds the event. If a receiver raises, the
error is logged, and the request continues.
"""

from __future__ import annotations

from blinker import Namespace

_signals = Namespace()

#: A session was stored for the first time: ``SessionCreated``.
session_created = _signals.signal("session-created")

#: A session got a new token: ``SessionRotated``.
session_rotated = _signals.signal("session-rotated")

#: The application ended a session: ``SessionDestroyed``.
session_destroyed = _signals.signal("session-destroyed")

#: Changes conflicted with another request's, and were not stored: ``SessionConflicted``.
session_conflict = _signals.signal("session-conflict")

#: There was no session for a request's token: ``SessionRefused``.
session_refused = _signals.signal("session-refused")
