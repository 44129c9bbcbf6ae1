"""A FastAPI or Starlette service reads the sessions of a Flask application."""

from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from starlette.websockets import WebSocket

from flask_gsession.contrib.asgi import SharedSessions, signed_in
from flask_gsession.errors import StoreUnavailable
from flask_gsession.opening import SessionPeek
from tests.harness.apps import Site, SiteMaker


def service(site: Site, **settings: Any) -> TestClient:
    """A FastAPI service beside the application, with a store of its own on the same records."""
    options = {"store": site.store, "cookie_name": site.cookie_name, **settings}
    sessions = SharedSessions("a key for tests", **options)
    sessions._interface.repository._clock = site.clock
    app = FastAPI()
    Shared = Annotated[SessionPeek | None, Depends(sessions)]  # a type

    @app.get("/cart")
    async def cart(session: Shared) -> Any:
        return None if session is None else session.get("cart")

    @app.get("/me")
    def me(session: Shared) -> Any:
        return signed_in(session)

    @app.websocket("/socket")
    async def socket(socket: WebSocket, session: Shared) -> None:
        await socket.accept()
        await socket.send_json(None if session is None else session.get("cart"))
        await socket.close()

    return TestClient(app)


def test_a_service_reads_the_session(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"], _user_id="17"))
    client = service(site)
    calls = len(site.store.calls)
    headers = {"Cookie": f"a=1; session={visitor.cookie}"}
    answer = client.get("/cart", headers=headers)
    assert (answer.status_code, answer.json()) == (200, ["mug"])
    assert "set-cookie" not in answer.headers
    assert site.store.calls[calls:] == ["load"]
    assert client.get("/me", headers=headers).json() == "17"
    with client.websocket_connect("/socket", headers=headers) as socket:
        assert socket.receive_json() == ["mug"]


@pytest.mark.parametrize("store_url", ["memory://"])
def test_a_client_may_send_its_token_in_a_header(make_site: SiteMaker) -> None:
    site = make_site(token_header="X-Token")
    visitor = site.visitor()
    answer = visitor.ask(lambda session: session.update(cart=["mug"]), headers={"X-Token": ""})
    headers = {"X-Token": answer.headers["X-Token"], "Cookie": "session=another"}
    client = service(site, token_header="X-Token")
    assert client.get("/cart", headers=headers).json() == ["mug"]
    with client.websocket_connect("/socket", headers=headers) as socket:
        assert socket.receive_json() == ["mug"]
    assert service(site).get("/cart", headers=headers).json() is None  # without the setting


def test_a_visitor_who_is_not_signed_in(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    client = service(site)
    headers = {"Cookie": f"session={visitor.cookie}"}
    assert client.get("/me", headers=headers).status_code == 401
    visitor.run(lambda session: session.destroy())
    assert client.get("/cart", headers=headers).json() is None
    assert client.get("/cart").json() is None
    assert client.get("/me").status_code == 401


def test_an_outage_is_503(site: Site) -> None:
    def fail() -> None:
        raise StoreUnavailable("drill", 7)

    visitor = site.visitor()
    visitor.run(lambda session: session.update(_user_id="17"))
    client = service(site)
    for path in ("/cart", "/me"):
        site.store.before("load", fail)
        answer = client.get(path, headers={"Cookie": f"session={visitor.cookie}"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


def test_another_secret_key_reads_nothing(make_site: SiteMaker) -> None:
    site = make_site()
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    sessions = SharedSessions("another key", store=site.store)
    app = FastAPI()

    @app.get("/cart", dependencies=[Depends(sessions)])
    async def cart() -> str:
        return "unused"

    headers = {"Cookie": f"session={visitor.cookie}"}
    calls = len(site.store.calls)
    assert TestClient(app).get("/cart", headers=headers).status_code == 200
    assert site.store.calls[calls:] == [], "no store is asked for a token that isn't ours"
    sessions.close()
