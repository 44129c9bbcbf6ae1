"""Protects the forms of the pages against forged requests (CSRF), without Flask-WTF.

A form's token is an HMAC under the secret key, over a salt and the session: over the user and
device of a bound session, which costs no write, or else over a random value in the session. So it
stays valid through rotations and ends with the session. Source: OWASP, Cross-Site Request Forgery
Prevention Cheat Sheet (signed double submit, bound to the session).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from flask import abort, current_app, request

from ..config import secret_keys
from ..request.session import SessionData

FIELD = "gsession_token"
#: The session's key with the random value.
KEY = "_pages_csrf"
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_LONGEST = 200  # characters


def form_token(session: SessionData) -> str:
    """A token for a form in a page of this session."""
    bound = _bound_to(session)
    if not bound:
        session[KEY] = secrets.token_urlsafe(24)
        bound = _bound_to(session)
    salt = secrets.token_urlsafe(9)  # against BREACH: no two pages have the same token
    return f"{salt}.{_sign(secret_keys(current_app)[0], salt, bound).decode()}"


def check_form(session: SessionData) -> None:
    """Respond 415 to anything but a form, and 400 to a form without this session's token."""
    if request.mimetype not in _FORMS:
        abort(415, "This address accepts only the form on its page.")
    given = request.form.get(FIELD, "")
    salt, _, signature = given[:_LONGEST].partition(".")
    bound = _bound_to(session)
    for key in secret_keys(current_app):
        if bound and hmac.compare_digest(_sign(key, salt, bound), signature.encode()):
            return
    abort(400, "This form is out of date. Go back, reload the page and send it again.")


def _bound_to(session: SessionData) -> str:
    """An id for this session that never changes; "" if it has none yet."""
    owner = session.owner
    if owner is not None:
        return f"user\0{session.device_id}\0{owner}"
    kept = session.get(KEY)
    return f"visitor\0{kept}" if isinstance(kept, str) else ""


def _sign(key: str | bytes, salt: str, bound: str) -> bytes:
    secret = key.encode() if isinstance(key, str) else key
    message = f"flask-gsession pages\0{salt}\0{bound}".encode("utf-8", "surrogatepass")
    return hmac.new(secret, message, hashlib.sha256).hexdigest().encode()
