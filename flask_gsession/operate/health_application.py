"""The application checks of ``flask gsession doctor``: secret keys, mode, cookie and timeouts.

Impossible settings, such as a ``__Host-`` cookie with a domain, are refused by ``init_app``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from flask import Flask
from flask.sessions import SessionInterface

from ..config import Settings, secret_keys
from ..stores.parts import Edge, Finding

_SHORT_SECRET = 16  # characters
_FEW_BITS = 64
_PLACEHOLDERS = ("change me", "changeme", "secret key", "secretkey", "your secret", "password")
_MAKE_ONE = "Anyone who guesses it can sign tokens: use secrets.token_urlsafe(32)."

_DAY = 86_400
# Re-authentication in OWASP ASVS 4.0.3, V3.3.2; 5.0 (V7.3) gives no figures.
_LEVELS = (  # level, idle and absolute timeout in seconds
    (3, 15 * 60, _DAY / 2),
    (2, 30 * 60, _DAY / 2),
    (1, math.inf, 30 * _DAY),
)


def check_application(
    app: Flask, interface: SessionInterface, settings: Settings, lifetime: float
) -> list[Finding]:
    """Check the application's secret keys, mode, store, cookie and timeouts.

    ``lifetime``: of permanent sessions, in seconds.
    """
    return [
        *_keys(app),
        *_mode(app, settings),
        *_place(app, settings),
        *_cookie(app, interface),
        _timeouts(settings, lifetime),
    ]


def check_offline_for(edge: Edge, settings: Settings) -> Finding:
    """Compare how long an edge may work offline with the idle timeout at its centre."""
    found = f"{edge.offline_for:g} s, and SESSION_IDLE_TIMEOUT is {settings.idle_timeout:g} s"
    if edge.offline_for <= settings.idle_timeout / 2:
        return Finding("ok", "edge: offline_for", found)
    return Finding(
        "warning",
        "edge: offline_for",
        found,
        "Sessions in use at the edge can expire first at the centre, which loses their changes: "
        "keep it below half of that.",
    )


def _keys(app: Flask) -> Iterator[Finding]:
    current, *older = secret_keys(app)
    if not current:
        yield Finding(
            "error", "SECRET_KEY", "not set", "Sessions need a key: use secrets.token_urlsafe(32)."
        )
        return
    for name, key in (("SECRET_KEY", current), *(("SECRET_KEY_FALLBACKS", old) for old in older)):
        weakness = _weakness(key)
        if weakness:
            yield Finding("error", name, weakness, _MAKE_ONE)


def _weakness(key: str | bytes) -> str:
    """Why the key can be guessed, without showing any of it."""
    text = key if isinstance(key, str) else key.decode("latin-1")
    if len(text) < _SHORT_SECRET:
        return f"{len(text)} characters"
    if any(word in text.lower().replace("-", " ").replace("_", " ") for word in _PLACEHOLDERS):
        return "a placeholder"
    shares = [count / len(text) for count in Counter(text).values()]
    if -sum(share * math.log2(share) for share in shares) * len(text) < _FEW_BITS:
        return "repeats itself"
    return ""


def _mode(app: Flask, settings: Settings) -> Iterator[Finding]:
    if app.debug:
        yield Finding("warning", "debug", "on", "Never in production: it runs code for visitors.")
    elif settings.debug:
        yield Finding(
            "warning",
            "SESSION_DEBUG",
            "on, without debug mode",
            "It logs more about each request than production logs should: set it to False.",
        )
    if app.testing:
        yield Finding(
            "warning", "TESTING", "on", "Never in production: errors bypass the error pages."
        )


def _place(app: Flask, settings: Settings) -> Iterator[Finding]:
    if settings.store is None and not app.debug and not app.testing:
        yield Finding(
            "warning",
            "SESSION_STORE",
            "not set: sessions are in a file in the instance folder",
            "A second machine or a new container starts with an empty file: use a server, or set "
            "sqlite:////path/to/a/file if you want a file.",
        )


def _cookie(app: Flask, interface: SessionInterface) -> Iterator[Finding]:
    name = interface.get_cookie_name(app)
    domain, path = interface.get_cookie_domain(app), interface.get_cookie_path(app)
    samesite = interface.get_cookie_samesite(app)
    prefix = "__Secure-" if domain or path != "/" else "__Host-"
    attributes = {
        name: True,
        "Secure": interface.get_cookie_secure(app),
        "HttpOnly": interface.get_cookie_httponly(app),
        f"SameSite={samesite}": samesite,
        "Partitioned": interface.get_cookie_partitioned(app),
        f"Domain={domain}": domain,
        f"Path={path}": True,
    }
    yield Finding("ok", "cookie", "; ".join(text for text, there in attributes.items() if there))
    if not interface.get_cookie_secure(app):
        yield Finding(
            "warning",
            "SESSION_COOKIE_SECURE",
            "off",
            "Browsers send the cookie over plain HTTP too: set it to True if the site has HTTPS.",
        )
    elif not name.lower().startswith(("__host-", "__secure-")):
        yield Finding(
            "warning",
            "cookie prefix",
            "none",
            "A sibling domain or a page without TLS can set a cookie of this name: rename it to "
            f"{prefix}{name} (OWASP ASVS 5.0, V3.3.1).",
        )
    if not interface.get_cookie_httponly(app):
        yield Finding(
            "error", "SESSION_COOKIE_HTTPONLY", "off", "Scripts can read the token: set it to True."
        )
    if str(samesite).lower() not in ("lax", "strict"):
        yield Finding(
            "warning",
            "SESSION_COOKIE_SAMESITE",
            str(samesite),
            'Other sites can send requests with the cookie: "Lax" prevents most.',
        )
    if domain:
        yield Finding(
            "warning",
            "SESSION_COOKIE_DOMAIN",
            domain,
            "Every subdomain gets the token: remove the setting if one host is enough.",
        )


def _timeouts(settings: Settings, lifetime: float) -> Finding:
    idle = max(settings.idle_timeout, lifetime)
    absolute = settings.absolute_timeout
    found = (
        f"idle {_span(settings.idle_timeout)}, if permanent {_span(lifetime)}, "
        f"absolute {_span(absolute)}"
    )
    for level, most_idle, most in _LEVELS:
        if min(idle, absolute) <= most_idle and absolute <= most:
            return Finding("ok", "timeouts", f"{found}: level {level} of OWASP ASVS 4.0.3, V3.3.2")
    return Finding(
        "warning",
        "timeouts",
        found,
        "OWASP ASVS 4.0.3, V3.3.2 requires a new login after 30 days (level 1), after 12 hours or "
        "30 idle minutes (2), after 12 hours or 15 idle minutes (3); 5.0, V7.3 requires a "
        "documented decision. See SESSION_ABSOLUTE_TIMEOUT and SESSION_IDLE_TIMEOUT.",
    )


def _span(seconds: float) -> str:
    for unit, length in (("d", _DAY), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.4g} {unit}"
    return f"{seconds:.4g} s"
