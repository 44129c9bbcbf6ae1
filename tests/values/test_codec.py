"""G5: you get back the value that you put in, or it is refused by name. Never pickle."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import datetime as dt
import enum
import errno
import math
import re
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable, Hashable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from msgspec import Raw
from msgspec.msgpack import Ext, encode
from werkzeug.datastructures import CombinedMultiDict, ImmutableMultiDict, MultiDict
from werkzeug.local import LocalProxy

from flask_gsession.errors import SessionTooLarge, UnreadableRecord, UnsupportedType
from flask_gsession.values.codec import IMMUTABLE, SUPPORTED, Codec

CODEC = Codec(max_depth=64)

BERLIN = ZoneInfo("Europe/Berlin")
KATHMANDU = ZoneInfo("Asia/Kathmandu")
MONROVIA = ZoneInfo("Africa/Monrovia")  # 44.5 minutes behind UTC until 1972
ODD_OFFSET = dt.timezone(-dt.timedelta(hours=3, seconds=7, microseconds=11))


def shape(value: Any) -> Hashable:
    """The exact type and content of `value`: in a session, values of one shape are equal.

    Unlike `==`, it distinguishes 1 from True and 1.0, 0.0 from -0.0, one order of keys from
    another, and the two meanings of an hour that a clock shows twice; and NaN is NaN.
    """
    kind = type(value)
    what: Hashable
    if kind is float:
        what = struct.pack(">d", value)
    elif kind is dict:
        what = tuple((shape(key), shape(item)) for key, item in value.items())
    elif kind in (list, tuple):
        what = tuple(shape(item) for item in value)
    elif kind in (set, frozenset):
        what = frozenset(shape(item) for item in value)
    elif kind in (dt.datetime, dt.time):
        zone = value.tzinfo
        what = (value.isoformat(), value.fold, type(zone).__name__, getattr(zone, "key", None))
    elif kind is Decimal:
        what = str(value)  # says 1.0 and 1.00, and the payload of a NaN
    else:
        what = value
    return (kind.__name__, what)


def there_and_back(value: Any, codec: Codec = CODEC) -> Any:
    """`value` as the next request sees it."""
    return codec.decode(codec.encode("key", value))


# All supported values ------------------------------------------------------------------------

any_text = st.text() | st.text(st.characters()) | st.sampled_from(["\ud800", "a\udfffb", "\0"])
any_int = st.integers() | st.sampled_from(
    [n + d for n in (-(2**63), 2**63, 2**64, -(10**30)) for d in (-1, 0, 1)]
)
offsets = st.timedeltas(
    min_value=dt.timedelta(days=-1, microseconds=1), max_value=dt.timedelta(days=1, microseconds=-1)
).filter(lambda offset: not offset or abs(offset) >= dt.timedelta(seconds=1))
zones = (
    st.none()
    | st.just(dt.UTC)
    | st.sampled_from([BERLIN, KATHMANDU, MONROVIA, ZoneInfo("Pacific/Apia"), ZoneInfo("UTC")])
    | offsets.map(dt.timezone)
)
folds = st.sampled_from([0, 1])
datetimes = st.builds(
    lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold),
    st.datetimes() | st.sampled_from([dt.datetime.min, dt.datetime.max]),
    zones,
    folds,
)
times = st.builds(
    lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), st.times(), zones, folds
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    any_int,
    st.floats(),
    any_text,
    st.binary(max_size=40),
    datetimes,
    st.dates(),
    times,
    st.timedeltas() | st.sampled_from([dt.timedelta.min, dt.timedelta.max]),
    st.uuids(),
    st.decimals().filter(lambda value: not value.is_snan())
    | st.sampled_from([Decimal("1.00"), Decimal("-0"), Decimal("1E+999999")]),
    st.text().map(Markup),
)
hashables = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
dict_keys = st.text(max_size=8) | any_int | st.none() | st.booleans() | st.floats(allow_nan=False)
values = st.recursive(
    scalars | st.sets(hashables, max_size=4) | st.frozensets(hashables, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        | st.dictionaries(dict_keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400)
@given(values)
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    assert shape(there_and_back(value)) == shape(value)


@settings(max_examples=100)
@given(values)
def test_encoding_leaves_the_value_alone(value: Any) -> None:
    before = shape(value)
    CODEC.encode("key", value)
    assert shape(value) == before


@settings(max_examples=100)
@given(values)
def test_a_value_that_came_back_has_the_same_bytes(value: Any) -> None:
    """So a value that was only looked at does not count as changed."""
    raw = CODEC.encode("key", value)
    assert CODEC.encode("key", CODEC.decode(raw)) == raw


SIGNALLING = Decimal("-sNaN7")  # which Python itself cannot hash

EXAMPLES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63),
    -(2**63) - 1,
    10**30,
    -(10**30),
    1 << 100_000,
    0.0,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    1.7976931348623157e308,
    "",
    "\0",
    "Straße, 東京, 🛒",
    "lone \ud83d surrogate",
    "\udc00\ud800",
    b"",
    b"\x80\x04\x95",
    [],
    (),
    {},
    set(),
    frozenset(),
    {"": 1, "a.b": 2, "$set": 3, "\0": 4},
    {"b": 1, "a": 2},
    {1: "a", "1": "b", 2**70: "c", -(2**63) - 1: {3: {"4": 5}}},
    {None: 1, True: 2, 2.5: 3, "": [{0: ()}], -0.0: "zero"},
    {1, "1", b"1", (1,), frozenset({1}), None, 1.5},
    frozenset({frozenset({frozenset()}), ("a", ("b",))}),
    [[(1, [2, {"a": ({3},)}])]],
    {"deep": [{"er": ({"lists": [[]]},)}]},
    ["\ud800", {"a": ("\udfff", {"\ud800"})}],
    dt.datetime(2024, 2, 29, 23, 59, 59, 999999),
    dt.datetime.min,
    dt.datetime.max,
    dt.datetime.min.replace(tzinfo=dt.UTC),
    dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-23, minutes=-59))),
    dt.datetime(2024, 7, 1, 12, tzinfo=dt.UTC),
    dt.datetime(2024, 7, 1, 12, tzinfo=ODD_OFFSET),
    dt.datetime(2024, 7, 1, 12, tzinfo=BERLIN),
    dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=0),
    dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
    dt.datetime(2024, 3, 31, 2, 30, tzinfo=BERLIN),  # an hour that no clock showed
    dt.datetime(1960, 1, 1, tzinfo=MONROVIA),
    dt.datetime(2024, 1, 1, fold=1),
    dt.date.min,
    dt.date.max,
    dt.time.min,
    dt.time.max,
    dt.time(2, 30, fold=1),
    dt.time(12, tzinfo=ODD_OFFSET),
    dt.time(12, tzinfo=KATHMANDU),
    dt.timedelta.min,
    dt.timedelta.max,
    dt.timedelta(days=-1, microseconds=1),
    UUID(int=0),
    UUID("12345678-1234-5678-1234-567812345678"),
    Decimal("19.90"),
    Decimal("-0.00"),
    Decimal("1E+1000000"),
    Decimal("Infinity"),
    Decimal("NaN123"),
    SIGNALLING,
    Markup("<b>&amp;</b>"),
    Markup(""),
]


def label(value: Any) -> str:
    """A short name of a test case, the same in every process."""
    if isinstance(value, (set, frozenset)):
        return type(value).__name__  # the order of its elements differs
    return f"{type(value).__name__} {ascii(value) if type(value) is not int else hex(value)}"[:40]


@pytest.mark.parametrize("value", EXAMPLES, ids=label)
def test_examples_come_back_as_they_were(value: Any) -> None:
    assert shape(there_and_back(value)) == shape(value)
    assert shape(there_and_back({"nested": [value, (value,)]})) == shape(
        {"nested": [value, (value,)]}
    )


@pytest.mark.parametrize(
    "value",
    [value for value in EXAMPLES if type(value) in IMMUTABLE and value is not SIGNALLING],
    ids=label,
)
def test_examples_come_back_from_a_set(value: Any) -> None:
    assert shape(there_and_back({value, "another"})) == shape({value, "another"})
    assert shape(there_and_back(frozenset({(value,)}))) == shape(frozenset({(value,)}))


def test_every_supported_type_has_an_example() -> None:
    names = SUPPORTED.replace(" and", ",").split(", ")
    assert {type(value).__name__.removesuffix("Type") for value in EXAMPLES} == set(names)


def test_named_time_zones_keep_their_rules() -> None:
    """A meeting moved by half a year stays at its hour of the clock."""
    meeting = there_and_back(dt.datetime(2024, 1, 15, 9, tzinfo=BERLIN))
    assert meeting.utcoffset() == dt.timedelta(hours=1)
    assert meeting.replace(month=7).utcoffset() == dt.timedelta(hours=2)


def test_a_time_zone_that_this_machine_does_not_know_leaves_the_instant_right() -> None:
    moment = dt.datetime(2024, 7, 1, 12, tzinfo=BERLIN)
    raw = CODEC.encode("key", moment).replace(b"Europe/Berlin", b"Europe/Barlin")
    there = CODEC.decode(raw)
    assert there == moment
    assert there.utcoffset() == dt.timedelta(hours=2)


def test_a_zone_from_a_file_without_a_name_keeps_its_offset() -> None:
    class Nameless(dt.tzinfo):
        def utcoffset(self, when: dt.datetime | None) -> dt.timedelta:
            return dt.timedelta(hours=5, minutes=45)

    moment = dt.datetime(2024, 7, 1, 12, tzinfo=Nameless())
    assert there_and_back(moment) == moment


# Equal sets give equal bytes -----------------------------------------------------------------


@settings(max_examples=100)
@given(st.sets(hashables, max_size=8))
def test_the_order_of_a_set_does_not_matter(value: set[Any]) -> None:
    backwards: set[Any] = set()
    backwards.update(reversed(list(value)))
    assert CODEC.encode("key", backwards) == CODEC.encode("key", value)


def test_sets_have_the_same_bytes_in_every_process() -> None:
    """Each process of Python orders a set of texts differently; that must not change a session."""
    code = (
        "from flask_gsession.values.codec import Codec\n"
        "words = {'w%d' % n for n in range(50)}\n"
        "value = [words, frozenset(words), {(w, frozenset({w, w + w})) for w in words}]\n"
        "print([*words][:5]); print(Codec(64).encode('key', value).hex())"
    )
    orders, encoded = set(), set()
    for seed in ("1", "2", "3"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        order, line = run.stdout.splitlines()
        orders.add(order)
        encoded.add(line)
    assert len(orders) > 1
    assert len(encoded) == 1


# Subclasses become plain types -----------------------------------------------------------------


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Ratio(float):
    pass


class Moment(dt.datetime):
    pass


class Day(dt.date):
    pass


class Hour(dt.time):
    pass


class Span(dt.timedelta):
    pass


class Id(UUID):
    pass


class Price(Decimal):
    pass


class Basket(list):  # type: ignore[type-arg]
    pass


class Tags(set):  # type: ignore[type-arg]
    pass


class Blob(bytes):
    pass


class Html(Markup):
    pass


class Weekday(enum.IntEnum):
    MONDAY = 1


class Rights(enum.IntFlag):
    READ = 1
    WRITE = 2


class Size(enum.StrEnum):
    LARGE = "L"


class Fruit(str, enum.Enum):  # noqa: UP042  # as older applications have it
    PEAR = "pear"


class Point(NamedTuple):
    x: int


class Token(dict):  # type: ignore[type-arg]
    """As Authlib and oauthlib have it."""

    @property
    def expired(self) -> bool:
        return False


def moved_to_the_end() -> Any:
    ordered = collections.OrderedDict(a=1, b=2)
    ordered.move_to_end("a")
    return ordered


PLAIN: list[tuple[Any, Any]] = [
    (Text("a"), "a"),
    (Text("\ud800"), "\ud800"),
    (Size.LARGE, "L"),
    (Fruit.PEAR, "pear"),
    (Number(2**70), 2**70),
    (Weekday.MONDAY, 1),
    (Rights.READ | Rights.WRITE, 3),
    (Ratio(0.5), 0.5),
    (Blob(b"a"), b"a"),
    (Html("<b>"), Markup("<b>")),
    (
        Moment(2024, 7, 1, 12, tzinfo=BERLIN, fold=1),
        dt.datetime(2024, 7, 1, 12, tzinfo=BERLIN, fold=1),
    ),
    (Day(2024, 7, 1), dt.date(2024, 7, 1)),
    (Hour(2, 30, tzinfo=dt.UTC, fold=1), dt.time(2, 30, tzinfo=dt.UTC, fold=1)),
    (Span(days=-1, microseconds=5), dt.timedelta(days=-1, microseconds=5)),
    (Id(int=7), UUID(int=7)),
    (Price("1.00"), Decimal("1.00")),
    (Basket([1, Basket([Text("b")])]), [1, ["b"]]),
    (Point(1), (1,)),
    (Tags({1}), {1}),
    (Token(access_token="t", scope=Basket(["a"])), {"access_token": "t", "scope": ["a"]}),
    (moved_to_the_end(), {"b": 2, "a": 1}),
    (collections.defaultdict(list, a=[1]), {"a": [1]}),
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    (MultiDict([("a", "1"), ("a", "2")]), {"a": ["1", "2"]}),
    (ImmutableMultiDict({"a": "1"}), {"a": ["1"]}),
    (LocalProxy(lambda: Token(a=1)), {"a": 1}),
    ({Text("a"): 1, Size.LARGE: 2, Markup("m"): 3}, {"a": 1, "L": 2, "m": 3}),
    ({Weekday.MONDAY: Weekday.MONDAY, Ratio(0.5): 2}, {1: 1, 0.5: 2}),
]


@pytest.mark.parametrize(("value", "plain"), PLAIN, ids=lambda value: type(value).__name__)
def test_subclasses_come_back_as_the_plain_type(value: Any, plain: Any) -> None:
    assert value == plain  # or it could not be kept
    for around in (lambda it: it, lambda it: {"a": [it]}, lambda it: (it, "\ud800")):
        assert shape(there_and_back(around(value))) == shape(around(plain))
        assert CODEC.encode("key", around(value)) == CODEC.encode("key", around(plain))


def test_subclasses_come_back_from_a_set() -> None:
    value = {Text("a"), Weekday.MONDAY, Point(1), frozenset({Size.LARGE})}
    assert shape(there_and_back(value)) == shape({"a", 1, (1,), frozenset({"L"})})


def test_a_default_is_not_made_by_saving() -> None:
    value: Any = collections.defaultdict(list, a=collections.defaultdict(int))
    there_and_back(value)
    assert value == {"a": {}}


class Lazy:
    """A lazily translated text, as Flask-Babel has it."""

    def __str__(self) -> str:
        return "Saved"

    def __html__(self) -> str:
        return str(self)


class LazyText(str):
    def __html__(self) -> str:
        return "<b>"


@dataclasses.dataclass
class Field:
    name: str

    def __html__(self) -> str:
        return f"<input name={self.name}>"


@pytest.mark.parametrize(
    ("value", "html"), [(Lazy(), "Saved"), (LazyText("a"), "<b>"), (Field("a"), "<input name=a>")]
)
def test_objects_with_html_are_kept_as_markup(value: Any, html: str) -> None:
    nested = {"a": [("message", value)]}
    assert shape(there_and_back(value)) == shape(Markup(html))
    assert shape(there_and_back(nested)) == shape({"a": [("message", Markup(html))]})


def test_freezegun_changes_nothing() -> None:
    """Its own classes of times are subclasses like any other, also where it came first."""
    code = (
        "import datetime as real; kinds = real.datetime, real.date\n"
        "from freezegun import freeze_time\n"
        "frozen = freeze_time('2030-01-02'); frozen.start()\n"
        "from flask_gsession.values.codec import Codec\n"
        "import datetime as dt; codec = Codec(64)\n"
        "for value in dt.datetime.now(), dt.date.today(), [dt.datetime.now(dt.timezone.utc)]:\n"
        "    assert type(value) not in kinds\n"
        "    raw = codec.encode('', value); back = codec.decode(raw)\n"
        "    assert back == value and codec.encode('', back) == raw, value\n"
        "    assert type(back) in (*kinds, list), type(back)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Unequal(str):
    """Equals no plain text."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unequal) and str.__eq__(self, other)

    __hash__ = str.__hash__


# The tables of the documentation ---------------------------------------------------------------


def rows_of_the_documentation(*headings: str) -> list[tuple[str, str]]:
    """The rows below such a heading, as expressions in Python; one row for each of them."""
    text = Path("docs/how-to/values.md").read_text(encoding="utf-8")
    rows = []
    for heading in headings:
        for _, table in [
            part.split(heading + "\n", 1) for part in text.split("\n\n") if heading in part
        ]:
            for line in table.splitlines()[1:]:
                left, right = (cell.strip() for cell in line.strip("|").split(" | "))
                rows += [(each, right) for each in re.findall(r"`([^`]*[({][^`]*|1j)`", left)]
    return rows


@dataclasses.dataclass
class Address:
    street: str


def names_in_the_documentation() -> dict[str, Any]:
    """The names that the expressions of the tables use."""
    pytest.importorskip("authlib")
    from authlib.oauth2.rfc6749 import OAuth2Token
    from freezegun.api import FakeDatetime

    return {
        **vars(collections),
        **vars(enum),
        "OAuth2Token": OAuth2Token,
        "FakeDatetime": FakeDatetime,
        "MultiDict": MultiDict,
        "CombinedMultiDict": CombinedMultiDict,
        "LocalProxy": LocalProxy,
        "Markup": Markup,
        "Point": collections.namedtuple("Point", "x y"),
        "Size": Size,
        "Level": enum.IntEnum("Level", "LOW"),
        "lazy_gettext": lambda text: Lazy(),
        "datetime": dt.datetime,
        "Address": Address,
        "UnequalText": Unequal,
        "nan": math.nan,
    }


def test_the_documented_values_come_back() -> None:
    names = names_in_the_documentation()
    rows = rows_of_the_documentation("| you store | later requests get |")
    assert len(rows) == 17
    for stored, later in rows:
        value, plain = eval(stored, names), eval(later.strip("`"), names)
        assert shape(there_and_back(value)) == shape(plain), stored


def test_the_documented_refusals() -> None:
    names = names_in_the_documentation()
    rows = rows_of_the_documentation("| Refused | Store instead |")
    assert len(rows) == 13
    for refused, _ in rows:
        with pytest.raises(UnsupportedType):
            CODEC.encode("key", eval(refused, names))


# Refused values ------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class UnequalDict(dict):  # type: ignore[type-arg]
    """Equals no plain dict."""

    def __eq__(self, other: object) -> bool:
        return type(other) is UnequalDict

    __hash__ = None


class Hiding(dict):  # type: ignore[type-arg]
    """Shows other keys than it holds."""

    def __iter__(self) -> Any:
        return iter(())


class Doubling(list):  # type: ignore[type-arg]
    """Shows other items than it holds."""

    def __iter__(self) -> Any:
        return (2 * item for item in list.__iter__(self))


class Money:
    """Would come back by pickle."""


REFUSED: list[Any] = [
    Colour.RED,
    Money(),
    Money,
    Unequal("a"),
    UnequalDict(a=1),
    Hiding(a=1),
    Doubling([1]),
    CombinedMultiDict([MultiDict({"a": 1})]),
    collections.UserDict(a=1),
    collections.UserList([1]),
    collections.UserString("a"),
    collections.deque([1]),
    types.MappingProxyType({}),
    types.SimpleNamespace(),
    array.array("b", b"1"),
    bytearray(b"1"),
    memoryview(b"1"),
    1j,
    range(3),
    iter([1]),
    len,
    lambda: 1,
    NotImplemented,
    ...,
    re.compile("a"),
    ValueError("a"),
    dt.UTC,
    Ext(2, b"\x90"),
    Raw(b"\x01"),
    {}.keys(),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_other_types_are_refused_by_name(value: Any) -> None:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    for nested, path in [
        (value, "session['key']"),
        ([1, 2, value], "session['key'][2]"),
        ({"a": [{"b": (0, value)}]}, "session['key']['a'][0]['b'][1]"),
        (["\ud800", {"a": value}], "session['key'][1]['a']"),
    ]:
        with pytest.raises(UnsupportedType) as refusal:
            CODEC.encode("key", nested)
        assert refusal.value.path == path
        assert str(refusal.value).startswith(f"{path}: ")
        assert name in str(refusal.value)
        assert SUPPORTED in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (Colour.RED, " (store its .value)"),
        (Address("Larch Lane"), " (store dataclasses.asdict() of it)"),
        (UnequalDict(a=1), " (store dict() of it)"),
        (collections.UserDict(a=1), " (store dict() of it)"),
        (CombinedMultiDict([MultiDict({"a": 1})]), " (store dict() of it)"),
        (Doubling([1]), " (store list() of it)"),
        (Unequal("a"), ""),
        (Money(), ""),
        (Colour, ""),
        (Address, ""),
    ],
)
def test_a_refusal_suggests_an_alternative(value: Any, hint: str) -> None:
    with pytest.raises(UnsupportedType) as refusal:
        CODEC.encode("key", value)
    assert f"{hint}; allowed: " in str(refusal.value)


@pytest.mark.parametrize("value", [Unequal("a"), Colour.RED, Money(), 1j])
def test_other_types_are_refused_inside_sets(value: Any) -> None:
    with pytest.raises(
        UnsupportedType, match=re.escape("session['key']['a']{...}: a session can't")
    ):
        CODEC.encode("key", {"a": {value}})


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (b"a", "bytes"),
        (("a",), "tuple"),
        (UUID(int=1), "UUID"),
        (Unequal("a"), "Unequal"),
        (Colour.RED, "Colour"),
        (math.nan, "float NaN"),
        (Decimal("0.1"), "Decimal"),
    ],
)
def test_other_keys_of_a_dict_are_refused(key: Any, name: str) -> None:
    for value in ({key: 1}, {"a": 1, key: 2}, {1: {}, key: "\ud800"}):
        with pytest.raises(UnsupportedType) as refusal:
            CODEC.encode("key", {"a": [value]})
        assert refusal.value.path == "session['key']['a'][0]"
        assert f"must be str, int, float, bool or None, not {name};" in refusal.value.reason


def test_invalid_text_is_refused() -> None:
    for value, path in [
        ({"\ud800": 1}, "session['key']"),
        ({"a": [1, {"b\udfff": 1}]}, "session['key']['a'][1]"),
        (Markup("\ud800"), "session['key']"),
        ({"a": [Markup("\ud800")]}, "session['key']['a'][0]"),
    ]:
        with pytest.raises(UnsupportedType, match="surrogates") as refusal:
            CODEC.encode("key", value)
        assert refusal.value.path == path
        str(refusal.value).encode()


def test_a_time_zone_that_cannot_be_written_down_is_refused() -> None:
    class Vague(dt.tzinfo):
        def utcoffset(self, when: dt.datetime | None) -> None:
            return None

    # Python reads an offset of less than a second back as UTC.
    for zone in (Vague(), *(dt.timezone(dt.timedelta(microseconds=n)) for n in (1, -1, 999_999))):
        for value in (dt.datetime(2024, 1, 1, tzinfo=zone), dt.time(12, tzinfo=zone)):
            with pytest.raises(UnsupportedType, match="neither a name nor an offset"):
                CODEC.encode("key", value)


def test_a_refusal_never_shows_the_value() -> None:
    class Card:
        def __repr__(self) -> str:
            return "4111 1111 1111 1111"

    with pytest.raises(UnsupportedType) as refusal:
        CODEC.encode("key", {"card": Card(), "number": "4111"})
    assert "4111" not in str(refusal.value)
    assert refusal.value.__cause__ is None


def test_a_long_or_odd_key_is_shown_short_and_in_ascii() -> None:
    with pytest.raises(UnsupportedType) as refusal:
        CODEC.encode("k" * 10_000 + "\ud800", {"é\n" * 10_000: Money()})
    message = str(refusal.value)
    assert message.isascii()
    assert "\n" not in message
    assert len(refusal.value.path) < 400


# Depth and cycles ----------------------------------------------------------------------------


def numbered(items: Iterable[Any] = ()) -> dict[int, Any]:
    """A dict with keys of another type than str."""
    return dict(enumerate(items, 1))


def nested(levels: int, kind: Callable[..., Any], core: Any = None) -> Any:
    """`levels` containers inside each other."""
    value = core
    for level in range(levels):
        if kind is dict:
            value = {"in": value}
        else:
            value = kind([value]) if level or core is not None else kind()
    return value


@pytest.mark.parametrize("kind", [list, tuple, dict, numbered, frozenset])
@pytest.mark.parametrize("core", [None, 1, 2**70, "\ud800"], ids=ascii)
def test_depth_is_exact(kind: Callable[..., Any], core: Any) -> None:
    codec = Codec(max_depth=5)
    value = nested(5, kind, core)
    assert shape(there_and_back(value, codec)) == shape(value)
    with pytest.raises(SessionTooLarge, match="SESSION_MAX_DEPTH"):
        codec.encode("key", nested(6, kind, core))


@pytest.mark.parametrize("kind", [list, tuple, dict, numbered])
def test_the_deepest_setting_works(kind: Callable[..., Any]) -> None:
    value = nested(200, kind, 1)
    codec = Codec(max_depth=200)
    assert shape(there_and_back(value, codec)) == shape(value)
    with pytest.raises(SessionTooLarge):
        codec.encode("key", nested(201, kind, 1))


def list_in_itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def dict_in_itself() -> Any:
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


def numbers_in_themselves() -> Any:
    value: dict[int, Any] = {}
    value.update({1: value, 2: ["\ud800"]})
    return value


def tuple_in_itself() -> Any:
    value: tuple[list[Any]] = ([],)
    value[0].append(value)
    return value


def twice_in_itself() -> Any:
    value: list[Any] = []
    value += [value, value]
    return value


def twice_in_itself_beside_bad_text() -> Any:
    """Each reference doubles the work of following them all; the text starts a second look."""
    value: list[Any] = [("\ud800",)]
    value += [value, value]
    return value


def twice_in_itself_before_bad_text() -> Any:
    value: dict[str, Any] = {}
    value.update(a=value, b=[value], c="\ud800", d={"\ud800"}, e=Markup("\ud800"))
    return value


@pytest.mark.parametrize(
    "make",
    [
        list_in_itself,
        dict_in_itself,
        numbers_in_themselves,
        tuple_in_itself,
        twice_in_itself,
        twice_in_itself_beside_bad_text,
        twice_in_itself_before_bad_text,
        *(
            pytest.param(lambda n=levels, k=kind: nested(n, k, 1), id=f"{levels} {kind.__name__}")
            for levels in (1_000, 200_000)
            for kind in (list, tuple, dict, numbered)
        ),
    ],
)
def test_cycles_and_depth_are_refused_quickly(make: Any) -> None:
    value = make()
    start = time.thread_time()
    with pytest.raises(SessionTooLarge, match="SESSION_MAX_DEPTH") as refusal:
        CODEC.encode("key", value)
    assert time.thread_time() - start < 1
    assert refusal.value.path.startswith("session['key']")
    assert len(str(refusal.value)) < 300


# Decoding foreign bytes -----------------------------------------------------------------------


def ext(code: int, data: bytes) -> bytes:
    """An extension value of MessagePack."""
    return encode(Ext(code, data))


@settings(max_examples=300)
@given(st.binary(max_size=64) | st.builds(ext, st.integers(0, 20), st.binary()))
@example(b"")
@example(b"\xc1")
@example(b"\xdd\xff\xff\xff\xff")  # a list of four thousand million items
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xa1\xff")  # text that is no UTF-8
@example(ext(3, b"\x91\x90"))  # a set that holds a list
@example(ext(8, b"999999999999;0;0"))
@example(ext(10, b"1E+99999999999999999999"))
@example(ext(5, b"2024-01-01;0;../../../etc/passwd"))
@example(ext(5, b"2024-01-01;0;No/Such"))
@example(ext(5, b"2024-01-01;2;"))
@example(ext(99, b""))
def test_any_bytes_give_a_value_or_are_unreadable(data: bytes) -> None:
    with contextlib.suppress(UnreadableRecord):
        CODEC.decode(data)


@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1a"], ids=["list", "map"])
def test_bytes_nested_without_end_are_unreadable(level: bytes) -> None:
    with pytest.raises(UnreadableRecord):
        CODEC.decode(level * 200_000 + b"\xc0")


@pytest.mark.parametrize("kind", [list, tuple, dict, frozenset])
def test_a_stack_that_is_almost_used_up_damages_nothing(kind: type) -> None:
    """Only what cannot be decoded on any stack is unreadable."""
    raw = CODEC.encode("key", nested(40, kind, dt.date(2030, 1, 2)))
    outcomes = set()

    def at(depth: int) -> str:
        if depth:
            return at(depth - 1)
        CODEC.decode(raw)
        return "read"

    for depth in range(sys.getrecursionlimit()):
        try:
            outcomes.add(at(depth))
        except RecursionError:
            outcomes.add("RecursionError")
    assert outcomes == {"read", "RecursionError"}


class Deadline(ValueError):
    """Raised by a signal handler of the application."""


def test_an_interrupt_damages_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, decode, strikes = Codec(64), CODEC._decode, [Deadline()]

    def interrupted(raw: bytes) -> Any:
        for strike in strikes:
            strikes.clear()
            raise strike
        return decode(raw)

    monkeypatch.setattr(codec, "_decode", interrupted)
    raw = CODEC.encode("key", (1,))
    with pytest.raises(Deadline):
        codec.decode(raw)
    assert codec.decode(raw) == (1,)
    for strike in (MemoryError(), KeyboardInterrupt(), ImportError()):
        strikes.append(strike)  # type: ignore[arg-type]
        with pytest.raises(type(strike)):
            codec.decode(raw)


def test_a_zone_that_cannot_be_looked_up_now_is_not_unknown(monkeypatch: Any) -> None:
    """Without a free file descriptor the value would lose its zone, and be stored like that."""
    raw = CODEC.encode("key", dt.datetime(2024, 7, 1, 12, tzinfo=BERLIN))

    def no_more_files(name: str) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("flask_gsession.values.codec.ZoneInfo", no_more_files)
    with pytest.raises(OSError, match="Too many"):
        CODEC.decode(raw)


def test_tuples_nested_without_end_are_unreadable() -> None:
    data = encode([])
    for _ in range(2_000):
        data = ext(2, encode([Raw(data)]))
    with pytest.raises(UnreadableRecord):
        CODEC.decode(data)
