"""G8: a record with a right checksum and a wrong content is no session, and no 500.

An attacker who can write to the store can make one, and so can a bug. Bodies of wrong types, huge
numbers, odd marks and references, extension types with bad content and deep nesting.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext, encode

from flask_gsession.errors import SessionEnded, ValueLost, ValueRefused
from flask_gsession.stores.base import new_version
from flask_gsession.testing import FakeClock
from flask_gsession.tokens import session_key
from flask_gsession.values.envelope import FORMAT
from tests.harness.apps import Site, Visitor
from tests.values.test_codec import CODEC
from tests.values.test_codec import values as good_values
from tests.values.test_payload import PLAIN, bound

huge = st.sampled_from(
    [d + sign * 2**n for n in (31, 32, 47, 48, 53, 62, 63) for sign in (1, -1) for d in (-1, 0)]
).filter(lambda number: number >= -(2**63))
numbers = st.integers(-(2**63), 2**64 - 1) | huge | st.floats()
odd_text = st.sampled_from(
    [
        *("", "0", "-1", "9" * 5000, "1e999999999999", "NaN", "sNaN", "2024-13-45", "99999-01-01"),
        *("2024-01-01;7;", "2024-01-01;0;../etc", "2024-01-01;0;" + "x" * 300, "12:00+99:99", ";;"),
    ]
)
contents = st.binary(max_size=24) | odd_text.map(str.encode)


def reference(kind: int, sealed: int, length: int, frame: int, size: int) -> bytes:
    """The data of a reference to a blob that is not there; of odd `size`, a malformed one."""
    data = struct.pack(
        ">BB16s16s32sQI", kind, sealed, b"n" * 16, b"k" * 16, b"d" * 32, length, frame
    )
    return (data + b"\0" * 8)[: max(0, size)]


references = st.builds(
    reference,
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 2**64 - 1),
    st.integers(0, 3) | st.integers(0, 2**32 - 1),
    st.just(78) | st.integers(0, 80),
)


def long_ext(code: int, data: bytes) -> bytes:
    """An extension value with a length of four bytes, like marks and references."""
    return b"\xc9" + struct.pack(">IB", len(data), code) + data


def mark(expires_at: int, version: int, inner: bytes) -> bytes:
    """A value with a mark; `inner` need not be a value."""
    return long_ext(13, expires_at.to_bytes(6, "big") + version.to_bytes(2, "big") + inner)


# Values encoded by somebody who knows the format but violates it.
trees = st.recursive(
    st.none() | st.booleans() | numbers | odd_text | contents
    | st.builds(Ext, st.integers(-128, 127) | st.integers(0, 16), contents)
    | references.map(lambda data: Ext(14, data)),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.integers() .filter(lambda n: -(2**63) <= n < 2**64) | st.text(max_size=3)
                      | st.none() | st.floats(), inner, max_size=3)
    | st.builds(lambda code, value: Ext(code, encode(value)),
                st.sampled_from([1, 2, 3, 4, 5, 8, 12, 13, 14, 15]), inner),
    max_leaves=6,
)  # fmt: skip
deep = st.builds(
    lambda level, n: level * n,
    st.sampled_from([b"\x91", b"\x81\xa1a", b"\xc8\xff\xff\x02\x91", b"\x82\x01"]),
    st.sampled_from([100, 500, 5000]),
)
good = good_values.map(lambda value: CODEC.encode("key", value))
plain = good | trees.map(encode) | deep | st.binary(min_size=1, max_size=20)
raws = st.recursive(
    plain | references.map(lambda data: long_ext(14, data)),
    lambda inner: (
        st.builds(mark, st.integers(0, 2**48 - 1), st.integers(0, 65535), inner)
        | st.builds(lambda raw, end: raw[:end], inner, st.integers(1, 60))
    ),
    max_leaves=2,
)
maps = st.dictionaries(
    st.sampled_from(["user", "cart", "_permanent", "seen", "_flashes", ""]), raws
)
owners = st.tuples(
    *(st.text(), st.text(), numbers, numbers, st.none() | st.text()),
).flatmap(lambda parts: st.integers(3, 5).map(lambda n: parts[:n]))
bodies = st.one_of(
    st.tuples(
        *(maps, st.none() | numbers, st.booleans(), st.none() | numbers, st.booleans()),
        *(owners | trees, trees),
    ).flatmap(lambda parts: st.integers(1, 7).map(lambda n: encode(parts[:n]))),
    trees.map(encode),
    maps.map(encode),
    deep,
    st.just(b"\x95\x80\xc0\xc2\xc0\xc3" + b"\x91" * 100_000),
    st.just(b"\x96\x80\xc0\xc2\xc0\xc3" + b"\x91" * 100_000),
)
STEPS: dict[str, Any] = {
    "read": lambda session: (session.get("user"), "cart" in session, session.handle),
    "all": lambda session: (session.copy(), len(session), list(session), not session),
    "items": lambda session: (session.items(), session.size, session.expires_at, f"{session!r}"),
    "ttl": lambda session: [session.ttl(key) for key in ("user", "cart") if key in session],
    "write": lambda session: session.update(seen=True),
    "change": lambda session: session.setdefault("cart", []),
    "atomic": lambda session: ended(lambda: session.update_atomic("user", lambda value: "ada")),
    "take": lambda session: ended(lambda: session.take("user", None)),
    "open": lambda session: "cart" in session and not_bytes(lambda: session.open("cart").read(99)),
    "remember": lambda session: setattr(session, "permanent", True),
    "rotate": lambda session: session.rotate(),
    "lifetime": lambda session: session.set_lifetime(60),
    "transaction": lambda session: ended(lambda: in_transaction(session)),
    "lock": lambda session: in_lock(session),
    "remove": lambda session: session.pop("user", None),
    "clear": lambda session: session.clear(),
    "flash": lambda session: session.setdefault("_flashes", []),
    "modified": lambda session: session.modified,
    "reload": lambda session: ended(session.reload),
    "owner": lambda session: (session.owner, session.device_id),
    "bind": lambda session: session.bind("ada"),
    "unbind": lambda session: session.unbind(),
    "logout": lambda session: session.destroy(),
}  # fmt: skip


def ended(act: Any) -> Any:
    """Call ``act``, which may find that there is no session, and so that it has ended."""
    try:
        return act()
    except (SessionEnded, ValueRefused):
        return None


def not_bytes(act: Any) -> Any:
    try:
        return act()
    except (TypeError, KeyError, ValueLost):
        return None


def in_transaction(session: Any) -> None:
    with session.transaction():
        session["seen"] = 1


def in_lock(session: Any) -> None:
    if session.handle is not None and session:
        with suppress(SessionEnded), session.lock():
            session["seen"] = 1


class Forger:
    """Puts bodies into the place of a visitor's session."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.visitor = site.visitor()
        self.visitor.run(lambda session: session.update(user="ada"))
        record = site.store.store.load(session_key(self.visitor.token))
        assert record is not None
        self.record = record
        self.cookie = self.visitor.cookie

    def forged(self, body: bytes) -> Visitor:
        """The visitor, with this body in a record that is right otherwise."""
        store: Any = self.site.store.store
        store.delete(self.record.key)
        payload = bound(body, self.record.key)
        if len(body) % 3:  # as if a value were a reference, or a user's: another checksum
            number = FORMAT + len(body) % 3
            payload = PLAIN.envelope.seal(self.record.key, body, (), number)
        store.create(self.record._replace(version=new_version(), payload=payload))
        return self.site.visitor(self.cookie)

    def check(self, body: bytes, steps: Any) -> None:
        """No such request is a 500, and the next request neither."""
        for name in steps:
            visitor = self.forged(body)
            for step in (STEPS[name], STEPS["read"]):
                response = visitor.ask(lambda session, step=step: step(session) and None)
                assert response.status_code == 200, name


def memory_forger() -> Forger:
    """On a store in memory, as cheap as can be."""
    return Forger(Site("memory://", "forged:", FakeClock()))


EXAMPLES = [
    encode([{"user": encode("grace")}, -(2**63)]),
    encode([{"user": encode("grace")}, 2**63, False, 2**64 - 1]),
    encode([{"user": encode("grace")}, None, False, -1]),
    encode([{"user": long_ext(14, reference(9, 0, 1, 1, 78))}, None, False, None, True]),
    encode([{"user": long_ext(14, reference(1, 0, 1, 0, 78))}, None, False, None, True]),
    encode([{"user": long_ext(14, reference(1, 0, 2**63, 1, 78))}, None, False, None, True]),
    encode([{"cart": long_ext(14, reference(2, 0, 2**39, 2, 78))}, None, False, None, True]),
    encode([{"user": long_ext(14, reference(2, 0, 5, 5, 78))}, None]),
    encode([{"user": mark(2**48 - 1, 1, b"\x01")}, None, True]),
    encode([{"user": mark(2**47, 1, mark(0, 1, b"\x01"))}, None, True]),
    encode([{"user": mark(0, 9, b"\xc1"), "cart": b"\xc9"}, None, True]),
    encode([{"cart": encode([Ext(14, reference(1, 0, 5, 5, 78))])}, None]),
    encode([{"cart": encode({"a": Ext(14, reference(2, 1, 5, 5, 78))})}, None, True, None, True]),
    encode([{"user": encode(Ext(5, b"2024-01-01;0;" + b"x" * 300))}, None]),
    encode([{"_permanent": encode({"a": 1}), "_flashes": encode(7)}, None]),
    encode([{"user": b"\x91" * 5000}, None]),
    encode([{"user": encode(Ext(10, b"1e999999999999999999"))}, None]),
]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_known_forgeries_cause_no_500(site: Site, number: int) -> None:
    """Every step in memory; on the other stores, a quarter of them for each body in turn."""
    steps = list(STEPS) if site.url == "memory://" else list(STEPS)[number % 4 :: 4]
    Forger(site).check(EXAMPLES[number], steps)


FORGER = memory_forger()


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(bodies, st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
def test_forged_bodies_cause_no_500(body: bytes, steps: list[str]) -> None:
    FORGER.check(body, steps)


def test_forged_bodies_cause_no_500_on_any_store(site: Site) -> None:
    forger = Forger(site)

    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    @given(bodies, st.sampled_from(sorted(STEPS)))
    def check(body: bytes, step: str) -> None:
        forger.check(body, [step])

    check()
