"""All settings with their defaults and checks. Only this module reads ``app.config``."""

from __future__ import annotations

import base64
import difflib
import importlib.util
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, Generic, Literal, TypedDict, TypeVar

from flask import Flask
from flask.sessions import SessionInterface

from .errors import SettingError
from .events import logger
from .flask_session_settings import (
    READABLE,
    FlaskSessionSettings,
    read_flask_session_settings,
)
from .tokens import TokenFactory
from .values.codec import is_valid_text
from .values.marks import END_OF_TIME
from .values.merge import POLICIES, MergeFunction, last, reject
from .values.payload import MOST_BYTES

T = TypeVar("T")

#: The last item of SESSION_ENCRYPTION_KEYS, to accept payloads that aren't encrypted.
PLAIN = "plain"

_HOUR = 3_600_000  # milliseconds
_TOTAL_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked settings of one ``Session`` on one application. Durations are in seconds."""

    store: object = None
    cookie_name: str = "session"
    key_prefix: str = "gsession:"
    id_length: int = 32
    token_factory: TokenFactory | None = None
    token_header: str | None = None
    idle_timeout: float = 7200.0
    absolute_timeout: float = 31 * 86400.0
    permanent_lifetime: float = 31 * 86400.0
    renew_interval: float | None = None
    newcomers_per_minute: int | None = 600
    newcomer_timeout: float = 300.0
    rotation_grace: float = 10.0
    renew_csrf: bool = False
    confirm_view: str | None = None
    remember: str = "cookie"
    remember_until: float | None = None
    store_timeout: float = 1.0
    pool_max: int = 100
    breaker_failures: int = 5
    breaker_pause: float = 1.0
    near_cache: float = 0.0
    near_cache_bytes: int = 64 * 1024 * 1024
    logout_replicas: int = 0
    on_store_error: str = "fail"
    max_bytes: int = 1024 * 1024
    max_keys: int = 1000
    max_depth: int = 64
    spill_bytes: int | None = 16 * 1024
    spill_store: object = None
    max_value_bytes: int = 32 * 1024 * 1024
    max_total_bytes: int | None = None
    encryption_keys: tuple[bytes, ...] = ()
    read_plain: bool = False
    conflict: MergeFunction = last
    merge_policies: Mapping[str, MergeFunction] = field(default_factory=dict)
    lock_timeout: float = 10.0
    lock_wait: float = 5.0
    lock_waiters: int = 10
    lock_client_waiters: int | None = 10
    lock_warn: float | None = 1.0
    max_per_user: int | None = None
    max_policy: Literal["oldest", "refuse"] = "oldest"
    seen_interval: float = 300.0
    schema: object = None
    permanent: bool = False
    imports: tuple[object, ...] = ()
    import_until: float | None = None
    import_watch: bool = False
    import_cookie_name: str | None = None
    import_cookie_domain: str | None = None
    import_cookie_path: str | None = None
    debug: bool = False
    debug_show: Collection[str] = ()
    #: Flask-Session's settings, if they are in the configuration
    flask_session: FlaskSessionSettings | None = None
    #: whether ``store`` follows from them
    store_follows: bool = False
    #: appended to SESSION_COOKIE_NAME
    cookie_suffix: str = ""

    def __repr__(self) -> str:
        """Hides the stores' URLs and the encryption keys."""
        hidden = {"store", "spill_store", "encryption_keys", "imports"}
        names = [f.name for f in fields(self) if f.name not in hidden]
        return f"Settings({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def total_limit(self) -> int:
        """The limit in bytes for all large values of a session together."""
        if self.max_total_bytes is None:
            return max(_TOTAL_BYTES, self.max_value_bytes)
        return self.max_total_bytes

    def marks_end(self, now: int) -> int:
        """When marks of imported sessions expire, in milliseconds.

        An hour after the end of the imports, longer than any request takes. Without an end, longer
        than an old session and its new one can live together.
        """
        if self.import_until is not None:
            return int(self.import_until * 1000) + _HOUR
        longest = max(self.permanent_lifetime, self.absolute_timeout)
        return now + int(2 * longest * 1000) + _HOUR

    @property
    def remember_end(self) -> int:
        """Until when it is remembered whose remember-me cookie was converted, in milliseconds."""
        return int((self.remember_until or 0) * 1000) + _HOUR

    def renew_interval_for(self, idle: float) -> float:
        """The renewal interval of a session with this idle timeout."""
        if self.renew_interval is None:
            return min(60.0, idle / 20)
        return min(self.renew_interval, idle)


Seconds = float | timedelta


class SettingKeywords(TypedDict, total=False):
    """The keywords of ``Session``, for editors and type checkers."""

    store: object
    cookie_name: str
    key_prefix: str
    id_length: int
    token_factory: TokenFactory | None
    token_header: str | None
    idle_timeout: Seconds
    absolute_timeout: Seconds
    permanent_lifetime: Seconds
    renew_interval: Seconds | None
    newcomers_per_minute: int | None
    newcomer_timeout: Seconds
    rotation_grace: Seconds
    renew_csrf: bool
    confirm_view: str | None
    remember: Literal["cookie", "session"]
    remember_until: str | date | float | None
    store_timeout: Seconds
    pool_max: int
    breaker_failures: int
    breaker_pause: Seconds
    near_cache: Seconds
    near_cache_bytes: int
    logout_replicas: int
    on_store_error: Literal["fail", "keep-response"]
    max_bytes: int
    max_keys: int
    max_depth: int
    spill_bytes: int | None
    spill_store: object
    max_value_bytes: int
    max_total_bytes: int | None
    encryption_keys: str | bytes | Sequence[str | bytes] | None
    conflict: Literal["last", "reject"]
    merge_policies: Mapping[str, str | MergeFunction]
    lock_timeout: Seconds
    lock_wait: Seconds
    lock_waiters: int
    lock_client_waiters: int | None
    lock_warn: Seconds | None
    max_per_user: int | None
    max_policy: Literal["oldest", "refuse"]
    seen_interval: Seconds
    schema: object
    permanent: bool
    imports: Sequence[object] | None
    import_until: str | date | float | None
    import_watch: bool
    import_cookie_name: str | None
    import_cookie_domain: str | None
    import_cookie_path: str | None
    debug: bool
    debug_show: Collection[str]


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
    """A point in time, in seconds since 1970; a date is over when the day is, in UTC."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = (date if len(value) <= len("2026-12-31") else datetime).fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC) + timedelta(days=1)
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if type(value) not in (int, float) or not 0 < value < END_OF_TIME / 1000:
        raise ValueError("a date, as date(2027, 3, 31) or '2027-03-31', or a datetime")
    return float(value)


def _callable(value: Any) -> Any:
    if not callable(value):
        raise ValueError("a function without arguments that returns a new token")
    return value


def _policy(value: Any) -> MergeFunction:
    if isinstance(value, str) and value in POLICIES:
        return POLICIES[value]
    if callable(value):
        return value  # type: ignore[no-any-return]  # a function of base, theirs, mine
    raise ValueError(f"one of {', '.join(POLICIES)}, or a function of base, theirs and mine")


def _policies(value: Any) -> Mapping[str, MergeFunction]:
    if not isinstance(value, Mapping) or not all(type(key) is str for key in value):
        raise ValueError("a dict of session key to policy")
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
            length = "characters, and no base64url text"
            key = value
    if isinstance(key, bytes) and len(key) == 32:
        return key
    given = f"{len(key)} {length}" if isinstance(key, (str, bytes)) else type(key).__name__
    raise ValueError(
        "a key, or a list of keys, the current one first; a key is 32 bytes, or their "
        f"base64url text as from secrets.token_urlsafe(32) (not shown; given: {given})"
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


_FLASKS_LIFETIME = 31 * 86400.0
_PATTERN = set("{}*?[]")
# Headers of requests and of responses, since the token is in both, and headers that proxies change.
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
_NO_DOMAIN = {*" ,;=/\\", *map(chr, range(32)), "\x7f"}
_DROPPED = (
    "Browsers drop a SameSite=None or Partitioned session cookie without "
    "SESSION_COOKIE_SECURE = True"
)
_PREFIXES = ("__host-", "__secure-", "__http-")  # RFC 6265bis
_DAY = 86400.0
_FOREVER = 10 * 366 * _DAY

_cookie_name = _text(
    lambda v: 0 < len(v) <= 200 and _token_text(v), "a cookie name (RFC 6265 token)"
)
_cookie_domain = _text(
    lambda v: bool(v) and set(v).isdisjoint(_NO_DOMAIN), "a name as 'example.com'"
)
_cookie_path = _text(lambda v: v.startswith("/"), "a path as '/shop'")

# field of Settings -> (key in app.config, check). A check raises ValueError with what is allowed.
_CHECKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "store": ("SESSION_STORE", lambda value: value),
    "cookie_name": ("SESSION_COOKIE_NAME", _cookie_name),
    "key_prefix": (
        "SESSION_KEY_PREFIX",
        _text(
            lambda v: len(v) <= 200 and v.isascii() and v.isprintable() and not set(v) & _PATTERN,
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
    "renew_interval": ("SESSION_RENEW_INTERVAL", _optional(_seconds(0, _DAY))),
    "newcomers_per_minute": (
        "SESSION_NEWCOMERS_PER_MINUTE",
        _optional(_integer(1, 1_000_000, "new sessions a minute")),
    ),
    "newcomer_timeout": ("SESSION_NEWCOMER_TIMEOUT", _seconds(1, _DAY)),
    "rotation_grace": ("SESSION_ROTATION_GRACE", _seconds(0, 3600)),
    "renew_csrf": ("SESSION_RENEW_CSRF", _flag),
    "confirm_view": (
        "SESSION_CONFIRM_VIEW",
        _optional(_text(lambda v: 0 < len(v) <= 200, "the endpoint of a view, as 'confirm'")),
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
    "logout_replicas": ("SESSION_LOGOUT_REPLICAS", _integer(0, 100, "replicas")),
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
#: Behind the old cookie's name, while old sessions are imported.
COOKIE_SUFFIX = "_gs"

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
# Settings of Flask-Session that have no effect with an import of its sessions either.
_FLASK_SESSIONS = {
    "SESSION_FILE_MODE": "nothing: only the owner can read the files",
    "SESSION_FILE_THRESHOLD": "nothing: live sessions are never removed",
    "SESSION_CLEANUP_N_REQUESTS": "CleanupWorker",
}
# The Flask-Session settings that are needed to read its sessions.
_OF_AN_IMPORT = {
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
# The Flask-Session settings for the place of sessions, and advice for SESSION_STORE.
_A_URL = 'the URL of a Redis or MongoDB, or "sqlite:///gsession.sqlite3" for a file on this machine'
_PLACES = {
    "SESSION_REDIS": "a redis:// URL, or the client that SESSION_REDIS holds",
    "SESSION_MONGODB": "a mongodb:// URL, or the client that SESSION_MONGODB holds",
    "SESSION_MEMCACHED": _A_URL,
    "SESSION_SQLALCHEMY": _A_URL,
    "SESSION_DYNAMODB": _A_URL,
    "SESSION_CACHELIB": _A_URL,
    "SESSION_FILE_DIR": _A_URL,
}
_OTHER_EXTENSIONS = {"SESSION_PROTECTION"}  # Flask-Login


def read_settings(app: Flask, overrides: Mapping[str, Any], *, further: bool = False) -> Settings:
    """The settings of ``app``; ``overrides`` (by field name) override ``app.config``.

    Raises ``SettingError`` with the key, the value (unless it is secret) and the allowed values.
    Warns about unknown ``SESSION_*`` keys that resemble a known key or belong to Flask-Session.
    """
    unknown = set(overrides) - set(_CHECKS)
    if unknown:
        name = min(unknown)
        hint = _did_you_mean(name.lower().removeprefix("session_"), _CHECKS)
        raise SettingError(f"Session() got an unknown setting {name!r}{hint}")
    values: dict[str, Any] = {"debug": app.debug}
    for name, (key, _) in _CHECKS.items():
        if name in overrides:
            value = overrides[name]
        elif key in app.config and not (name == "debug" and app.config[key] is None):
            value = app.config[key]
            if name == "permanent_lifetime" and _has_own_lifetime(app):
                try:
                    value = app.permanent_session_lifetime
                except Exception:  # it may need a request; each request reads it again
                    continue
        else:
            continue
        if name in ("encryption_keys", "imports") and value is None:
            continue
        if name == "encryption_keys":
            value, values["read_plain"] = _split_plain(value)
        values[name] = _check(name, value)
    if further and "imports" not in overrides:
        values["imports"] = ()  # old sessions are those of the first
    settings = _with_imports(app, Settings(**values), values, overrides)
    _check_secret_keys(_keys_at_start(app))
    _warn_of_lifetimes(settings, values)
    _check_remember(app, settings)
    if _is_dropped(_check_cookie((settings.cookie_name, *cookie_attributes(app)))):
        warn(_DROPPED)
    _warn_unknown(app, settings)
    return settings


def _check(name: str, value: Any) -> Any:
    """The value of a setting, converted for ``Settings``. Raises ``SettingError``."""
    key, check = _CHECKS[name]
    try:
        return check(value)
    except ValueError as error:
        shown = _type_of(value) if key in _SECRET else repr(value)[:80]
        raise SettingError(f"{key} is {shown}; allowed: {error}") from None


def set_secret_keys(app: Flask, current: str | bytes, older: Iterable[str | bytes]) -> None:
    """Give ``app`` the secret keys of another application."""
    app.secret_key = current
    app.config["SECRET_KEY_FALLBACKS"] = list(older)


def _has_own_lifetime(app: Flask) -> bool:
    """Whether a subclass of Flask overrides ``permanent_session_lifetime``."""
    kinds: tuple[Any, Any] = type(app), Flask
    own, flasks = (kind.permanent_session_lifetime for kind in kinds)
    return own is not flasks


def _type_of(secret: object) -> str:
    return f"of type {type(secret).__name__}"


def warn(message: str) -> None:
    """Warn the developer, and write to the log of a running server."""
    logger.warning("%s", message)
    level = 2
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("flask_gsession."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _warn_of_lifetimes(settings: Settings, given: Mapping[str, Any]) -> None:
    for name, default in (("idle_timeout", None), ("permanent_lifetime", _FLASKS_LIFETIME)):
        value = given.get(name, default)
        if value not in (None, default) and value > settings.absolute_timeout:
            warn(
                f"{_CHECKS[name][0]} is {value:.0f} seconds, but SESSION_ABSOLUTE_TIMEOUT ends "
                f"every session after {settings.absolute_timeout:.0f}"
            )


def _split_plain(value: Any) -> tuple[Any, bool]:
    if isinstance(value, (list, tuple)) and len(value) > 1 and value[-1] == PLAIN:
        return value[:-1], True
    return value, False


def _check_secret_keys(keys: tuple[object, object]) -> tuple[str | bytes, ...]:
    """Refuse keys that can't sign. There may be no key yet."""
    current, fallbacks = keys
    if fallbacks is not None and not isinstance(fallbacks, (list, tuple)):
        raise SettingError(
            f"SECRET_KEY_FALLBACKS is {_type_of(fallbacks)}; allowed: a list of keys"
        )
    named = [("SECRET_KEY", current)]
    named += [("A key of SECRET_KEY_FALLBACKS", key) for key in fallbacks or ()]
    for what, key in named:
        if key is not None and not isinstance(key, (str, bytes)):
            raise SettingError(f"{what} is {_type_of(key)}; allowed: text, or bytes")
        if isinstance(key, str) and not is_valid_text(key):
            raise SettingError(f"{what} contains lone surrogates: use bytes instead")
    return (current, *filter(None, fallbacks or ()))


def _check_cookie(cookie: tuple[Any, ...]) -> dict[str, Any]:
    """The attributes of a cookie, from a tuple of its name and the values of ``_ATTRIBUTES``.

    Refuses invalid values, and combinations that browsers don't accept.
    """
    name, attributes = cookie[0], dict(zip(_ATTRIBUTES, cookie[1:], strict=True))
    for attribute in ("secure", "httponly", "partitioned"):
        value = attributes[attribute]
        if type(value) is not bool:
            raise SettingError(
                f"SESSION_COOKIE_{attribute.upper()} is {value!r}; allowed: True or False"
            )
    domain, path = attributes["domain"], attributes["path"]
    if domain and (type(domain) is not str or not set(domain).isdisjoint(_NO_DOMAIN)):
        raise SettingError(
            f"SESSION_COOKIE_DOMAIN is {domain!r}; allowed: a name such as 'example.com', or None"
        )
    if type(path) is not str or not path.startswith("/"):
        raise SettingError(
            f"SESSION_COOKIE_PATH is {path!r}; allowed: a path such as '/shop', or None"
        )
    samesite = attributes["samesite"]
    policy = "" if samesite is None else str(samesite).lower()
    if policy not in ("", "strict", "lax", "none") or samesite == "":
        raise SettingError(
            f"SESSION_COOKIE_SAMESITE is {samesite!r}; allowed: 'Strict', 'Lax', 'None' or None"
        )
    secure, lower = attributes["secure"], name.lower()
    if lower.startswith(_PREFIXES) and not secure:
        raise SettingError(f"The cookie name {name} needs SESSION_COOKIE_SECURE = True")
    if lower.startswith(("__http-", "__host-http-")) and not attributes["httponly"]:
        raise SettingError(f"The cookie name {name} needs SESSION_COOKIE_HTTPONLY = True")
    if lower.startswith("__host-") and (domain or path != "/"):
        raise SettingError(
            f"The cookie name {name} requires no SESSION_COOKIE_DOMAIN and the path '/' "
            "(SESSION_COOKIE_PATH, APPLICATION_ROOT)"
        )
    return attributes


def _is_dropped(attributes: Mapping[str, Any]) -> bool:
    """Whether browsers drop a cookie with these attributes."""
    elsewhere = str(attributes["samesite"]).lower() == "none" and attributes["samesite"] is not None
    return not attributes["secure"] and (elsewhere or attributes["partitioned"])


def _with_imports(
    app: Flask, settings: Settings, given: Mapping[str, Any], keywords: Mapping[str, Any]
) -> Settings:
    """The settings, adapted to Flask-Session's settings and to ``SESSION_IMPORT``.

    ``given``: the settings in the configuration or in ``keywords``.
    """
    old = read_flask_session_settings(app.config)
    changes: dict[str, Any] = {"flask_session": old}
    if settings.store is None:
        if old is None:
            _refuse_places(app)
        else:
            changes |= {"store": old.store(), "store_follows": True}
    by_hand = "imports" in given
    if old is not None:
        changes.setdefault("permanent", given.get("permanent", old.permanent))
        if "idle_timeout" not in given:
            changes["idle_timeout"] = settings.permanent_lifetime
        if not by_hand and old.is_readable:
            changes["imports"] = ("flask-session",)
        elif not by_hand:
            warn(
                f"SESSION_TYPE is {old.type!r}; its sessions can't be taken over, so users have to "
                "log in again. Remove Flask-Session's settings to stop this warning"
            )
    settings = replace(settings, **changes)
    if "flask-session" in settings.imports and (old is None or not old.is_readable):
        raise SettingError(
            'SESSION_IMPORT names "flask-session", but SESSION_TYPE is not set to a type that can '
            f"be read; allowed: {', '.join(READABLE)}, with Flask-Session's other settings"
        )
    if not settings.imports:
        return settings
    _check_end(settings, by_hand)
    return replace(settings, **_cookies(app, settings, keywords))


def _check_end(settings: Settings, by_hand: bool) -> None:
    """Refuse or report an import without an end, or after its end."""
    until = settings.import_until
    if until is None and by_hand:
        raise SettingError(
            "SESSION_IMPORT is set without SESSION_IMPORT_UNTIL; allowed: a date such as "
            "date(2027, 3, 31) or '2027-03-31', when the import ends"
        )
    if until is None:
        warn(
            "SESSION_TYPE is set, so old sessions of Flask-Session are taken over, without an end: "
            "set SESSION_IMPORT_UNTIL to a date, or SESSION_IMPORT to [] to take over none"
        )
    elif until <= time.time():
        warn(
            "SESSION_IMPORT_UNTIL has passed: old sessions are no longer taken over. Remove "
            "SESSION_IMPORT, SESSION_IMPORT_UNTIL and Flask-Session's settings, and set "
            f"SESSION_COOKIE_NAME to {settings.cookie_name + COOKIE_SUFFIX!r} unless it has a name "
            "of its own already"
        )


def _cookies(app: Flask, settings: Settings, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Two names: old and new workers must not overwrite each other's cookies."""
    configured = str(app.config["SESSION_COOKIE_NAME"])
    old, new = settings.import_cookie_name or configured, settings.cookie_name
    suffix = ""
    if settings.import_cookie_name is None and "cookie_name" not in keywords:
        suffix = COOKIE_SUFFIX
        new = configured + suffix
    if old == new:
        raise SettingError(
            f"SESSION_IMPORT needs two cookies, but the old one and the new one are both called "
            f"{new!r}: old workers would overwrite the new one. Give another name as cookie_name, "
            "or set SESSION_IMPORT_COOKIE_NAME to the old one"
        )
    return {"cookie_name": new, "cookie_suffix": suffix, "import_cookie_name": old}


def _refuse_places(app: Flask) -> None:
    """Refuse to fall back to a file if Flask-Session's settings name a store."""
    for key, place in _PLACES.items():
        if app.config.get(key) is not None:
            raise SettingError(
                f"{key} is a Flask-Session setting without effect unless SESSION_TYPE is set, and "
                "SESSION_STORE is not set: sessions would be in a file on this machine. Set "
                f"SESSION_STORE to {place}"
            )


def _warn_unknown(app: Flask, settings: Settings) -> None:
    known = {key for key, _ in _CHECKS.values()} | _FLASKS_OWN | _OTHER_EXTENSIONS
    foreign = _FLASK_SESSIONS if settings.flask_session else _FLASK_SESSIONS | _OF_AN_IMPORT
    if settings.flask_session:
        known |= _OF_AN_IMPORT.keys()
    for key in app.config:
        if not key.startswith(("SESSION_", "PERMANENT_SESSION_")) or key in known:
            continue
        if key in foreign:
            hint = f"; it is a Flask-Session setting, here use {foreign[key]}"
        else:
            # Compare without the common prefix, which would make all of them similar.
            hint = _did_you_mean(key, known, key.partition("SESSION_")[0] + "SESSION_", 0.73)
        if hint:
            warn(f"Unknown setting {key}{hint}")


def _did_you_mean(name: str, known: Any, start: str = "", cutoff: float = 0.75) -> str:
    """A hint with the ``known`` names that are most similar to ``name`` after ``start``."""
    name = name.removeprefix(start)
    ends = [each.removeprefix(start) for each in known if each.startswith(start)]
    close = difflib.get_close_matches(name, ends, n=3, cutoff=cutoff)
    likeness = [difflib.SequenceMatcher(None, key, name).ratio() for key in close]
    closest = [key for key, ratio in zip(close, likeness, strict=True) if ratio == likeness[0]]
    names = " or ".join(start + key for key in sorted(closest))
    return f"; did you mean {names}?" if names else ""


class Live(Generic[T]):
    """One of Flask's own settings, which may change while the application runs.

    A new value is checked. A wrong value is logged once as an error, and the last valid value
    stays in force, so that no session breaks.
    """

    __slots__ = ("_check", "_known")

    def __init__(self, check: Callable[[Any], T], given: object, value: T) -> None:
        self._check = check
        self._known = (given, value)

    def of(self, given: object) -> T:
        """The checked value of ``given``, or the last valid value."""
        seen, value = self._known
        if given is seen or given == seen:
            return value
        try:
            value = self._check(given)
        except SettingError as error:
            logger.error("%s. The previous value stays in force.", error)
        self._known = (given, value)
        return value


_ATTRIBUTES = ("domain", "path", "secure", "httponly", "samesite", "partitioned")


def cookie_attributes(app: Flask) -> Iterator[Any]:
    """The cookie's attributes in the configuration, in the order of ``_ATTRIBUTES``."""
    for attribute in _ATTRIBUTES:
        value = app.config[f"SESSION_COOKIE_{attribute.upper()}"]
        yield value or app.config["APPLICATION_ROOT"] or "/" if attribute == "path" else value


class LiveSettings:
    """Flask's own settings that a ``Session`` reads on each request: see ``Live``.

    ``given``: the keywords of the ``Session``, which override later changes of the settings.
    ``is_taken``: whether another ``Session`` of the application has a cookie of this name.
    """

    def __init__(
        self,
        app: Flask,
        settings: Settings,
        given: Collection[str],
        is_taken: Callable[[str], bool],
    ) -> None:
        self._app = app
        self._is_taken = is_taken
        self._name_given = "cookie_name" in given
        self._lifetime_given = "permanent_lifetime" in given
        self._settings = settings
        name, lifetime = settings.cookie_name, settings.permanent_lifetime
        cookie = (name, *cookie_attributes(app))
        keys = _keys_at_start(app)
        self._name = Live(self._check_name, name, name)
        self._lifetime = Live(partial(_check, "permanent_lifetime"), lifetime, lifetime)
        self._cookie = Live(self._check_cookie, cookie, _check_cookie(cookie))
        self._keys = Live(_check_secret_keys, keys, _check_secret_keys(keys))

    def cookie_name(self) -> str:
        """``SESSION_COOKIE_NAME``."""
        if self._name_given:
            return self._settings.cookie_name
        name = self._app.config["SESSION_COOKIE_NAME"]
        if self._settings.cookie_suffix and isinstance(name, str):
            name += self._settings.cookie_suffix
        return self._name.of(name)

    def permanent_lifetime(self) -> float:
        """``app.permanent_session_lifetime`` in seconds."""
        if self._lifetime_given:
            return self._settings.permanent_lifetime
        return self._lifetime.of(_given_lifetime(self._app))

    def cookie(self, name: str, interface: SessionInterface) -> dict[str, Any]:
        """The attributes of the cookie, from the interface's getters."""
        app = self._app
        return self._cookie.of(
            (
                name,
                interface.get_cookie_domain(app),
                interface.get_cookie_path(app) or "/",
                interface.get_cookie_secure(app),
                interface.get_cookie_httponly(app),
                interface.get_cookie_samesite(app),
                interface.get_cookie_partitioned(app),
            )
        )

    def configured_cookie(self) -> dict[str, Any]:
        """The attributes of the cookie in the configuration, by name."""
        return dict(zip(_ATTRIBUTES, cookie_attributes(self._app), strict=True))

    def secret_keys(self) -> tuple[str | bytes, ...]:
        """As the function ``secret_keys``."""
        return self._keys.of(given_keys(self._app))

    def _check_cookie(self, cookie: tuple[Any, ...]) -> dict[str, Any]:
        attributes = _check_cookie(cookie)
        if _is_dropped(attributes):
            logger.warning("%s", _DROPPED)
        return attributes

    def _check_name(self, name: object) -> str:
        checked: str = _check("cookie_name", name)
        if self._is_taken(checked):
            raise SettingError(
                f"SESSION_COOKIE_NAME is {checked!r}, but another Session of the application has "
                "that cookie: use another name"
            )
        _check_cookie((checked, *cookie_attributes(self._app)))
        return checked


def _given_lifetime(app: Flask) -> object:
    """Read the attribute, as Flask does, since a subclass may override it."""
    try:
        return app.permanent_session_lifetime
    except Exception as error:
        if _has_own_lifetime(app):
            return f"not readable ({type(error).__name__})"
        return app.config["PERMANENT_SESSION_LIFETIME"]


def given_keys(app: Flask) -> tuple[object, object]:
    """Read the attribute ``secret_key``, as Flask does, since a subclass may define it."""
    fallbacks = app.config.get("SECRET_KEY_FALLBACKS")
    return app.secret_key, tuple(fallbacks) if isinstance(fallbacks, list) else fallbacks


def _keys_at_start(app: Flask) -> tuple[object, object]:
    """As ``given_keys``. A property may need a request; each request reads it again."""
    try:
        return given_keys(app)
    except Exception:
        return None, None


def secret_keys(app: Flask) -> tuple[str | bytes, ...]:
    """The keys that sign tokens, the current one first, then ``SECRET_KEY_FALLBACKS``.

    The first may be None. Raises ``SettingError``.
    """
    return _check_secret_keys(given_keys(app))


def warn_without_secret_key(app: Flask) -> None:
    """Warn about a missing key. You may set it until the first request."""
    try:
        missing = not app.secret_key
    except Exception:  # see ``_keys_at_start``
        return
    if missing:
        logger.warning(
            "The application %r has no SECRET_KEY yet. Until it has one, its sessions are empty "
            "and read-only. Set it to secrets.token_urlsafe(32) before the first request, and "
            "keep it out of the source code.",
            app.name,
        )


def _check_remember(app: Flask, settings: Settings) -> None:
    """Say so where remember-me cookies outlive sessions, or are converted for nobody."""
    if settings.remember == "session":
        if importlib.util.find_spec("flask_login") is None:
            raise SettingError(
                "SESSION_REMEMBER is 'session', but Flask-Login is not installed; without it, set "
                "session.permanent = True at the sign-in"
            )
        if settings.remember_until is not None and settings.remember_until <= time.time():
            warn("SESSION_REMEMBER_UNTIL is over: no remember-me cookie is converted. Remove it")
        return
    if settings.remember_until is not None:
        raise SettingError(
            "SESSION_REMEMBER_UNTIL is set without SESSION_REMEMBER = 'session': Flask-Login's "
            "remember-me cookies stay in use, and none is converted"
        )
    if app.extensions.get("gsession"):  # Flask-Login uses the session of the first one
        return
    if "REMEMBER_COOKIE_DURATION" in app.config or hasattr(app, "login_manager"):
        text = remember_warning(app, settings)
        if text is not None:
            warn(text)


def remember_warning(app: Flask, settings: Settings) -> str | None:
    """What is wrong with the duration of Flask-Login's remember-me cookie; None if nothing is."""
    duration = app.config.get("REMEMBER_COOKIE_DURATION", timedelta(days=365))
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if not isinstance(seconds, (int, float)) or seconds <= settings.absolute_timeout:
        return None
    return (
        f"REMEMBER_COOKIE_DURATION is {seconds / _DAY:g} days, longer than "
        f"SESSION_ABSOLUTE_TIMEOUT ({settings.absolute_timeout / _DAY:g} days): the cookie of "
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
