"""All settings with their defaults and checks. Only this package reads ``app.config``."""

from .checks import CHECKS, lock_timeout, lock_wait
from .imports import COOKIE_SUFFIX
from .live import (
    LiveSetting,
    LiveSettings,
    cookie_attributes,
    secret_keys,
    set_secret_keys,
    token_settings,
    warn_without_secret_key,
)
from .other_extensions import csrf_field, propagates_exceptions, remember_cookie, remember_warning
from .reading import read_settings
from .settings import PLAIN, Seconds, SettingKeywords, Settings
from .unknown import did_you_mean
from .warning import warn

__all__ = [
    "CHECKS",
    "COOKIE_SUFFIX",
    "PLAIN",
    "LiveSetting",
    "LiveSettings",
    "Seconds",
    "SettingKeywords",
    "Settings",
    "cookie_attributes",
    "csrf_field",
    "did_you_mean",
    "lock_timeout",
    "lock_wait",
    "propagates_exceptions",
    "read_settings",
    "remember_cookie",
    "remember_warning",
    "secret_keys",
    "set_secret_keys",
    "token_settings",
    "warn",
    "warn_without_secret_key",
]
