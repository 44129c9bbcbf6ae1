"""The session as views, templates, threads and test clients use it, and the extension around it."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask
import pytest
from flask import Flask, Response
from flask.sessions import SessionMixin
from marshmallow import fields
from pymongo import MongoClient, monitoring
from redis import Redis

import flask_gsession
from flask_gsession import Session, SessionEnded, SettingError, ValueRefused
from flask_gsession.events import (
    SessionCreated,
    SessionDestroyed,
    SessionRenewed,
    SessionRotated,
    SessionSaved,
)
from flask_gsession.stores import (
    StoreOptions,
    open_store,
)
from flask_gsession.stores.parts import parts_of
from flask_gsession.testing import FakeClock
from flask_gsession.typed import SessionKey
from tests.harness.apps import PATIENCE, Site, SiteMaker, Visitor, at_once


def visitor_with(site: Site, **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values))
    return visitor


# A dict --------------------------------------------------------------------------------------

DICT_OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "item": lambda d: d["a"],
    "missing item": lambda d: d["x"],
    "get": lambda d: (d.get("a"), d.get("x"), d.get("x", 5), d.get("none", 5)),
    "contains": lambda d: ("a" in d, "x" in d, None in d, 1 in d),
    "len and bool": lambda d: (len(d), bool(d)),
    "keys": lambda d: list(d.keys()),
    "values": lambda d: list(d.values()),
    "items": lambda d: list(d.items()),
    "iteration": lambda d: [*d],
    "reversed": lambda d: list(reversed(d)),
    "equality": lambda d: (d == dict(d), d == {}, d != {}, dict(d) == d),
    "view operators": lambda d: (d.keys() & {"a", "x"}, ("a", 1) in d.items()),
    "copy": lambda d: (d.copy(), type(d.copy())),
    "copy by module": lambda d: (a_copy := copy.copy(d), a_copy.update(a=9), type(a_copy)),
    "deep copy": lambda d: (a_copy := copy.deepcopy(d), a_copy["b"].append(9), type(a_copy)),
    "or": lambda d: (d | {"a": 9, "z": 1}, {"a": 9, "z": 1} | d),
    "or in place": lambda d: d.__ior__({"a": 9, "z": 1}) is d,
    "unpacking": lambda d: ({**d}, [*d.items()]),
    "set": lambda d: d.__setitem__("b", 7),
    "set a new key": lambda d: d.__setitem__("z", 7),
    "delete": lambda d: d.__delitem__("a"),
    "delete what is missing": lambda d: d.__delitem__("x"),
    "delete twice": lambda d: (d.__delitem__("a"), d.__delitem__("a")),
    "delete and get": lambda d: (d.__delitem__("a"), d.get("a"), "a" in d, len(d)),
    "set and delete": lambda d: (d.__setitem__("z", 1), d.__delitem__("z"), list(d)),
    "pop": lambda d: (d.pop("a"), d.pop("x", 5)),
    "pop what is missing": lambda d: d.pop("x"),
    "popitem": lambda d: (d.popitem(), d.popitem()),
    "popitem until the end": lambda d: [d.popitem() for _ in range(9)],
    "setdefault": lambda d: (d.setdefault("a", 9), d.setdefault("none", 9), d.setdefault("z", 9)),
    "update": lambda d: d.update({"a": 2}, z=3),
    "update by pairs": lambda d: d.update([("a", 2), ("y", 3)]),
    "update by itself": lambda d: d.update(d),
    "clear": lambda d: (d.clear(), list(d), bool(d)),
    "clear and set": lambda d: (d.clear(), d.update(z=1), list(d.items())),
    "change while iterating over a list": lambda d: [d.pop(key) for key in list(d)],
}


def outcome(operation: Callable[[Any], Any], target: Any) -> Any:
    """The result; for an error, its type and the key it names."""
    try:
        result = operation(target)
    except KeyError as error:
        return KeyError, "empty" in str(error) or error.args
    return result


def test_it_works_as_a_dict_does(site: Site) -> None:
    start = {"a": 1, "b": [2], "none": None, "c": "text"}
    for what, operation in DICT_OPERATIONS.items():
        model = dict(start)
        expected = outcome(operation, model)
        if what == "or in place":
            expected = True
        unsaved, stored = site.visitor(), visitor_with(site, **start)
        for visitor in (unsaved, stored):

            def view(
                session: Any,
                operation: Callable[[Any], Any] = operation,
                fresh: bool = visitor is unsaved,
            ) -> Any:
                if fresh:
                    session.update(start)
                return outcome(operation, session._get_current_object()), dict(session)

            assert visitor.run(view) == (expected, model), what
            assert visitor.run(dict) == model, what


def test_it_has_the_type_that_flask_expects(site: Site) -> None:
    def view(session: Any) -> None:
        session = session._get_current_object()
        assert isinstance(session, SessionMixin)
        assert isinstance(session, MutableMapping)
        assert isinstance(session, flask_gsession.SessionData)
        assert dict(session) == {}
        assert session.accessed is True

    site.visitor().run(view)
    assert flask_gsession.session is flask.session


def test_repr_shows_no_value_and_loads_nothing(site: Site) -> None:
    visitor = visitor_with(site, name="Ada Lovelace")
    with site.counted() as count:
        assert visitor.run(lambda session: repr(session)) == "<SessionData not loaded>"
    assert not count.calls
    text = visitor.run(lambda session: (session["name"], repr(session))[1])
    assert "Ada" not in text
    assert "keys=1" in text


def test_set_many_sets_all_or_nothing(make_site: SiteMaker) -> None:
    for debug in (False, True):
        visitor = visitor_with(make_site(debug=debug), a=0)

        def view(session: Any) -> None:
            session.set_many({"a": 1, "b": 2})
            for bad in ({"c": 3, "d": object()}, {"c": 3, 4: 4}, {"a": 5, "b": [len]}):
                with pytest.raises(ValueRefused):
                    session.set_many(bad)

        visitor.run(view)
        assert visitor.run(dict) == {"a": 1, "b": 2}


def test_remove_says_how_many_there_were(site: Site) -> None:
    visitor = visitor_with(site, a=1, b=2, c=3)
    assert visitor.run(lambda session: session.remove("a", "x", "c", "a")) == 2
    assert visitor.run(lambda session: session.remove()) == 0
    assert visitor.run(dict) == {"b": 2}


def test_get_or_set(site: Site) -> None:
    visitor = visitor_with(site, there=None)
    calls: list[int] = []

    def make() -> list[int]:
        calls.append(1)
        return [1]

    for _ in range(2):
        assert visitor.run(lambda session: session.get_or_set("made", make)) == [1]
        assert visitor.run(lambda session: session.get_or_set("there", make)) is None
        assert visitor.run(lambda session: session.get_or_set("plain", 5)) == 5
    assert len(calls) == 1
    assert visitor.run(dict) == {"there": None, "made": [1], "plain": 5}


# Its repr and properties -----------------------------------------------------------------------


def test_a_session_that_is_not_stored_has_no_particulars(site: Site) -> None:
    def view(session: Any) -> Any:
        session["a"] = 1
        return session.new, session.handle, session.created_at, session.expires_at, session.size

    assert site.visitor().run(view) == (True, None, None, None, 0)


def test_properties_of_a_stored_session(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    start = datetime.fromtimestamp(int(site.clock() * 1000) / 1000, UTC)
    site.clock.advance(30)

    def view(session: Any) -> None:
        assert session.new is False
        assert session.created_at == start
        assert session.created_at.tzinfo is UTC
        assert session.expires_at == start + timedelta(seconds=7260)
        assert session.size == len("a") + 1
        assert len(session.handle) == 43

    visitor.run(view)
    handle = visitor.run(lambda session: session.handle)
    visitor.run(lambda session: session.update(b="x" * 1000))
    assert visitor.run(lambda session: session.size) > 1000
    assert visitor.run(lambda session: session.handle) == handle
    assert visitor.run(lambda session: session.created_at) == start


def test_handle_and_times_follow_the_request(site: Site) -> None:
    visitor = visitor_with(site, a=1)

    def view(session: Any) -> None:
        assert not session.new
        session.destroy()
        assert session.new
        assert (session.handle, session.expires_at, session.size) == (None, None, 0)
        session["b"] = 1
        assert session.new

    visitor.run(view)
    assert visitor.run(lambda session: session.new) is False


def test_modified_reports_changes(site: Site) -> None:
    visitor = visitor_with(site, a=1, items=[])

    def view(session: Any) -> None:
        assert session.modified is False
        for change, back in (
            (lambda: session.update(a=2), lambda: session.update(a=1)),
            (lambda: session["items"].append(1), lambda: session["items"].clear()),
            (lambda: session.pop("a"), lambda: session.update(a=1)),
            (
                lambda: setattr(session, "modified", True),
                lambda: setattr(session, "modified", False),
            ),
        ):
            change()
            assert session.modified is True
            back()
            assert session.modified is False
        session.rotate()
        assert session.modified is True

    visitor.run(view)


def test_modified_forces_a_save(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    with site.counted() as count:
        visitor.run(lambda session: setattr(session, "modified", True))
    assert count.calls == ["load", "save"]
    assert visitor.run(dict) == {"a": 1}


def test_permanent_is_off_and_kept_as_flask_keeps_it(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    assert visitor.run(lambda session: session.permanent) is False
    assert "_permanent" not in visitor.run(dict)
    visitor.run(lambda session: setattr(session, "permanent", True))
    assert visitor.run(lambda session: session.permanent) is True
    assert visitor.run(dict) == {"a": 1, "_permanent": True}


# Its life ------------------------------------------------------------------------------------


def test_reload_discards_and_sees_changes_of_others(site: Site) -> None:
    visitor = visitor_with(site, a=1, items=[1], gone=1)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        session.update(a=5, mine=1)
        session["items"].append(2)
        session.rotate()
        tab.run(lambda session: (session.update(b=2), session.pop("gone")))
        session.reload()
        assert dict(session) == {"a": 1, "items": [1], "b": 2}
        assert not session.modified
        session["a"] = 6

    visitor.run(view)
    assert visitor.run(dict) == {"a": 6, "items": [1], "b": 2}
    assert visitor.cookie == tab.cookie


def test_reload_of_a_session_that_is_not_stored(site: Site) -> None:
    def view(session: Any) -> None:
        session["a"] = 1
        session.reload()
        assert dict(session) == {}
        session["b"] = 2

    visitor = site.visitor()
    visitor.run(view)
    assert visitor.run(dict) == {"b": 2}


def test_reload_after_destroy_stays_empty(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    visitor.run(lambda session: (session.destroy(), session.reload(), session.update(b=2)))
    assert visitor.run(dict) == {"b": 2}


BAD_SECONDS = (-1, math.nan, math.inf, -math.inf, "60", None, True, [], timedelta(seconds=-1))


def test_a_bad_lifetime_is_refused(site: Site) -> None:
    visitor = visitor_with(site, a=1)

    def view(session: Any) -> None:
        for seconds in (*BAD_SECONDS, 0, 0.5, 32 * 86400):
            with pytest.raises(ValueError, match="lifetime"):
                session.set_lifetime(seconds)
        with pytest.raises(ValueError, match="allowed are 1 to 2678400 "):
            session.set_lifetime(0)
        assert not session.modified

    visitor.run(view)


def test_a_duration_may_be_a_timedelta(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    before = visitor.another_tab()

    def view(session: Any) -> None:
        session.set_lifetime(timedelta(minutes=5))
        session.rotate(timedelta(0))

    visitor.run(view)
    ends = visitor.run(lambda session: session.expires_at.timestamp()) - site.clock()
    assert 300 <= ends <= 330
    assert before.run(dict) == {}


def test_a_bad_grace_is_refused(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    cookie = visitor.cookie

    def view(session: Any) -> None:
        for grace in (*BAD_SECONDS[:5], *BAD_SECONDS[6:], 3601):
            with pytest.raises(ValueError, match="grace"):
                session.rotate(grace)
        assert not session.modified

    visitor.run(view)
    assert visitor.cookie == cookie


def test_destroy_ends_the_session_at_once(site: Site) -> None:
    visitor = visitor_with(site, a=1)

    def view(session: Any) -> None:
        assert session["a"] == 1
        session.destroy()
        assert not site.stored()
        assert dict(session) == {}
        session["b"] = 2
        session.destroy()
        session["c"] = 3

    visitor.run(view)
    assert visitor.run(dict) == {"c": 3}


def test_each_step_of_its_life_is_an_event(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    first = visitor.run(lambda session: session.handle)
    visitor.run(lambda session: session.update(a=2))
    site.clock.advance(100)
    visitor.run(dict)
    visitor.run(lambda session: session.rotate())
    second = visitor.run(lambda session: session.handle)
    visitor.run(lambda session: session.destroy())
    assert [event.handle for event in site.happened(SessionCreated)] == [first]
    saved = site.happened(SessionSaved)[0]
    assert (saved.handle, saved.conflicts) == (first, 0)
    assert saved.payload_bytes > 0
    assert [event.handle for event in site.happened(SessionRenewed)] == [first]
    assert site.happened(SessionRotated) == [SessionRotated(second, first)]
    assert [event.handle for event in site.happened(SessionDestroyed)] == [second]


def test_a_subscriber_that_fails_does_no_harm(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    @site.ext.on(SessionCreated)
    def fail(event: SessionCreated) -> None:
        raise ZeroDivisionError

    visitor = visitor_with(site, a=1)
    assert visitor.run(dict) == {"a": 1}
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(TypeError):
        site.ext.on(int, print)  # type: ignore[type-var]


# Around the view -----------------------------------------------------------------------------


def test_every_hook_around_the_view_may_write(make_site: SiteMaker) -> None:
    site = make_site()

    @site.app.before_request
    def before() -> None:
        flask.session["before"] = 1

    @site.app.after_request
    def after(response: Response) -> Response:
        flask.session["after"] = flask.session["before"] + 1
        return response

    @site.app.errorhandler(418)
    def teapot(error: Exception) -> tuple[str, int]:
        flask.session["teapot"] = 3
        return "", 418

    visitor = site.visitor()
    assert visitor.ask(lambda session: flask.abort(418)).status_code == 418
    assert visitor.run(dict) == {"before": 1, "after": 2, "teapot": 3}


def test_templates_read_the_session(site: Site) -> None:
    page = (
        "{{ session.name }} {{ session['cart'][0].title }} {{ session.get('none') }}"
        "{% for key in session %} {{ key }}{% endfor %} {{ 'name' in session }}"
        "{% for text in get_flashed_messages() %} {{ text }}{% endfor %}"
    )
    visitor = visitor_with(site, name="Ada", cart=[{"title": "mug"}])
    visitor.run(lambda session: flask.flash("thank you"))
    text = visitor.run(lambda session: flask.render_template_string(page))
    assert text == "Ada mug None name cart _flashes True thank you"
    assert "_flashes" not in visitor.run(dict)


def test_flashes_with_categories(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: (flask.flash("saved", "ok"), flask.flash("but late", "warning")))
    messages = lambda session: flask.get_flashed_messages(with_categories=True)  # noqa: E731
    assert visitor.run(messages) == [("ok", "saved"), ("warning", "but late")]
    assert visitor.run(messages) == []


def test_a_stream_may_read_loaded_values(site: Site) -> None:
    visitor = visitor_with(site, words=["a", "b"])

    def view(session: Any) -> Response:
        session["more"] = 1
        return Response(flask.stream_with_context(part for part in session["words"]))

    assert visitor.ask(view).text == "ab"
    assert visitor.run(dict) == {"words": ["a", "b"], "more": 1}


LOST: dict[str, Callable[[Any], object]] = {
    "assignment": lambda session: session.update(a=2),
    "deletion": lambda session: session.pop("a"),
    "clear": lambda session: session.clear(),
    "rotate": lambda session: session.rotate(),
    "lifetime": lambda session: session.set_lifetime(60),
    "permanent": lambda session: setattr(session, "permanent", True),
    "modified": lambda session: setattr(session, "modified", True),
    "flash": lambda session: flask.flash("too late"),
}


def test_a_write_in_a_stream_is_lost_and_logged(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """The page is whole all the same."""
    visitor = visitor_with(site, a=1)
    before = site.stored()
    looks: list[Callable[[Any], object]] = [
        lambda session: session["a"],
        lambda session: None,
        lambda session: session.accessed,  # through the proxy, without loading it
    ]
    for look in looks:
        for what, write in LOST.items():
            caplog.clear()

            def body(write: Any = write) -> Iterator[str]:
                write(flask.session)
                yield "the end"

            response = visitor.ask(
                lambda session, look=look, body=body: (
                    look(session),
                    Response(flask.stream_with_context(body())),
                )[1]
            )
            assert response.text == "the end", what
            (record,) = [record for record in caplog.records if record.name == "flask_gsession"]
            assert record.levelno == logging.ERROR, what
            assert "before a streamed body" in record.getMessage(), what
            assert site.stored() == before, what
            assert visitor.run(dict) == {"a": 1}, what


def test_a_session_saved_by_hand_before_the_first_look_can_be_written(site: Site) -> None:
    def view(session: Any) -> None:
        site.app.session_interface.save_session(site.app, flask.session, Response())
        session["a"] = 1

    visitor = site.visitor()
    visitor.run(view)
    assert visitor.run(dict) == {"a": 1}


def test_a_nested_change_in_a_stream_is_reported(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = visitor_with(site, items=[1])

    def view(session: Any) -> Response:
        items = session["items"]
        items.append(2)

        def body() -> Iterator[str]:
            yield "x"
            items.append(3)

        return Response(body())

    with visitor.ask(view) as response:
        assert response.text == "x"
    assert visitor.run(dict) == {"items": [1, 2]}
    (record,) = [record for record in caplog.records if record.name == "flask_gsession"]
    assert record.levelno == logging.ERROR
    assert "session['items']" in record.getMessage()


def test_writes_of_a_stream_that_store_at_once_are_stored(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = visitor_with(site, a=1, b=2)

    def body() -> Iterator[str]:
        session: Any = flask.session
        yield str(session.update_atomic("a", lambda a: a + 1))
        yield str(session.take("b"))
        with session.transaction():
            session["c"] = 3
        with session.lock():
            session["d"] = 4

    with visitor.ask(lambda _: Response(flask.stream_with_context(body()))) as response:
        assert response.text == "22"
    assert visitor.run(dict) == {"a": 2, "c": 3, "d": 4}
    assert "is lost" not in caplog.text

    def logout() -> Iterator[str]:
        flask.session.destroy()  # type: ignore[attr-defined]
        yield "bye"

    with visitor.ask(lambda _: Response(flask.stream_with_context(logout()))) as response:
        assert response.text == "bye"
    assert not site.stored()


def test_a_write_at_teardown_is_lost_and_logged(
    make_site: SiteMaker, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()

    @site.app.teardown_request
    def late(error: BaseException | None) -> None:
        flask.session["late"] = 1

    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    assert caplog.text.count("session['late'] was changed after") == 1
    assert visitor.run(dict) == {"a": 1}


def test_a_thread_of_the_request_shares_its_session(site: Site) -> None:
    visitor = visitor_with(site, a=1)

    def view(session: Any) -> None:
        @flask.copy_current_request_context
        def work() -> None:
            flask.session["thread"] = flask.session["a"] + 1

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert session["thread"] == 2

    with site.counted() as count:
        visitor.run(view)
    assert count.calls == ["load", "save"]
    assert visitor.run(dict) == {"a": 1, "thread": 2}


def test_threads_that_look_at_once_load_it_once(site: Site) -> None:
    visitor = visitor_with(site, **{f"key {n}": [n] for n in range(8)})

    def view(session: Any) -> None:
        def look(number: int) -> None:
            flask.session[f"key {number}"].append(number)

        at_once(*[flask.copy_current_request_context(lambda n=n: look(n)) for n in range(8)])

    with site.counted() as count:
        visitor.run(view)
    assert count.calls == ["load", "save"]
    assert visitor.run(dict) == {f"key {n}": [n, n] for n in range(8)}


def test_async_views_use_the_session(make_site: SiteMaker) -> None:
    site = make_site()

    @site.app.get("/async")
    async def view() -> dict[str, Any]:
        flask.session["n"] = flask.session.get("n", 0) + 1
        await asyncio.sleep(0)
        flask.session.setdefault("items", []).append(flask.session["n"])
        total = flask_gsession.session.update_atomic("total", lambda n: n + 1, 0)
        return {"n": flask.session["n"], "total": total}

    visitor = site.visitor()
    assert [visitor.get("/async").json for _ in range(3)] == [
        {"n": n, "total": n} for n in (1, 2, 3)
    ]
    assert visitor.run(dict) == {"n": 3, "items": [1, 2, 3], "total": 3}


# Test clients --------------------------------------------------------------------------------


def test_session_transactions(site: Site) -> None:
    visitor = site.visitor()
    with visitor.session_transaction() as session:
        session["a"] = [1]
    assert visitor.run(dict) == {"a": [1]}
    with visitor.session_transaction() as session:
        session["a"].append(2)
        flask_session = session
    assert visitor.run(dict) == {"a": [1, 2]}
    flask_session["late"] = 1  # logged as lost
    assert visitor.run(dict) == {"a": [1, 2]}
    with visitor.session_transaction() as session:
        assert session["a"] == [1, 2]
        session.destroy()
    assert visitor.cookie is None
    with visitor.session_transaction() as session:
        assert session.new


def test_the_session_of_the_last_request_can_be_looked_at(site: Site) -> None:
    visitor = site.visitor()
    with visitor:
        visitor.run(lambda session: session.update(a=1))
        assert flask.session["a"] == 1
        visitor.run(lambda session: session.update(b=2))
        assert dict(flask.session) == {"a": 1, "b": 2}


def test_outside_a_request_there_is_no_session(site: Site) -> None:
    with pytest.raises(RuntimeError, match="outside of request context"):
        flask_gsession.session.get("a")
    with site.app.app_context(), pytest.raises(RuntimeError, match="outside of request context"):
        site.ext.session.get("a")


# Several of them -----------------------------------------------------------------------------


def test_two_sessions_on_one_application(make_site: SiteMaker) -> None:
    site = make_site()
    other = open_store("memory://", StoreOptions())[0]
    admin = Session(site.app, cookie_name="admin", store=other, idle_timeout=600)
    visitor = site.visitor()

    def both(session: Any) -> tuple[Any, Any]:
        return dict(session), dict(admin.session)

    visitor.run(lambda session: session.update(who="customer"))
    assert visitor.get_cookie("admin") is None
    response = visitor.ask(lambda session: admin.session.update(who="admin"))
    assert response.headers.getlist("Set-Cookie")[0].startswith("admin=")
    assert len(response.headers.getlist("Set-Cookie")) == 1
    assert visitor.run(both) == ({"who": "customer"}, {"who": "admin"})
    with site.counted() as count:
        visitor.run(lambda session: admin.session.setdefault("items", []).append(1))
        visitor.get("/untouched")
    assert not count.calls
    visitor.run(lambda session: (session.update(n=1), admin.session.update(n=2)))
    assert visitor.run(both) == (
        {"who": "customer", "n": 1},
        {"who": "admin", "items": [1], "n": 2},
    )
    visitor.run(lambda session: admin.session.destroy())
    assert visitor.run(both) == ({"who": "customer", "n": 1}, {})
    assert visitor.get_cookie("admin") is None
    visitor.run(lambda session: (admin.session.update(a=1), session.destroy()))
    assert visitor.run(both) == ({}, {"a": 1})
    assert visitor.run(lambda session: site.ext.session == session) is True


def test_a_further_session_belongs_to_its_own_request(make_site: SiteMaker) -> None:
    """Also where it is kept, and first looked at in the request of somebody else."""
    site = make_site()
    further = Session(site.app, store="memory://", cookie_name="further")
    visitor, other = site.visitor(), site.visitor()
    other.run(lambda session: further.session.update(mine=1))
    kept: Any = visitor.run(lambda session: further.session._get_current_object())  # type: ignore[attr-defined]
    assert other.run(lambda session: (dict(kept), dict(further.session))) == ({}, {"mine": 1})


def test_a_token_of_one_session_means_nothing_in_the_other(make_site: SiteMaker) -> None:
    site = make_site()
    admin = Session(site.app, cookie_name="admin", store=site.store, clock=site.clock)
    customer = visitor_with(site, who="customer")
    assert customer.cookie is not None
    customer.set_cookie("admin", customer.cookie)
    with site.counted() as count:
        assert customer.run(lambda session: dict(admin.session)) == {}
    assert not count.calls


def test_several_applications_do_not_disturb_each_other(
    store_url: str, store_prefix: str, clock: FakeClock
) -> None:
    ext = Session(clock=clock, store_timeout=PATIENCE)
    apps = [Flask(f"app{number}") for number in range(2)]
    for number, app in enumerate(apps):
        app.config.update(
            SECRET_KEY=f"key {number}",
            SESSION_STORE=store_url,
            SESSION_KEY_PREFIX=f"{store_prefix}{number}:",
            SESSION_MAX_KEYS=number + 2,
        )
        ext.init_app(app)

        @app.get("/<key>")
        def view(key: str) -> dict[str, Any]:
            flask.session[key] = 1
            return dict(ext.session)

    clients = [app.test_client() for app in apps]
    try:
        assert [client.get("/a").json for client in clients] == [{"a": 1}, {"a": 1}]
        assert [client.get("/b").json for client in clients] == [{"a": 1, "b": 1}] * 2
        assert [client.get("/c").status_code for client in clients] == [500, 200]
        cookie = clients[0].get_cookie("session")
        assert cookie is not None
        clients[1].set_cookie("session", cookie.value)
        assert clients[1].get("/a").json == {"a": 1}
        assert ext.store(apps[0]) is not ext.store(apps[1])
        with apps[1].app_context():
            assert ext.store() is ext.store(apps[1])
    finally:
        for app in apps:
            ext.close(app)


def test_nothing_keeps_an_application_alive(store_url: str, store_prefix: str) -> None:
    ext = Session(store=store_url, key_prefix=store_prefix, store_timeout=PATIENCE)

    def use() -> weakref.ref[Flask]:
        app = Flask(__name__)
        app.secret_key = "a key for tests"
        ext.init_app(app)

        @app.get("/")
        def view() -> str:
            flask.session["a"] = 1
            return ""

        app.test_client().get("/")
        ext.close(app)
        return weakref.ref(app)

    gone = use()
    gc.collect()
    assert gone() is None


def test_an_application_takes_a_session_once() -> None:
    app = Flask(__name__)
    ext = Session(app, store="memory://")
    with pytest.raises(SettingError, match="not both"):
        ext.init_app(app)
    with pytest.raises(SettingError, match="already: pass the second Session another"):
        Session(app, store="memory://")
    with pytest.raises(SettingError, match="already"):
        Session().init_app(app)
    app.config["SESSION_COOKIE_NAME"] = "another"
    with pytest.raises(SettingError, match="already"):
        ext.init_app(app)
    assert len(app.extensions["gsession"]) == 1
    with pytest.raises(SettingError, match="init_app"):
        Session().store(app)


def test_keywords_go_before_the_configuration(tmp_path: Path) -> None:
    app = Flask(__name__)
    app.config.update(SECRET_KEY="a key for tests", SESSION_MAX_KEYS=1, SESSION_STORE="memory://")
    ext = Session(app, max_keys=2, store=f"sqlite:///{tmp_path}/s.sqlite3")

    @app.get("/")
    def view() -> str:
        flask.session.update(a=1, b=2)
        return ""

    assert app.test_client().get("/").status_code == 200
    assert (tmp_path / "s.sqlite3").exists()
    ext.close(app)


# Clients and stores of the application's own ---------------------------------------------------


class Watched:
    """A store that says when it was closed, and passes everything on."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def use_and_drop(store: Any, prefix: str) -> None:
    """Use `store` in an application that is closed and collected afterwards."""
    app = Flask(__name__)
    app.config.update(SECRET_KEY="a key for tests", SESSION_STORE=store, SESSION_KEY_PREFIX=prefix)
    ext = Session(app)

    @app.get("/")
    def view() -> dict[str, Any]:
        flask.session["n"] = flask.session.get("n", 0) + 1
        flask.session.setdefault("bytes", b"\xff\x00")
        return {"n": flask.session["n"]}

    client = app.test_client()
    assert [client.get("/").json for _ in range(3)] == [{"n": 1}, {"n": 2}, {"n": 3}]
    ext.close(app)
    assert client.get("/").json == {"n": 4}
    ext.close(app)
    del app, ext, client, view
    gc.collect()


def test_a_store_object_is_used_and_never_closed(store_url: str, store_prefix: str) -> None:
    store = open_store(store_url, StoreOptions(prefix=store_prefix, timeout=PATIENCE))[0]
    watched = Watched(store)
    use_and_drop(watched, "")
    assert not watched.closed
    for part, other in zip(parts_of(watched), parts_of(store), strict=True):
        assert part is other
    store.close()


@pytest.mark.parametrize("decode", [False, True])
def test_a_redis_client_is_used_and_never_closed(
    redis_url: str, store_prefix: str, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = store_prefix.strip(":")
    with Redis.from_url(redis_url, decode_responses=decode, client_name=name) as client:
        use_and_drop(client, store_prefix)  # from here on the server knows the script
        client.delete(*client.scan_iter(f"{store_prefix}*"))
        pool, taken = client.connection_pool, []
        take = pool.get_connection
        monkeypatch.setattr(pool, "get_connection", lambda *args: (taken.append(1), take(*args))[1])
        use_and_drop(client, store_prefix)
        assert len(taken) == 7  # one create, three times a load and a save
        assert [each["name"] for each in client.client_list()].count(name) == 1
        assert len(list(client.scan_iter(f"{store_prefix}*"))) == 1
        assert client.echo("still open") in ("still open", b"still open")


def test_a_subclass_of_the_redis_client_is_one(store_prefix: str, redis_url: str) -> None:
    class Traced(Redis):
        pass

    with Traced.from_url(redis_url) as client:
        use_and_drop(client, store_prefix)
        assert client.ping()


def test_a_mongo_client_is_used_and_never_closed(mongodb_url: str, store_prefix: str) -> None:
    class Listener(monitoring.CommandListener):
        names: list[str]

        def __init__(self) -> None:
            self.names = []

        def started(self, event: monitoring.CommandStartedEvent) -> None:
            self.names.append(event.command_name)

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    listener = Listener()
    client: MongoClient[dict[str, Any]]
    with MongoClient(mongodb_url, event_listeners=[listener], tz_aware=True) as client:
        use_and_drop(client, store_prefix)
        assert listener.names.count("insert") == 1
        assert listener.names.count("update") == 3
        assert client.get_default_database()["gsession"].count_documents({}) == 1
        assert client.admin.command("ping")["ok"] == 1


def test_ended_while_the_view_waits(site: Site) -> None:
    """`update_atomic` raises, a plain write is dropped, and a reload shows the end."""
    visitor = visitor_with(site, n=0)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        assert session["n"] == 0
        tab.run(lambda session: session.destroy())
        with pytest.raises(SessionEnded):
            session.update_atomic("n", lambda n: n + 1)
        session.reload()
        assert dict(session) == {}

    visitor.run(view)
    assert not site.stored()


# Reference cycles ------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["values", "a typed key", "a lock", "a transaction"])
def test_a_session_is_freed_with_its_request(site: Site, use: str) -> None:
    """A reference cycle would keep its values in memory until the next garbage collection."""
    key = SessionKey("typed", fields.Int())
    seen: list[weakref.ref[Any]] = []

    def view(session: Any) -> None:
        seen.append(weakref.ref(session._get_current_object()))
        session.setdefault("list", []).append(len(dict(session.items())))
        if use == "a typed key":
            key.set(key.get(0) + 1)
        elif use == "a lock":
            with session.lock():
                session["a"] = 1
        elif use == "a transaction":
            with session.transaction():
                session["a"] = 1

    visitor = site.visitor()
    for _ in range(2):
        visitor.run(view)  # the first error of a server, for a script it lacks, is such a cycle
    gc.disable()
    try:
        visitor.run(view)
        visitor.run(lambda _: None)  # the client keeps the context of its last request
        assert seen[-1]() is None
    finally:
        gc.enable()
