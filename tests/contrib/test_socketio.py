"""Sockets of Flask-SocketIO that follow their sessions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask_socketio import SocketIO

from flask_gsession.contrib.socketio import SessionSockets, user_room
from tests.harness.apps import Site, SiteMaker, Visitor, until


@pytest.fixture
def socketio(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[SocketIO]:
    """The application's sockets, bound to sessions. MongoDB is polled often."""
    monkeypatch.setattr("flask_gsession.stores.mongodb.changes._POLL", 0.1)
    socketio = SocketIO(site.app, async_mode="threading")
    sockets = SessionSockets(socketio, site.ext)
    socketio.on_event("connect", sockets.join)
    yield socketio
    site.ext.close(site.app)


def test_sockets_follow_their_sessions(site: Site, socketio: SocketIO) -> None:
    here, there = site.visitor(), site.visitor()

    def connected(visitor: Visitor) -> Any:
        return socketio.test_client(site.app, flask_test_client=visitor)

    assert not connected(here).is_connected()  # without a session
    for visitor in (here, there):
        visitor.run(lambda session: session.bind("ada"))
    sockets = [connected(here), connected(there), connected(there)]
    assert all(socket.is_connected() for socket in sockets)
    before = site.stored()
    events: list[Any] = []

    def heard(socket: Any, *wanted: str) -> list[Any]:
        """The messages to one socket, up to the last of these events."""
        events.clear()

        def are_there() -> bool:
            events.extend(socket.get_received())
            return {*wanted} <= {event["name"] for event in events}

        until(are_there)
        return [event["args"][0] for event in events if event["name"] in wanted]

    assert site.stored() == before  # no use of the session
    here.run(lambda session: session.update(cart=["a"]))
    changes = heard(sockets[0], "gsession:changed")
    assert {"keys": ["cart"], "user_keys": [], "devices": False} in changes
    with site.app.app_context():
        site.ext.live.publish("ada", "order", {"id": 7})
    for socket in sockets:
        (message,) = heard(socket, "gsession:message")
        assert (message["name"], message["data"]) == ("order", {"id": 7})
    socketio.emit("sale", "today", to=user_room("ada"))
    assert heard(sockets[2], "sale") == ["today"]

    with site.app.app_context():
        site.ext.users.revoke("ada", there.run(lambda session: session.device_id))
    until(lambda: not sockets[1].is_connected() and not sockets[2].is_connected())
    assert sockets[0].is_connected()
    here.run(lambda session: session.unbind())
    rooms = socketio.server.manager.get_participants
    until(lambda: not [*rooms("/", user_room("ada"))])
    assert sockets[0].is_connected()
    sockets[0].disconnect()
    here.run(lambda session: session.update(cart=["b"]))
    with site.app.app_context():
        until(lambda: not site.ext.live.hints().watches())


@pytest.mark.parametrize("store_url", ["memory://"])
def test_a_handshake_may_bring_the_token_in_its_header(make_site: SiteMaker) -> None:
    site = make_site(token_header="X-Token")
    socketio = SocketIO(site.app, async_mode="threading")
    socketio.on_event("connect", SessionSockets(socketio, site.ext).join)
    browser, phone = site.visitor(), site.visitor()
    browser.run(lambda session: session.bind("bob"))
    answer = phone.ask(lambda session: session.bind("ada"), headers={"X-Token": ""})
    token = answer.headers["X-Token"]
    for visitor, header, joins in (
        (phone, token, True),
        (browser, token, True),  # the cookie is ignored, as in any request with the header
        (browser, token[:-1], False),
        (browser, "", False),
    ):
        socket = socketio.test_client(
            site.app, flask_test_client=visitor, headers={"X-Token": header}
        )
        assert socket.is_connected() is joins
    assert len(list(socketio.server.manager.get_participants("/", user_room("ada")))) == 2
    site.ext.close(site.app)
