"""A streamed body runs after the session was saved: it can read the session, not write to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Response, copy_current_request_context, flash, stream_with_context
from werkzeug.test import TestResponse

from flask_gsession import SessionData, session
from tests.apps import Site, SiteMaker, Visitor

Act = Callable[[Any], object]


def streaming(body: Callable[[], Iterator[str]], first: Act = lambda session: None) -> Act:
    """A view that does `first` with the session, and then streams `body`."""

    def view(session: Any) -> Response:
        first(session)
        return Response(stream_with_context(body()), mimetype="text/plain")

    return view


def whole(visitor: Visitor, view: Act) -> TestResponse:
    """The response to a request whose body was read to its end and closed, as servers do."""
    return visitor.ask(view, buffered=True)


def a_cart(visitor: Visitor) -> None:
    """Give the visitor a session to stream from."""
    visitor.run(lambda session: session.update(user="alice", cart=["mug"], tags={"new"}))


def what_is_stored(visitor: Visitor) -> dict[str, Any]:
    """The whole session, as a request afterwards finds it."""
    stored: dict[str, Any] = visitor.run(lambda session: session.copy())
    return stored


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What Flask-GSession logged as an error."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "flask_gsession" and record.levelno >= logging.ERROR
    ]


def test_reading_while_streaming(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Also what this request wrote itself."""
    visitor = site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        yield session["user"]
        yield f" {session['cart']} {sorted(session)} {session.get('color')} {len(session)}"
        yield f" {session.handle is not None} {session.new} {session.size > 0}"

    response = whole(visitor, streaming(body, lambda session: session["cart"].append("cup")))
    text = "alice ['mug', 'cup'] ['cart', 'tags', 'user'] None 3 True False True"
    assert response.get_data(as_text=True) == text
    assert what_is_stored(visitor)["cart"] == ["mug", "cup"]
    assert logged(caplog) == []


def test_a_session_first_looked_at_while_streaming(site: Site) -> None:
    """It loads then, though too late for a Vary header."""
    visitor = site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        yield f"{session['user']} {session['cart']}"

    response = whole(visitor, streaming(body))
    assert response.get_data(as_text=True) == "alice ['mug']"
    assert "Set-Cookie" not in response.headers


def test_what_was_written_before_the_stream_is_stored_before_it(site: Site) -> None:
    """A second request, sent by the client at the first byte, finds it."""
    visitor = site.visitor()
    a_cart(visitor)
    other = visitor.another_tab()
    seen = []

    def body() -> Iterator[str]:
        seen.append(what_is_stored(other)["step"])
        yield "done"

    response = whole(visitor, streaming(body, lambda session: session.update(step=1)))
    assert response.get_data(as_text=True) == "done"
    assert seen == [1]


def test_a_new_session_can_be_read_in_its_first_stream(site: Site) -> None:
    visitor = site.visitor()

    def body() -> Iterator[str]:
        yield session["user"]
        yield f" {session.handle}"

    response = whole(visitor, streaming(body, lambda session: session.update(user="alice")))
    handle = visitor.run(lambda session: session.handle)
    assert response.get_data(as_text=True) == f"alice {handle}"


WRITES: dict[str, Act] = {
    "assign": lambda s: s.__setitem__("color", "red"),
    "replace": lambda s: s.__setitem__("user", "bob"),
    "del": lambda s: s.__delitem__("user"),
    "pop": lambda s: s.pop("user"),
    "popitem": lambda s: s.popitem(),
    "clear": lambda s: s.clear(),
    "update": lambda s: s.update(color="red"),
    "update in place": lambda s: s.__ior__({"color": "red"}),
    "setdefault": lambda s: s.setdefault("color", "red"),
    "set_many": lambda s: s.set_many({"color": "red"}),
    "remove": lambda s: s.remove("user"),
    "get_or_set": lambda s: s.get_or_set("color", "red"),
    "rotate": lambda s: s.rotate(),
    "set_lifetime": lambda s: s.set_lifetime(60),
    "modified": lambda s: setattr(s, "modified", True),
    "permanent": lambda s: setattr(s, "permanent", True),
    "flash": lambda s: flash("too late"),
}


@pytest.mark.parametrize("looked_at", [True, False], ids=["looked-at", "untouched"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_while_streaming_is_lost_and_logged(
    write: Act, looked_at: bool, memory_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether or not the request looked at the session before; the response is whole."""
    visitor = memory_site.visitor()
    a_cart(visitor)
    before, records = what_is_stored(visitor), memory_site.stored()

    def body() -> Iterator[str]:
        yield "one "
        write(session)
        yield "two"

    first: Act = (lambda session: session.get("user")) if looked_at else (lambda session: None)
    response = whole(visitor, streaming(body, first))
    assert response.status_code == 200
    assert response.get_data(as_text=True) == "one two"
    assert logged(caplog)
    assert memory_site.stored() == records
    assert what_is_stored(visitor) == before


@pytest.fixture
def memory_site(clock: Any) -> Iterator[Site]:
    """What is decided above the stores needs one of them only."""
    with SiteMaker("memory://", "", clock) as make:
        yield make()


def test_a_write_while_streaming_is_lost_on_each_store(site: Site) -> None:
    visitor = site.visitor()
    a_cart(visitor)
    before = what_is_stored(visitor)

    def body() -> Iterator[str]:
        WRITES["assign"](session)
        yield "."

    assert whole(visitor, streaming(body)).get_data(as_text=True) == "."
    assert what_is_stored(visitor) == before


def test_an_anonymous_stream_cannot_start_a_session(memory_site: Site) -> None:
    """Its cookie could not be sent any more."""
    visitor = memory_site.visitor()

    def body() -> Iterator[str]:
        session["user"] = "alice"
        session.update_atomic("n", lambda n: n + 1, 0)
        yield "done"

    response = whole(visitor, streaming(body))
    assert response.get_data(as_text=True) == "done"
    assert "Set-Cookie" not in response.headers
    assert memory_site.stored() == {}


# Changes in place are found when the response closes --------------------------------


IN_PLACE: dict[str, Act] = {
    "list": lambda s: s["cart"].append("late"),
    "set": lambda s: s["tags"].add("late"),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize(
    "first",
    [
        lambda session: None,
        lambda session: session.get("user"),
        lambda session: (session["cart"], session["tags"]),
        lambda session: session.update(user="bob"),
        lambda session: (session["cart"].append("in time"), session["tags"].add("in time")),
    ],
    ids=["untouched", "other key read", "values read", "other key written", "values changed"],
)
def test_a_nested_change_while_streaming_is_reported_as_lost(
    first: Act, change: Act, memory_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = memory_site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        change(session)
        yield "done"

    response = whole(visitor, streaming(body, first))
    assert response.status_code == 200
    assert response.get_data(as_text=True) == "done"
    (message,) = logged(caplog)
    key = "cart" if change is IN_PLACE["list"] else "tags"
    assert f"session['{key}']" in message
    assert "lost" in message
    stored = what_is_stored(visitor)
    assert "late" not in stored["cart"]
    assert "late" not in stored["tags"]


def test_a_lost_change_is_reported_on_each_store(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        session["cart"].append("a secret, not to be logged")
        yield "done"

    whole(visitor, streaming(body, lambda session: session["cart"]))
    (message,) = logged(caplog)
    assert "session['cart']" in message
    assert "secret" not in message
    assert what_is_stored(visitor)["cart"] == ["mug"]


def test_a_lost_change_is_reported_when_the_client_goes_away(
    memory_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = memory_site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        session["cart"].append("late")
        yield "one"
        yield "two"

    response = visitor.ask(streaming(body, lambda session: session["cart"]))
    assert next(iter(response.response)) == b"one"
    response.close()
    assert len(logged(caplog)) == 1


def test_a_value_that_could_not_even_be_kept_is_reported_too(
    memory_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = memory_site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        session["cart"].append(object())
        yield "done"

    response = whole(visitor, streaming(body, lambda session: session["cart"]))
    assert response.get_data(as_text=True) == "done"
    (message,) = logged(caplog)
    assert "cart" in message


def test_nothing_is_reported_for_a_save_that_failed(
    memory_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Its changes are lost as well, but by another cause, which was reported."""
    visitor = memory_site.visitor()
    a_cart(visitor)
    memory_site.app.testing = False
    response = whole(visitor, lambda session: session["cart"].append(object()))
    assert response.status_code == 500
    assert logged(caplog) == []


def test_an_ordinary_response_reports_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    visitor = site.visitor()
    a_cart(visitor)
    visitor.run(lambda session: session["cart"].append("cup"))
    assert what_is_stored(visitor)["cart"] == ["mug", "cup"]
    assert logged(caplog) == []


# Beside the stream ------------------------------------------------------------------------------


def test_a_thread_that_outlives_the_response_writes_in_vain(
    memory_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """`copy_current_request_context` hands the very session on."""
    visitor = memory_site.visitor()
    a_cart(visitor)
    response_is_out = threading.Event()
    outcome: list[object] = []

    def view(session_: SessionData) -> None:
        session_["step"] = 1

        @copy_current_request_context
        def later() -> None:
            assert response_is_out.wait(30)
            outcome.append(session["step"])
            session["step"] = 2

        thread.append(threading.Thread(target=later))
        thread[0].start()

    thread: list[threading.Thread] = []
    visitor.run(view)
    response_is_out.set()
    thread[0].join()
    assert outcome == [1]
    assert len(logged(caplog)) == 1
    assert what_is_stored(visitor)["step"] == 1


def test_a_session_that_was_ended_before_its_stream_reads_as_empty(site: Site) -> None:
    visitor = site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        yield f"{dict(session)} {session.handle}"

    response = whole(visitor, streaming(body, lambda session: session.destroy()))
    assert response.get_data(as_text=True) == "{} None"
    assert site.stored() == {}
