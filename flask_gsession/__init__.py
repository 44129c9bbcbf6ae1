"""Server-side sessions for Flask, in Redis, MongoDB or an embedded SQLite file."""

from typing import cast as _cast

import flask

from .errors import (
    ConfirmationRequired,
    GSessionError,
    LockLost,
    LockMisused,
    NotSignedIn,
    RevocationUnfinished,
    RotationRefused,
    SessionConflict,
    SessionEnded,
    SessionLocked,
    SessionTooLarge,
    SettingError,
    SignInRefused,
    StoreError,
    StoreUnavailable,
    TooManySessions,
    TransactionMisused,
    UnsupportedType,
    UserValuesUnreadable,
    ValueRefused,
)
from .extension import Session
from .freshness import next_url, require_fresh
from .request.decorators import session_lock, session_transaction
from .request.session import SessionData
from .values.merge import MISSING

#: ``flask.session``, with its real type.
session = _cast(SessionData, flask.session)

__all__ = [
    "MISSING",
    "ConfirmationRequired",
    "GSessionError",
    "LockLost",
    "LockMisused",
    "NotSignedIn",
    "RevocationUnfinished",
    "RotationRefused",
    "Session",
    "SessionConflict",
    "SessionData",
    "SessionEnded",
    "SessionLocked",
    "SessionTooLarge",
    "SettingError",
    "SignInRefused",
    "StoreError",
    "StoreUnavailable",
    "TooManySessions",
    "TransactionMisused",
    "UnsupportedType",
    "UserValuesUnreadable",
    "ValueRefused",
    "next_url",
    "require_fresh",
    "session",
    "session_lock",
    "session_transaction",
]
