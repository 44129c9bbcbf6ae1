"""A streamed body runs after the session was saved: it can read the session, not write to it."""

from __future__ import annotations

import io
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import (
    Response,
    copy_current_request_context,
    current_app,
    flash,
    request,
    send_file,
    stream_template_string,
    stream_with_context,
)
from werkzeug.local import LocalProxy
from werkzeug.test import TestResponse
from werkzeug.wsgi import ClosingIterator

from flask_gsession import Session as FurtherSession
from flask_gsession import SessionData, session
from tests.harness.apps import Site, SiteMaker, Visitor

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


def stored_values(visitor: Visitor) -> dict[str, Any]:
    """The whole session, as a request afterwards finds it."""
    stored: dict[str, Any] = visitor.run(lambda session: session.copy())
    return stored


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The errors that Flask-GSession logged."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "flask_gsession" and record.levelno >= logging.ERROR
    ]


def test_reading_while_streaming(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Including this request's own writes."""
    visitor = site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        yield session["user"]
        yield f" {session['cart']} {sorted(session)} {session.get('color')} {len(session)}"
        yield f" {session.handle is not None} {session.new} {session.size > 0}"

    response = whole(visitor, streaming(body, lambda session: session["cart"].append("cup")))
    text = "alice ['mug', 'cup'] ['cart', 'tags', 'user'] None 3 True False True"
    assert response.get_data(as_text=True) == text
    assert stored_values(visitor)["cart"] == ["mug", "cup"]
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


def test_changes_before_a_stream_are_stored_before_it(site: Site) -> None:
    """A second request, sent by the client at the first byte, finds it."""
    visitor = site.visitor()
    a_cart(visitor)
    other = visitor.another_tab()
    seen = []

    def body() -> Iterator[str]:
        seen.append(stored_values(other)["step"])
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
    before, records = stored_values(visitor), memory_site.stored()

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
    assert stored_values(visitor) == before


@pytest.fixture
def memory_site(clock: Any) -> Iterator[Site]:
    """One store is enough: the code under test is above the stores."""
    with SiteMaker("memory://", "", clock) as make:
        yield make()


def test_a_write_while_streaming_is_lost_on_each_store(site: Site) -> None:
    visitor = site.visitor()
    a_cart(visitor)
    before = stored_values(visitor)

    def body() -> Iterator[str]:
        WRITES["assign"](session)
        yield "."

    assert whole(visitor, streaming(body)).get_data(as_text=True) == "."
    assert stored_values(visitor) == before


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


# Caches: the headers are made before the body reads ---------------------------------------------


def page() -> Iterator[str]:
    yield "<h1>Orders of "
    yield str(session.get("user"))
    yield "</h1>"


class Chunks:
    """An iterator of somebody's own around another."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self.body)


class Page:
    """A body that makes its iterator when it is asked for it."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def __iter__(self) -> Any:
        yield from self.body


def delegating(body: Any) -> Iterator[str]:
    yield from body


def closure() -> Iterator[str]:
    body = stream_with_context(page())

    def outer() -> Iterator[str]:
        yield from body

    return outer()


def copied_context() -> Iterator[str]:
    """A generator that reads in another thread, in a copy of the context."""
    read = copy_current_request_context(lambda: str(session.get("user")))

    def body() -> Iterator[str]:
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(read()))
        thread.start()
        thread.join()
        yield from found

    return body()


class OwnResponse(Response):
    """A response class of an application."""


READERS: dict[str, Callable[[], Any]] = {
    "stream_with_context": lambda: Response(stream_with_context(page())),
    "the generator itself": lambda: stream_with_context(page()),
    "of the generator function": lambda: stream_with_context(page)(),  # type: ignore[operator]
    "an own response class": lambda: OwnResponse(stream_with_context(page())),
    "stream_template_string": lambda: stream_template_string("Orders of {{ session.user }}"),
    "chained": lambda: Response(itertools.chain(["a"], stream_with_context(page()))),
    "mapped": lambda: Response(map(str.upper, stream_with_context(page()))),
    "generator expression": lambda: Response(each for each in stream_with_context(page())),
    "generator around it": lambda: Response(delegating(stream_with_context(page()))),
    "generator around two": lambda: Response(delegating(delegating(stream_with_context(page())))),
    "closure": lambda: Response(closure()),
    "iterator of a class": lambda: Response(Chunks(stream_with_context(page()))),
    "iterable of a class": lambda: Response(Page(stream_with_context(page()))),
    "ClosingIterator": lambda: Response(ClosingIterator(stream_with_context(page()))),
    "around a response": lambda: Response(
        delegating(Response(stream_with_context(page())).iter_encoded())
    ),
    "copied context": lambda: Response(copied_context()),
    "direct_passthrough": lambda: Response(
        (each.encode() for each in stream_with_context(page())), direct_passthrough=True
    ),
}


@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_body_that_can_read_the_session_sets_vary(
    make: Callable[[], Any], method: str, clock: Any
) -> None:
    with SiteMaker("memory://", "", clock) as make_site:
        site = make_site(token_header="X-Session")
        visitor = site.visitor()
        a_cart(visitor)

        def view(_: Any) -> Response:
            response = current_app.make_response(make())
            response.headers["Cache-Control"] = "max-age=60"
            return response

        response = visitor.ask(view, method=method, buffered=True)
        if method == "GET":
            assert "alice" in response.text.lower()
        assert set(response.vary) == {"Cookie", "X-Session"}
        assert "Set-Cookie" not in response.headers
        assert "no-store" not in response.headers["Cache-Control"]


def test_a_body_that_can_read_the_session_sets_vary_on_each_store(site: Site) -> None:
    for visitor in (site.visitor(), site.visitor("x")):
        with site.counted() as count:
            response = visitor.ask(lambda _: Response(stream_with_context(iter("abc"))))
        assert not count.calls
        assert set(response.vary) == {"Cookie"}
        response.close()


def test_not_modified_sets_vary_too(memory_site: Site) -> None:
    """RFC 9110, 15.4.5: with the headers that a 200 would have."""
    visitor = memory_site.visitor()
    a_cart(visitor)

    def view(_: Any) -> Response:
        response = Response(stream_with_context(page()))
        response.set_etag("1")
        return response.make_conditional(request)

    response = visitor.ask(view, headers={"If-None-Match": '"1"'})
    assert response.status_code == 304
    assert set(response.vary) == {"Cookie"}


def test_a_further_session_can_be_read_as_well(memory_site: Site) -> None:
    further = FurtherSession(memory_site.app, store="memory://", cookie_name="further")

    def body() -> Iterator[str]:
        yield str(further.session.get("user"))

    response = whole(memory_site.visitor(), streaming(body))
    assert set(response.vary) == {"Cookie"}


def late_failure() -> Iterator[str]:
    yield "a"
    yield str(session.get("user"))  # outside the context: it raises


def test_bodies_that_cannot_read_the_session_set_no_vary(memory_site: Site, tmp_path: Path) -> None:
    """A request that does not touch the session has no Vary: files, and other streams."""
    file = tmp_path / "file.txt"
    file.write_text("0123456789")

    class Rows:
        def __init__(self, app: Any) -> None:
            self.app, self.session = app, session  # the proxy, which nobody looks at

        def __iter__(self) -> Iterator[str]:
            yield "row"

    def with_locals() -> Iterator[str]:
        proxies = (session, request, LocalProxy(lambda: 1 // 0))
        yield "a"
        assert len(proxies) == 3

    def started() -> Any:
        body = with_locals()
        return itertools.chain([next(body)], body)

    bodies: dict[str, Callable[[], Any]] = {
        "send_file": lambda: send_file(file),
        "send_file, conditional": lambda: send_file(file, conditional=True, etag=True),
        "send_file of bytes": lambda: send_file(io.BytesIO(b"abc"), mimetype="text/plain"),
        "list": lambda: Response(["a", "b"]),
        "tuple": lambda: Response(("a", "b")),
        "text": lambda: Response("a"),
        "plain generator": lambda: Response(delegating(["a", "b"])),
        "iterator": lambda: Response(iter(["a", "b"])),
        "iterable": lambda: Response(Rows(current_app)),
        "generator with proxies": lambda: Response(with_locals()),
        "started generator": lambda: Response(started()),
        "generator that fails": lambda: Response(late_failure()),
        "map": lambda: Response(map(str, range(3))),
        "nothing": lambda: Response(status=204),
    }
    visitor = memory_site.visitor()
    a_cart(visitor)
    for name, make in bodies.items():
        for headers in ({}, {"Range": "bytes=2-4"}):
            response = visitor.ask(lambda _, make=make: make(), headers=headers)
            assert response.status_code in (200, 204, 206), name
            assert "Vary" not in response.headers, name
            response.close()


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
    stored = stored_values(visitor)
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
    assert stored_values(visitor)["cart"] == ["mug"]


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
    assert stored_values(visitor)["cart"] == ["mug", "cup"]
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
    assert stored_values(visitor)["step"] == 1


def test_a_session_that_was_ended_before_its_stream_reads_as_empty(site: Site) -> None:
    visitor = site.visitor()
    a_cart(visitor)

    def body() -> Iterator[str]:
        yield f"{dict(session)} {session.handle}"

    response = whole(visitor, streaming(body, lambda session: session.destroy()))
    assert response.get_data(as_text=True) == "{} None"
    assert site.stored() == {}
