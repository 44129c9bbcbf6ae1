"""Your session: what the shop remembers of this visit, and the buttons that make it forget."""

from collections.abc import Sized
from dataclasses import dataclass
from datetime import UTC, datetime

from flask import Blueprint, flash, redirect, render_template, url_for
from flask.typing import ResponseReturnValue

from flask_gsession import session

pages = Blueprint("visit", __name__)

PURPOSES = {
    "_confirmed": "When you gave your password again",
    "_permanent": "Whether to keep you signed in",
    "_flashes": "A message for the next page",
    "cart": "What you mean to buy",
    "csrf_token": "Proves that a form came from this shop",
    "preferences": "How the shop looks and writes",
    "seen": "Products you looked at",
    "signed_in_at": "When you signed in",
    "user": "Who is signed in",
}


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the session. Its value is not shown: that is between it and the shop."""

    name: str
    type: str
    entries: int | None
    purpose: str


def _keys() -> list[Key]:
    keys = []
    for name in sorted(session):
        value = session[name]
        entries = len(value) if isinstance(value, Sized) and not isinstance(value, str) else None
        keys.append(Key(name, type(value).__name__, entries, PURPOSES.get(name, "")))
    return keys


@pages.get("/session")
def show() -> ResponseReturnValue:
    """The public side of the session: handle, times, size, names and types."""
    return render_template(
        "session.html",
        stored=session.handle is not None,
        handle=session.handle,
        created_at=session.created_at,
        expires_at=session.expires_at,
        size=session.size,
        keys=_keys(),
        now=datetime.now(UTC),
    )


@pages.get("/api/session")
def as_json() -> ResponseReturnValue:
    """The same as JSON."""
    return {
        "handle": session.handle,
        "created_at": session.created_at.isoformat() if session.created_at else None,
        "expires_at": session.expires_at.isoformat() if session.expires_at else None,
        "size": session.size,
        "keys": {key.name: key.type for key in _keys()},
    }


@pages.post("/session/rotate")
def rotate() -> ResponseReturnValue:
    """A new token for the same session; the old one is good for a few more seconds."""
    session.rotate()
    flash("Your session has a new token and a new handle, and everything that was in it.", "info")
    return redirect(url_for("visit.show"), 303)


@pages.get("/session/forget")
def ask_to_forget() -> ResponseReturnValue:
    """The question before everything goes."""
    if session.handle is None:
        return redirect(url_for("visit.show"), 303)
    return render_template("forget.html")


@pages.post("/session/forget")
def forget() -> ResponseReturnValue:
    """End the session and start no other: afterwards the browser holds no cookie of the shop."""
    session.destroy()
    return render_template("forgotten.html")
