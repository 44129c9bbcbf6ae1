"""A failure beside a session leaves the session, its cookie and its neighbours alone."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from flask import Response, session
from pymongo.collection import Collection
from pymongo.errors import OperationFailure, ServerSelectionTimeoutError

from flask_gsession import Session, StoreUnavailable
from flask_gsession.errors import UnreadableRecord
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.testing import FakeClock, a_record
from tests.harness.apps import Site, SiteMaker


def test_an_atomic_update_refreshes_a_permanent_cookie(make_site: SiteMaker) -> None:
    site = make_site(permanent_lifetime=3600)
    visitor = site.visitor()

    def start(session: Any) -> None:
        session.permanent = True
        session["hits"] = 0

    visitor.run(start)
    site.clock.advance(600)
    response = visitor.ask(lambda session: session.update_atomic("hits", lambda hits: hits + 1))
    assert "Expires=" in response.headers["Set-Cookie"]


def test_an_old_token_is_never_set_again_after_another_request_rotated(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        session.permanent = True
        site.before_a_write(lambda: tab.run(lambda other: other.rotate()))

    assert "Set-Cookie" not in visitor.ask(view).headers
    assert tab.run(dict) == {"user": "ada", "_permanent": True}


def test_a_failing_second_session_leaves_the_new_token_of_the_first(site: Site) -> None:
    further = Session(cookie_name="further", store="memory://")
    further.init_app(site.app)
    site.app.config["PROPAGATE_EXCEPTIONS"] = False
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))

    def view(session: Any) -> None:
        session.rotate(grace=0)
        further.session["bad"] = object()

    assert visitor.ask(view).status_code == 500
    assert visitor.run(dict) == {"user": "ada"}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["hook", "async hook"])
def test_an_outage_first_met_in_a_hook_is_503(asynchronous: bool, site: Site) -> None:
    if asynchronous:

        @site.app.after_request
        async def look_async(response: Response) -> Response:
            session.get("user")
            return response

    else:

        @site.app.after_request
        def look(response: Response) -> Response:
            session.get("user")
            return response

    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))

    def down() -> None:
        raise StoreUnavailable("down")

    site.store.before("load", down)
    response = visitor.get("/untouched")
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    assert visitor.get("/untouched").status_code == 200


@pytest.mark.parametrize("operation", ["load", "delete"])
def test_an_outage_is_logged_whatever_met_it(
    operation: str, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))

    def down() -> None:
        raise StoreUnavailable("the drill")

    site.store.before(operation, down)
    act = dict if operation == "load" else (lambda session: session.destroy())
    with caplog.at_level(logging.ERROR):
        assert visitor.ask(act).status_code == 503
    assert caplog.text.count("the drill") == 1


def test_an_unreadable_record_costs_one_connection_only(
    redis_url: str, store_prefix: str, redis_client: Any
) -> None:
    store: Any = open_store(redis_url, StoreOptions(prefix=store_prefix))[0]
    record = a_record(FakeClock())
    store.create(record)
    slot = store.commands.pool.take(time.monotonic() + 1)
    slot.ask(b"PING\r\n")
    redis_client.set(store.commands.names.record(record.key), b"\x07" * 40, px=60_000)
    with pytest.raises(UnreadableRecord):
        store.load(record.key)
    assert slot.connection._sock is not None
    store.commands.pool.give(slot)
    store.close()


def test_a_socket_that_an_interrupt_left_closed_costs_one_call(
    mongodb_url: str, store_prefix: str
) -> None:
    store: Any = open_store(mongodb_url, StoreOptions(prefix=store_prefix))[0]
    record = a_record(FakeClock())
    store.create(record)
    (server,) = store.driver.connect().database.client._topology._servers.values()
    (connection,) = server.pool.conns
    connection.close_conn(None)
    with pytest.raises(StoreUnavailable, match="OSError"):
        store.load(record.key)
    assert store.load(record.key) == record
    store.close()


def test_the_expiry_index_is_tried_again_after_an_outage(
    mongodb_url: str, store_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = open_store(mongodb_url, StoreOptions(prefix=store_prefix, timeout=10))[0]
    create_index = Collection.create_index

    def down(*_: Any, **__: Any) -> str:
        monkeypatch.setattr(Collection, "create_index", create_index)
        raise ServerSelectionTimeoutError("no server")

    monkeypatch.setattr(Collection, "create_index", down)
    store.create(a_record(FakeClock()))
    assert "gsession_expiry" not in store.driver.connect().index_information()
    store.create(a_record(FakeClock()))
    assert "gsession_expiry" in store.driver.connect().index_information()
    store.close()


def test_missing_rights_for_the_index_are_said_and_survived(
    mongodb_url: str,
    store_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store: Any = open_store(mongodb_url, StoreOptions(prefix=store_prefix, timeout=10))[0]

    def refused(*_: Any, **__: Any) -> str:
        raise OperationFailure("not authorized", code=13)

    monkeypatch.setattr(Collection, "create_index", refused)
    clock = FakeClock()
    records = [a_record(clock), a_record(clock)]
    with caplog.at_level(logging.WARNING):
        for record in records:
            store.create(record)
    assert caplog.text.count("createIndex") == 1
    assert store.load(records[0].key) == records[0]
    store.close()
