"""The people who may sign in, and who is signed in now."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from typing import ParamSpec

from flask import redirect, url_for
from flask.typing import ResponseReturnValue
from werkzeug.security import check_password_hash, generate_password_hash

from flask_gsession import session

from . import csrf
from .database import Database

#: This is a demo: the sign-in page shows the names and this password to everyone.
DEMO_PASSWORD = "larch-and-linen"
DEMO_PEOPLE = {"mira": "Mira Holm", "jonas": "Jonas Weber", "sofia": "Sofia Marin"}
#: The people who may see and end everybody's sessions.
STAFF = {"sofia"}

View = ParamSpec("View")


@dataclass(frozen=True, slots=True)
class Person:
    """Someone with an account."""

    name: str
    full_name: str

    @property
    def first_name(self) -> str:
        return self.full_name.split()[0]


class Accounts:
    """The accounts in the shop's database; the demo's people are added when they are missing."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.reading() as connection:
            known = {row["name"] for row in connection.execute("SELECT name FROM people")}
        missing = [name for name in DEMO_PEOPLE if name not in known]
        people = [(n, DEMO_PEOPLE[n], generate_password_hash(DEMO_PASSWORD)) for n in missing]
        if people:
            with database.writing() as connection:
                connection.executemany("INSERT OR IGNORE INTO people VALUES (?, ?, ?)", people)
        # Checked if the name is unknown, so that the response time reveals nothing.
        self._nobody = generate_password_hash(secrets.token_urlsafe())

    def find(self, name: str) -> Person | None:
        """The person of that name."""
        found = self._row(name)
        return Person(*found[:2]) if found else None

    def check(self, name: str, password: str) -> Person | None:
        """The person of that name if the password is theirs."""
        found = self._row(name)
        if check_password_hash(found[2] if found else self._nobody, password) and found:
            return Person(*found[:2])
        return None

    def _row(self, name: str) -> tuple[str, str, str] | None:
        query = "SELECT name, full_name, password_hash FROM people WHERE name = ?"
        with self._database.reading() as connection:
            row = connection.execute(query, (name,)).fetchone()
        return tuple(row) if row else None


def sign_in(person: Person, keep: bool = False) -> None:
    """Make this visitor's session the person's, and list it among their devices.

    With `keep` it outlives the browser window, for `PERMANENT_SESSION_LIFETIME`.

    The token changes without grace: an attacker who knows the old one, perhaps because they planted
    it, must not be signed in as well (OWASP, session fixation).
    """
    session.bind(person.name)
    session.permanent = keep
    session["user"] = person.name
    session["signed_in_at"] = datetime.now(UTC)
    csrf.renew()


def runs_the_shop() -> bool:
    """Whether the visitor is signed in as someone who works here."""
    return session.get("user") in STAFF


def sign_in_needed(
    view: Callable[View, ResponseReturnValue],
) -> Callable[View, ResponseReturnValue]:
    """Send visitors who are not signed in to the sign-in page, and afterwards back to `view`."""

    @wraps(view)
    def guarded(*args: View.args, **kwargs: View.kwargs) -> ResponseReturnValue:
        if "user" not in session:
            return redirect(url_for("account.sign_in", next=view.__name__), 303)
        return view(*args, **kwargs)

    return guarded
