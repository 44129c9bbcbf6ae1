"""What happens to sessions, as signals of blinker: for those who subscribe as to Flask's own.

Each is sent with the application as the sender and the event as ``event``. What a receiver raises
is logged, and does not fail the request.
"""

from __future__ import annotations

from blinker import Namespace

_signals = Namespace()

#: A session was stored for the first time: ``SessionCreated``.
session_created = _signals.signal("session-created")

#: A session got a new token: ``SessionRotated``.
session_rotated = _signals.signal("session-rotated")

#: A session was ended by the application: ``SessionDestroyed``.
session_destroyed = _signals.signal("session-destroyed")

#: Changes met those of another request, and could not be stored: ``SessionConflicted``.
session_conflict = _signals.signal("session-conflict")

#: A presented token did not lead to a session: ``SessionRefused``.
session_refused = _signals.signal("session-refused")
