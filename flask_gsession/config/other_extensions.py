"""Settings of Flask-Login and Flask-WTF, and Flask's error handling."""

from __future__ import annotations

import importlib.util
import time
from datetime import timedelta
from typing import Any

from flask import Flask

from ..errors import SettingError
from .checks import DAY
from .settings import Settings
from .warning import warn


def check_remember(app: Flask, settings: Settings) -> None:
    """Warn if remember-me cookies outlive sessions, or can't be converted."""
    if settings.remember == "session":
        if importlib.util.find_spec("flask_login") is None:
            raise SettingError(
                "SESSION_REMEMBER is 'session', but Flask-Login is not installed. Remove the "
                "setting; to remember a user without Flask-Login, set session.permanent = True in "
                "the sign-in view"
            )
        if settings.remember_until is not None and settings.remember_until <= time.time():
            warn(
                "SESSION_REMEMBER_UNTIL has passed: remember-me cookies aren't converted any more. "
                "Remove the setting"
            )
        return
    if settings.remember_until is not None:
        raise SettingError(
            "SESSION_REMEMBER_UNTIL has no effect without SESSION_REMEMBER = 'session': set that, "
            "too, or remove SESSION_REMEMBER_UNTIL"
        )
    if app.extensions.get("gsession"):  # Flask-Login uses the session of the first Session
        return
    if "REMEMBER_COOKIE_DURATION" in app.config or hasattr(app, "login_manager"):
        text = remember_warning(app, settings)
        if text is not None:
            warn(text)


def remember_warning(app: Flask, settings: Settings) -> str | None:
    """The warning about the duration of Flask-Login's remember-me cookie; None if it is fine."""
    duration = app.config.get("REMEMBER_COOKIE_DURATION", timedelta(days=365))
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if not isinstance(seconds, (int, float)) or seconds <= settings.absolute_timeout:
        return None
    return (
        f"REMEMBER_COOKIE_DURATION is {seconds / DAY:g} days, longer than "
        f"SESSION_ABSOLUTE_TIMEOUT ({settings.absolute_timeout / DAY:g} days): the cookie of "
        "Flask-Login signs users in after their sessions have ended. Set SESSION_REMEMBER to "
        "'session', or a shorter duration"
    )


def remember_cookie(app: Flask) -> dict[str, Any]:
    """Name, path and domain of Flask-Login's cookie, for ``delete_cookie``."""
    return {
        "key": app.config.get("REMEMBER_COOKIE_NAME", "remember_token"),
        "path": app.config.get("REMEMBER_COOKIE_PATH", "/"),
        "domain": app.config.get("REMEMBER_COOKIE_DOMAIN"),
    }


def csrf_field(app: Flask) -> str:
    """The session key of Flask-WTF's token."""
    return str(app.config.get("WTF_CSRF_FIELD_NAME", "csrf_token"))


def propagates_exceptions(app: Flask) -> bool:
    """Whether Flask lets errors through to the server or the test client."""
    propagate = app.config["PROPAGATE_EXCEPTIONS"]
    return bool(app.testing or app.debug) if propagate is None else bool(propagate)
