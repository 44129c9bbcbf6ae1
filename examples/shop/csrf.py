"""Every form carries a token that another site cannot know; it is kept in the session."""

import hmac
import secrets

from flask import Flask, abort, request

from flask_gsession import session

FIELD = "csrf_token"


def token() -> str:
    """The token of this session, made when a page first needs it."""
    value: str = session.get_or_set(FIELD, secrets.token_urlsafe)
    return value


def renew() -> None:
    """Give the next page another token, since a sign-in must not keep the old one."""
    session.pop(FIELD, None)


def protect(app: Flask) -> None:
    """Answer 400 to each form that does not carry the session's token."""

    @app.before_request
    def check() -> None:
        if request.method not in ("POST", "PUT", "PATCH", "DELETE") or request.endpoint is None:
            return
        expected = session.get(FIELD)
        given = request.form.get(FIELD, "")
        if not isinstance(expected, str) or not hmac.compare_digest(
            expected.encode(), given.encode("utf-8", "replace")
        ):
            abort(400, "This form is out of date. Go back, reload the page and send it again.")
