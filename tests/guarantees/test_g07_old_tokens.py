"""Whoever holds an old token within its grace is served, and never gets a new token for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask_login import LoginManager, UserMixin, login_user

from flask_gsession.request.own_session import rotate_soon
from tests.harness.apps import Site, Visitor


def sign_in(session: Any) -> None:
    session["user"] = "eve"
    session.rotate(grace=0)
    session["seen"] = True


def in_a_lock(session: Any) -> None:
    with session.lock():
        sign_in(session)


def in_a_transaction(session: Any) -> None:
    with session.transaction():
        session["user"] = "eve"
        rotate_soon(session._life, 0)  # as Flask-Login's signal does
        session["seen"] = True


def by_regenerate(session: Any) -> None:
    from flask import current_app

    session["user"] = "eve"
    current_app.session_interface.regenerate(session)  # type: ignore[attr-defined]
    session["seen"] = True


SIGN_INS: dict[str, Callable[[Any], None]] = {
    "rotate": sign_in,
    "in a lock": in_a_lock,
    "in a transaction": in_a_transaction,
    "regenerate": by_regenerate,
}


def a_session(site: Site) -> tuple[Visitor, Visitor]:
    """The visitor, and another one with the token from before a rotation."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada", cart=["mug"]))
    holder = visitor.another_tab()
    visitor.run(lambda session: session.rotate(grace=60))
    return visitor, holder


def test_an_old_token_reads_and_writes_within_the_grace(site: Site) -> None:
    visitor, holder = a_session(site)
    assert holder.run(dict) == {"user": "ada", "cart": ["mug"]}
    holder.run(lambda session: session["cart"].append("pen"))
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug", "pen"]}
    site.clock.advance(61)
    assert holder.run(dict) == {}
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug", "pen"]}


@pytest.mark.parametrize("grace", [None, 1, 3600])
def test_a_rotation_through_it_gives_no_token(site: Site, grace: float | None) -> None:
    visitor, holder = a_session(site)
    cookie = holder.cookie
    holder.run(lambda session: (session.rotate(grace), session.update(step=1)))
    assert holder.cookie == cookie
    site.clock.advance(61)
    assert holder.run(dict) == {}
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"], "step": 1}


@pytest.mark.parametrize("way", SIGN_INS)
def test_a_sign_in_through_it_has_a_session_of_its_own(site: Site, way: str) -> None:
    visitor, holder = a_session(site)
    holder.run(SIGN_INS[way])
    assert holder.run(dict) == {"user": "eve", "seen": True}
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"]}
    site.clock.advance(61)
    assert holder.run(dict) == {"user": "eve", "seen": True}
    assert visitor.run(lambda session: session.lock().__enter__() and None) is None  # it is free


def test_nothing_of_the_old_session_is_taken_along(site: Site) -> None:
    visitor, holder = a_session(site)

    def view(session: Any) -> None:
        session["cart"].append("pen")  # a stored value that changes inside
        session["note"] = "mine"
        sign_in(session)
        assert "cart" not in session

    holder.run(view)
    assert holder.run(dict) == {"user": "eve", "note": "mine", "seen": True}
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"]}


def test_a_parallel_rotation_makes_a_token_old(site: Site) -> None:
    """The request began with a token that was current then."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada", cart=["mug"]))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        session["cart"]
        tab.run(lambda session: session.rotate(grace=60))
        sign_in(session)

    visitor.run(view)
    assert visitor.run(dict) == {"user": "eve", "seen": True}
    assert tab.run(dict) == {"user": "ada", "cart": ["mug"]}


def test_flask_login_through_it(site: Site) -> None:
    class User(UserMixin):
        id = "eve"

    LoginManager(site.app).user_loader(lambda name: User())
    visitor, holder = a_session(site)
    holder.run(lambda session: login_user(User()))
    signed_in = holder.run(dict)
    assert signed_in["_user_id"] == "eve"
    assert "cart" not in signed_in
    assert visitor.run(dict) == {"user": "ada", "cart": ["mug"]}


@pytest.mark.parametrize("rotations", [1, 9, 20])
def test_a_logout_through_it_ends_the_session(site: Site, rotations: int) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    holder = visitor.another_tab()
    for _ in range(rotations):
        visitor.run(lambda session: session.rotate(grace=60))
    assert holder.run(dict) == {"user": "ada"}
    holder.run(lambda session: session.destroy())
    assert visitor.run(dict) == {}
    assert not site.stored()
