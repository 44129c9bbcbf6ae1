"""Binding in all the places where a session can be written."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, Response
from flask import session as flask_session

from flask_gsession import Session
from flask_gsession.errors import RotationRefused, SessionConflict
from flask_gsession.request.session import lifecycle_of
from flask_gsession.request.state import NO_WISHES
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.base import Store
from tests.harness.apps import Site, SiteMaker

from .test_devices import device_id, ids, owner, signed_in


def test_binding_in_a_transaction(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    before = visitor.cookie

    def sign_in(session: Any) -> None:
        with session.transaction():
            session["b"] = 2
            session.bind("ada")
        assert session.owner == "ada"

    visitor.run(sign_in)
    assert visitor.cookie != before
    assert (owner(visitor), visitor.run(dict)) == ("ada", {"a": 1, "b": 2})
    assert ids(site) == [device_id(visitor)]


def test_a_transaction_that_fails_binds_nobody(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))

    def fail(session: Any) -> None:
        with session.transaction():
            session.bind("ada")
            raise ZeroDivisionError

    def sign_in(session: Any) -> None:
        with pytest.raises(ZeroDivisionError):
            fail(session)
        assert session.owner is None

    visitor.run(sign_in)
    assert (owner(visitor), ids(site)) == (None, [])


def test_binding_in_a_lock(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()

    def sign_in(session: Any) -> None:
        with session.lock():
            session["b"] = 2
            session.bind("ada")
            session.update_atomic("a", lambda a: a + 1)
            assert session.owner == "ada"

    visitor.run(sign_in)
    assert (owner(visitor), visitor.run(dict)) == ("ada", {"a": 2, "b": 2})
    assert ids(site) == [device_id(visitor)]
    assert tab.run(dict) == {}


def test_beside_an_update_at_once(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))

    def sign_in(session: Any) -> None:
        session.bind("ada")
        session.update_atomic("a", lambda a: a + 1)
        session.take("a")

    visitor.run(sign_in)
    assert (owner(visitor), visitor.run(dict)) == ("ada", {})
    assert ids(site) == [device_id(visitor)]


def test_with_an_old_token(site: Site) -> None:
    """It starts a session of its own, and leaves the other one as it is."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate(60))

    def sign_in(session: Any) -> None:
        session["name"] = "Ada"
        session.bind("ada")

    tab.run(sign_in)
    assert (owner(tab), tab.run(dict)) == ("ada", {"name": "Ada"})
    assert (owner(visitor), visitor.run(dict)) == (None, {"cart": ["mug"]})
    assert ids(site) == [device_id(tab)]


def test_with_an_old_token_of_the_same_user(site: Site) -> None:
    visitor = signed_in(site)
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate(60))
    tab.run(lambda session: session.bind("ada"))
    assert owner(visitor) == owner(tab) == "ada"
    assert set(ids(site)) == {device_id(visitor), device_id(tab)}
    assert len(ids(site)) == 2


def test_binding_by_a_rotation_that_another_request_overtakes(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()

    def sign_in(session: Any) -> None:
        session.bind("ada")
        site.before_a_write(lambda: tab.run(lambda session: session.rotate(60)))

    visitor.run(sign_in)
    assert owner(visitor) == "ada"
    assert owner(tab) is None
    assert ids(site) == [device_id(visitor)]


def test_binding_with_a_save_by_hand(site: Site) -> None:
    """As in a socket handler, whose response nobody sends: the token stays."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    cookie = visitor.cookie

    def sign_in(session: Any) -> Response:
        session.bind("ada")
        site.app.session_interface.save_session(site.app, flask_session, Response())  # type: ignore[arg-type]
        lifecycle_of(session).wishes = NO_WISHES  # nobody sends this response
        return Response()

    visitor.run(sign_in)
    assert visitor.cookie == cookie
    assert owner(visitor) == "ada"
    assert ids(site) == [device_id(visitor)]
    with site.app.app_context():
        assert site.ext.users.revoke_all("ada") == 1
    assert owner(visitor) is None


def test_saved_by_hand_with_an_old_token_is_refused(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate(60))

    def sign_in(session: Any) -> None:
        session["b"] = 1
        session.bind("ada")
        with pytest.raises(SessionConflict):
            site.app.session_interface.save_session(site.app, flask_session, Response())  # type: ignore[arg-type]
        session.unbind()

    tab.ask(sign_in)
    assert owner(visitor) is None
    assert ids(site) == []


def test_binding_in_a_block_of_open(site: Site) -> None:
    visitor = signed_in(site)
    handle, device = visitor.run(lambda session: (session.handle, session.device_id))
    with site.app.app_context():
        with site.ext.open(handle) as session:
            assert (session.owner, session.device_id) == ("ada", device)
            session["job"] = 1
            with pytest.raises(RotationRefused):
                session.bind("bob")
        with site.ext.open(handle) as session:
            session.unbind()
    assert (owner(visitor), visitor.run(dict), ids(site)) == (None, {"job": 1}, [])


def test_binding_in_a_test_client(site: Site) -> None:
    client = site.app.test_client()
    with client.session_transaction() as session:
        session["a"] = 1
        session.bind("ada")  # type: ignore[attr-defined]
    assert len(ids(site)) == 1
    with client.session_transaction() as session:
        assert session.owner == "ada"  # type: ignore[attr-defined]


def test_with_a_token_header(make_site: SiteMaker) -> None:
    site = make_site(token_header="X-Token")
    visitor = site.visitor()
    answer = visitor.ask(lambda session: session.bind("ada"), headers={"X-Token": ""})
    token = answer.headers["X-Token"]
    assert visitor.run(lambda session: session.owner, headers={"X-Token": token}) == "ada"
    with site.app.app_context():
        site.ext.users.revoke_all("ada")
    assert visitor.run(lambda session: session.owner, headers={"X-Token": token}) is None


def test_revoking_while_debugging(make_site: SiteMaker, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site(debug=True)
    visitor = signed_in(site)
    visitor.run(lambda session: session.rotate())
    with site.app.app_context():
        assert site.ext.users.revoke_all("ada") == 1
    assert owner(visitor) is None
    assert visitor.cookie is None or visitor.token not in caplog.text


class SevenVerbs:
    """A third-party store that fulfils the contract, and no more."""

    def __init__(self, store: Store) -> None:
        for verb in ("create", "load", "save", "renew", "replace", "close"):
            setattr(self, verb, getattr(store, verb))
        self._delete = store.delete

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        return bool(self._delete(key, expected_version))


def test_on_a_third_party_store() -> None:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    store: Any = SevenVerbs(open_store("memory://", StoreOptions())[0])
    ext = Session(app, store=store, max_per_user=2)

    @app.post("/login")
    def login() -> dict[str, Any]:
        flask_session.bind("ada")  # type: ignore[attr-defined]
        return {}

    @app.post("/logout")
    def logout() -> dict[str, Any]:
        flask_session.destroy()  # type: ignore[attr-defined]
        return {}

    @app.get("/")
    def who() -> dict[str, Any]:
        return {"owner": flask_session.owner}  # type: ignore[attr-defined]

    clients = [app.test_client() for _ in range(3)]
    for client in clients:
        assert client.post("/login").status_code == 200
    assert [client.get("/").json for client in clients] == [
        {"owner": None},
        {"owner": "ada"},
        {"owner": "ada"},
    ]
    clients[1].get("/")
    assert clients[1].post("/logout").status_code == 200
    with app.app_context():
        assert ext.users.revoke_all("ada") >= 1
        assert ext.users.devices("ada") == []
    assert clients[2].get("/").json == {"owner": None}
