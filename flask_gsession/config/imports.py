"""Adapts the settings to Flask-Session's, and to ``SESSION_IMPORT``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flask import Flask

from ..errors import SettingError
from ..flask_session_settings import READABLE, is_id_length, read_flask_session_settings
from .checks import CHECKS, check_setting
from .settings import Settings
from .unknown import refuse_ignored_stores
from .warning import warn

#: Appended to the old cookie's name while old sessions are imported.
COOKIE_SUFFIX = "_gs"


def is_only_for_old_sessions(config: Mapping[str, Any], name: str) -> bool:
    """Whether a setting that Flask-Session also has holds a value that only Flask-Session accepts.

    New sessions use our default instead.
    """
    value = config.get(CHECKS[name][0])
    is_prefix = name == "key_prefix" and type(value) is str
    is_length = name == "id_length" and is_id_length(value)
    if not (is_prefix or is_length) or read_flask_session_settings(config) is None:
        return False
    try:
        check_setting(name, value)
    except SettingError:
        return True
    return False


def with_imports(
    app: Flask, settings: Settings, given: Mapping[str, Any], keywords: Mapping[str, Any]
) -> Settings:
    """The settings, adapted to Flask-Session's settings and to ``SESSION_IMPORT``.

    ``given``: the settings in the configuration or in ``keywords``.
    """
    old = read_flask_session_settings(app.config)
    changes: dict[str, Any] = {"flask_session": old}
    if settings.store is None:
        if old is None:
            refuse_ignored_stores(app)
        else:
            changes |= {"store": old.store(), "store_follows": True}
    explicit = "imports" in given
    if old is not None:
        changes.setdefault("permanent", given.get("permanent", old.permanent))
        if "idle_timeout" not in given:
            changes["idle_timeout"] = settings.permanent_lifetime
        if not explicit and old.is_readable:
            changes["imports"] = ("flask-session",)
        elif not explicit:
            warn(
                f"SESSION_TYPE is {old.type!r}; its sessions can't be taken over, so users have to "
                "log in again. Remove Flask-Session's settings to stop this warning"
            )
    settings = replace(settings, **changes)
    if "flask-session" in settings.imports and (old is None or not old.is_readable):
        raise SettingError(
            'SESSION_IMPORT names "flask-session", but SESSION_TYPE doesn\'t name a store whose '
            f"sessions can be taken over; allowed: {', '.join(READABLE)}. Keep Flask-Session's "
            "settings, or remove the name from SESSION_IMPORT"
        )
    if not settings.imports:
        return settings
    _check_end(settings, explicit)
    return replace(settings, **_cookies(app, settings, keywords))


def _check_end(settings: Settings, explicit: bool) -> None:
    """Refuse an import without an end date, or warn about it; warn after the end."""
    until = settings.import_until
    if until is None and explicit:
        raise SettingError(
            "SESSION_IMPORT is set without SESSION_IMPORT_UNTIL: set it to the date when the "
            "import ends, such as date(2027, 3, 31) or '2027-03-31'"
        )
    if until is None:
        warn(
            "SESSION_TYPE is set, so old sessions of Flask-Session are taken over, with no end "
            "date: set SESSION_IMPORT_UNTIL to a date, or SESSION_IMPORT to [] to take over none"
        )
    elif until <= time.time():
        warn(
            "SESSION_IMPORT_UNTIL has passed: old sessions are no longer taken over. Remove "
            "SESSION_IMPORT, SESSION_IMPORT_UNTIL and Flask-Session's settings, and set "
            f"SESSION_COOKIE_NAME to {settings.cookie_name + COOKIE_SUFFIX!r} unless it has a name "
            "of its own already"
        )


def _cookies(app: Flask, settings: Settings, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The names of the old and the new cookie, which old and new workers must not share."""
    configured = str(app.config["SESSION_COOKIE_NAME"])
    old, new = settings.import_cookie_name or configured, settings.cookie_name
    suffix = ""
    if settings.import_cookie_name is None and "cookie_name" not in keywords:
        suffix = COOKIE_SUFFIX
        new = configured + suffix
    if old == new:
        raise SettingError(
            f"During an import, the old and the new cookie need different names, but both are "
            f"{new!r}: old workers would overwrite the new cookie. Pass Session() another "
            "cookie_name, or set SESSION_IMPORT_COOKIE_NAME to the name of the old cookie"
        )
    return {"cookie_name": new, "cookie_suffix": suffix, "import_cookie_name": old}
