"""The signals of blinker, and the event of a conflict, on every store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blinker import Signal
from flask import Flask, session

from flask_gsession import Session, SessionConflict, signals
from flask_gsession.events import (
    SessionConflicted,
    SessionCreated,
    SessionDestroyed,
    SessionRefused,
    SessionRotated,
    SessionSaved,
)
from tests.harness.apps import Site, SiteMaker, at_once

SIGNALS: dict[type, Signal] = {
    SessionCreated: signals.session_created,
    SessionRotated: signals.session_rotated,
    SessionDestroyed: signals.session_destroyed,
    SessionConflicted: signals.session_conflict,
    SessionRefused: signals.session_refused,
}
Sent = list[tuple[Flask, Any]]


@pytest.fixture
def sent() -> Iterator[Sent]:
    """The signals sent during the test, with their senders."""
    found: Sent = []

    def receive(sender: Flask, event: object, **more: object) -> None:
        found.append((sender, event))

    for signal in SIGNALS.values():
        signal.connect(receive)
    yield found
    for signal in SIGNALS.values():
        signal.disconnect(receive)


def test_each_signal_is_sent_by_its_application(site: Site, sent: Sent) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=[1]))
    visitor.run(lambda session: session.rotate())
    visitor.run(lambda session: session.destroy())
    site.visitor("nonsense").run(dict)
    kinds = [SessionCreated, SessionRotated, SessionDestroyed, SessionRefused]
    assert [type(event) for _, event in sent] == kinds
    assert all(sender is site.app for sender, _ in sent)
    assert [event for _, event in sent] == [
        event for kind in kinds for event in site.happened(kind)
    ]


def parallel(site: Site, other: Callable[[Any], object]) -> Callable[[Any], object]:
    """A function that lets another tab store something just before the next save."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(stock=1))
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(other))
    return lambda view: visitor.ask(view).status_code


def test_a_change_that_its_policy_refuses_is_a_conflict(make_site: SiteMaker, sent: Sent) -> None:
    site = make_site(merge_policies={"stock": "reject"})
    ask = parallel(site, lambda session: session.update(stock=2))
    assert ask(lambda session: session.update(stock=3)) == 409
    (conflict,) = site.happened(SessionConflicted)
    assert conflict.reason == "refused"
    assert (site.app, conflict) in sent


def test_a_merge_is_not_a_conflict(site: Site) -> None:
    ask = parallel(site, lambda session: session.update(other=2))
    assert ask(lambda session: session.update(stock=3)) == 200
    assert site.happened(SessionConflicted) == []
    assert site.happened(SessionSaved)[-1].conflicts == 1


def test_a_transaction_reports_each_lost_race_once(site: Site) -> None:
    def view(session: Any) -> None:
        session.transaction().run(lambda session: session.update(stock=session["stock"] + 1))

    ask = parallel(site, lambda session: session.update(stock=5))
    assert ask(view) == 200
    assert [event.reason for event in site.happened(SessionConflicted)] == ["transaction"]

    def once(session: Any) -> None:
        with pytest.raises(SessionConflict), session.transaction():
            session["stock"] += 1

    ask = parallel(site, lambda session: session.update(stock=5))
    assert ask(once) == 200
    assert [event.reason for event in site.happened(SessionConflicted)] == ["transaction"] * 2


def test_too_many_lost_races_send_a_signal(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_gsession.repository.races.ATTEMPTS", 1)
    site = make_site()
    ask = parallel(site, lambda session: session.update(stock=5))
    assert ask(lambda session: session.update(stock=3)) == 409
    ask = parallel(site, lambda session: session.update(stock=5))
    assert ask(lambda session: session.update_atomic("stock", lambda stock: stock + 1)) == 409
    assert [event.reason for event in site.happened(SessionConflicted)] == ["too many races"] * 2


def test_a_receiver_that_fails_is_logged_and_does_no_harm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, ext = application()

    def fail(sender: Flask, event: object) -> None:
        raise RuntimeError("of the receiver")

    with signals.session_created.connected_to(fail, app):
        assert app.test_client().post("/").status_code == 200
    assert "A receiver of the signal for SessionCreated failed" in caplog.text
    ext.close(app)


def test_an_async_receiver_is_waited_for() -> None:
    app, ext = application()
    received = []

    async def receive(sender: Flask, event: SessionCreated) -> None:
        received.append(event.handle)

    with signals.session_created.connected_to(receive, app):
        assert app.test_client().post("/").status_code == 200
    assert len(received) == 1
    ext.close(app)


def test_applications_that_share_an_extension_send_each_their_own(sent: Sent) -> None:
    ext = Session()
    apps = [application(ext)[0] for _ in range(2)]
    at_once(*(lambda app=app: app.test_client().post("/") for app in apps))  # type: ignore[misc]
    assert {id(sender) for sender, _ in sent} == {id(app) for app in apps}


def application(ext: Session | None = None) -> tuple[Flask, Session]:
    """An application whose page makes a session, in memory."""
    app = Flask(__name__)
    app.config.update(SECRET_KEY="a key for tests", SESSION_STORE="memory://")
    ext = ext or Session()
    ext.init_app(app)

    @app.post("/")
    def page() -> str:
        session["user"] = "ada"
        return ""

    return app, ext
