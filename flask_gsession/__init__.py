"""Server-side sessions for Flask, in Redis, MongoDB or an embedded SQLite file."""

from typing import cast as _cast

import flask

from .data import SessionData
from .errors import (
    GSessionError,
    SessionClosed,
    SessionConflict,
    SessionEnded,
    SessionTooLarge,
    SettingError,
    StoreError,
    StoreUnavailable,
    TransactionMisused,
    UnsupportedType,
    ValueRefused,
)
from .extension import Session
from .merge import MISSING
from .transactions import session_transaction

#: ``flask.session``, with the type that it has here.
session = _cast(SessionData, flask.session)

__all__ = [
    "MISSING",
    "GSessionError",
    "Session",
    "SessionClosed",
    "SessionConflict",
    "SessionData",
    "SessionEnded",
    "SessionTooLarge",
    "SettingError",
    "StoreError",
    "StoreUnavailable",
    "TransactionMisused",
    "UnsupportedType",
    "ValueRefused",
    "session",
    "session_transaction",
]
