"""`get` returns what `set` returned, for every schema; otherwise `set` refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from inspect import signature
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from flask import Flask, session
from hypothesis import given, settings
from hypothesis import strategies as st
from marshmallow import (
    EXCLUDE,
    INCLUDE,
    Schema,
    ValidationError,
    fields,
    post_dump,
    post_load,
    pre_dump,
    pre_load,
    validate,
)

from flask_gsession import Session
from flask_gsession.errors import SettingError, ValueRefused
from flask_gsession.events import StoredValueInvalid
from flask_gsession.typed import SessionKey
from tests.harness.apps import Site, SiteMaker


def of(**declared: Any) -> type[Schema]:
    return Schema.from_dict(declared)


@contextmanager
def in_request(**settings_of: Any) -> Iterator[None]:
    app = Flask("typed")
    app.secret_key = "k" * 32
    Session(app, store="memory://", **settings_of)
    with app.test_request_context():
        yield


def alike(one: Any, other: Any) -> bool:
    """Whether two values are equal; compares objects without `==` by their attributes."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if hasattr(one, "__dict__") and not isinstance(one, Enum):
        return alike(vars(one), vars(other))
    return bool(one == other)


# Values that round-trip -----------------------------------------------------------------------


class Item(Schema):
    article = fields.Str(required=True)
    label = fields.Method("make_label")
    length = fields.Function(lambda item: len(item["article"]))
    shown = fields.Str(dump_only=True, dump_default="yes")

    def make_label(self, item: Any) -> str:
        return str(item["article"]).upper()


class Renamed(Schema):
    count = fields.Int(data_key="Count", load_default=0)
    when = fields.Date(attribute="day")


class Bag:
    """Has no `==`."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class Made(Schema):
    count = fields.Int(data_key="Count")

    @post_load
    def make(self, data: Any, **_: Any) -> Bag:
        return Bag(**data)


class Point(NamedTuple):
    x: int


class MadeTuple(Schema):
    x = fields.Int()

    @post_load
    def make(self, data: Any, **_: Any) -> Point:
        return Point(**data)


class Open(Schema):
    class Meta:
        unknown = INCLUDE

    count = fields.Int(data_key="Count", load_default=0)


class Lax(Schema):
    class Meta:
        unknown = EXCLUDE

    count = fields.Int(data_key="Count", load_default=0)


class Envelope(Schema):
    theme = fields.Str(data_key="Theme")
    size = fields.Int(load_default=1)

    @pre_load
    def unwrap(self, data: Any, **_: Any) -> Any:
        return data["data"]

    @post_dump
    def wrap(self, data: Any, **_: Any) -> Any:
        return {"data": data}


COLLECTION: Any = (  # marshmallow 3 has another name for it
    {"pass_collection": True}
    if "pass_collection" in signature(pre_load).parameters
    else {"pass_many": True}
)


class ManyInEnvelope(Schema):
    n = fields.Int(data_key="N")
    double = fields.Function(lambda row: row["n"] * 2)

    @pre_load(**COLLECTION)
    def unwrap(self, data: Any, many: bool, **_: Any) -> Any:
        return data["rows"] if many else data

    @post_dump(**COLLECTION)
    def wrap(self, data: Any, many: bool, **_: Any) -> Any:
        return {"rows": data} if many else data


class Drops(Schema):
    company = fields.Str(required=True, allow_none=True)

    @post_dump
    def without_none(self, data: Any, **_: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None}


class Adds(Schema):
    n = fields.Int()

    @post_dump
    def add(self, data: Any, **_: Any) -> Any:
        return {**data, "type": "adds"}


class UsesComputed(Schema):
    n = fields.Int()
    total = fields.Function(lambda row: row["n"] * 2)

    @post_dump
    def more(self, data: Any, **_: Any) -> Any:
        return {**data, "total": data["total"] + 1}


class InPlace(Schema):
    n = fields.Int()
    on = fields.Date()

    @pre_load
    def rename(self, data: Any, **_: Any) -> Any:
        data["n"] = data.pop("N")
        return data

    @pre_dump
    def note(self, value: Any, **_: Any) -> Any:
        value["noted"] = True
        return value

    @post_dump
    def rename_back(self, data: Any, **_: Any) -> Any:
        data["N"] = data.pop("n")
        return data


class Stripped(fields.Str):
    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._deserialize(value, *args, **kwargs).strip()


class Counting(fields.Int):
    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._deserialize(value, *args, **kwargs) + 1


class Node(Schema):
    name = fields.Str(data_key="Name")
    inside = fields.List(fields.Nested(lambda: Node()), load_default=list)
    count = fields.Function(lambda node: len(node["inside"]))


class Colour(Enum):
    RED = "red"


@dataclass
class Folder:
    name: str = ""
    inside: list[Folder] = field(default_factory=list)
    parent: Folder | None = None
    by_number: dict[int, Folder] = field(default_factory=dict)


@dataclass
class Measure:
    value: float = 0.0
    unit: str = ""
    lasted: timedelta = timedelta(0)
    ids: dict[date, UUID] = field(default_factory=dict)


def passes_once() -> Callable[[Any], None]:
    """A validator, as of a code that can be used once."""
    used: list[Any] = []

    def check(value: Any) -> None:
        if value in used:
            raise ValidationError("Used.")
        used.append(value)

    return check


MUG = {"article": "mug"}
CAMERA = timedelta(days=200_000, seconds=4881, microseconds=871_461)

# The schema, the value sent, and the value that comes back; ... if that is the same.
KEPT: dict[str, tuple[Any, Any, Any]] = {
    "nested": (of(item=fields.Nested(Item)), {"item": MUG}, ...),
    "many": (Item(many=True), [MUG, MUG], ...),
    "nested many": (of(items=fields.Nested(Item, many=True)), {"items": [MUG]}, ...),
    "list": (of(items=fields.List(fields.Nested(Item))), {"items": [MUG]}, ...),
    "dict": (of(items=fields.Dict(fields.Str(), fields.Nested(Item))), {"items": {"a": MUG}}, ...),
    "lists in a dict": (
        fields.Dict(values=fields.List(fields.Nested(Item))),
        {"a": [MUG], "b": []},
        ...,
    ),
    "tuple": (fields.Tuple((fields.Nested(Item), fields.Int())), [MUG, 1], (MUG, 1)),
    "nested as a key": (fields.Nested(Item), MUG, ...),
    "list as a key": (fields.List(fields.Nested(Item)), [MUG], ...),
    "two levels": (of(a=fields.Nested(of(b=fields.Nested(Item)))), {"a": {"b": MUG}}, ...),
    "data_key": (Renamed, {"Count": 1}, {"count": 1}),
    "attribute": (Renamed, {"when": "2030-01-02"}, {"count": 0, "day": date(2030, 1, 2)}),
    "attribute with a dot": (of(a=fields.Int(attribute="b.c")), {"a": 1}, {"b": {"c": 1}}),
    "empty data_key": (of(a=fields.Int(data_key="")), {"": 1}, {"a": 1}),
    "pluck": (of(tag=fields.Pluck(Item, "article")), {"tag": "mug"}, {"tag": MUG}),
    "pluck many": (fields.Pluck(Item, "article", many=True), ["mug"], [MUG]),
    "included": (Open, {"Count": 1, "more": [1]}, {"count": 1, "more": [1]}),
    "included, many": (Open(many=True), [{"a": 1}], [{"count": 0, "a": 1}]),
    "included, nested": (of(a=fields.Nested(Item, unknown=INCLUDE)), {"a": MUG | {"x": 1}}, ...),
    "excluded": (Lax, {"Count": 1, "more": 1}, {"count": 1}),
    "excluded, but named so": (Lax, {"count": 1}, {"count": 1}),
    "object": (Made, {"Count": 1}, Bag(count=1)),
    "many objects": (Made(many=True), [{"Count": 1}], [Bag(count=1)]),
    "objects in lists": (fields.List(fields.Nested(Made)), [{"Count": 1}], [Bag(count=1)]),
    "object given": (Made, Bag(count=1), ...),
    "named tuple": (MadeTuple, {"x": 1}, Point(1)),
    "envelope": (
        Envelope,
        {"data": {"Theme": "dark"}},
        {"theme": "dark", "size": 1},
    ),
    "many in an envelope": (ManyInEnvelope(many=True), {"rows": [{"N": 1}]}, [{"n": 1}]),
    "hooks that change what they get": (
        InPlace,
        {"N": 1, "on": "2030-01-02"},
        {"n": 1, "on": date(2030, 1, 2)},
    ),
    "such hooks in a list": (fields.List(fields.Nested(InPlace)), [{"N": 1}], [{"n": 1}]),
    "hook that drops": (Drops, {"company": None}, ...),
    "hook that adds": (Adds, {"n": 1}, ...),
    "hook that uses a computed field": (fields.Nested(UsesComputed), {"n": 1}, ...),
    "field of one's own": (of(a=Stripped()), {"a": " x "}, {"a": "x"}),
    "recursive": (
        Node,
        {"Name": "a", "inside": [{"Name": "b"}]},
        {"name": "a", "inside": [{"name": "b", "inside": []}]},
    ),
    "keys of numbers": (fields.Dict(fields.Int(), fields.Nested(Item)), {"1": MUG}, {1: MUG}),
    "keys of dates": (fields.Dict(fields.Date()), {"2030-01-02": 1}, {date(2030, 1, 2): 1}),
    "keys of any kind": (fields.Dict(), {1: {None: 1}, "1": {"\0pairs": []}, 1.5: 2}, ...),
    "keys of decimals": (fields.Dict(fields.Decimal()), {"1.5": 1}, {Decimal("1.5"): 1}),
    "keys of tuples": (fields.Dict(), {(1, 2): 1, date(2030, 1, 2): {b"3": 4}}, ...),
    "enum": (fields.Enum(Colour), "RED", Colour.RED),
    "timestamp": (fields.DateTime("timestamp"), datetime(2030, 1, 2, 3, 4, 5), ...),
    "rfc": (fields.DateTime("rfc"), datetime(2030, 1, 2, tzinfo=UTC), ...),
    "zone": (fields.DateTime(), datetime(2030, 1, 2, tzinfo=ZoneInfo("Europe/Vienna")), None),
    "format": (fields.Date("%d.%m.%y"), date(2030, 1, 2), ...),
    "decimal": (fields.Decimal(as_string=True), Decimal("1.10"), ...),
    "infinite": (fields.Float(allow_nan=True), math.inf, ...),
    "words": (fields.Bool(truthy={"yes"}, falsy={"no"}), "no", False),
    "iterator": (fields.List(fields.Int()), iter([1, 2]), [1, 2]),
    "iterator inside": (of(a=fields.List(fields.Nested(Item))), {"a": iter([MUG])}, {"a": [MUG]}),
    "set": (fields.List(fields.Int()), {1}, [1]),
    "raw": (fields.Raw(), [(1, {2: b"3"}), {4}], ...),
    "dataclass": (Folder, {"name": "a", "inside": [{}]}, Folder("a", [Folder()])),
    "recursive dataclass": (
        Folder,
        Folder("a", [Folder("b", parent=Folder("c"))], None, {7: Folder()}),
        ...,
    ),
    "dataclass of numbers": (Measure, Measure(3, "m", CAMERA), Measure(3.0, "m", CAMERA)),
    "dates in a dataclass": (
        Measure,
        {"ids": {"2030-01-02": str(UUID(int=1))}},
        Measure(ids={date(2030, 1, 2): UUID(int=1)}),
    ),
}


def test_every_kind_comes_back(site: Site) -> None:
    keys = {what: SessionKey(what, schema) for what, (schema, _, _) in KEPT.items()}
    sent = copy.deepcopy({what: sent for what, (_, sent, _) in KEPT.items()})
    visitor = site.visitor()

    def put(_: Any) -> dict[str, Any]:
        returned = {what: key.set(sent[what]) for what, key in keys.items()}
        assert alike(returned, {what: key.get() for what, key in keys.items()})
        return returned

    def again(_: Any) -> Any:
        found = {what: key.get("nothing") for what, key in keys.items()}
        for what, key in keys.items():
            key.set(found[what])
            key.set(copy.deepcopy(found[what]))  # a value that isn't a known result of get()
        return found

    returned = visitor.run(put)
    for what, value in returned.items():
        expected = KEPT[what][1] if KEPT[what][2] is ... else KEPT[what][2]
        assert expected is None or alike(value, expected), what
    assert alike(visitor.run(again), returned)
    assert alike(visitor.run(again), returned)
    assert site.happened(StoredValueInvalid) == []


def test_an_instant_in_a_zone_keeps_its_offset() -> None:
    with in_request():
        there = datetime(2030, 1, 2, tzinfo=ZoneInfo("Europe/Vienna"))
        got = SessionKey("at", fields.DateTime()).set(there)
        assert (got, got.utcoffset()) == (there, there.utcoffset())


def hooked(field: fields.Field[Any], hook: Callable[[Any], Any]) -> type[Schema]:
    """A schema of a field with a hook of its own, which marshmallow has since 4.3."""
    vars(field).setdefault("post_load", []).append(hook)
    return of(a=field)


def test_hooks_of_fields() -> None:
    kept = SessionKey("kept", hooked(fields.Str(), str.strip))
    lost = SessionKey("lost", hooked(fields.Int(), lambda n: n + 1))
    with in_request():
        assert kept.set({"a": " x "}) == kept.get() == kept.schema.load({"a": " x "})
        if lost.schema.load({"a": 1}) == {"a": 2}:
            with pytest.raises(ValidationError):
                lost.set({"a": 1})
        else:
            assert lost.set({"a": 1}) == lost.get()


# Refused values ------------------------------------------------------------------------------


class Stamps(Schema):
    page = fields.Str()
    at = fields.DateTime()

    @post_load
    def now(self, data: Any, **_: Any) -> Any:
        return {**data, "at": datetime.now(UTC)}


class StampsUndeclared(Schema):
    page = fields.Str()

    @post_load
    def now(self, data: Any, **_: Any) -> Any:
        return {**data, "at": datetime.now(UTC)}


class Counted:
    made = 0

    def __init__(self, n: int) -> None:
        Counted.made += 1
        self.n, self.serial = n, Counted.made


class MakesCounted(Schema):
    n = fields.Int()

    @post_load
    def make(self, data: Any, **_: Any) -> Counted:
        return Counted(**data)


@dataclass
class Labels:
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = [*self.names, "all"]


@dataclass
class LabelsAndMore(Labels):
    more: int = 0


LATER = datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
NAN_ALLOWED = fields.Float(allow_nan=True)

# The schema, a value, and the field that the error names.
REFUSED: dict[str, tuple[Any, Any, str | int | None]] = {
    "required load_only": (
        of(name=fields.Str(), password=fields.Str(required=True, load_only=True)),
        {"name": "ada", "password": "x"},
        "password",
    ),
    "load_only": (of(a=fields.Str(load_only=True, data_key="A")), {"A": "x"}, "A"),
    "load_only with a default": (
        of(a=fields.Str(load_only=True, load_default="x")),
        {"a": "y"},
        "a",
    ),
    "load_only that differs": (of(a=fields.UUID(load_only=True, load_default=uuid4)), {}, "a"),
    "load_only method": (
        of(a=fields.Function(deserialize=str.upper)),
        {"a": "x"},
        "a",
    ),
    "stamp": (Stamps, {"page": "/"}, "at"),
    "stamp of no field": (StampsUndeclared, {"page": "/"}, "at"),
    "validator that differs": (of(a=fields.Int(validate=passes_once())), {"a": 1}, "a"),
    "validators that differ": (
        of(a=fields.Int(validate=validate.And(validate.Range(0), passes_once()))),
        {"a": 1},
        "a",
    ),
    "object that differs": (MakesCounted, {"n": 1}, "serial"),
    "dataclass that grows": (Labels, Labels(["new"]), "names"),
    "subclass of the dataclass": (Folder, Measure(), None),
    "field of one's own": (of(a=Counting()), {"a": 1}, "a"),
    "function": (of(a=fields.Function(lambda _: 5, lambda n: n)), {"a": 1}, "a"),
    "nan": (of(a=NAN_ALLOWED), {"a": math.nan}, "a"),
    "nan as text": (of(a=NAN_ALLOWED), {"a": "nan"}, "a"),
    "nan inside": (of(a=fields.Raw()), {"a": {"b": [math.nan]}}, "a"),
    "nan decimal": (of(a=fields.Decimal(allow_nan=True)), {"a": Decimal("sNaN")}, "a"),
    "aware timestamp": (of(a=fields.DateTime("timestamp")), {"a": LATER}, "a"),
    "microseconds in rfc": (of(a=fields.DateTime("rfc")), {"a": LATER}, "a"),
    "century": (of(a=fields.Date("%d.%m.%y")), {"a": date(1815, 1, 2)}, "a"),
    "seconds": (of(a=fields.Time("%H:%M")), {"a": time(1, 2, 3)}, "a"),
    "long timedelta": (of(a=fields.TimeDelta()), {"a": CAMERA}, "a"),
    "default of another type": (of(a=fields.Int(load_default="5")), {}, "a"),
    "default that can't be dumped": (of(a=fields.Date(load_default="2030")), {}, "a"),
    "included under a field's name": (Open, {"count": "x"}, "Count"),
    "in many": (of(a=NAN_ALLOWED)(many=True), [{"a": 1}, {"a": math.nan}], 1),
    "text for a float": (Measure, {"value": " 3.5 "}, "value"),
    "bytes for a float": (Measure, {"value": b"3"}, "value"),
    "bytes for text": (Measure, {"unit": b"m"}, "unit"),
    "text for a timedelta": (Measure, {"lasted": "5"}, "lasted"),
    "bytes for a UUID": (Measure, {"ids": {"2030-01-02": b"0" * 16}}, "ids"),
    "instance with text": (Measure, Measure(value="3.5"), "value"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("before", [False, True], ids=["new", "over another"])
def test_values_that_cannot_come_back_are_refused(what: str, before: bool) -> None:
    schema, value, name = REFUSED[what]
    key = SessionKey("key", schema)
    with in_request():
        if before:
            session["key"] = "as it was"
        with pytest.raises(ValidationError) as refused:
            key.set(value)
        assert name is None or list(refused.value.messages) == [name]
        assert session.get("key") == ("as it was" if before else None)


def test_a_dataclass_takes_values_of_its_types_only() -> None:
    @dataclass
    class Strict:
        flag: bool = False
        size: Literal[1, "M"] = 1
        colour: Colour = Colour.RED
        price: Decimal = Decimal(0)

    key = SessionKey("strict", Strict)
    wrong: list[dict[str, Any]] = [{"flag": 1}, {"size": True}, {"size": 1.0}, {"price": b"1"}]
    with in_request():
        for value in wrong:
            with pytest.raises(ValidationError):
                key.set(value)
        assert key.set({"size": "M", "colour": "red"}) == Strict(size="M")


def test_set_refuses_values_that_no_session_can_store() -> None:
    key = SessionKey("key", of(a=fields.Raw()))
    with in_request():
        with pytest.raises(ValueRefused, match=r"session\['key'\]\['a'\]"):
            key.set({"a": object()})
        assert "key" not in session
    with in_request(max_depth=3):
        deep = {"plain": of(a=fields.Raw()), "other": of(a=fields.Raw(), b=fields.Date())}
        for name, schema in deep.items():
            key = SessionKey(name, schema)
            with pytest.raises(ValueRefused, match="SESSION_MAX_DEPTH"):
                key.set({"a": [[[1]]]})
            assert name not in session


def test_a_computed_field_is_not_a_key() -> None:
    with pytest.raises(SettingError, match=r"fields\.Method needs a schema"):
        SessionKey("key", fields.Method("compute", "load"))


def test_a_dataclass_with_an_unknown_name() -> None:
    @dataclass
    class Odd:
        value: Nowhere  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(SettingError, match="Odd: name 'Nowhere' is not defined"):
        SessionKey("odd", Odd)


def test_a_recursive_dataclass_in_a_function() -> None:
    @dataclass
    class Local:
        inside: list[Local] = field(default_factory=list)

    with in_request():
        assert SessionKey("local", Local).set(Local([Local()])) == Local([Local()])


def test_a_schema_of_a_dataclass_takes_nobodys_name() -> None:
    class FolderSchema(Schema):
        name = fields.Str()

    SessionKey("folder", Folder).schema  # noqa: B018
    outer = of(folder=fields.Nested("FolderSchema"))
    with in_request():
        assert SessionKey("outer", outer).set({"folder": {"name": "a"}})


# Both readings -------------------------------------------------------------------------------


def cents(row: Any) -> float:
    return float(row["price"] / 100)


Price = of(price=fields.Function(cents, lambda euros: int(euros * 100)), note=fields.Str())


def test_set_recognises_a_result_of_get() -> None:
    """A value that could also come from a client: the same object counts, even after a change."""
    key = SessionKey("price", Price)
    with in_request():
        assert key.set({"price": 2}) == {"price": 200}
        assert key.set(key.get()) == {"price": 200}
        given = key.get()
        given["note"] = "gift"
        assert key.set(given) == {"price": 200, "note": "gift"}
        assert key.update(note="none") == {"price": 200, "note": "none"}
        assert key.set(key.set({"price": 3})) == {"price": 300}


def test_defaults_are_given_as_values_are() -> None:
    def default(schema: Any, value: Any) -> Any:
        return SessionKey("key", schema, default=value).get()

    schema: Any
    style = of(colour=fields.Enum(Colour), since=fields.Date())
    expected = {"colour": Colour.RED, "since": date(2030, 1, 2)}
    for schema, written, got in (
        (style, {"colour": "RED", "since": "2030-01-02"}, expected),
        (style, expected, expected),
        (fields.Enum(Colour), "RED", Colour.RED),
        (Renamed, {"Count": 5}, {"count": 5}),
        (Renamed, {"count": 5}, {"count": 5}),
        (Made, {"Count": 5}, Bag(count=5)),
        (Made, Bag(count=5), Bag(count=5)),
        (fields.List(fields.Nested(Made)), [{"Count": 5}], [Bag(count=5)]),
        (Folder, {"name": "a"}, Folder("a")),
    ):
        with in_request():
            assert alike(default(schema, written), got)
    for schema, wrong in ((NAN_ALLOWED, math.nan), (Stamps, {}), (fields.Raw(), object())):
        with pytest.raises(SettingError):
            default(schema, wrong)


# update, view --------------------------------------------------------------------------------


def test_update_keeps_the_other_fields(site: Site) -> None:
    cart = SessionKey(
        "cart", of(note=fields.Str(), items=fields.List(fields.Nested(Item)), n=fields.Nested(Made))
    )
    forms = {
        "renamed": SessionKey("renamed", Renamed),
        "open": SessionKey("open", Open),
        "envelope": SessionKey("envelope", Envelope),
        "drops": SessionKey("drops", of(company=fields.Nested(Drops), n=fields.Int())),
        "made": SessionKey("made", Made),
        "default": SessionKey(
            "default",
            of(a=fields.Str(load_default="", validate=validate.Length(min=1)), b=fields.Int()),
        ),
    }

    def start(_: Any) -> None:
        cart.set({"note": "gift", "items": [MUG], "n": {"Count": 3}})
        forms["renamed"].set({"Count": 1, "when": "2030-01-02"})
        forms["open"].set({"Count": 1, "more": 2})
        forms["envelope"].set({"data": {"Theme": "dark", "size": 5}})
        forms["drops"].set({"company": {"company": None}})
        forms["made"].set({"Count": 1})
        forms["default"].set({})

    def change(_: Any) -> None:
        cart.update(note="none")
        forms["renamed"].update(Count=2)
        forms["open"].update(Count=2, other=3)
        forms["envelope"].update(Theme="light")
        forms["drops"].update(n=1)
        forms["made"].update(Count=2)
        forms["default"].update(b=1)

    visitor = site.visitor()
    visitor.run(start)
    visitor.run(change)
    assert visitor.run(lambda _: cart.get()["items"]) == [MUG]
    assert visitor.run(lambda _: (cart.get()["note"], cart.get()["n"].count)) == ("none", 3)
    found = visitor.run(lambda _: {name: key.get() for name, key in forms.items()})
    assert alike(
        found,
        {
            "renamed": {"count": 2, "day": date(2030, 1, 2)},
            "open": {"count": 2, "more": 2, "other": 3},
            "envelope": {"theme": "light", "size": 5},
            "drops": {"company": {"company": None}, "n": 1},
            "made": Bag(count=2),
            "default": {"a": "", "b": 1},
        },
    )


def test_a_view_shows_computed_fields_at_every_level(site: Site) -> None:
    shelf = of(
        note=fields.Str(),
        one=fields.Nested(Item),
        many=fields.Nested(Item, many=True),
        listed=fields.List(fields.Nested(Item)),
        named=fields.Dict(fields.Str(), fields.Nested(Item)),
        first=fields.Function(lambda value: value["one"]["article"]),
        more=fields.Nested(Open),
    )
    key = SessionKey("shelf", shelf)
    site.app.add_url_rule("/shelf", view_func=key.view())
    visitor = site.visitor()
    value = {"one": MUG, "many": [MUG], "listed": [MUG], "named": {"a": MUG}, "more": {"x": 1}}
    visitor.run(lambda _: key.set(value))
    mug = {"article": "mug", "label": "MUG", "length": 3, "shown": "yes"}
    shown = {"one": mug, "many": [mug], "listed": [mug], "named": {"a": mug}, "first": "mug"}
    shown["more"] = {"Count": 0, "x": 1}
    assert visitor.get("/shelf").json == shown
    answer = visitor.patch("/shelf", json={"note": "new"})
    assert answer.json == shown | {"note": "new"}
    assert visitor.patch("/shelf", json={"first": "cup"}).status_code == 422
    assert visitor.patch("/shelf", json={"one": mug}).status_code == 422
    assert visitor.get("/shelf").json == shown | {"note": "new"}


def test_a_view_of_dicts_with_other_keys(site: Site) -> None:
    schema = of(
        days=fields.Dict(fields.Date(), fields.Int()),
        prices=fields.Dict(fields.Decimal(), fields.Int()),
        mixed=fields.Dict(),
    )
    key = SessionKey("key", schema)
    site.app.add_url_rule("/key", view_func=key.view())
    visitor = site.visitor()
    value = {"days": {"2030-01-02": 1}, "prices": {"1.5": 1}, "mixed": {1: 1, "a": {None: 2}}}
    visitor.run(lambda _: key.set(value))
    assert visitor.get("/key").json == {
        "days": {"2030-01-02": 1},
        "prices": {"1.5": 1},
        "mixed": {"1": 1, "a": {"null": 2}},
    }
    answer = visitor.patch("/key", json={"prices": {"2.5": 3}})
    assert answer.json == visitor.get("/key").json
    assert answer.json["prices"] == {"2.5": 3}  # type: ignore[index]  # it is there


# Stored data ---------------------------------------------------------------------------------

CONVERTED: dict[str, tuple[Any, Any]] = {
    "data_key": (of(on=fields.Bool(data_key="On")), {"On": "yes"}),
    "number": (of(n=fields.Int(data_key="N")), {"N": "7"}),
    "float": (of(n=fields.Int(data_key="N")), {"N": 7.0}),
    "attribute": (of(n=fields.Int(attribute="m")), {"n": "7"}),
    "nested": (of(a=fields.Nested(of(n=fields.Int(data_key="N")))), {"a": {"N": "7"}}),
    "many": (of(n=fields.Int(data_key="N"))(many=True), [{"N": "7"}]),
    "pluck": (of(a=fields.Pluck(of(n=fields.Int()), "n")), {"a": "7"}),
    "object": (Made, {"Count": "7"}),
    "keys": (fields.Dict(fields.Date(), fields.Bool()), {"2030-01-02": "yes"}),
    "keys of a dict": (fields.Dict(fields.Int()), {"1": "a"}),
    "included": (Open, {"Count": "7", "more": 1}),
    "load_only": (of(n=fields.Int(load_only=True)), {"n": "7"}),
    "lost": (of(n=fields.Int(load_only=True)), {"n": 7}),
    "computed": (Item, MUG | {"label": "MUG"}),
    "in an envelope": (Envelope, {"data": {"Theme": "x", "size": "7"}}),
    "enum of a dataclass": (Measure, {"value": 3}),
}


@pytest.mark.parametrize("what", CONVERTED)
def test_nothing_is_converted_on_the_way_out(what: str) -> None:
    schema, stored = CONVERTED[what]
    key = SessionKey("key", schema)
    with in_request():
        session["key"] = stored
        assert key.get("not valid") == "not valid"
        assert session["key"] == stored
    with in_request(schema=[key]):
        with pytest.raises(ValidationError) as refused:
            session["key"] = stored
        assert list(refused.value.messages) == ["key"]
        assert "key" not in session


def test_values_of_earlier_versions_are_read() -> None:
    """The stored form of a schema without computed, unknown or renamed fields hasn't changed."""
    for schema, stored, value in (
        (of(day=fields.Date(data_key="Day")), {"Day": "2030-01-02"}, {"day": date(2030, 1, 2)}),
        (Measure, {"value": 1.0, "unit": "m", "lasted": 9e7}, Measure(1.0, "m", timedelta(0, 90))),
        (Folder, {"name": "a", "inside": []}, Folder("a")),
        (Envelope, {"data": {"Theme": "x", "size": 1}}, {"theme": "x", "size": 1}),
        (Lax, {"Count": 1, "left": "over"}, {"count": 1}),
    ):
        with in_request():
            session["key"] = stored
            assert SessionKey("key", schema).get("not valid") == value


# Parallel requests ---------------------------------------------------------------------------


def race(site: Site, change: Callable[[Any], object], theirs: Callable[[Any], object]) -> int:
    """The status of a request that changes the session while another one does."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(start=1))
    site.last = visitor  # type: ignore[attr-defined]

    def both(session: Any) -> None:
        change(session)
        visitor.another_tab().run(theirs)

    return visitor.ask(both).status_code


@pytest.mark.parametrize("what", ["data_key", "attribute", "object", "list", "pluck", "dict"])
def test_a_merge_function_works_on_values_as_returned_by_get(site: Site, what: str) -> None:
    cases: dict[str, tuple[Any, Any, Any]] = {
        "data_key": (Renamed, {"Count": 1}, {"Count": 2}),
        "attribute": (Renamed, {"when": "2030-01-02"}, {"when": "2031-01-02"}),
        "object": (Made, {"Count": 1}, {"Count": 2}),
        "list": (fields.List(fields.Nested(Made)), [{"Count": 1}], [{"Count": 2}]),
        "pluck": (fields.Pluck(Item, "article", many=True), ["a"], ["b"]),
        "dict": (fields.Dict(fields.Int(), fields.Date()), {1: "2030-01-02"}, {2: "2031-01-02"}),
    }
    schema, sent, other = cases[what]
    seen: list[Any] = []

    def merge(base: Any, theirs: Any, mine: Any) -> Any:
        seen.extend((theirs, mine))
        return theirs

    key: SessionKey[Any] = SessionKey("key", schema, merge=merge)
    assert race(site, lambda _: key.set(sent), lambda _: key.set(other)) == 200
    stored = site.last.run(lambda _: key.get())  # type: ignore[attr-defined]
    assert alike(stored, seen[0])
    with in_request():
        expected = SessionKey("other", schema)
        assert alike(seen, [expected.set(other), expected.set(sent)])
    assert site.happened(StoredValueInvalid) == []


def test_a_merged_dict_with_numbers_as_keys(site: Site) -> None:
    key = SessionKey("key", fields.Dict(fields.Int(), fields.Int()), merge="dict")
    assert race(site, lambda _: key.set({1: 1}), lambda _: key.set({2: 2})) == 200
    assert site.last.run(lambda _: key.get()) == {1: 1, 2: 2}  # type: ignore[attr-defined]


class Limits(Schema):
    tries = fields.Int(strict=True, validate=validate.Range(0, 5))
    seen = fields.List(fields.Int(strict=True), validate=validate.Length(max=3))


POLICIES: dict[str, Any] = {
    "tries": "counter",
    "seen": "append",
    "free": "append",
    "own": lambda base, theirs, mine: "no number",
}


def test_results_of_configured_policies_are_checked_by_the_schema(make_site: SiteMaker) -> None:
    own = SessionKey("own", fields.Int())
    for schema in (
        Limits,
        [
            SessionKey("tries", fields.Int(validate=validate.Range(0, 5))),
            SessionKey("seen", fields.List(fields.Int(), validate=validate.Length(max=3))),
            own,
        ],
    ):
        site = make_site(schema=schema, merge_policies=POLICIES)

        def tries(n: int) -> Callable[[Any], object]:
            return lambda session: session.update(tries=session.get("tries", 0) + n)

        def seen(*n: int) -> Callable[[Any], object]:
            return lambda session: session.setdefault("seen", []).extend(n)

        visitor = site.visitor()

        def beside(mine: Any, theirs: Any, visitor: Any = visitor) -> int:
            def both(session: Any) -> None:
                mine(session)
                visitor.another_tab().run(theirs)

            status: int = visitor.ask(both).status_code
            return status

        visitor.run(lambda session: session.update(tries=1, seen=[1]))
        assert beside(tries(1), tries(1)) == 200
        assert beside(tries(2), tries(2)) == 409
        assert beside(seen(3), seen(4)) == 200
        visitor.run(lambda session: session.update(seen=[1, 2]))
        assert beside(seen(3), seen(4)) == 409
        assert visitor.run(dict) == {"tries": 5, "seen": [1, 2, 4]}
        if schema is not Limits:
            assert beside(lambda _: own.set(1), lambda _: own.set(2)) == 409


def test_results_of_configured_policies_are_checked_by_the_key(make_site: SiteMaker) -> None:
    """Also where the key is in no `SESSION_SCHEMA`."""
    site = make_site(merge_policies=POLICIES)
    tries = SessionKey("tries", fields.Int(validate=validate.Range(0, 5)))
    free = SessionKey("free", fields.List(fields.Int()))
    visitor = site.visitor()
    visitor.run(lambda _: (tries.set(4), free.set([])))

    def both(key: SessionKey[Any], mine: Any, theirs: Any) -> int:
        def change(_: Any) -> None:
            key.get()
            visitor.another_tab().run(lambda _: key.set(theirs))
            key.set(mine)

        return visitor.ask(change).status_code

    assert both(tries, 5, 5) == 409
    assert both(free, [1], [2]) == 200
    assert visitor.run(lambda _: (tries.get(), free.get())) == (5, [2, 1])


def test_a_computed_field_is_not_a_key_of_a_session(make_site: SiteMaker) -> None:
    class Whole(Schema):
        user = fields.Int()
        label = fields.Method("make_label")
        shown = fields.Str(dump_only=True)
        renamed = fields.Int(data_key="Renamed", attribute="other")

        def make_label(self, _: Any) -> str:
            return "x"

    def write(session: Any) -> None:
        session["user"] = 1
        session["Renamed"] = 2
        for key in ("label", "shown"):
            with pytest.raises(ValidationError):
                session[key] = "x"

    visitor = make_site(schema=Whole).visitor()
    visitor.run(write)
    assert visitor.run(dict) == {"user": 1, "Renamed": 2}


# Random schemas ------------------------------------------------------------------------------


class _Unwrap(Schema):
    @pre_load
    def unwrap(self, data: Any, **_: Any) -> Any:
        return data["data"] if isinstance(data, dict) and set(data) == {"data"} else data

    @post_dump
    def wrap(self, data: Any, **_: Any) -> Any:
        return {"data": data}


class _DropNone(Schema):
    @post_dump
    def drop(self, data: Any, **_: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None}


class _Upper(Schema):
    @pre_load
    def lower(self, data: Any, **_: Any) -> Any:
        return {key.lower(): value for key, value in data.items()}

    @post_dump
    def upper(self, data: Any, **_: Any) -> Any:
        return {key.upper(): value for key, value in data.items()}


class _Objects(Schema):
    @post_load
    def make(self, data: Any, **_: Any) -> Any:
        return SimpleNamespace(**data)


class _Extra(Schema):
    @post_dump
    def add(self, data: Any, **_: Any) -> Any:
        return {**data, "links": ["/"]}


class _Open(Schema):
    class Meta:
        unknown = INCLUDE


def also(values: st.SearchStrategy[Any], form: Callable[[Any], str]) -> st.SearchStrategy[Any]:
    """Values as text; from marshmallow 4 on, fields take the values themselves as well."""
    return values.map(form) | values if "pass_collection" in COLLECTION else values.map(form)


HOOKS = [Schema, Schema, _Unwrap, _DropNone, _Upper, _Objects, _Extra, _Open]

LEAVES: list[tuple[Callable[..., Any], st.SearchStrategy[Any]]] = [
    (fields.Str, st.text(max_size=5)),
    (fields.Int, st.integers() | st.integers(0, 9).map(str)),
    (fields.Float, st.floats(allow_nan=False, allow_infinity=False)),
    (fields.Bool, st.sampled_from([True, False, "yes", "off"])),
    (fields.Date, also(st.dates(), str)),
    (
        fields.DateTime,
        also(st.datetimes() | st.datetimes(timezones=st.just(UTC)), datetime.isoformat),
    ),
    (fields.Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (fields.UUID, st.uuids() | st.uuids().map(str)),
    (lambda **how: fields.Enum(Colour, **how), also(st.just(Colour.RED), lambda _: "RED")),
    (fields.Raw, st.integers() | st.lists(st.booleans()) | st.binary(max_size=3)),
    (lambda **how: fields.Tuple((fields.Int(), fields.Str()), **how), st.just([1, "a"])),
    (
        lambda **how: fields.Bool(truthy={"ja"}, falsy={"nein"}, **how),
        st.sampled_from(["ja", "nein"]),
    ),
]

Shape = tuple[Callable[..., Any], st.SearchStrategy[Any]]


@st.composite
def schemas(draw: Any, depth: int = 2) -> tuple[type[Schema], st.SearchStrategy[Any]]:
    """A schema, and a value for it."""
    base = draw(st.sampled_from(HOOKS))
    declared: dict[str, Any] = {}
    sent: dict[str, st.SearchStrategy[Any]] = {}
    for number in range(draw(st.integers(0, 3))):
        name = f"f{number}"
        make, values = draw(shapes(depth))
        how: dict[str, Any] = {}
        kind = draw(st.sampled_from(["", "", "data_key", "attribute", "none", "default"]))
        key = name
        if kind == "data_key":
            key = how["data_key"] = f"k{number}"
        elif kind == "attribute":
            how["attribute"] = f"a{number}"
        elif kind == "none":
            how["allow_none"] = True
            values = values | st.none()
        elif kind == "default":
            how["load_default"] = None
        declared[name] = make(**how)
        sent[key] = values
    if draw(st.booleans()):
        declared["computed"] = fields.Function(lambda _: 7)
    if draw(st.booleans()):
        declared["shown"] = fields.Str(dump_only=True, dump_default="x")
    if base is _Open:
        sent["unknown"] = st.integers() | st.lists(st.integers())
    values_of: st.SearchStrategy[Any] = st.fixed_dictionaries({}, optional=sent)
    return type("Random", (base,), {**declared, "Meta": _meta(base)}), values_of


def _meta(base: type[Schema]) -> type:
    return type("Meta", (base.Meta,), {"register": False})


@st.composite
def shapes(draw: Any, depth: int) -> Shape:
    """A function that makes a field, and a value for it."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(LEAVES))  # type: ignore[no-any-return]
    schema, values = draw(schemas(depth - 1))
    lists = st.lists(values, max_size=2)
    numbered = st.dictionaries(st.integers(0, 3), values, max_size=2)
    return draw(  # type: ignore[no-any-return]
        st.sampled_from(
            [
                (lambda **how: fields.Nested(schema, **how), values),
                (lambda **how: fields.Nested(schema, many=True, **how), lists),
                (lambda **how: fields.List(fields.Nested(schema), **how), lists),
                (
                    lambda **how: fields.Dict(fields.Int(), fields.Nested(schema), **how),
                    numbered,
                ),
            ]
        )
    )


@settings(max_examples=60)
@given(st.data())
def test_random_schemas(data: st.DataObject) -> None:
    schema, values = data.draw(schemas())
    many = data.draw(st.booleans())
    declared = schema(many=many)
    if data.draw(st.booleans()):
        declared = fields.Nested(schema, many=many)  # type: ignore[assignment]
    key: SessionKey[Any] = SessionKey("key", declared)
    value = data.draw(st.lists(values, max_size=2) if many else values)
    with in_request():
        returned = key.set(value)  # all of these can come back
        assert alike(key.get("not valid"), returned)
        stored = copy.deepcopy(session["key"])
        assert alike(key.set(key.get()), returned)
        assert alike(key.set(copy.deepcopy(key.get())), returned)
        assert session["key"] == stored
        assert alike(key.get("not valid"), returned)
        if isinstance(declared, Schema) and not many:
            assert alike(key.update(), returned)
            assert alike(key.get("not valid"), returned)
    with in_request(schema=[SessionKey("key", declared)]):
        session["key"] = stored  # is what a schema of the session takes, too
