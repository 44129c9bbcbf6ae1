"""The reader of pickles: plain data comes back exactly, and nothing else is ever touched."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import io
import itertools
import os
import pickle
import pickletools
import struct
import uuid
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_gsession.moving import pickles
from flask_gsession.moving.contents import RefusedContents, read_contents
from flask_gsession.moving.map_keys import excess_in
from flask_gsession.moving.pickles import RefusedPickle, read_pickle

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
SHORT = st.integers(-(2**63), 2**64 - 1)
KEYS = st.text() | SHORT | st.booleans() | st.none() | st.tuples(st.text(), SHORT)
PLAIN = st.recursive(
    SCALARS | st.sets(st.text() | SHORT) | st.frozensets(st.binary()),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=20,
)
TEXTUAL = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


def exactly(value: Any) -> str:
    """The value with its types, in the order in which dicts keep it."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(map(exactly, value))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}{[exactly(item) for item in value]}"
    if isinstance(value, dict):
        return f"dict{[(exactly(key), exactly(item)) for key, item in value.items()]}"
    return f"{type(value).__name__}:{value!r}"


@given(PLAIN, st.sampled_from([4, 5]))
def test_plain_data_comes_back_exactly(value: Any, protocol: int) -> None:
    assert exactly(read_pickle(pickle.dumps(value, protocol))) == exactly(value)


@given(TEXTUAL, st.sampled_from([0, 1, 2, 3]))
def test_earlier_protocols_bring_back_all_but_bytes_and_sets(value: Any, protocol: int) -> None:
    assert exactly(read_pickle(pickle.dumps(value, protocol))) == exactly(value)


@given(PLAIN, st.data())
def test_an_altered_pickle_is_read_or_refused(value: Any, data: st.DataObject) -> None:
    altered = bytearray(pickle.dumps(value, data.draw(st.sampled_from(range(6)))))
    for _ in range(data.draw(st.integers(1, 4))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RefusedPickle):
        read_pickle(bytes(altered[: data.draw(st.integers(0, len(altered)))]))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(RefusedPickle):
        read_pickle(data)


class Calls:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Plain:
    pass


class WithState:
    def __reduce__(self) -> Any:
        return Plain, (), {"a": 1}


class Persistent(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return "id" if obj == "outside" else None


def persistent(protocol: int) -> bytes:
    file = io.BytesIO()
    Persistent(file, protocol).dump({"a": "outside"})
    return file.getvalue()


PLANTED = {
    "global": b"cos\nsystem\n.",
    "stack global": pickle.dumps(os.getcwd, 4),
    "reduce": b"cos\nsystem\n(S'true'\ntR.",
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'true'\no.",
    "newobj": pickle.dumps(Plain(), 2),
    "newobj_ex": b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.",
    "build": pickle.dumps(WithState(), 4),
    "ext1": b"\x80\x02\x82\x01.",
    "ext2": b"\x80\x02\x83\x01\x00.",
    "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persid": persistent(0),
    "binpersid": persistent(4),
    "dup": b"]2a.",
    "next buffer": b"\x80\x05\x97.",
    "readonly buffer": b"\x80\x05\x97\x98.",
    "bytearray": pickle.dumps(bytearray(b"x"), 5),
    "datetime": pickle.dumps({"at": dt.datetime(2026, 1, 1)}),
    "decimal": pickle.dumps({"price": decimal.Decimal("1.5")}),
    "uuid": pickle.dumps({"id": uuid.uuid4()}),
    "counter": pickle.dumps(Counter("abc")),
    "ordered dict": pickle.dumps(OrderedDict(a=1)),
    "bytes of protocol 2": pickle.dumps(b"\xff", 2),
    "set of protocol 3": pickle.dumps({1}, 3),
    "bytes of Python 2": b"U\x01\xff.",
    "a list as a key": b"}](K\x01eK\x02s.",
    "a deep key": b"}" + b"(" * 3 + b"ttt" + b"K\x01s.",
    "a dict in a set": b"\x80\x04\x8f(}\x90.",
    "keys with the same hash": b"\x80\x04\x8f("
    + b"".join(
        b"(" + b"".join(b"J" + struct.pack("<i", ~bit) for bit in bits) + b"t"
        for bits in itertools.product((0, 1), repeat=6)
    )
    + b"\x90.",
    "two values": b"K\x01K\x02.",
    "no value": b".",
    "a mark": b"(.",
    "no stop": b"K\x01",
    "no memo": b"h\x05.",
    "memo of a mark": b"(q\x00.",
    "append to a dict": b"}K\x01a.",
    "append to nothing": b"K\x01a.",
    "items without a mark": b"]K\x01e.",
    "a long key": pickle.dumps({1 << 20_000: 1}),
    "a long key in a tuple": pickle.dumps({(1 << 20_000,): 1}),
    "long keys with one hash": pickle.dumps(dict.fromkeys(n * (2**61 - 1) for n in range(1, 200))),
    "long members with one hash": pickle.dumps({n * (2**61 - 1) for n in range(1, 200)}, 4),
    "odd items": b"}(K\x01u.",
    "pop of a mark as a value": b"](a.",
    "huge length": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.",
    "length beyond the end": b"B\xff\xff\xff\x7fx.",
    "many digits": b"I" + b"9" * 100_000 + b"\n.",
    "json": b'{"a": 1}',
    "nothing": b"",
    "not text": b"Vtext\\ud800\n" + b"\x00",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_pickle_is_refused(name: str) -> None:
    with pytest.raises(RefusedPickle):
        read_pickle(PLANTED[name])


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_called(tmp_path: Path, protocol: int) -> None:
    planted = tmp_path / "planted"
    data = pickle.dumps({"_user_id": "1", "x": [Calls(planted)]}, protocol)
    with pytest.raises(RefusedPickle, match="GLOBAL"):
        read_pickle(data)
    assert not planted.exists()
    pickle.loads(data)
    assert planted.exists()  # the pickle was one that harms


def test_every_operation_that_is_not_plain_is_refused() -> None:
    """By the list of ``pickletools``: a new operation of a later Python is refused, too."""
    accepted = set(pickles._OPERATIONS) | {"STOP"}
    names = {opcode.name for opcode in pickletools.opcodes}
    assert accepted < names
    assert names - accepted >= {
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"),
        *("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"),
    }


def bomb(levels: int) -> bytes:
    """A list of two lists, which are the same, of two lists, …: 2 ** levels values."""
    inner = b"](K\x01K\x01e"
    for index in range(levels):
        inner += b"q%c0](h%ch%ce" % (index, index, index)
    return inner + b"."


MIB = 1 << 20


@pytest.mark.parametrize("shared", ["x" * MIB, b"x" * MIB], ids=["text", "bytes"])
@pytest.mark.parametrize("container", ["list", "tuple", "values", "keys"])
def test_a_large_value_counts_wherever_it_appears(shared: Any, container: str) -> None:
    """Or a pickle of one megabyte would make a session of a hundred gigabytes."""
    value: Any = [shared] * 100
    if container == "tuple":
        value = tuple(value)
    elif container == "values":
        value = dict.fromkeys(range(100), shared)
    elif container == "keys":
        value = [{shared: None} for _ in range(100)]
    with pytest.raises(RefusedPickle, match="bytes"):
        read_pickle(pickle.dumps({"a": value}))


def test_limits_of_messagepack() -> None:
    """msgspec makes tuples of arrays that are keys, and tuples of -1 and -2 have the same hash."""

    def keys(number: int) -> dict[str, Any]:
        rows = itertools.islice(itertools.product((-1, -2), repeat=17), number)
        return {"a": [{"b": {row: {"c": 2**40, "d": b"x" * 300} for row in rows}}]}

    assert read_contents(msgspec.msgpack.encode(keys(1000))) == keys(1000)
    with pytest.raises(RefusedContents, match="1000 arrays as keys"):
        read_contents(msgspec.msgpack.encode(keys(1001)))
    with pytest.raises(RefusedContents, match="200000 values"):
        read_contents(msgspec.msgpack.encode({"a": [None] * 200_000}))


@given(st.dictionaries(st.text(), PLAIN, max_size=5))
def test_plain_messagepack_is_within_the_limits(value: dict[str, Any]) -> None:
    with contextlib.suppress(TypeError, OverflowError):  # types that MessagePack lacks
        assert excess_in(msgspec.msgpack.encode(value)) == ""


def test_limits_of_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_pickle(bomb(3)) == [[[[1, 1]] * 2] * 2] * 2
    with pytest.raises(RefusedPickle, match="values"):
        read_pickle(bomb(60))
    with pytest.raises(RefusedPickle, match="deep"):
        read_pickle(b"]" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(RefusedPickle, match="deep"):
        read_pickle(b"(" * 90_000 + b"t" * 90_000 + b".")
    circular: list[Any] = []
    circular.append(circular)
    with pytest.raises(RefusedPickle, match="deep"):
        read_pickle(pickle.dumps(circular))
    with pytest.raises(RefusedPickle, match="operations"):
        read_pickle(b"](" + b"N" * 300_000 + b"e.")
    with pytest.raises(RefusedPickle, match="memo"):
        read_pickle(b"N" + b"".join(b"p%d\n" % n for n in range(100_001)) + b".")
    monkeypatch.setattr(pickles, "MAX_BYTES", 10)
    with pytest.raises(RefusedPickle, match="bytes"):
        read_pickle(pickle.dumps("0123456789"))
