"""Settings without effect: misspelt ones, and Flask-Session settings."""

from __future__ import annotations

import difflib
from typing import Any

from flask import Flask

from ..errors import SettingError
from .checks import CHECKS
from .settings import Settings
from .warning import warn

_FLASKS_OWN = {
    "SESSION_COOKIE_NAME",
    "SESSION_COOKIE_DOMAIN",
    "SESSION_COOKIE_PATH",
    "SESSION_COOKIE_HTTPONLY",
    "SESSION_COOKIE_SECURE",
    "SESSION_COOKIE_PARTITIONED",
    "SESSION_COOKIE_SAMESITE",
    "SESSION_REFRESH_EACH_REQUEST",
}
# Flask-Session settings that have no effect even while its sessions are imported.
_FLASK_SESSIONS = {
    "SESSION_FILE_MODE": "nothing: only the owner can read the files",
    "SESSION_FILE_THRESHOLD": "nothing: live sessions are never removed",
    "SESSION_CLEANUP_N_REQUESTS": "CleanupWorker",
}
# Flask-Session settings that an import needs to read the old sessions.
_USED_BY_IMPORTS = {
    "SESSION_TYPE": "SESSION_STORE",
    "SESSION_REDIS": "SESSION_STORE",
    "SESSION_MONGODB": "SESSION_STORE",
    "SESSION_MONGODB_DB": "the database in the URL of SESSION_STORE",
    "SESSION_MONGODB_COLLECT": "SESSION_KEY_PREFIX, to share a store",
    "SESSION_MEMCACHED": "SESSION_STORE",
    "SESSION_SQLALCHEMY": "SESSION_STORE",
    "SESSION_SQLALCHEMY_TABLE": "SESSION_STORE",
    "SESSION_SQLALCHEMY_SCHEMA": "SESSION_STORE",
    "SESSION_SQLALCHEMY_BIND_KEY": "SESSION_STORE",
    "SESSION_SQLALCHEMY_SEQUENCE": "SESSION_STORE",
    "SESSION_DYNAMODB": "SESSION_STORE",
    "SESSION_DYNAMODB_TABLE": "SESSION_STORE",
    "SESSION_CACHELIB": "SESSION_STORE",
    "SESSION_FILE_DIR": "SESSION_STORE",
    "SESSION_USE_SIGNER": "nothing: tokens are always signed",
    "SESSION_SERIALIZATION_FORMAT": "nothing: values keep their types",
}
# Flask-Session settings that say where sessions are stored, and what to set SESSION_STORE to.
_A_URL = 'the URL of a Redis or MongoDB, or "sqlite:///gsession.sqlite3" for a file on this machine'
_STORE_SETTINGS = {
    "SESSION_REDIS": "a redis:// URL, or the client that SESSION_REDIS holds",
    "SESSION_MONGODB": "a mongodb:// URL, or the client that SESSION_MONGODB holds",
    "SESSION_MEMCACHED": _A_URL,
    "SESSION_SQLALCHEMY": _A_URL,
    "SESSION_DYNAMODB": _A_URL,
    "SESSION_CACHELIB": _A_URL,
    "SESSION_FILE_DIR": _A_URL,
}
_OTHER_EXTENSIONS = {"SESSION_PROTECTION"}  # Flask-Login


def refuse_ignored_stores(app: Flask) -> None:
    """Refuse to fall back to a file if Flask-Session's settings name a store."""
    for key, place in _STORE_SETTINGS.items():
        if app.config.get(key) is not None:
            raise SettingError(
                f"{key} is a setting of Flask-Session, but neither SESSION_TYPE nor SESSION_STORE "
                "is set, so sessions would be stored in a file on this machine. Set SESSION_STORE "
                f"to {place}"
            )


def warn_unknown(app: Flask, settings: Settings) -> None:
    known = {key for key, _ in CHECKS.values()} | _FLASKS_OWN | _OTHER_EXTENSIONS
    foreign = _FLASK_SESSIONS if settings.flask_session else _FLASK_SESSIONS | _USED_BY_IMPORTS
    if settings.flask_session:
        known |= _USED_BY_IMPORTS.keys()
    for key in app.config:
        if not key.startswith(("SESSION_", "PERMANENT_SESSION_")) or key in known:
            continue
        if key in foreign:
            hint = f"; it is a Flask-Session setting, here use {foreign[key]}"
        else:
            # Compare without the common prefix, which would make all of them similar.
            hint = did_you_mean(key, known, key.partition("SESSION_")[0] + "SESSION_", 0.73)
        if hint:
            warn(f"Unknown setting {key}{hint}")


def did_you_mean(name: str, known: Any, start: str = "", cutoff: float = 0.75) -> str:
    """A hint with the ``known`` names that are most similar to ``name`` after ``start``."""
    name = name.removeprefix(start)
    ends = [each.removeprefix(start) for each in known if each.startswith(start)]
    close = difflib.get_close_matches(name, ends, n=3, cutoff=cutoff)
    ratios = [difflib.SequenceMatcher(None, key, name).ratio() for key in close]
    closest = [key for key, ratio in zip(close, ratios, strict=True) if ratio == ratios[0]]
    names = " or ".join(start + key for key in sorted(closest))
    return f"; did you mean {names}?" if names else ""
