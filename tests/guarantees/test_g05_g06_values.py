"""G5 and G6: values come back as they were or are refused; nested changes are noticed."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import flask
import pytest
from markupsafe import Markup

from flask_gsession import SessionTooLarge, UnsupportedType, ValueRefused
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker

VALUES: dict[str, object] = {
    "text": "Größe, 大小, \U0001f6d2, \0, \r\n",
    "lone surrogate": "\ud800",
    "empty text": "",
    "zero": 0,
    "minus one": -1,
    "64 bits": 2**64 - 1,
    "more": 2**64,
    "minus more": -(2**64),
    "huge": 10**300,
    "float": 0.1,
    "whole float": 1.0,
    "minus zero": -0.0,
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "true": True,
    "false": False,
    "none": None,
    "bytes": bytes(range(256)),
    "list": [1, "two", [3.0, [None]]],
    "tuple": (1, "two", (3.0, ())),
    "dict": {"a": {"b.c": {"$d": {"": [{}]}}}},
    "dict order": {"z": 1, "a": 2, "m": 3},
    "dict keys": {1: "a", "1": {2**70: "b", -1: {None: {True: {0.5: ()}}}}},
    "set": {1, "two", (3, 4), frozenset({5})},
    "frozenset": frozenset({1, "two"}),
    "empty set": set(),
    "mixed": [({"deep": {frozenset({(1, b"x")})}},)],
    "naive": datetime(2024, 2, 29, 12, 30, 45, 123456),
    "aware": datetime(2024, 2, 29, 12, 30, 45, 1, tzinfo=UTC),
    "offset": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=45))),
    "zone": datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
    "date": date(9999, 12, 31),
    "time": time(23, 59, 59, 999999),
    "aware time": time(1, 2, tzinfo=UTC),
    "timedelta": timedelta(days=-3, microseconds=1),
    "UUID": UUID("12345678-1234-5678-1234-567812345678"),
    "decimal": Decimal("10.50"),
    "decimal NaN": Decimal("NaN"),
    "Markup": Markup("<b>bold</b>"),
}


def alike(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        same_keys = alike([*one], [*other])
        return same_keys and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (set, frozenset)):
        return one == other and {type(item) for item in one} == {type(item) for item in other}
    if isinstance(one, (float, Decimal)):
        return str(one) == str(other)  # of NaN and minus zero, too
    if isinstance(one, (datetime, time)):
        same_zone = str(one.tzinfo) == str(other.tzinfo) and one.fold == other.fold
        return bool(one == other) and same_zone
    return bool(one == other)


def test_every_value_comes_back_as_it_was(site: Site) -> None:
    for build in (lambda value: value, lambda value: {"deep": [(value,)]}):
        visitor = site.visitor()
        wanted = {name: build(value) for name, value in VALUES.items()}
        visitor.run(lambda session, wanted=wanted: session.update(wanted))
        got = visitor.run(dict)
        assert list(got) == list(wanted)
        assert [name for name in wanted if not alike(got[name], wanted[name])] == []


def test_values_survive_merges_and_rotations(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(VALUES))
    other = visitor.another_tab()
    site.before_a_write(lambda: other.run(lambda session: session.update(n=1)))
    visitor.run(lambda session: (session.rotate(), session.update(m=1)))
    got = visitor.run(dict)
    assert [name for name, value in VALUES.items() if not alike(got[name], value)] == []


def test_every_key_comes_back_as_it_was(site: Site) -> None:
    keys = ["", " ", ".", "$", "a.b.c", "$set", "_id", "key", "\0", "\r\n", "ключ", "x" * 100_000]
    visitor = site.visitor()
    visitor.run(lambda session: session.update({key: n for n, key in enumerate(keys)}))
    assert list(visitor.run(dict).items()) == [(key, n) for n, key in enumerate(keys)]


# Subclasses become plain types -----------------------------------------------------------------


class Text(str):
    __slots__ = ()


class Number(IntEnum):
    ONE = 1


class Token(dict):  # type: ignore[type-arg]
    """As libraries have it."""


class Rows(list):  # type: ignore[type-arg]
    """As libraries have it."""


class Lazy:
    """A text that is translated when it is shown."""

    def __html__(self) -> str:
        return "<b>saved</b>"


SUBCLASSES: dict[str, tuple[Any, Any]] = {
    "text": (Text("ada"), "ada"),
    "enum": (Number.ONE, 1),
    "dict": (Token(scope=Rows([Text("a")]), user=Token(n=1)), {"scope": ["a"], "user": {"n": 1}}),
    "list": (Rows([1, Rows()]), [1, []]),
    "ordered": (OrderedDict(b=[], a=()), {"b": [], "a": ()}),
    "default": (defaultdict(list, a=[1]), {"a": [1]}),
    "counter": (Counter("aab"), {"a": 2, "b": 1}),
    "lazy": (Lazy(), Markup("<b>saved</b>")),
    "key": ({Text("a"): {Number.ONE: Lazy()}}, {"a": {1: Markup("<b>saved</b>")}}),
}


def test_subclasses_come_back_as_the_plain_type(site: Site) -> None:
    """The request keeps its own objects, and they are as stored; it is not written again."""
    visitor = site.visitor()

    def view(session: Any) -> None:
        for name, (value, _) in SUBCLASSES.items():
            session[name] = value
            session["_" + name] = [value]
            assert session[name] is value
        session["n"] = session.get("n", 0) + 1
        if session.handle:
            session.update_atomic("n", lambda n: n)  # which stores all
            assert not session.modified
            assert all(session[name] is value for name, (value, _) in SUBCLASSES.items())

    for _ in range(2):
        visitor.run(view)
        got = visitor.run(dict)
        for name, (_, plain) in SUBCLASSES.items():
            assert alike(got[name], plain), name
            assert alike(got["_" + name], [plain]), name
    with site.counted() as count:
        visitor.run(lambda session: session.update({n: v for n, (v, _) in SUBCLASSES.items()}))
        assert not visitor.run(lambda session: [*session.values(), session.modified][-1])
    assert "save" not in count.calls  # equal values are no change


def test_a_change_inside_a_subclass_is_saved(site: Site) -> None:
    visitor = site.visitor()

    def view(session: Any) -> None:
        session["token"] = token = Token(scope=Rows(["a"]), user=Token(n=1))
        session.update_atomic("n", lambda n: Number.ONE)
        token["scope"].append("b")
        token["user"]["n"] = Number.ONE
        token["counts"] = Counter("a")

    for _ in range(2):
        visitor.run(view)
        kept = {"scope": ["a", "b"], "user": {"n": 1}, "counts": {"a": 1}}
        assert alike(visitor.run(dict), {"token": kept, "n": 1})


def test_a_lazy_text_can_be_flashed(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: flask.flash(Lazy(), "info"))  # type: ignore[arg-type]
    got = visitor.run(lambda session: flask.get_flashed_messages(with_categories=True))
    assert alike(got, [("info", Markup("<b>saved</b>"))])


# Refused values ------------------------------------------------------------------------------


def cycle() -> list[Any]:
    items: list[Any] = []
    items.append({"again": items})
    return items


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


# The value assigned to session["key"], the error and the path it names.
REFUSED: dict[str, tuple[Any, type[ValueRefused], str]] = {
    "object": (object(), UnsupportedType, "session['key']"),
    "function": (len, UnsupportedType, "session['key']"),
    "class": (int, UnsupportedType, "session['key']"),
    "enum": (Enum("Theme", "DARK").DARK, UnsupportedType, "session['key']"),
    "bytearray": (bytearray(b"x"), UnsupportedType, "session['key']"),
    "complex": (1j, UnsupportedType, "session['key']"),
    "range": (range(3), UnsupportedType, "session['key']"),
    "path": (Path("/"), UnsupportedType, "session['key']"),
    "deque": (deque([1]), UnsupportedType, "session['key']"),
    "dict with bytes keys": ({b"1": "one"}, UnsupportedType, "session['key']"),
    "dict with NaN key": ({"a": {math.nan: 1}}, UnsupportedType, "session['key']['a']"),
    "in a list": ([0, object()], UnsupportedType, "session['key'][1]"),
    "in a tuple": ((0, object()), UnsupportedType, "session['key'][1]"),
    "in a set": ({1, len}, UnsupportedType, "session['key']{...}"),
    "in depth": (
        {"rows": [{}, {"price": (object(),)}]},
        UnsupportedType,
        "session['key']['rows'][1]['price'][0]",
    ),
    "cycle": (cycle(), SessionTooLarge, "session['key'][0]['again'][0]"),
    "1,000 levels": (deep(1000), SessionTooLarge, "session['key'][0]"),
    "200,000 levels": (deep(200_000), SessionTooLarge, "session['key'][0]"),
}

TOO_LARGE: dict[str, Any] = {
    "a large value": lambda session: session.update(key=b"x" * (32 * 1024 * 1024 + 1)),
    "a hundred": lambda session: session.update({str(n): "x" * 16_000 for n in range(100)}),
    "a key of 1 MB": lambda session: session.update({"x" * 1_100_000: 1}),
    "many keys": lambda session: session.update({str(n): n for n in range(2000)}),
    "very many keys": lambda session: session.update(dict.fromkeys(map(str, range(50_000)))),
    "many keys, one of them large": lambda session: session.update(
        {str(n): n for n in range(2000)}, key=b"x" * 100_000
    ),
    "a hundred and a large one": lambda session: session.update(
        {str(n): "x" * 16_000 for n in range(100)}, key=b"x" * 100_000
    ),
}
MAX_BYTES = 15 * 1024 * 1024  # the most that SESSION_MAX_BYTES may be

# For a session whose large values have no place of their own.
SEVENTEEN_MB: dict[str, Any] = {
    "in one value": lambda session: session.update(key=b"x" * 17_000_000),
    "in many values": lambda session: session.update({str(n): "x" * 17_500 for n in range(990)}),
    "in a list": lambda session: session["kept"].extend(["x" * 1000] * 17_000),
}


def refused_at_the_end(site: Site, assign: Any) -> ValueRefused:
    """The error of a request whose session cannot be saved; checks that nothing of it was."""
    errors: list[Any] = []
    visitor = site.visitor()
    visitor.run(lambda session: session.update(kept=["as it was"]))
    before, calls = site.stored(), len(site.store.calls)
    with flask.got_request_exception.connected_to(
        lambda sender, exception: errors.append(exception), site.app
    ):
        response = visitor.ask(
            lambda session: (
                session["kept"].append("changed"),
                session.update(other=1),
                assign(session),
                flask.Response("all is well", headers={"Content-Language": "en"}),
            )[-1]
        )
    assert site.store.calls[calls:] == ["load"]
    assert response.status_code == 500
    assert "all is well" not in response.text
    assert "Set-Cookie" not in response.headers
    assert site.stored() == before
    assert visitor.run(dict) == {"kept": ["as it was"]}
    (error,) = errors
    assert isinstance(error, ValueRefused)
    return error


def test_a_refused_value_stops_the_response(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    for what, (value, kind, path) in REFUSED.items():
        caplog.clear()
        error = refused_at_the_end(
            site, lambda session, value=value: session.update({"key": value})
        )
        assert type(error) is kind, what
        assert error.path.startswith(path), what
        assert path in caplog.text, what
        assert ("With SESSION_DEBUG = True" in caplog.text) is (kind is UnsupportedType), what
        if kind is UnsupportedType and "keys" not in what and "None" not in what:
            assert error.path == path, what


def test_a_refused_nested_change_stops_the_response(site: Site) -> None:
    for change, path in (
        (lambda session: session["kept"].append(object()), "session['kept'][2]"),
        (lambda session: session["kept"].append({"a": {b"2": 2}}), "session['kept'][2]['a']"),
        (lambda session: session.setdefault("new", []).append(len), "session['new'][0]"),
    ):
        assert refused_at_the_end(site, change).path == path


def test_a_session_that_is_too_large_stops_the_response(site: Site) -> None:
    for what, assign in TOO_LARGE.items():
        error = refused_at_the_end(site, assign)
        assert type(error) is SessionTooLarge, what
        # By default the limit for a single value equals the limit for the whole session.
        limit = "MAX_TOTAL_BYTES" if what == "a large value" else "MAX_BYTES"
        limit = "MAX_KEYS" if " keys" in what else limit
        assert f"SESSION_{limit} allows" in str(error), what
        assert len(str(error)) < 500, what


def test_100_000_keys_stop_the_response(store_prefix: str, clock: FakeClock) -> None:
    """They are counted before any of them is encoded."""
    with Site("memory://", store_prefix, clock) as site:
        error = refused_at_the_end(
            site, lambda session: session.update(dict.fromkeys(map(str, range(100_000))))
        )
    assert type(error) is SessionTooLarge
    assert "SESSION_MAX_KEYS allows" in str(error)
    assert len(str(error)) < 500


def test_a_session_of_17_mb_stops_the_response(make_site: SiteMaker) -> None:
    site = make_site(spill_bytes=None, max_bytes=MAX_BYTES)
    for what, assign in SEVENTEEN_MB.items():
        error = refused_at_the_end(site, assign)
        assert type(error) is SessionTooLarge, what
        assert f"SESSION_MAX_BYTES allows {MAX_BYTES}" in str(error), what
        assert len(str(error)) < 500, what


def test_limits_are_settings(make_site: SiteMaker) -> None:
    site = make_site(max_bytes=1000, max_keys=5, max_depth=3)
    for allowed, refused in (
        (lambda session: session.update(a="x" * 900), lambda session: session.update(a="x" * 1000)),
        (
            lambda session: session.update(dict.fromkeys("abcde")),
            lambda session: session.update(dict.fromkeys("abcdef")),
        ),
        (lambda session: session.update(a=[[[]]]), lambda session: session.update(a=[[[[]]]])),
    ):
        assert site.visitor().ask(allowed).status_code == 200
        assert site.visitor().ask(refused).status_code == 500


def test_in_debug_mode_the_assigning_line_fails(make_site: SiteMaker) -> None:
    site = make_site(config={"DEBUG": True, "PROPAGATE_EXCEPTIONS": False})
    visitor = site.visitor()
    visitor.run(lambda session: session.update(kept=1))

    def view(session: Any) -> None:
        for what, (value, kind, path) in REFUSED.items():
            for assign in (
                lambda value=value: session.__setitem__("key", value),
                lambda value=value: session.update(key=value),
                lambda value=value: session.setdefault("key", value),
                lambda value=value: session.set_many({"fine": 1, "key": value}),
                lambda value=value: session.get_or_set("key", value) if not callable(value)
                else session.__setitem__("key", value),
                lambda value=value: session.update_atomic("key", lambda _: value),
            ):  # fmt: skip
                with pytest.raises(kind) as caught:
                    assign()
                assert caught.value.path.startswith(path), what
                assert "key" not in session
                assert "fine" not in session
        session["key"] = "in order"

    visitor.run(view)
    assert visitor.run(dict) == {"kept": 1, "key": "in order"}


def test_outside_debug_mode_the_line_does_not_fail(site: Site) -> None:
    """The value is encoded once, at the end; it can still be taken back."""

    def view(session: Any) -> None:
        session["key"] = object()
        del session["key"]

    visitor = site.visitor()
    visitor.run(view)
    assert not site.stored()


def test_a_key_that_is_not_text_is_refused_at_once(make_site: SiteMaker) -> None:
    for debug in (True, False):
        site = make_site(debug=debug)

        def view(session: Any) -> None:
            for key in (1, None, b"bytes", ("a",), Text("x"), "\ud800"):
                for assign in (
                    lambda key=key: session.__setitem__(key, 1),
                    lambda key=key: session.update({key: 1}),
                    lambda key=key: session.set_many({"fine": 1, key: 1}),
                    lambda key=key: session.setdefault(key, 1),
                    lambda key=key: session.update_atomic(key, lambda _: 1),
                ):
                    with pytest.raises(UnsupportedType):
                        assign()
            assert 1 not in session
            assert session.get(None) is None
            assert not session

        site.visitor().run(view)
        assert not site.stored()


@pytest.mark.parametrize("registered", [ValueRefused, TypeError])
def test_the_app_may_have_a_page_for_refused_values(make_site: SiteMaker, registered: Any) -> None:
    site = make_site()

    @site.app.errorhandler(registered)
    def refused(error: ValueRefused) -> tuple[str, int]:
        return f"cannot keep {error.path}", 422

    response = site.visitor().ask(lambda session: session.update(key=object()))
    assert (response.status_code, response.text) == (422, "cannot keep session['key']")


@pytest.mark.parametrize("registered", [ValueRefused, 500, Exception])
def test_a_page_for_refused_values_may_flash(
    make_site: SiteMaker, registered: Any, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()

    @site.app.errorhandler(registered)
    def refused(error: Exception) -> str:
        flask.flash("This cannot be kept")  # the same goes for this one
        return "the page"

    response = site.visitor().ask(lambda session: session.update(key=object()))
    assert response.text == "the page"
    assert "session['_flashes'] was changed after" in caplog.text
    assert not site.stored()


def test_where_errors_propagate_the_error_is_the_tests(make_site: SiteMaker) -> None:
    site = make_site(config={"TESTING": True})
    with pytest.raises(UnsupportedType, match=r"session\['key'\]"):
        site.visitor().ask(lambda session: session.update(key=object()))


# Nested changes ------------------------------------------------------------------------------

START: dict[str, Any] = {
    "items": [3, 1, 2],
    "deep": {"rows": [{"n": 1, "tags": {"a"}, "pair": ([], 0)}]},
    "set": {1},
    "pair": ([1], 2),
    "n": 1,
}

NESTED: dict[str, Any] = {
    "append": lambda session: session["items"].append(4),
    "item assignment": lambda session: session["items"].__setitem__(0, 9),
    "item deletion": lambda session: session["items"].pop(),
    "sort": lambda session: session["items"].sort(),
    "extend in place": lambda session: session["items"].__iadd__([1]),
    "slice": lambda session: session["items"].__setitem__(slice(0, 2), []),
    "type of an item": lambda session: session["items"].__setitem__(1, True),
    "dict in a list in a dict": lambda session: session["deep"]["rows"][0].update(n=2),
    "set in depth": lambda session: session["deep"]["rows"][0]["tags"].add("b"),
    "list in a tuple in depth": lambda session: session["deep"]["rows"][0]["pair"][0].append(1),
    "order of a dict": lambda session: session["deep"]["rows"][0].update(
        n=session["deep"]["rows"][0].pop("n")
    ),
    "set": lambda session: session["set"].discard(1),
    "list in a tuple": lambda session: session["pair"][0].append(2),
    "by get": lambda session: session.get("items").append(4),
    "by setdefault": lambda session: session.setdefault("items", []).append(4),
    "by setdefault of a new key": lambda session: session.setdefault("new", []).append(4),
    "by get_or_set": lambda session: session.get_or_set("new", list).append(4),
    "by values": lambda session: next(iter(session.values())).append(4),
    "by items": lambda session: dict(session.items())["items"].append(4),
    "by copy": lambda session: session.copy()["items"].append(4),
    "after an assignment": lambda session: (
        session.update(new={"a": []}),
        session["new"]["a"].append(1),
    ),
    "an object assigned twice": lambda session: (
        session.update(one=session["items"], two=session["items"]),
        session["items"].append(4),
    ),
    "augmented assignment": lambda session: session.__setitem__("n", session["n"] + 1),
}


def plain_dict(values: dict[str, Any]) -> Any:
    """A plain dict with the session's helpers that the changes above use."""

    class Plain(dict):  # type: ignore[type-arg]
        def get_or_set(self, key: str, default: Any) -> Any:
            return self.setdefault(key, default())

    return Plain(values)


def test_nested_changes_are_saved(site: Site) -> None:
    for what, change in NESTED.items():
        visitor = site.visitor()
        visitor.run(lambda session: session.update(copy.deepcopy(START)))
        expected = plain_dict(copy.deepcopy(START))
        change(expected)
        with site.counted() as count:
            visitor.run(lambda session, change=change: change(session) and None)
        assert count.calls == ["load", "save"], what
        assert alike(visitor.run(dict), dict(expected)), what


def test_a_nested_change_shows_in_modified(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(items=[]))

    def view(session: Any) -> None:
        assert not session.modified
        session["items"].append(1)
        assert session.modified
        session["items"].pop()
        assert not session.modified

    visitor.run(view)


NO_CHANGES: dict[str, Any] = {
    "nothing looked at": lambda session: session.get("missing"),
    "mutable values looked at": lambda session: [list(session.values()), session["deep"]["rows"]],
    "an equal immutable assigned": lambda session: session.update(n=1),
    "an equal mutable assigned": lambda session: session.update(items=[3, 1, 2], set={1}),
    "the value itself assigned": lambda session: session.update(items=session["items"]),
    "all assigned again": lambda session: session.update(dict(session)),
    "a change taken back": lambda session: (session["items"].append(4), session["items"].pop()),
    "deleted and set again": lambda session: session.update(items=session.pop("items")),
    "cleared and set again": lambda session: (
        values := session.copy(), session.clear(), session.update(values)
    ),
    "set and deleted": lambda session: (session.update(new=1), session.pop("new")),
    "setdefault of what is there": lambda session: session.setdefault("items", []),
    "a copy changed": lambda session: session.copy().update(n=2),
    "a set in another order": lambda session: session.update(
        many=set(map(str, range(99, -1, -1)))
    ),
}  # fmt: skip


def test_unchanged_values_cost_no_write(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(START, many=set(map(str, range(100)))))
    before = site.stored()
    for what, look in NO_CHANGES.items():
        with site.counted() as count:
            visitor.run(look)
        assert (count.calls, count.trips) == (["load"], 1), what
    assert site.stored() == before


def test_an_equal_value_of_another_type_is_a_change(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(key=1))
    for value in (True, 1.0, Decimal(1), 1, [1], (1,), {1}, frozenset({1}), "1", Markup("1"), b"1"):
        with site.counted() as count:
            visitor.run(lambda session, value=value: session.update(key=value))
        assert count.calls == ["load", "save"], repr(value)
        assert alike(visitor.run(dict), {"key": value}), repr(value)


def test_values_of_a_request_are_its_own(site: Site) -> None:
    """A request's changes to a value don't reach other requests before they are saved."""
    visitor = site.visitor()
    mine: list[int] = []
    visitor.run(lambda session: session.update(items=mine))
    mine.append(1)
    assert visitor.run(lambda session: session["items"]) == []
    other = visitor.another_tab()

    def view(session: Any) -> object:
        session["items"].append(2)
        return other.run(lambda session: session["items"])

    assert visitor.run(view) == []
    assert visitor.run(lambda session: session["items"]) == [2]
