"""Flask's own settings, read on each request: the cookie, the keys, the lifetime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

from flask import Flask
from flask.sessions import SessionInterface

from ..errors import SettingError
from ..events import logger
from ..values.codec import is_valid_text
from .checks import NOT_IN_A_DOMAIN, check_setting, type_of
from .settings import Settings

T = TypeVar("T")

DROPPED = (
    "Browsers drop a SameSite=None or Partitioned session cookie without "
    "SESSION_COOKIE_SECURE = True"
)
_PREFIXES = ("__host-", "__secure-", "__http-")  # RFC 6265bis


def set_secret_keys(app: Flask, current: str | bytes, older: Iterable[str | bytes]) -> None:
    """Replace the secret keys of ``app``."""
    app.secret_key = current
    app.config["SECRET_KEY_FALLBACKS"] = list(older)


def has_own_lifetime(app: Flask) -> bool:
    """Whether a subclass of Flask overrides ``permanent_session_lifetime``."""
    kinds: tuple[Any, Any] = type(app), Flask
    own, flasks = (kind.permanent_session_lifetime for kind in kinds)
    return own is not flasks


def check_secret_keys(keys: tuple[object, object]) -> tuple[str | bytes, ...]:
    """Return the keys; refuse those that can't sign. The current key may still be missing."""
    current, fallbacks = keys
    if fallbacks is not None and not isinstance(fallbacks, (list, tuple)):
        raise SettingError(f"SECRET_KEY_FALLBACKS is {type_of(fallbacks)}; allowed: a list of keys")
    named = [("SECRET_KEY", current)]
    named += [("A key of SECRET_KEY_FALLBACKS", key) for key in fallbacks or ()]
    for what, key in named:
        if key is not None and not isinstance(key, (str, bytes)):
            raise SettingError(f"{what} is {type_of(key)}; allowed: text, or bytes")
        if isinstance(key, str) and not is_valid_text(key):
            raise SettingError(f"{what} contains lone surrogates: use bytes instead")
    return (current, *filter(None, fallbacks or ()))


def check_cookie(cookie: tuple[Any, ...]) -> dict[str, Any]:
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
    if domain and (type(domain) is not str or not set(domain).isdisjoint(NOT_IN_A_DOMAIN)):
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


def is_dropped(attributes: Mapping[str, Any]) -> bool:
    """Whether browsers drop a cookie with these attributes."""
    elsewhere = str(attributes["samesite"]).lower() == "none" and attributes["samesite"] is not None
    return not attributes["secure"] and (elsewhere or attributes["partitioned"])


class LiveSetting(Generic[T]):
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
    """Flask's own settings that a ``Session`` reads on each request: see ``LiveSetting``.

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
        keys = keys_at_start(app)
        self._name = LiveSetting(self._check_name, name, name)
        check_lifetime = partial(check_setting, "permanent_lifetime")
        self._lifetime = LiveSetting(check_lifetime, lifetime, lifetime)
        self._cookie = LiveSetting(self._check_cookie, cookie, check_cookie(cookie))
        self._keys = LiveSetting(check_secret_keys, keys, check_secret_keys(keys))
        self.own_key = has_own_key(app)

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

    def secret_key(self) -> object:
        """``app.secret_key``, unchecked."""
        app = self._app
        return app.secret_key if self.own_key else app.config["SECRET_KEY"]

    def secret_keys(self) -> tuple[str | bytes, ...]:
        """Like the function ``secret_keys``."""
        return self._keys.of(given_keys(self._app))

    def _check_cookie(self, cookie: tuple[Any, ...]) -> dict[str, Any]:
        attributes = check_cookie(cookie)
        if is_dropped(attributes):
            logger.warning("%s", DROPPED)
        return attributes

    def _check_name(self, name: object) -> str:
        checked: str = check_setting("cookie_name", name)
        if self._is_taken(checked):
            raise SettingError(
                f"SESSION_COOKIE_NAME is {checked!r}, but another Session of the application has "
                "that cookie: use another name"
            )
        check_cookie((checked, *cookie_attributes(self._app)))
        return checked


def _given_lifetime(app: Flask) -> object:
    """Read the attribute, as Flask does, since a subclass may override it."""
    try:
        return app.permanent_session_lifetime
    except Exception as error:
        if has_own_lifetime(app):
            return f"not readable ({type(error).__name__})"
        return app.config["PERMANENT_SESSION_LIFETIME"]


def has_own_key(app: Flask) -> bool:
    """Whether a subclass of Flask overrides ``secret_key``."""
    kinds: tuple[Any, Any] = type(app), Flask
    own, flasks = (kind.secret_key for kind in kinds)
    return own is not flasks


def token_settings(app: Flask, own_key: bool = True) -> tuple[object, object, object]:
    """The settings that a token depends on: both settings of secret keys, and the cookie's name.

    ``own_key``: read the attribute ``secret_key``, as Flask does, since a subclass may define it.
    The attribute is slow to read.
    """
    config = app.config
    keys = config.get("SECRET_KEY_FALLBACKS")
    older = tuple(keys) if isinstance(keys, list) else keys
    key = app.secret_key if own_key else config["SECRET_KEY"]
    return key, older, config["SESSION_COOKIE_NAME"]


def given_keys(app: Flask) -> tuple[object, object]:
    """The current values of both settings of secret keys."""
    return token_settings(app)[:2]


def keys_at_start(app: Flask) -> tuple[object, object]:
    """Like ``given_keys``, but ``(None, None)`` if the application's property needs a request."""
    try:
        return given_keys(app)
    except Exception:
        return None, None


def secret_keys(app: Flask) -> tuple[str | bytes, ...]:
    """The keys that sign tokens, the current one first, then ``SECRET_KEY_FALLBACKS``.

    The first may be None. Raises ``SettingError``.
    """
    return check_secret_keys(given_keys(app))


def warn_without_secret_key(app: Flask) -> None:
    """Warn about a missing key, which you can still set until the first request."""
    try:
        missing = not app.secret_key
    except Exception:  # see ``keys_at_start``
        return
    if missing:
        logger.warning(
            "The application %r has no SECRET_KEY yet. Until it has one, its sessions are empty "
            "and read-only. Set it to secrets.token_urlsafe(32) before the first request, and "
            "keep it out of the source code.",
            app.name,
        )
