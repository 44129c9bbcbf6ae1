"""Typed session keys: checked on the way in and on the way out, on every store."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal, cast
from uuid import UUID

import pytest
from flask import Flask
from marshmallow import (
    EXCLUDE,
    INCLUDE,
    Schema,
    ValidationError,
    fields,
    post_dump,
    post_load,
    pre_dump,
    validate,
)

from flask_gsession import SettingError
from flask_gsession.errors import InvalidStoredValue, SchemaFailed
from flask_gsession.events import StoredValueInvalid
from flask_gsession.testing import FakeClock
from flask_gsession.typed import SessionKey, require_session, use_session
from flask_gsession.values.merge import MISSING
from tests.harness.apps import Site, SiteMaker, Visitor


class PlaceSchema(Schema):
    city = fields.Str(required=True, validate=validate.Length(min=1))
    zip = fields.Str()


class PreferencesSchema(Schema):
    theme = fields.Str(validate=validate.OneOf(["light", "dark", "system"]), load_default="system")
    size = fields.Int(strict=True, load_default=10)
    notifications = fields.Bool(load_default=True)
    tags = fields.List(fields.Str(), load_default=list)
    place = fields.Nested(PlaceSchema)


DEFAULTS = {"theme": "system", "size": 10, "notifications": True, "tags": []}


@pytest.fixture
def preferences() -> SessionKey[dict[str, Any]]:
    return SessionKey("preferences", PreferencesSchema)


def has(visitor: Visitor) -> Any:
    """The contents of the session in another request."""
    return visitor.run(lambda session: dict(session))


# Set, get, update, delete --------------------------------------------------------------------


def test_a_value_comes_back_checked(site: Site, preferences: SessionKey[dict[str, Any]]) -> None:
    visitor = site.visitor()
    assert visitor.run(lambda _: (preferences.get(), preferences.exists())) == (DEFAULTS, False)
    assert site.stored() == {}
    visitor.run(lambda _: preferences.set({"theme": "dark", "place": {"city": "Graz"}}))
    whole = DEFAULTS | {"theme": "dark", "place": {"city": "Graz"}}
    assert visitor.run(lambda _: (preferences.get(), preferences.exists())) == (whole, True)
    assert has(visitor) == {"preferences": whole}
    visitor.run(lambda _: preferences.update({"size": 12}, theme="light"))
    assert visitor.run(lambda _: preferences.get()) == whole | {"size": 12, "theme": "light"}
    assert visitor.run(lambda _: (preferences.delete(), preferences.delete())) == (True, False)
    assert visitor.run(lambda _: preferences.get()) == DEFAULTS


WRONG: dict[str, tuple[Any, Any]] = {
    "field": ({"theme": "pink"}, {"theme": ["Must be one of: light, dark, system."]}),
    "type": ({"size": "12"}, {"size": ["Not a valid integer."]}),
    "extra": ({"colour": "red"}, {"colour": ["Unknown field."]}),
    "missing": ({"place": {}}, {"place": {"city": ["Missing data for required field."]}}),
    "nesting": ({"place": "Graz"}, {"place": {"_schema": ["Invalid input type."]}}),
    "inner": ({"tags": ["a", 1]}, {"tags": {1: ["Not a valid string."]}}),
    "null": ({"theme": None}, {"theme": ["Field may not be null."]}),
    "list": ([], {"_schema": ["Invalid input type."]}),
    "text": ("dark", {"_schema": ["Invalid input type."]}),
    "none": (None, {"_schema": ["Invalid input type."]}),
    "two": ({"theme": 1, "size": []}, {"theme": ["Not a valid string."], "size": ["Not a"]}),
}


@pytest.mark.parametrize(("value", "messages"), WRONG.values(), ids=WRONG)
def test_invalid_values_are_refused_and_change_nothing(
    site: Site, preferences: SessionKey[dict[str, Any]], value: Any, messages: Any
) -> None:
    visitor = site.visitor()
    visitor.run(lambda _: preferences.set({"theme": "dark"}))

    def wrong(session: Any) -> None:
        with pytest.raises(ValidationError) as refused:
            preferences.set(value)
        assert str(refused.value.messages).startswith(str(messages)[:-3].rstrip("]'}"))
        if isinstance(value, dict):
            with pytest.raises(ValidationError):
                preferences.update(value)
        assert session.modified is False

    visitor.run(wrong)
    assert has(visitor) == {"preferences": DEFAULTS | {"theme": "dark"}}


def test_get_returns_a_copy(site: Site, preferences: SessionKey[dict[str, Any]]) -> None:
    def change(session: Any) -> tuple[Any, Any]:
        preferences.get()["tags"].append("x")
        preferences.set({"tags": ["a"]})
        preferences.get()["tags"].append("x")
        return preferences.get()["tags"], session["preferences"]["tags"]

    visitor = site.visitor()
    assert visitor.run(change) == (["a"], ["a"])
    assert visitor.run(change) == (["a"], ["a"])


def test_an_unchanged_value_is_checked_once(site: Site) -> None:
    calls: list[Any] = []
    key = SessionKey("n", fields.Dict(validate=lambda value: calls.append(value)))
    visitor = site.visitor()
    visitor.run(lambda _: key.set({"a": 1}))

    def read(session: Any) -> list[int]:
        counts = []

        def count() -> None:
            calls.clear()
            key.get()
            key.get()
            counts.append(len(calls))

        count()
        count()
        session["n"]["a"] = 2  # past the key
        count()
        assert key.get() == {"a": 2}
        session["n"] = {"a": 3}
        count()
        session.reload()
        count()
        assert key.get() == {"a": 1}
        return counts

    assert visitor.run(read) == [1, 0, 1, 1, 1]


def test_a_read_costs_a_read_and_a_write_a_write(
    site: Site, preferences: SessionKey[dict[str, Any]]
) -> None:
    visitor = site.visitor()
    visitor.run(lambda _: preferences.set({}))
    with site.counted() as count:
        visitor.run(lambda _: (preferences.get(), preferences.exists()))
    assert count.calls == ["load"]
    with site.counted() as count:
        visitor.run(lambda _: (preferences.get(), preferences.update(theme="dark")))
    assert count.calls == ["load", "save"]


def test_without_any_default_it_is_a_key_error(site: Site) -> None:
    key = SessionKey("place", PlaceSchema)
    user = SessionKey("user", fields.Int(strict=True))

    def look(_: Any) -> tuple[Any, ...]:
        for one in (key, user):
            with pytest.raises(KeyError, match="no valid value"):
                one.get()
        return key.get(None), user.get(7), user.exists()

    assert site.visitor().run(look) == (None, 7, False)


def test_defaults_in_their_order(site: Site) -> None:
    of_field = SessionKey("a", fields.Int(load_default=1))
    of_key = SessionKey("b", fields.Int(load_default=1), default=2)
    made = SessionKey("c", fields.List(fields.Int(), load_default=list))
    of_schema = SessionKey("d", PreferencesSchema, default={"theme": "dark"})  # as set takes it

    def look(_: Any) -> tuple[Any, ...]:
        made.get().append(1)
        return of_field.get(), of_key.get(), of_key.get(3), made.get(), of_schema.get()

    assert site.visitor().run(look) == (1, 2, 3, [], DEFAULTS | {"theme": "dark"})


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


VALUES: list[tuple[Any, Any, Any]] = [
    (fields.Int(strict=True), 5, 5),
    (fields.Date(), date(2024, 2, 29), "2024-02-29"),
    (fields.DateTime(), datetime(2024, 2, 29, 12, 30, 1, 5), "2024-02-29T12:30:01.000005"),
    (fields.Decimal(), Decimal("1.10"), Decimal("1.10")),
    (fields.UUID(), UUID(int=5), str(UUID(int=5))),
    (fields.Enum(Colour, by_value=True), Colour.RED, "red"),
    (fields.Enum(Colour), Colour.RED, "RED"),
    (fields.TimeDelta(), timedelta(seconds=90), 90.0),
    (fields.List(fields.Date()), [date(2024, 1, 1)], ["2024-01-01"]),
    (fields.Email(), "ada@example.org", "ada@example.org"),
    (fields.Str(allow_none=True), None, None),
    (PreferencesSchema(many=True), [DEFAULTS], [DEFAULTS]),
]


@pytest.mark.parametrize(
    ("schema", "value", "stored"),
    VALUES,
    ids=[repr(row[1])[:30] for row in VALUES],
)
def test_values_of_fields(site: Site, schema: Any, value: Any, stored: Any) -> None:
    key = SessionKey("key", schema)
    visitor = site.visitor()
    assert visitor.run(lambda _: key.set(value)) == value
    assert visitor.run(lambda _: key.get()) == value
    assert has(visitor) == {"key": stored}
    assert site.happened(StoredValueInvalid) == []


# Dataclasses ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    city: str


MAIL = fields.Email(load_default="a@b.org")


@dataclass
class Profile:
    name: str
    age: int | None = None
    born: date | None = None
    colour: Colour = Colour.RED
    size: Literal["S", "M"] = "M"
    places: list[Place] = field(default_factory=list)
    ratings: dict[str, float] = field(default_factory=dict)
    mail: str = field(default="a@b.org", metadata={"marshmallow": MAIL})
    nick: str = field(default="x", metadata={"validate": validate.Length(max=3)})
    news: bool = False
    note: Any = None


def test_a_dataclass_comes_back_as_its_instance(site: Site) -> None:
    key = SessionKey("profile", Profile)
    ada = Profile("Ada", 36, date(1815, 12, 10), Colour.BLUE, "S", [Place("London")], {"a": 1.5})
    ada.mail = "ada@example.org"
    visitor = site.visitor()
    assert visitor.run(lambda _: key.get(None)) is None
    visitor.run(lambda _: key.set(ada))
    assert visitor.run(lambda _: key.get()) == ada
    assert has(visitor)["profile"]["places"] == [{"city": "London"}]
    visitor.run(lambda _: key.update(name="Eve"))
    assert visitor.run(lambda _: (key.get().name, key.get().places)) == ("Eve", [Place("London")])
    visitor.run(lambda _: key.set({"name": "Bob", "born": "2001-02-03"}))
    assert visitor.run(lambda _: key.get()) == Profile("Bob", born=date(2001, 2, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"age": "36"},
        {"age": True},
        {"colour": "green"},
        {"size": "XL"},
        {"places": [{"town": "Graz"}]},
        {"ratings": {"a": "much"}},
        {"mail": "ada"},
        {"nick": "long"},
        {"news": "yes"},
        {"name": None},
    ],
    ids=str,
)
def test_a_dataclass_converts_nothing(site: Site, wrong: dict[str, Any]) -> None:
    key = SessionKey("profile", Profile)

    def refuse(_: Any) -> None:
        with pytest.raises(ValidationError) as refused:
            key.set({"name": "Ada"} | wrong)
        assert list(cast(Any, refused.value.messages)) == list(wrong)

    site.visitor().run(refuse)


def test_a_dataclass_with_a_type_without_a_field() -> None:
    @dataclass
    class Odd:
        value: set[int]

    with pytest.raises(SettingError, match=r"Odd\.value: there is no marshmallow field for set"):
        SessionKey("odd", Odd)


# ttl, versions, invalid data -----------------------------------------------------------------


def test_a_typed_value_expires(site: Site, clock: FakeClock) -> None:
    key = SessionKey("n", fields.Int(load_default=0), ttl=timedelta(minutes=1), version=2)
    visitor = site.visitor()
    visitor.run(lambda session: (key.set(5), session.update(user="ada")))
    clock.advance(59)
    assert visitor.run(lambda session: (key.get(), session.ttl("n"))) == (5, 1)

    def late(session: Any) -> tuple[int, int]:
        before = key.get()
        clock.advance(1)
        session.update(user="eve")
        return before, key.get()

    assert visitor.run(late) == (5, 0)
    assert has(visitor) == {"user": "eve"}


def put(value: Any, key: str = "preferences") -> Callable[[Any], object]:
    return lambda session: session.update({key: value})


OLD: dict[str, Any] = {
    "of another type": ["dark"],
    "with a field that is wrong": {"theme": "pink"},
    "with a field too many": {"colour": "red"},
    "that would be converted": {"notifications": "yes"},
    "that would be converted inside": {"place": {"city": b"Graz"}},
    "none": None,
}


@pytest.mark.parametrize("old", OLD.values(), ids=OLD)
def test_a_stored_value_that_is_no_longer_valid(
    site: Site,
    preferences: SessionKey[dict[str, Any]],
    old: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    visitor = site.visitor()
    visitor.run(put(old))
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "flask_gsession"):
        assert visitor.run(lambda _: (preferences.get(), preferences.get()))[1] == DEFAULTS
    handle = visitor.run(lambda session: session.handle)
    assert site.happened(StoredValueInvalid) == [
        StoredValueInvalid("preferences", "invalid", handle)
    ]
    said = [record.getMessage() for record in caplog.records if record.name == "flask_gsession"]
    assert said == [f"Session {handle}: ignored the stored value of 'preferences': invalid"]
    assert has(visitor) == {"preferences": old}  # left as it is
    visitor.run(lambda _: preferences.update(theme="dark"))
    assert has(visitor) == {"preferences": DEFAULTS | {"theme": "dark"}}

    strict = SessionKey("strict", PreferencesSchema, invalid="raise")

    def refuse(_: Any) -> None:
        with pytest.raises(InvalidStoredValue) as refused:
            strict.get()
        assert (refused.value.key, refused.value.reason) == ("strict", "invalid")
        assert str(refused.value) == "session['strict']: invalid"

    visitor.run(put(old, "strict"))
    visitor.run(refuse)


def test_fields_missing_in_an_older_schema_get_defaults(
    site: Site, preferences: SessionKey[dict[str, Any]]
) -> None:
    visitor = site.visitor()
    visitor.run(put({"theme": "dark"}))
    assert visitor.run(lambda _: preferences.get()) == DEFAULTS | {"theme": "dark"}
    assert site.happened(StoredValueInvalid) == []


def test_stored_data_is_upgraded(make_site: SiteMaker) -> None:
    old = make_site()
    new = make_site(store=old.store)
    first = SessionKey("preferences", fields.Str())
    third = SessionKey("preferences", PreferencesSchema, version=3)

    @third.upgrade(from_version=1)
    def name_it(theme: str) -> dict[str, Any]:
        return {"colours": theme}

    @third.upgrade(from_version=2)
    def rename(data: dict[str, Any]) -> dict[str, Any]:
        return {"theme": data["colours"]}

    visitor = old.visitor()
    visitor.run(lambda _: first.set("dark"))
    renewed = new.visitor(visitor.cookie)
    upgraded = DEFAULTS | {"theme": "dark"}
    with new.counted() as count:
        assert renewed.run(lambda _: third.get()) == upgraded
    assert count.calls == ["load"]
    assert has(visitor) == {"preferences": "dark"}
    renewed.run(lambda _: third.update(size=12))
    assert renewed.run(lambda _: third.get()) == upgraded | {"size": 12}
    assert new.happened(StoredValueInvalid) == []

    # The older worker meets the newer version.
    assert visitor.run(lambda _: first.get("default")) == "default"
    assert [event.reason for event in old.happened(StoredValueInvalid)] == ["newer version"]
    assert has(renewed) == {"preferences": upgraded | {"size": 12}}

    # A change past the key, a rotation, and a merge keep the version.
    renewed.run(lambda session: (session["preferences"].update(size=14), session.rotate(grace=0)))
    assert renewed.run(lambda _: third.get()["size"]) == 14


def test_a_merge_upgrades_values_of_older_workers(make_site: SiteMaker) -> None:
    old = make_site()
    new = make_site(store=old.store)
    total = SessionKey("total", fields.Int(), version=2, merge="counter", default=0)
    total.upgrade(from_version=1)(lambda euros: 100 * int(euros))
    names = SessionKey(
        "names", fields.List(fields.Str()), version=2, default=[], scope="user", at_login="merge"
    )
    names.upgrade(from_version=1)(lambda found: [f"n:{name}" for name in found])

    def beside(value: Any) -> Callable[[Any], None]:
        """Count, while an older worker stores another value."""

        def view(session: Any) -> None:
            total.set(total.get() + 5)
            older = old.visitor(visitor.cookie)
            new.store.before("save", lambda: older.run(put(value, "total")))

        return view

    visitor = new.visitor()
    old_one = old.visitor()
    old_one.run(put(1, "total"))
    visitor = new.visitor(old_one.cookie)
    visitor.run(beside(3))
    assert visitor.run(lambda _: total.get()) == 305
    old_one.run(put(1, "total"))
    assert visitor.ask(beside("much")).status_code == 409, "no upgrade, no merge"
    assert has(old_one)["total"] == "much"

    # The values that join at a sign-in may come from older workers: the visitor's, the user's or
    # both.
    device, other, last = new.visitor(), new.visitor(), new.visitor()
    device.run(lambda session: (session.bind("ada"), session.shared.update(names=["a"])))
    for each, added in ((other, "b"), (last, "c")):
        each.run(put([added], "names"))
        each.run(lambda session: (names.get(), session.bind("ada")))
    assert device.run(lambda _: names.get()) == ["n:a", "n:b", "n:c"]
    assert (has(other), has(last)) == ({}, {})


def test_upgraders_that_are_missing_or_fail(site: Site) -> None:
    key = SessionKey("n", fields.Int(load_default=0), version=3)
    visitor = site.visitor()
    visitor.run(put("four", "n"))
    assert visitor.run(lambda _: key.get()) == 0

    @key.upgrade(from_version=1)
    def first(value: str) -> int:
        return int(value)

    assert visitor.run(lambda _: key.get()) == 0
    visitor.run(put("4", "n"))
    assert visitor.run(lambda _: key.get()) == 0  # no upgrader starts at version 2
    key.upgrade(from_version=2)(lambda value: value + 1)
    assert visitor.run(lambda _: key.get()) == 5
    reasons = [event.reason for event in site.happened(StoredValueInvalid)]
    assert reasons == ["no upgrader", "upgrade failed with ValueError", "no upgrader"]


class Upper(fields.Str):
    def _serialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._serialize(value, *args, **kwargs).upper()


class WithHook(Schema):
    a = fields.Str()

    @post_dump
    def wrap(self, data: Any, **_: Any) -> Any:
        return {"a": data["a"] + "!"}


class WithHookBefore(Schema):
    a = fields.Str()

    @pre_dump
    def wrap(self, data: Any, **_: Any) -> Any:
        return {"a": data["a"] + "!"}


class WithAccess(Schema):
    a = fields.Str()

    def get_attribute(self, obj: Any, attr: str, default: Any) -> Any:
        return obj[attr] + "!"


class MadeByHook(Schema):
    a = fields.Str()

    @post_load
    def make(self, data: Any, **_: Any) -> Any:
        return {"a": 7} if data["a"] == "x" else {"a": int(data["a"])}


def patched(of_field: bool, name: str, function: Callable[..., Any]) -> Schema:
    """A schema with an override of its dump on this instance only."""
    schema = Schema.from_dict({"a": fields.Str()})()
    setattr(schema.fields["a"] if of_field else schema, name, function)
    return schema


# The value that is set, the results of `set` and `get`, and the stored value.
FLAT: dict[str, tuple[Schema, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": (
        Schema.from_dict({"b": fields.Str(), "a": fields.Int(), "c": fields.Bool()})(),
        {"a": 1, "b": "x", "c": True},
        {"b": "x", "a": 1, "c": True},
        {"b": "x", "a": 1, "c": True},
    ),
    "default": (
        Schema.from_dict({"a": fields.Str(load_default="x")})(),
        {},
        {"a": "x"},
        {"a": "x"},
    ),
    "no default": (Schema.from_dict({"a": fields.Str()})(), {}, {}, {}),
    "default of dump": (
        Schema.from_dict({"a": fields.Str(dump_default="x")})(),
        {},
        {"a": "x"},
        {"a": "x"},
    ),
    "default that isn't valid": (
        Schema.from_dict({"a": fields.Str(load_default="", validate=validate.Length(min=1))})(),
        {},
        {"a": ""},
        {},
    ),
    "none": (
        Schema.from_dict({"a": fields.Str(allow_none=True)})(),
        {"a": None},
        {"a": None},
        {"a": None},
    ),
    "converted": (Schema.from_dict({"a": fields.Int()})(), {"a": "7"}, {"a": 7}, {"a": 7}),
    "words for booleans": (
        Schema.from_dict({"a": fields.Bool(truthy={"yes", "y"}, falsy={"no"})})(),
        {"a": "y"},
        {"a": True},
        {"a": "y"},
    ),
    "as a string": (
        Schema.from_dict({"a": fields.Int(as_string=True)})(),
        {"a": 7},
        {"a": 7},
        {"a": "7"},
    ),
    "of another name": (
        Schema.from_dict({"a": fields.Str(data_key="A")})(),
        {"A": "x"},
        {"a": "x"},
        {"A": "x"},
    ),
    "of attributes": (
        Schema.from_dict({"a": fields.Str(attribute="b"), "b": fields.Str(attribute="a")})(),
        {"a": "x", "b": "y"},
        {"b": "x", "a": "y"},
        {"a": "x", "b": "y"},
    ),
    "only dumped": (
        Schema.from_dict({"a": fields.Str(dump_only=True, dump_default="x")})(),
        {},
        {},
        {},
    ),
    "more": (
        Schema.from_dict({"a": fields.Str()})(unknown=INCLUDE),
        {"a": "x", "b": 1},
        {"a": "x", "b": 1},
        {"a": "x", "b": 1},
    ),
    "hook": (WithHook(), {"a": "x"}, {"a": "x"}, {"a": "x"}),
    "hook before": (WithHookBefore(), {"a": "x"}, {"a": "x"}, {"a": "x"}),
    "made by a hook": (MadeByHook(), {"a": "x"}, {"a": 7}, {"a": "7"}),
}


@pytest.mark.parametrize("what", FLAT)
def test_the_session_stores_the_dump_of_the_schema(clock: FakeClock, what: str) -> None:
    schema, value, loaded, stored = FLAT[what]
    key = SessionKey("flat", schema)
    with SiteMaker("memory://", "", clock) as make:
        site = make()
        visitor = site.visitor()
        assert visitor.run(lambda _: key.set(value)) == loaded
        assert visitor.run(lambda _: key.get()) == loaded
        found = has(visitor)["flat"]
        assert site.happened(StoredValueInvalid) == []
    assert found == stored
    assert list(found) == list(stored)


LOSSY: dict[str, tuple[Schema, dict[str, Any]]] = {
    "only loaded": (Schema.from_dict({"a": fields.Str(load_only=True)})(), {"a": "x"}),
    "own field": (Schema.from_dict({"a": Upper()})(), {"a": "x"}),
    "own access": (WithAccess(), {"a": "x"}),
    "patched field": (patched(True, "serialize", lambda *_, **__: "y"), {"a": "x"}),
    "patched schema": (patched(False, "dump", lambda _: {"a": "y"}), {"a": "x"}),
}


@pytest.mark.parametrize("what", LOSSY)
def test_values_that_would_come_back_changed_are_refused(clock: FakeClock, what: str) -> None:
    schema, value = LOSSY[what]
    key = SessionKey("flat", schema)

    def refuse(session: Any) -> None:
        with pytest.raises(ValidationError) as refused:
            key.set(value)
        assert list(cast(Any, refused.value.messages)) == ["a"]
        assert "flat" not in session

    with SiteMaker("memory://", "", clock) as make:
        make().visitor().run(refuse)


def test_a_validator_that_raises_something_else(site: Site) -> None:
    def broken(value: Any) -> None:
        raise ZeroDivisionError("secret")

    key = SessionKey("n", fields.Int(validate=broken))

    def use(session: Any) -> None:
        with pytest.raises(SchemaFailed, match="failed with ZeroDivisionError") as failed:
            key.set(5)
        assert isinstance(failed.value.__cause__, ZeroDivisionError)
        assert "secret" not in str(failed.value)
        assert "n" not in session
        session["n"] = 5
        with pytest.raises(SchemaFailed):
            key.get()

    site.visitor().run(use)


# Declarations --------------------------------------------------------------------------------

DECLARATIONS: dict[str, tuple[Callable[[], object], str]] = {
    "no schema": (lambda: SessionKey("x", dict), "got dict; it takes a marshmallow Schema"),
    "a value": (lambda: SessionKey("x", cast(Any, 5)), "got a int"),
    "a field class": (lambda: SessionKey("x", fields.Int), r"pass a field, as in fields\.Integer"),
    "a name": (lambda: SessionKey(cast(Any, 5), fields.Int()), "needs a name; got 5"),
    "no name": (lambda: SessionKey("", fields.Int()), "needs a name"),
    "half a letter": (lambda: SessionKey("\ud800", fields.Int()), "needs a name"),
    "ttl": (lambda: SessionKey("x", fields.Int(), ttl=0), "ttl is 0 seconds"),
    "ttl below": (lambda: SessionKey("x", fields.Int(), ttl=-1), "ttl is -1 seconds"),
    "ttl of words": (
        lambda: SessionKey("x", fields.Int(), ttl=cast(Any, "1h")),
        "ttl must be a number",
    ),
    "version": (lambda: SessionKey("x", fields.Int(), version=0), "version is 0"),
    "merge": (lambda: SessionKey("x", fields.Int(), merge="add"), "merge is 'add'"),
    "invalid": (lambda: SessionKey("x", fields.Int(), invalid="drop"), "'default' or 'raise'"),
    "default": (lambda: SessionKey("x", fields.Int(), default=cast(Any, "y")), "invalid default"),
    "upgrade": (lambda: SessionKey("x", fields.Int()).upgrade(from_version=1), "can't be upgraded"),
    "view": (lambda: SessionKey("x", fields.Int()).view(), "has no fields"),
    "use": (lambda: use_session(cast(Any, "x")), "takes SessionKeys, not a str"),
    "require": (lambda: require_session(), "needs at least one key"),
}


@pytest.mark.parametrize(("declare", "message"), DECLARATIONS.values(), ids=DECLARATIONS)
def test_a_wrong_declaration_stops_the_import(declare: Callable[[], Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        declare()


def test_a_schema_that_cannot_be_made() -> None:
    class NeedsMore(Schema):
        def __init__(self, more: str) -> None:
            super().__init__()

    with pytest.raises(SettingError, match=r"NeedsMore\(\) failed .* pass an instance"):
        SessionKey("x", NeedsMore)


def test_two_keys_of_one_name(make_site: SiteMaker) -> None:
    one, other = SessionKey("n", fields.Int()), SessionKey("n", fields.Str())
    site = make_site()
    site.visitor().run(lambda _: one.set(5))

    def use(_: Any) -> None:
        with pytest.raises(SettingError, match="Two SessionKeys are named 'n'"):
            other.set("5")

    site.visitor().run(use)
    with pytest.raises(
        SettingError, match="SESSION_SCHEMA has two keys named 'n': remove or rename"
    ):
        make_site(schema=[one, other])
    declared = make_site(schema=[one])
    declared.visitor().run(use)  # before the declared one was ever used
    visitor = make_site(schema=[other]).visitor()  # another application knows nothing of it
    assert visitor.run(lambda _: (other.set("5"), other.get())) == ("5", "5")


def test_two_upgraders_from_one_version() -> None:
    key = SessionKey("n", fields.Int(), version=2)
    key.upgrade(from_version=1)(int)
    with pytest.raises(SettingError, match="has an upgrader from version 1 already"):
        key.upgrade(from_version=1)(int)


def test_a_key_without_fields_has_no_update(site: Site) -> None:
    def use(_: Any) -> None:
        with pytest.raises(TypeError, match="use set"):
            SessionKey("n", fields.Int()).update(n=1)

    site.visitor().run(use)


def test_a_key_without_a_session() -> None:
    app = Flask(__name__)
    with app.test_request_context(), pytest.raises(SettingError, match="call Session"):
        SessionKey("n", fields.Int()).get()


def test_a_key_of_a_second_session(make_site: SiteMaker) -> None:
    from flask_gsession import Session

    site = make_site()
    second = Session(site.app, cookie_name="second", store="memory://")
    key = SessionKey("n", fields.Int(), session=second.session)
    visitor = site.visitor()
    visitor.run(lambda _: key.set(5))
    assert visitor.run(lambda session: (key.get(), dict(session))) == (5, {})
    second.close(site.app)


# Parallel requests ---------------------------------------------------------------------------


def beside(site: Site, key: SessionKey[Any], start: Any, mine: Any, theirs: Any) -> Any:
    """The value stored when two requests replace `start`, or the status of a refusal."""
    visitor = site.visitor()
    visitor.run(lambda _: key.set(start))
    other = visitor.another_tab()

    def change(_: Any) -> None:
        key.get()
        other.run(lambda _: key.set(theirs))
        key.set(mine)

    response = visitor.ask(change)
    if response.status_code != 200:
        return response.status_code
    assert site.happened(StoredValueInvalid) == []
    return visitor.run(lambda _: key.get())


def test_a_typed_key_names_its_merge(site: Site) -> None:
    integer, words = fields.Int(), fields.List(fields.Str())

    def both(name: str, schema: Any, merge: Any, start: Any, mine: Any, theirs: Any) -> Any:
        return beside(site, SessionKey(name, schema, merge=merge), start, mine, theirs)

    assert both("last", integer, "last", 1, 2, 3) == 2
    assert both("reject", integer, "reject", 1, 2, 3) == 409
    assert both("counter", integer, "counter", 1, 2, 3) == 4
    assert both("set", words, "set", ["a", "b"], ["b", "c"], ["a", "b", "d"]) == ["b", "d", "c"]
    assert both("append", words, "append", ["a"], ["a", "b"], ["a", "c"]) == ["a", "c", "b"]
    merged = both("dict", PreferencesSchema, "dict", {}, {"size": 5}, {"theme": "dark"})
    assert merged == DEFAULTS | {"size": 5, "theme": "dark"}


def test_a_merge_function_gets_values_as_get_returns_them(site: Site) -> None:
    seen: list[Any] = []

    def later(base: Any, theirs: Any, mine: Any) -> Any:
        seen.extend((base, theirs, mine))
        return max(theirs, mine)

    key = SessionKey("day", fields.Date(), merge=later)
    days = [date(2024, 1, day) for day in (1, 2, 3)]
    assert beside(site, key, *days) == days[2]
    assert seen == [days[0], days[2], days[1]]
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=1))
    seen.clear()

    def first(session: Any) -> None:
        session["n"]
        visitor.another_tab().run(lambda _: key.set(days[1]))
        key.set(days[2])

    visitor.run(first)
    assert seen == [MISSING, days[1], days[2]]


def test_the_result_of_a_merge_is_checked(site: Site) -> None:
    few = fields.List(fields.Str(), validate=validate.Length(max=3))
    key = SessionKey("few", few, merge="append")
    assert beside(site, key, ["a"], ["a", "b"], ["a", "c"]) == ["a", "c", "b"]
    assert beside(site, key, ["a"], ["a", "b"], ["a", "c", "d"]) == 409
    own = SessionKey("own", fields.Int(), merge=lambda base, theirs, mine: "no number")
    assert beside(site, own, 1, 2, 3) == 409


def test_a_merge_starts_from_the_value_read_before_the_race(site: Site) -> None:
    """`get` is a look: a later change of the value by others is a conflict."""
    key = SessionKey("n", fields.Int(), merge="counter")
    visitor = site.visitor()
    visitor.run(lambda session: (key.set(1), session.update(other=0)))
    other = visitor.another_tab()

    def count(session: Any) -> int:
        seen = key.get()
        other.run(lambda _: key.set(10))
        session.update_atomic("other", lambda n: n + 1)  # which meets the other's change
        key.set(seen + 1)
        return seen

    assert visitor.run(count) == 1
    assert visitor.run(lambda _: key.get()) == 11


# The whole session ---------------------------------------------------------------------------


class WholeSchema(Schema):
    user = fields.Int(strict=True)
    preferences = fields.Nested(PreferencesSchema)


WRITES: dict[str, Callable[[Any], object]] = {
    "assign": lambda session: session.__setitem__("user", "5"),
    "update": lambda session: session.update(user="5"),
    "set": lambda session: session.set("user", "5"),
    "set with a ttl": lambda session: session.set("user", "5", ttl=5),
    "set_many": lambda session: session.set_many({"preferences": {}, "user": "5"}),
    "setdefault": lambda session: session.setdefault("user", "5"),
    "get_or_set": lambda session: session.get_or_set("user", "5"),
    "update_atomic": lambda session: session.update_atomic("user", lambda user: "5"),
    "or": lambda session: session.__ior__({"user": "5"}),
    "nested": lambda session: session.__setitem__("preferences", {"place": {"town": "Graz"}}),
    "key": lambda session: SessionKey("user", fields.Str()).set("five"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("stored", [False, True], ids=["new", "stored"])
def test_every_write_is_checked(
    make_site: SiteMaker, write: Callable[[Any], object], stored: bool
) -> None:
    site = make_site(schema=WholeSchema)
    visitor = site.visitor()
    if stored:
        visitor.run(lambda session: session.update(preferences={"theme": "dark"}, _flashes=[]))

    def wrong(session: Any) -> None:
        with pytest.raises(ValidationError) as refused:
            write(session)
        assert set(cast(Any, refused.value.messages)) <= {"user", "preferences", "other"}
        session["user"] = 7

    visitor.run(wrong)
    expected: dict[str, Any] = {"user": 7}
    if stored:
        expected |= {"preferences": {"theme": "dark"}, "_flashes": []}
    assert has(visitor) == expected


def test_unknown_keys_as_the_schema_says(make_site: SiteMaker) -> None:
    class Open(WholeSchema):
        class Meta:
            unknown = INCLUDE

    class Lax(WholeSchema):
        class Meta:
            unknown = EXCLUDE

    for schema in (Open, Lax(), [SessionKey("user", fields.Int())]):
        visitor = make_site(schema=schema).visitor()
        visitor.run(lambda session: session.update(other=1))
        assert has(visitor) == {"other": 1}

    def refused(session: Any) -> None:
        with pytest.raises(ValidationError) as error:
            session["other"] = 1
        assert error.value.messages == {"other": ["Unknown field."]}
        session["_user_id"] = "ada"  # of Flask's extensions

    visitor = make_site(schema=WholeSchema).visitor()
    visitor.run(refused)
    assert has(visitor) == {"_user_id": "ada"}


def test_a_change_inside_a_value_is_checked_when_it_is_saved(make_site: SiteMaker) -> None:
    site = make_site(schema=WholeSchema)

    @site.app.errorhandler(ValidationError)
    def invalid(error: ValidationError) -> tuple[Any, int]:
        return error.messages, 422

    visitor = site.visitor()
    visitor.run(lambda session: session.update(preferences={"theme": "dark"}))

    response = visitor.ask(lambda session: session["preferences"].update(theme="pink"))
    assert response.status_code == 422
    assert response.json == {"preferences": {"theme": ["Must be one of: light, dark, system."]}}

    def in_a_transaction(session: Any) -> None:
        with session.transaction():
            session["preferences"]["theme"] = "pink"

    assert visitor.ask(in_a_transaction).status_code == 422
    assert has(visitor) == {"preferences": {"theme": "dark"}}


def test_declared_keys_keep_ttl_version_and_merge_wherever_they_are_written(
    make_site: SiteMaker,
) -> None:
    hits = SessionKey("hits", fields.Int(), ttl=60, merge="counter", version=2)
    site = make_site(schema=[hits])
    visitor = site.visitor()
    visitor.run(lambda session: session.update(hits=1))
    other = visitor.another_tab()

    def plain(session: Any) -> None:
        session["hits"] += 1
        other.run(lambda session: session.update(hits=session["hits"] + 1))

    visitor.run(plain)
    assert visitor.run(lambda session: (hits.get(), session.ttl("hits"))) == (3, 60)
    visitor.run(lambda session: session.set("hits", 5, ttl=30))
    visitor.run(lambda session: session.update_atomic("hits", lambda n: n + 1))
    assert visitor.run(lambda session: (hits.get(), session.ttl("hits"))) == (6, 30)
    assert site.happened(StoredValueInvalid) == []


@pytest.mark.parametrize("schema", [dict, 5, "WholeSchema", [fields.Int()], fields.Int()], ids=str)
def test_a_malformed_schema_stops_the_application(make_site: SiteMaker, schema: Any) -> None:
    with pytest.raises(SettingError, match=r"SESSION_SCHEMA is .*; allowed: a marshmallow Schema"):
        make_site(schema=schema)


def test_a_schema_checks_each_written_value_once(make_site: SiteMaker) -> None:
    calls: list[Any] = []
    key = SessionKey("n", fields.Int(validate=lambda value: calls.append(value)))
    site = make_site(schema=[key])
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=1))
    visitor.run(lambda _: key.set(2))
    assert calls == [1, 2, 2]  # set() loads the value to be stored once more
    assert visitor.run(lambda _: key.get()) == 2


# Views ---------------------------------------------------------------------------------------


@pytest.fixture
def shop(site: Site) -> Site:
    """A site with pages for its preferences."""
    preferences = SessionKey("preferences", PreferencesSchema)
    user = SessionKey("user", fields.Int(strict=True))
    app = site.app

    @app.get("/theme/<word>")
    @use_session(preferences, user)
    def theme(word: str, preferences: dict[str, Any], user: int) -> str:
        return f"{word} {preferences['theme']} {user}"

    @app.get("/async")
    @require_session("user")
    @use_session(preferences)
    async def theme_async(preferences: dict[str, Any]) -> str:
        return str(preferences["theme"])

    @app.get("/account")
    @require_session(user)
    def account() -> str:
        return "welcome"

    @app.get("/login")
    def login() -> str:
        return "who are you?"

    @app.get("/orders")
    @require_session("user", preferences, redirect_to="login")
    async def orders() -> str:
        return "none"

    app.add_url_rule("/api/preferences", view_func=preferences.view())
    app.add_url_rule("/api/place", view_func=SessionKey("place", PlaceSchema).view())
    return site


def test_views_get_values_and_refuse(shop: Site) -> None:
    visitor = shop.visitor()
    assert visitor.get("/account").status_code == 401
    assert visitor.get("/async").status_code == 401
    assert visitor.get("/orders").location == "/login"
    visitor.run(lambda session: session.update(user="five"))
    assert visitor.get("/account").status_code == 401  # there, but not valid
    assert visitor.get("/async").text == "system"
    visitor.run(lambda session: session.update(user=5))
    assert visitor.get("/account").text == "welcome"
    assert visitor.get("/orders").location == "/login"  # defaults don't count
    visitor.patch("/api/preferences", json={"theme": "dark"})
    assert visitor.get("/orders").text == "none"
    assert visitor.get("/theme/now").text == "now dark 5"


def test_a_value_as_json(shop: Site) -> None:
    visitor = shop.visitor()
    assert visitor.get("/api/preferences").json == DEFAULTS
    answer = visitor.patch("/api/preferences", json={"theme": "dark"})
    assert (answer.status_code, answer.json) == (200, DEFAULTS | {"theme": "dark"})
    answer = visitor.patch("/api/preferences", json={"theme": "pink", "size": "x"})
    assert answer.status_code == 422
    assert answer.json == {
        "errors": {
            "theme": ["Must be one of: light, dark, system."],
            "size": ["Not a valid integer."],
        }
    }
    for wrong in ("[]", '"dark"', "null", "5"):
        answer = visitor.patch("/api/preferences", data=wrong, content_type="application/json")
        assert (answer.status_code, answer.json) == (
            422,
            {"errors": {"_schema": ["Invalid input type."]}},
        )
    assert visitor.patch("/api/preferences", data={"theme": "light"}).status_code == 415
    answer = visitor.patch("/api/preferences", data="{", content_type="application/json")
    assert answer.status_code == 400
    assert visitor.post("/api/preferences", json={}).status_code == 405
    assert visitor.get("/api/preferences").json == DEFAULTS | {"theme": "dark"}
    assert visitor.get("/api/place").status_code == 404
    assert visitor.patch("/api/place", json={}).status_code == 422
    assert visitor.patch("/api/place", json={"city": "Graz"}).json == {"city": "Graz"}


# mypy ----------------------------------------------------------------------------------------


def test_mypy_infers_the_types() -> None:
    here = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(here / "typing")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=here.parent,
    )
    assert run.returncode == 0, run.stdout + run.stderr
