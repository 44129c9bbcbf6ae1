"""The check of each setting: converts a value, or names the allowed ones."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from types import MappingProxyType
from typing import Any

from ..errors import SettingError
from ..values.marks import END_OF_TIME
from ..values.merge import POLICIES, MergeFunction, last, reject
from ..values.payload import MOST_BYTES


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, timedelta):
            value = value.total_seconds()
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"seconds as a number, or a timedelta: {low:g} to {high:.0f} seconds")
        return float(value)

    return check


def _integer(low: int, high: int, unit: str) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number of {unit}, {low} to {high}")
        return value

    return check


def _text(pattern: Callable[[str], bool], allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str or not pattern(value):
            raise ValueError(allowed)
        return value

    return check


def _optional(inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        try:
            return None if value is None else inner(value)
        except ValueError as error:
            raise ValueError(f"{error}, or None") from None

    return check


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("True or False")
    return value


def _names(value: Any) -> frozenset[str]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(
        type(name) is str for name in value
    ):
        raise ValueError("a list of session keys")
    return frozenset(value)


def _imports(value: Any) -> tuple[object, ...]:
    if not isinstance(value, (list, tuple)) or any(source in ("", None) for source in value):
        raise ValueError(
            'a list of "flask-session", "cookie", and earlier stores of Flask-GSession, each as '
            'SESSION_STORE takes them or as a dict with "store" and "key_prefix"'
        )
    return tuple(value)


def _time(value: Any) -> float:
    """A point in time, in seconds since 1970. A date stands for the end of that day, in UTC."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = (date if len(value) <= len("2026-12-31") else datetime).fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        with suppress(OverflowError):  # date.max has no next day
            value = datetime(value.year, value.month, value.day, tzinfo=UTC) + timedelta(days=1)
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if type(value) not in (int, float) or not 0 < value < END_OF_TIME / 1000:
        raise ValueError("a date such as date(2027, 3, 31) or '2027-03-31', or a datetime")
    return float(value)


def _callable(value: Any) -> Any:
    if not callable(value):
        raise ValueError("a function without arguments that returns a new token")
    return value


def _policy(value: Any) -> MergeFunction:
    if isinstance(value, str) and value in POLICIES:
        return POLICIES[value]
    if callable(value):
        return value  # type: ignore[no-any-return]  # a function that takes base, theirs and mine
    raise ValueError(f"one of {', '.join(POLICIES)}, or a function of base, theirs and mine")


def _policies(value: Any) -> Mapping[str, MergeFunction]:
    if not isinstance(value, Mapping) or not all(type(key) is str for key in value):
        raise ValueError("a dict that maps session keys to policies")
    return MappingProxyType({key: _policy(policy) for key, policy in value.items()})


def _conflict(value: Any) -> MergeFunction:
    if value == "last":
        return last
    if value == "reject":
        return reject
    raise ValueError('"last" or "reject"')


def _remember(value: Any) -> str:
    if value not in ("cookie", "session"):
        raise ValueError('"cookie" or "session"')
    return str(value)


def _on_store_error(value: Any) -> str:
    if value not in ("fail", "keep-response"):
        raise ValueError('"fail" or "keep-response"')
    return str(value)


def _max_policy(value: Any) -> str:
    if value not in ("oldest", "refuse"):
        raise ValueError('"oldest" or "refuse"')
    return str(value)


def _token_text(value: str) -> bool:
    return value.isascii() and all(char.isalnum() or char in "!#$%&'*+-.^_`|~" for char in value)


def _encryption_key(value: Any) -> bytes:
    key, length = value, "bytes"
    if isinstance(value, str):
        length = "bytes as base64url text"
        try:
            key = base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True)
        except ValueError:
            length = "characters that aren't base64url"
            key = value
    if isinstance(key, bytes) and len(key) == 32:
        return key
    given = f"{len(key)} {length}" if isinstance(key, (str, bytes)) else type(key).__name__
    raise ValueError(
        "a key, or a list of keys, the current one first; a key is 32 bytes, or their "
        f"base64url text, such as secrets.token_urlsafe(32) (not shown; given: {given})"
    )


def _encryption_keys(value: Any) -> tuple[bytes, ...]:
    if isinstance(value, (str, bytes)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError("a key, or a list of keys, the current one first")
    return tuple(_encryption_key(key) for key in value)


#: Checks for the times of a lock. They raise ``ValueError`` with the allowed range.
lock_timeout = _seconds(0.1, 3600)
lock_wait = _seconds(0, 3600)
_near_bound = _seconds(0.02, 10)


def _near_cache(value: Any) -> float:
    """Seconds; 0 turns the near cache off."""
    if value in (0, timedelta(0)) and value is not False:
        return 0.0
    try:
        return _near_bound(value)
    except ValueError as error:
        raise ValueError(f"0, or {error}") from None


_GLOB_CHARACTERS = set("{}*?[]")
# Standard headers of requests and responses (the token is in both), and headers that proxies
# change.
_STANDARD_HEADER = re.compile(
    "(accept|access-control|cf|content|cross-origin|if|proxy|sec|x-forwarded)-.+"
    "|accept|age|allow|alt-svc|alt-used|authentication-info|authorization|cache-control|connection"
    "|cookie2?|date|dnt|early-data|etag|expect|expires|forwarded|from|host|http2-settings"
    "|keep-alive|last-modified|link|location|max-forwards|origin|pragma|prefer|priority|range"
    "|referer|referrer-policy|refresh|retry-after|server|server-timing|set-cookie2?"
    "|strict-transport-security|te|trailer|transfer-encoding|upgrade|upgrade-insecure-requests"
    "|user-agent|vary|via|warning|www-authenticate|x-content-type-options|x-frame-options"
    "|x-real-ip|x-request-id|x-requested-with",
    re.IGNORECASE,
)
NOT_IN_A_DOMAIN = {*" ,;=/\\", *map(chr, range(32)), "\x7f"}
DAY = 86400.0
_FOREVER = 10 * 366 * DAY
_cookie_name = _text(
    lambda v: 0 < len(v) <= 200 and _token_text(v), "a cookie name (RFC 6265 token)"
)
_cookie_domain = _text(
    lambda v: bool(v) and set(v).isdisjoint(NOT_IN_A_DOMAIN), "a name such as 'example.com'"
)
_cookie_path = _text(lambda v: v.startswith("/"), "a path such as '/shop'")
# field of Settings -> (key in app.config, check). A check raises ValueError with the allowed
# values.
CHECKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "store": ("SESSION_STORE", lambda value: value),
    "cookie_name": ("SESSION_COOKIE_NAME", _cookie_name),
    "key_prefix": (
        "SESSION_KEY_PREFIX",
        _text(
            lambda v: (
                len(v) <= 200 and v.isascii() and v.isprintable() and _GLOB_CHARACTERS.isdisjoint(v)
            ),
            "at most 200 printable ASCII characters without { } * ? [ ]",
        ),
    ),
    "id_length": ("SESSION_ID_LENGTH", _integer(16, 64, "bytes of entropy")),
    "token_factory": ("SESSION_TOKEN_FACTORY", _optional(_callable)),
    "token_header": (
        "SESSION_TOKEN_HEADER",
        _optional(
            _text(
                lambda v: (
                    0 < len(v) <= 100 and _token_text(v) and not _STANDARD_HEADER.fullmatch(v)
                ),
                "a header name of your own, such as 'X-Session'; not one that HTTP, proxies or "
                "browsers use",
            )
        ),
    ),
    "idle_timeout": ("SESSION_IDLE_TIMEOUT", _seconds(1, _FOREVER)),
    "absolute_timeout": ("SESSION_ABSOLUTE_TIMEOUT", _seconds(1, _FOREVER)),
    "permanent_lifetime": ("PERMANENT_SESSION_LIFETIME", _seconds(1, _FOREVER)),
    "renew_interval": ("SESSION_RENEW_INTERVAL", _optional(_seconds(0, DAY))),
    "newcomers_per_minute": (
        "SESSION_NEWCOMERS_PER_MINUTE",
        _optional(_integer(1, 1_000_000, "new sessions a minute")),
    ),
    "newcomer_timeout": ("SESSION_NEWCOMER_TIMEOUT", _seconds(1, DAY)),
    "rotation_grace": ("SESSION_ROTATION_GRACE", _seconds(0, 3600)),
    "renew_csrf": ("SESSION_RENEW_CSRF", _flag),
    "confirm_view": (
        "SESSION_CONFIRM_VIEW",
        _optional(_text(lambda v: 0 < len(v) <= 200, "the endpoint of a view, such as 'confirm'")),
    ),
    "remember": ("SESSION_REMEMBER", _remember),
    "remember_until": ("SESSION_REMEMBER_UNTIL", _optional(_time)),
    "store_timeout": ("SESSION_STORE_TIMEOUT", _seconds(0.01, 60)),
    "pool_max": ("SESSION_POOL_MAX", _integer(1, 10_000, "connections")),
    "breaker_failures": ("SESSION_BREAKER_FAILURES", _integer(0, 10_000, "failures")),
    "breaker_pause": ("SESSION_BREAKER_PAUSE", _seconds(0.01, 60)),
    "near_cache": ("SESSION_NEAR_CACHE", _near_cache),
    "near_cache_bytes": (
        "SESSION_NEAR_CACHE_BYTES",
        _integer(64 * 1024, 64 * 1024 * 1024 * 1024, "bytes"),
    ),
    "live_streams": ("SESSION_LIVE_STREAMS", _optional(_integer(0, 100_000, "streams"))),
    "live_user_streams": ("SESSION_LIVE_USER_STREAMS", _integer(1, 10_000, "streams")),
    "live_heartbeat": ("SESSION_LIVE_HEARTBEAT", _seconds(1, 60)),
    "live_stream_life": ("SESSION_LIVE_STREAM_LIFE", _seconds(10, 3600)),
    "live_poll": ("SESSION_LIVE_POLL", _seconds(1, 600)),
    "edge_sync": ("SESSION_EDGE_SYNC", _seconds(0.1, 3600)),
    "logout_replicas": ("SESSION_LOGOUT_REPLICAS", _integer(0, 100, "replicas")),
    "journal": ("SESSION_JOURNAL", _flag),
    "journal_events": ("SESSION_JOURNAL_EVENTS", _integer(1000, 1_000_000_000, "events")),
    "on_store_error": ("SESSION_ON_STORE_ERROR", _on_store_error),
    "max_bytes": ("SESSION_MAX_BYTES", _integer(256, MOST_BYTES, "bytes")),
    "max_keys": ("SESSION_MAX_KEYS", _integer(1, 1_000_000, "keys")),
    "max_depth": ("SESSION_MAX_DEPTH", _integer(1, 200, "levels")),
    "spill_bytes": ("SESSION_SPILL_BYTES", _optional(_integer(256, MOST_BYTES, "bytes"))),
    "spill_store": ("SESSION_SPILL_STORE", lambda value: value),
    "max_value_bytes": ("SESSION_MAX_VALUE_BYTES", _integer(256, 256 * 1024 * 1024, "bytes")),
    "max_total_bytes": (
        "SESSION_MAX_TOTAL_BYTES",
        _optional(_integer(256, 1024 * 1024 * 1024, "bytes")),
    ),
    "encryption_keys": ("SESSION_ENCRYPTION_KEYS", _encryption_keys),
    "conflict": ("SESSION_CONFLICT", _conflict),
    "merge_policies": ("SESSION_MERGE_POLICIES", _policies),
    "lock_timeout": ("SESSION_LOCK_TIMEOUT", lock_timeout),
    "lock_wait": ("SESSION_LOCK_WAIT", lock_wait),
    "lock_waiters": ("SESSION_LOCK_WAITERS", _integer(0, 10_000, "waiting requests")),
    "lock_client_waiters": (
        "SESSION_LOCK_CLIENT_WAITERS",
        _optional(_integer(0, 10_000, "waiting requests")),
    ),
    "lock_warn": ("SESSION_LOCK_WARN", _optional(_seconds(0, 3600))),
    "max_per_user": ("SESSION_MAX_PER_USER", _optional(_integer(1, 1000, "sessions"))),
    "max_policy": ("SESSION_MAX_POLICY", _max_policy),
    "seen_interval": ("SESSION_SEEN_INTERVAL", _seconds(1, 86_400)),
    "device_labels": ("SESSION_DEVICE_LABELS", _flag),
    "user_values_lifetime": ("SESSION_USER_VALUES_LIFETIME", _seconds(60, _FOREVER)),
    "schema": ("SESSION_SCHEMA", lambda value: value),
    "permanent": ("SESSION_PERMANENT", _flag),
    "imports": ("SESSION_IMPORT", _imports),
    "import_until": ("SESSION_IMPORT_UNTIL", _optional(_time)),
    "import_watch": ("SESSION_IMPORT_WATCH", _flag),
    "import_cookie_name": ("SESSION_IMPORT_COOKIE_NAME", _optional(_cookie_name)),
    "import_cookie_domain": ("SESSION_IMPORT_COOKIE_DOMAIN", _optional(_cookie_domain)),
    "import_cookie_path": ("SESSION_IMPORT_COOKIE_PATH", _optional(_cookie_path)),
    "debug": ("SESSION_DEBUG", _flag),
    "debug_show": ("SESSION_DEBUG_SHOW", _names),
}
_SECRET = {"SESSION_STORE", "SESSION_SPILL_STORE", "SESSION_ENCRYPTION_KEYS", "SESSION_IMPORT"}


def check_setting(name: str, value: Any) -> Any:
    """The value of a setting, converted for ``Settings``. Raises ``SettingError``."""
    key, check = CHECKS[name]
    try:
        return check(value)
    except ValueError as error:
        shown = type_of(value) if key in _SECRET else repr(value)[:80]
        raise SettingError(f"{key} is {shown}; allowed: {error}") from None


def type_of(secret: object) -> str:
    return f"of type {type(secret).__name__}"
