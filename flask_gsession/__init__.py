"""Server-side sessions for Flask, in Redis, MongoDB or an embedded SQLite file."""

from typing import cast as _cast

import flask

from .data import SessionData
from .errors import (
    GSessionError,
    LockLost,
    LockMisused,
    SessionClosed,
    SessionConflict,
    SessionEnded,
    SessionLocked,
    SessionTooLarge,
    SettingError,
    StoreError,
    StoreUnavailable,
    TransactionMisused,
    UnsupportedType,
    ValueRefused,
)
from .extension import Session
from .locking import session_lock
from .merge import MISSING
from .transactions import session_transaction

#: ``flask.session``, with the type that it has here.
session = _cast(SessionData, flask.session)

__all__ = [
    "MISSING",
    "GSessionError",
    "LockLost",
    "LockMisused",
    "Session",
    "SessionClosed",
    "SessionConflict",
    "SessionData",
    "SessionEnded",
    "SessionLocked",
    "SessionTooLarge",
    "SettingError",
    "StoreError",
    "StoreUnavailable",
    "TransactionMisused",
    "UnsupportedType",
    "ValueRefused",
    "session",
    "session_lock",
    "session_transaction",
]
