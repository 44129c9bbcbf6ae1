"""The settings: every key, its default and its check, once; the only reader of ``app.config``."""

from __future__ import annotations

import base64
import difflib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Literal, TypedDict

from flask import Flask

from .codec import is_valid_text
from .errors import SettingError
from .merge import POLICIES, MergeFunction, last, reject
from .tokens import TokenFactory

#: Read payloads written before encryption was turned on: the last of SESSION_ENCRYPTION_KEYS.
PLAIN = "plain"

_MAX_BYTES_LIMIT = 15 * 1024 * 1024  # a MongoDB document ends at 16 MiB


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
    rotation_grace: float = 10.0
    store_timeout: float = 1.0
    pool_max: int = 100
    breaker_failures: int = 5
    breaker_pause: float = 1.0
    logout_replicas: int = 0
    on_store_error: str = "fail"
    max_bytes: int = 1024 * 1024
    max_keys: int = 1000
    max_depth: int = 64
    spill_bytes: int | None = 16 * 1024
    spill_store: object = None
    max_value_bytes: int = 32 * 1024 * 1024
    encryption_keys: tuple[bytes, ...] = ()
    read_plain: bool = False
    conflict: MergeFunction = last
    merge_policies: Mapping[str, MergeFunction] = field(default_factory=dict)
    lock_timeout: float = 10.0
    lock_wait: float = 5.0
    lock_waiters: int = 10
    lock_warn: float | None = 1.0
    schema: object = None
    debug: bool = False
    debug_show: Collection[str] = ()

    def __repr__(self) -> str:
        """Never shows the stores' URLs or the encryption keys."""
        hidden = {"store", "spill_store", "encryption_keys"}
        names = [f.name for f in fields(self) if f.name not in hidden]
        return f"Settings({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def renew_interval_for(self, idle: float) -> float:
        """How long a session with this idle timeout may go without a renewal."""
        if self.renew_interval is None:
            return min(60.0, idle / 20)
        return min(self.renew_interval, idle)


Seconds = float | timedelta


class SettingKeywords(TypedDict, total=False):
    """What ``Session`` takes as keywords, for editors and type checkers."""

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
    rotation_grace: Seconds
    store_timeout: Seconds
    pool_max: int
    breaker_failures: int
    breaker_pause: Seconds
    logout_replicas: int
    on_store_error: Literal["fail", "keep-response"]
    max_bytes: int
    max_keys: int
    max_depth: int
    spill_bytes: int | None
    spill_store: object
    max_value_bytes: int
    encryption_keys: str | bytes | Sequence[str | bytes] | None
    conflict: Literal["last", "reject"]
    merge_policies: Mapping[str, str | MergeFunction]
    lock_timeout: Seconds
    lock_wait: Seconds
    lock_waiters: int
    lock_warn: Seconds | None
    schema: object
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


def _callable(value: Any) -> Any:
    if not callable(value):
        raise ValueError("a function that takes nothing and returns a new token")
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


def _on_store_error(value: Any) -> str:
    if value not in ("fail", "keep-response"):
        raise ValueError('"fail" or "keep-response"')
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
        f"base64url text as secrets.token_urlsafe(32) gives it (not shown; given: {given})"
    )


def _encryption_keys(value: Any) -> tuple[bytes, ...]:
    if isinstance(value, (str, bytes)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError("a key, or a list of keys, the current one first")
    return tuple(_encryption_key(key) for key in value)


#: Checks of the times of a lock; they raise ``ValueError`` with what is allowed.
lock_timeout = _seconds(0.1, 3600)
lock_wait = _seconds(0, 3600)

_FLASKS_LIFETIME = 31 * 86400.0
_PATTERN = set("{}*?[]")
_NO_DOMAIN = {*" ,;=/\\", *map(chr, range(32)), "\x7f"}
_DAY = 86400.0
_FOREVER = 10 * 366 * _DAY

# field of Settings -> (key in app.config, check). A check raises ValueError with what is allowed.
_CHECKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "store": ("SESSION_STORE", lambda value: value),
    "cookie_name": (
        "SESSION_COOKIE_NAME",
        _text(lambda v: 0 < len(v) <= 200 and _token_text(v), "a cookie name (RFC 6265 token)"),
    ),
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
        _optional(_text(lambda v: 0 < len(v) <= 100 and _token_text(v), "a header name")),
    ),
    "idle_timeout": ("SESSION_IDLE_TIMEOUT", _seconds(1, _FOREVER)),
    "absolute_timeout": ("SESSION_ABSOLUTE_TIMEOUT", _seconds(1, _FOREVER)),
    "permanent_lifetime": ("PERMANENT_SESSION_LIFETIME", _seconds(1, _FOREVER)),
    "renew_interval": ("SESSION_RENEW_INTERVAL", _optional(_seconds(0, _DAY))),
    "rotation_grace": ("SESSION_ROTATION_GRACE", _seconds(0, 3600)),
    "store_timeout": ("SESSION_STORE_TIMEOUT", _seconds(0.01, 60)),
    "pool_max": ("SESSION_POOL_MAX", _integer(1, 10_000, "connections")),
    "breaker_failures": ("SESSION_BREAKER_FAILURES", _integer(0, 10_000, "failures")),
    "breaker_pause": ("SESSION_BREAKER_PAUSE", _seconds(0.01, 60)),
    "logout_replicas": ("SESSION_LOGOUT_REPLICAS", _integer(0, 100, "replicas")),
    "on_store_error": ("SESSION_ON_STORE_ERROR", _on_store_error),
    "max_bytes": ("SESSION_MAX_BYTES", _integer(256, _MAX_BYTES_LIMIT, "bytes")),
    "max_keys": ("SESSION_MAX_KEYS", _integer(1, 1_000_000, "keys")),
    "max_depth": ("SESSION_MAX_DEPTH", _integer(1, 200, "levels")),
    "spill_bytes": ("SESSION_SPILL_BYTES", _optional(_integer(256, _MAX_BYTES_LIMIT, "bytes"))),
    "spill_store": ("SESSION_SPILL_STORE", lambda value: value),
    "max_value_bytes": ("SESSION_MAX_VALUE_BYTES", _integer(256, 256 * 1024 * 1024, "bytes")),
    "encryption_keys": ("SESSION_ENCRYPTION_KEYS", _encryption_keys),
    "conflict": ("SESSION_CONFLICT", _conflict),
    "merge_policies": ("SESSION_MERGE_POLICIES", _policies),
    "lock_timeout": ("SESSION_LOCK_TIMEOUT", lock_timeout),
    "lock_wait": ("SESSION_LOCK_WAIT", lock_wait),
    "lock_waiters": ("SESSION_LOCK_WAITERS", _integer(0, 10_000, "waiting requests")),
    "lock_warn": ("SESSION_LOCK_WARN", _optional(_seconds(0, 3600))),
    "schema": ("SESSION_SCHEMA", lambda value: value),
    "debug": ("SESSION_DEBUG", _flag),
    "debug_show": ("SESSION_DEBUG_SHOW", _names),
}
_SECRET = {"SESSION_STORE", "SESSION_SPILL_STORE", "SESSION_ENCRYPTION_KEYS"}

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
_FLASK_SESSIONS = {
    "SESSION_TYPE": "SESSION_STORE",
    "SESSION_REDIS": "SESSION_STORE",
    "SESSION_MONGODB": "SESSION_STORE",
    "SESSION_MONGODB_DB": "the database in the URL of SESSION_STORE",
    "SESSION_MONGODB_COLLECT": "SESSION_KEY_PREFIX, to share a store",
    "SESSION_MEMCACHED": "SESSION_STORE",
    "SESSION_SQLALCHEMY": "SESSION_STORE",
    "SESSION_SQLALCHEMY_TABLE": "SESSION_STORE",
    "SESSION_DYNAMODB": "SESSION_STORE",
    "SESSION_DYNAMODB_TABLE": "SESSION_STORE",
    "SESSION_CACHELIB": "SESSION_STORE",
    "SESSION_FILE_DIR": "SESSION_STORE",
    "SESSION_FILE_MODE": "nothing: files are readable for their owner only",
    "SESSION_FILE_THRESHOLD": "nothing: what is live is never removed",
    "SESSION_CLEANUP_N_REQUESTS": "CleanupWorker",
    "SESSION_PERMANENT": "session.permanent",
    "SESSION_USE_SIGNER": "nothing: tokens are always signed",
    "SESSION_SERIALIZATION_FORMAT": "nothing: values keep their types",
}


def read_settings(app: Flask, overrides: Mapping[str, Any]) -> Settings:
    """The settings of ``app``, with ``overrides`` (field names) before ``app.config``.

    Raises ``SettingError`` that names the key, the value (never of a secret one) and what is
    allowed. Warns about unknown ``SESSION_*`` keys that look like a known one or are
    Flask-Session's.
    """
    unknown = set(overrides) - set(_CHECKS)
    if unknown:
        name = min(unknown)
        hint = _did_you_mean(name.lower().removeprefix("session_"), _CHECKS)
        raise SettingError(f"Session() got an unknown setting {name!r}{hint}")
    values: dict[str, Any] = {"debug": app.debug}
    for name, (key, check) in _CHECKS.items():
        if name in overrides:
            value = overrides[name]
        elif key in app.config and not (name == "debug" and app.config[key] is None):
            value = app.config[key]
        else:
            continue
        if name == "encryption_keys":
            if value is None:
                continue
            value, values["read_plain"] = _split_plain(value)
        try:
            values[name] = check(value)
        except ValueError as error:
            shown = _type_of(value) if key in _SECRET else repr(value)[:80]
            raise SettingError(f"{key} is {shown}; allowed: {error}") from None
    settings = Settings(**values)
    _check_secret_keys(app)
    _warn_of_lifetimes(settings, values)
    _check_cookie(app, settings.cookie_name)
    _warn_unknown(app)
    return settings


def _type_of(secret: object) -> str:
    return f"of type {type(secret).__name__}"


def _warn_of_lifetimes(settings: Settings, given: Mapping[str, Any]) -> None:
    for name, default in (("idle_timeout", None), ("permanent_lifetime", _FLASKS_LIFETIME)):
        value = given.get(name, default)
        if value not in (None, default) and value > settings.absolute_timeout:
            warnings.warn(
                f"{_CHECKS[name][0]} is {value:.0f} seconds, but SESSION_ABSOLUTE_TIMEOUT ends "
                f"every session after {settings.absolute_timeout:.0f}",
                stacklevel=5,
            )


def _split_plain(value: Any) -> tuple[Any, bool]:
    if isinstance(value, (list, tuple)) and len(value) > 1 and value[-1] == PLAIN:
        return value[:-1], True
    return value, False


def _check_secret_keys(app: Flask) -> None:
    """Refuse keys that nothing could be signed with; there may be none yet."""
    fallbacks = app.config.get("SECRET_KEY_FALLBACKS")
    if fallbacks is not None and not isinstance(fallbacks, (list, tuple)):
        raise SettingError(
            f"SECRET_KEY_FALLBACKS is {_type_of(fallbacks)}; allowed: a list of keys"
        )
    keys = [("SECRET_KEY", app.config["SECRET_KEY"])]
    keys += [("A key of SECRET_KEY_FALLBACKS", key) for key in fallbacks or ()]
    for what, key in keys:
        if key is not None and not isinstance(key, (str, bytes)):
            raise SettingError(f"{what} is {_type_of(key)}; allowed: text, or bytes")
        if isinstance(key, str) and not is_valid_text(key):
            raise SettingError(f"{what} holds lone surrogates: it is no text; give it as bytes")


def _check_cookie(app: Flask, name: str) -> None:
    """Refuse cookie attributes that are none, or that browsers would not accept together."""
    config = app.config
    for key in ("SESSION_COOKIE_SECURE", "SESSION_COOKIE_HTTPONLY", "SESSION_COOKIE_PARTITIONED"):
        if type(config[key]) is not bool:
            raise SettingError(f"{key} is {config[key]!r}; allowed: True or False")
    domain, path = config["SESSION_COOKIE_DOMAIN"], config["SESSION_COOKIE_PATH"]
    if domain and (type(domain) is not str or not set(domain).isdisjoint(_NO_DOMAIN)):
        raise SettingError(
            f"SESSION_COOKIE_DOMAIN is {domain!r}; allowed: a name as 'example.com', or None"
        )
    if path and (type(path) is not str or not path.startswith("/")):
        raise SettingError(f"SESSION_COOKIE_PATH is {path!r}; allowed: a path as '/shop', or None")
    samesite = config["SESSION_COOKIE_SAMESITE"]
    policy = "" if samesite is None else str(samesite).lower()
    if policy not in ("", "strict", "lax", "none") or samesite == "":
        raise SettingError(
            f"SESSION_COOKIE_SAMESITE is {samesite!r}; allowed: 'Strict', 'Lax', 'None' or None"
        )
    secure = bool(config["SESSION_COOKIE_SECURE"])
    path = path or config["APPLICATION_ROOT"] or "/"
    if name.lower().startswith(("__host-", "__secure-")) and not secure:
        raise SettingError(f"The cookie name {name} needs SESSION_COOKIE_SECURE = True")
    if name.lower().startswith("__host-") and (config["SESSION_COOKIE_DOMAIN"] or path != "/"):
        raise SettingError(
            f"The cookie name {name} allows no SESSION_COOKIE_DOMAIN and only the path '/' "
            "(SESSION_COOKIE_PATH, APPLICATION_ROOT)"
        )
    if not secure and (policy == "none" or config["SESSION_COOKIE_PARTITIONED"]):
        warnings.warn(
            "Browsers drop a SameSite=None or Partitioned session cookie without "
            "SESSION_COOKIE_SECURE = True",
            stacklevel=5,
        )


def _warn_unknown(app: Flask) -> None:
    known = {key for key, _ in _CHECKS.values()} | _FLASKS_OWN
    for key in app.config:
        if not key.startswith(("SESSION_", "PERMANENT_SESSION_")) or key in known:
            continue
        if key in _FLASK_SESSIONS:
            hint = f"; it is a Flask-Session setting, here use {_FLASK_SESSIONS[key]}"
        else:
            hint = _did_you_mean(key, known)
        if hint:
            warnings.warn(f"Unknown setting {key}{hint}", stacklevel=5)


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.75)
    likeness = [difflib.SequenceMatcher(None, key, name).ratio() for key in close]
    closest = [key for key, ratio in zip(close, likeness, strict=True) if ratio == likeness[0]]
    return f"; did you mean {' or '.join(sorted(closest))}?" if closest else ""


def secret_keys(app: Flask) -> tuple[str | bytes, ...]:
    """The keys that sign tokens, the current one first, then ``SECRET_KEY_FALLBACKS``."""
    current, fallbacks = app.config["SECRET_KEY"], app.config.get("SECRET_KEY_FALLBACKS")
    return (current, *filter(None, fallbacks)) if fallbacks else (current,)


def propagates_exceptions(app: Flask) -> bool:
    """Whether Flask lets errors through to the server or the test client, by its own rule."""
    propagate = app.config["PROPAGATE_EXCEPTIONS"]
    return bool(app.testing or app.debug) if propagate is None else bool(propagate)
