"""Wrong passwords are limited: for each account, and for each network.

It takes the extra `limits`. Without it the shop works, and says at its start that it has no limits.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, request

from flask_gsession import session

try:
    from flask_gsession.contrib.ratelimit import SessionLimits, session_limit
except ImportError:
    SessionLimits = None  # type: ignore[assignment, misc]

WRONG_PASSWORD = 401  # the status that counts

View = Callable[..., Any]


def limit_sign_in(view: View) -> View:
    """Limit the wrong passwords that `view` answers with `WRONG_PASSWORD`."""
    if SessionLimits is None:
        return view
    return session_limit(
        "10/hour",  # for one account, from everywhere
        key=_account,
        network="100/hour",  # from one network, for all accounts
        deduct_when=lambda response: response.status_code == WRONG_PASSWORD,
    )(view)


def _account() -> str:
    """The account of the password: the name in the sign-in form, or else the visitor."""
    if request.endpoint == "account.check":
        return request.form.get("name", "").strip().lower()
    return str(session.get("user", ""))


def start(app: Flask) -> None:
    """Count where the sessions are, or in this process where they are in a file."""
    if SessionLimits is None:
        app.logger.warning("Wrong passwords are not limited: install flask-gsession[limits]")
        return
    scheme = urlsplit(app.config.get("SESSION_STORE") or "").scheme
    shared = scheme in ("redis", "rediss", "unix", "mongodb", "mongodb+srv")
    SessionLimits(app, proxies=0, creation=None, storage=None if shared else "memory://")
