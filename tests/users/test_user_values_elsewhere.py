"""The values of a user by other ways in: libraries, handles, threads, streams, a second session."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from flask import Response, copy_current_request_context, stream_with_context
from flask_login import LoginManager, UserMixin, login_user, logout_user

from flask_gsession import Session
from tests.harness.apps import Site, SiteMaker

from .test_devices import signed_in
from .test_joining import CART


@pytest.fixture
def memory(store_prefix: str, clock: Any) -> Iterator[Site]:
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield make()


def test_a_sign_in_with_flask_login(memory: Site) -> None:
    class User(UserMixin):
        id = "ada"

    manager = LoginManager(memory.app)
    manager.user_loader(lambda name: User())
    visitor, other = memory.visitor(), memory.visitor()
    visitor.run(lambda session: CART.set({"a": 1}))
    visitor.run(lambda session: login_user(User()))
    assert visitor.run(lambda session: (CART.get(), "cart" in session)) == ({"a": 1}, False)
    other.run(lambda session: CART.set({"b": 1}))

    def by_hand(session: Any) -> Any:  # without a call of Flask-Login
        session["_user_id"] = "ada"
        return CART.get()

    assert other.run(by_hand) == {"a": 1, "b": 1}
    assert other.run(lambda session: (CART.get(), "cart" in session)) == ({"a": 1, "b": 1}, False)
    visitor.run(lambda session: logout_user())
    assert visitor.run(lambda session: CART.get()) == {}


def test_a_session_that_is_opened_or_saved_by_hand(memory: Site) -> None:
    visitor = signed_in(memory)
    handle = visitor.run(lambda session: session.handle)
    with memory.app.app_context():
        with memory.ext.open(handle) as opened:
            opened.shared["n"] = 1
            CART.of(opened).set({"a": 1})
        with pytest.raises(ZeroDivisionError), memory.ext.open(handle) as opened:
            opened.shared["n"] = 1 / 0
    assert visitor.run(lambda session: dict(session.shared)) == {"n": 1, "cart": {"a": 1}}
    with visitor.session_transaction() as session:
        session.shared["n"] += 1  # type: ignore[attr-defined]

    def by_hand(session: Any) -> Any:
        session.shared["n"] += 1
        assert session.modified
        memory.app.session_interface.save_session(memory.app, session, Response())
        session.shared["n"] += 1

    visitor.run(by_hand)
    assert visitor.run(lambda session: session.shared["n"]) == 4


def test_a_second_session_and_threads(memory: Site) -> None:
    site = memory
    second = Session(site.app, store=site.store, clock=site.clock, cookie_name="second")
    visitor = signed_in(site)

    def view(session: Any) -> Any:
        second.session.bind("bob")
        second.session.shared["n"] = session.shared["n"] = 0
        before = [CART.get(), session.shared]

        def work() -> None:
            for _ in range(20):
                session.shared.update_atomic("n", lambda n: n + 1)

        threads = [Thread(target=copy_current_request_context(work)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return before

    visitor.run(view)
    assert visitor.run(lambda session: (session.shared["n"], second.session.shared["n"])) == (60, 0)


def test_a_streamed_body_may_read_and_write_at_once(memory: Site) -> None:
    visitor = signed_in(memory)
    visitor.run(lambda session: session.shared.update(n=1))

    def view(session: Any) -> Response:
        def body() -> Iterator[str]:
            yield str(session.shared["n"])
            session.shared.update_atomic("n", lambda n: n + 1)

        session.shared["n"]
        return Response(stream_with_context(body()))

    assert visitor.ask(view).text == "1"
    assert visitor.run(lambda session: session.shared["n"]) == 2
