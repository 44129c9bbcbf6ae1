"""Reads the settings of an application at its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask

from ..errors import SettingError
from .checks import CHECKS, check_setting
from .imports import is_only_for_old_sessions, with_imports
from .live import (
    DROPPED,
    check_cookie,
    check_secret_keys,
    cookie_attributes,
    has_own_lifetime,
    is_dropped,
    keys_at_start,
)
from .other_extensions import check_remember
from .settings import PLAIN, Settings
from .unknown import did_you_mean, warn_unknown
from .warning import warn

_FLASK_DEFAULT_LIFETIME = 31 * 86400.0


def read_settings(app: Flask, overrides: Mapping[str, Any], *, further: bool = False) -> Settings:
    """The settings of ``app``; ``overrides`` (by field name) override ``app.config``.

    Raises ``SettingError`` with the key, the value (unless it is secret) and the allowed values.
    Warns about unknown ``SESSION_*`` keys that resemble a known key or belong to Flask-Session.
    """
    unknown = set(overrides) - set(CHECKS)
    if unknown:
        name = min(unknown)
        hint = did_you_mean(name.lower().removeprefix("session_"), CHECKS)
        raise SettingError(f"Session() got an unknown setting {name!r}{hint}")
    values: dict[str, Any] = {"debug": app.debug}
    for name, (key, _) in CHECKS.items():
        if name in overrides:
            value = overrides[name]
        elif key in app.config and not (name == "debug" and app.config[key] is None):
            value = app.config[key]
            if name == "permanent_lifetime" and has_own_lifetime(app):
                try:
                    value = app.permanent_session_lifetime
                except Exception:  # it may need a request; each request reads it again
                    continue
        else:
            continue
        if name in ("encryption_keys", "imports") and value is None:
            continue
        if name not in overrides and is_only_for_old_sessions(app.config, name):
            continue
        if name == "encryption_keys":
            value, values["read_plain"] = _split_plain(value)
        values[name] = check_setting(name, value)
    if further and "imports" not in overrides:
        values["imports"] = ()  # the first Session imports the old sessions
    settings = with_imports(app, Settings(**values), values, overrides)
    check_secret_keys(keys_at_start(app))
    _warn_of_lifetimes(settings, values)
    check_remember(app, settings)
    if is_dropped(check_cookie((settings.cookie_name, *cookie_attributes(app)))):
        warn(DROPPED)
    warn_unknown(app, settings)
    return settings


def _warn_of_lifetimes(settings: Settings, given: Mapping[str, Any]) -> None:
    for name, default in (("idle_timeout", None), ("permanent_lifetime", _FLASK_DEFAULT_LIFETIME)):
        value = given.get(name, default)
        if value not in (None, default) and value > settings.absolute_timeout:
            warn(
                f"{CHECKS[name][0]} is {value:.0f} seconds, but SESSION_ABSOLUTE_TIMEOUT ends "
                f"every session after {settings.absolute_timeout:.0f}"
            )


def _split_plain(value: Any) -> tuple[Any, bool]:
    if isinstance(value, (list, tuple)) and len(value) > 1 and value[-1] == PLAIN:
        return value[:-1], True
    return value, False
