"""G8: a payload is its own record's, whole and unaltered, or it does not open."""

from __future__ import annotations

import math
import pickle
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import encode

from flask_gsession.errors import SessionTooLarge, UnreadableRecord, UnsupportedType
from flask_gsession.repository.expiry import Expiry
from flask_gsession.repository.idle_spans import FixedSpan, Span
from flask_gsession.repository.records import SessionRecords
from flask_gsession.stores.base import Record
from flask_gsession.tokens import new_token, session_key
from flask_gsession.values.codec import Codec
from flask_gsession.values.encryption import Cipher
from flask_gsession.values.envelope import FORMAT, NEWEST, Envelope
from flask_gsession.values.marks import END_OF_TIME
from flask_gsession.values.payload import Body, BodyFormat, Join, Origin, Owner
from tests.values.test_codec import shape, values

CODEC = Codec(64)
KEY, OTHER_KEY = session_key(new_token()), session_key(new_token())
TIMES = 1_000, 2_000
OLD, NEW = secrets.token_bytes(32), secrets.token_bytes(32)


class Format:
    """Packs bodies into the payloads of records, and back."""

    def __init__(self, bodies: BodyFormat, envelope: Envelope) -> None:
        self.envelope = envelope
        expiry = Expiry(time.time, FixedSpan(Span(1, 1)), 1)
        self.records = SessionRecords(bodies, envelope, expiry, lambda: ("", KEY))
        self.bodies = bodies

    def pack(self, key: str, body: Body, *times: int) -> bytes:
        """The payload of a body."""
        number, content = self.bodies.encode(body)
        return self.envelope.seal(key, content, times or TIMES, number)

    def unpack(self, key: str, payload: bytes, *times: int) -> Body:
        """The body of a payload."""
        began, end = times or TIMES
        body = self.records.read(key, Record(key, 1, began, end, end, payload))
        assert body is not None
        return body

    def pack_pointer(self, key: str, successor: str) -> bytes:
        """The payload of a pointer."""
        return self.envelope.seal(key, successor.encode(), (*TIMES, TIMES[1]))

    def check_pointer(self, key: str, successor: str, payload: bytes, end: int = TIMES[1]) -> None:
        """Read a pointer."""
        record = Record(key, 1, TIMES[0], end, TIMES[1], payload, successor)
        assert self.records.read(key, record) is None


def a_format(
    *keys: bytes, max_bytes: int = 10_000, max_keys: int = 20, allow_plain: bool = False
) -> Format:
    """A format; sealed where encryption keys are given."""
    cipher = Cipher(keys) if keys else None
    return Format(BodyFormat(max_bytes, max_keys), Envelope(cipher, allow_plain))


def a_body(items: dict[str, Any], lifetime: int | None = None) -> Body:
    """A body with these values."""
    return Body({key: CODEC.encode(key, value) for key, value in items.items()}, lifetime)


def content(body: Body) -> tuple[Any, int | None]:
    """The exact contents of a body."""
    found = {key: CODEC.decode(raw) for key, raw in body.values.items()}
    return shape(found), body.lifetime


def bound(data: bytes, key: str = KEY) -> bytes:
    """A plain payload of the session `key`, around any bytes instead of a body."""
    return PLAIN.envelope.seal(key, data, TIMES)


PLAIN, SEALED = a_format(), a_format(NEW)
both = pytest.mark.parametrize("form", [PLAIN, SEALED], ids=["plain", "sealed"])
BODY = a_body({"user": "ada", "cart": ["mug", ("pen", 2)]})


# Packed and unpacked -------------------------------------------------------------------------


@both
@settings(max_examples=40)
@given(
    items=st.dictionaries(st.text(), values, max_size=4),
    lifetime=st.none() | st.integers(0, END_OF_TIME - 1),
)
def test_a_body_comes_back_as_it_was(
    form: Format, items: dict[str, Any], lifetime: int | None
) -> None:
    body = a_body(items, lifetime)
    assert content(form.unpack(KEY, form.pack(KEY, body))) == content(body)


@both
def test_keys_of_every_kind_come_back(form: Format) -> None:
    items = {"": 0, "a.b": 1, "$set": 2, "a\0b": 3, "ключ": 4, "_permanent": 5, "k" * 5_000: 6}
    assert content(form.unpack(KEY, form.pack(KEY, a_body(items)))) == (shape(items), None)


def test_the_format_is_as_documented() -> None:
    """Changing it makes all stored sessions unreadable: then raise FORMAT."""
    body = b"\x92\x82\xa1a\xc4\x01\x01\xa1b\xc4\x03\x92\x02\x03\xc0"
    check = KEY[:4].encode() + crc32(KEY.encode() + body).to_bytes(4, "big")
    items = {"a": 1, "b": [2, 3]}
    assert PLAIN.pack(KEY, a_body(items)) == bytes((FORMAT, 0)) + check + body
    sealed = SEALED.pack(KEY, a_body(items))
    assert sealed[:2] == bytes((FORMAT, 2))
    assert len(sealed) == 2 + 4 + 12 + len(body) + 16


@pytest.mark.parametrize(
    ("body", "lifetime"),
    [
        ([{"a": b"\x01"}], None),
        ([{"a": b"\x01"}, 5000], 5000),
        ([{"a": b"\x01"}, 5000, True], 5000),
        ([{"a": b"\x01"}, 5000, False, 7000], 5000),
        ([{"a": b"\x01"}, None, False, None, False, None, None, None, [], "later"], None),
    ],
)
def test_older_and_extended_bodies_are_read(body: list[Any], lifetime: int | None) -> None:
    opened = PLAIN.unpack(KEY, bound(encode(body)))
    assert content(opened) == (shape({"a": 1}), lifetime)


# Limits --------------------------------------------------------------------------------------


def test_the_limit_on_bytes_is_exact_and_of_the_body() -> None:
    body = a_body({"small": 1, "large": "x" * 300})
    size = len(PLAIN.pack(KEY, body)) - len(bound(b""))
    for keys in ((), (NEW,)):
        a_format(*keys, max_bytes=size).pack(KEY, body)
        with pytest.raises(SessionTooLarge) as refusal:
            a_format(*keys, max_bytes=size - 1).pack(KEY, body)
        message = str(refusal.value)
        assert f"{size} bytes; SESSION_MAX_BYTES allows {size - 1}" in message
        assert "the largest key is 'large'" in message
        assert "xxx" not in message


@both
def test_the_limit_on_keys_is_exact(form: Format) -> None:
    form.pack(KEY, a_body({str(n): n for n in range(20)}))
    with pytest.raises(SessionTooLarge, match="21 keys; SESSION_MAX_KEYS allows 20"):
        form.pack(KEY, a_body({str(n): n for n in range(21)}))


@pytest.mark.parametrize(
    "items",
    [
        lambda: {"blob": b"x" * 17_000_000},
        lambda: {str(n): n for n in range(1_000_000)},
        lambda: {"k" * 1_000_000: 1},
    ],
    ids=["17 MB", "a million keys", "a key of 1 MB"],
)
def test_far_too_much_is_refused_quickly(items: Callable[[], dict[str, Any]]) -> None:
    body = a_body(items())
    start = time.thread_time()
    with pytest.raises(SessionTooLarge) as refusal:
        a_format(max_bytes=500_000, max_keys=1000).pack(KEY, body)
    assert time.thread_time() - start < 1
    assert len(str(refusal.value)) < 300


def test_a_key_that_is_not_text_is_refused() -> None:
    body = Body({"good": b"\x01", "bad\ud800": b"\x01"})
    with pytest.raises(UnsupportedType, match="surrogates") as refusal:
        PLAIN.pack(KEY, body)
    assert refusal.value.path == r"session['bad\ud800']"


# Unreadable payloads --------------------------------------------------------------------------


def assert_refused(form: Format, payload: bytes, reason: str = "corrupt") -> None:
    with pytest.raises(UnreadableRecord) as refusal:
        form.unpack(KEY, payload)
    assert refusal.value.reason == reason
    assert "ada" not in str(refusal.value)


@both
def test_truncated_at_every_length(form: Format) -> None:
    payload = form.pack(KEY, BODY)
    for length in range(len(payload)):
        assert_refused(form, payload[:length])


@both
@pytest.mark.parametrize("more", [b"\0", b"\xc0", b"x" * 100])
def test_with_something_behind_it(form: Format, more: bytes) -> None:
    assert_refused(form, form.pack(KEY, BODY) + more)


@both
def test_with_any_one_bit_flipped(form: Format) -> None:
    payload = form.pack(KEY, BODY)
    for position in range(len(payload)):
        for bit in range(8):
            flipped = bytearray(payload)
            flipped[position] ^= 1 << bit
            with pytest.raises(UnreadableRecord) as refusal:
                form.unpack(KEY, bytes(flipped))
            assert (refusal.value.reason == "newer format") == (flipped[0] > NEWEST)


@both
def test_a_payload_of_another_session_is_refused(form: Format) -> None:
    assert_refused(form, form.pack(OTHER_KEY, BODY))


@both
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"\x01",
        bytes(14),
        bytes(1000),
        b"\xff" * 100,
        b"\x80\x04\x95 a pickle's beginning",
        b'{"user": "json"}',
        b"eyJ1c2VyIjo3fQ.ZxYk1w.signature",
        encode({"user": 7}),
        encode([{"user": 7}, None]),
        encode(7),
        encode("text"),
    ],
)
def test_a_foreign_payload(form: Format, payload: bytes) -> None:
    with pytest.raises(UnreadableRecord):
        form.unpack(KEY, payload)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        bytes(4),
        b"\xff" * 4,
        encode([1, 2, 3]),
        encode(7),
        encode("text"),
        encode({"user": 7}),
        encode([]),
        encode([7]),
        encode([{"user": 7}, None]),
        encode([[], None]),
        encode([{}, "7200"]),
        encode([{}, 7.5]),
        encode([{"a": b""}, None]),  # a value is a byte at least
        encode([{"a": "text"}, None]),
        encode([{1: b"\x01"}, None]),
        encode([{b"a": b"\x01"}, None]),
        encode([{"a": b"\x01"}, None])[:-1],
        encode([{"a": b"\x01"}, None]) + b"\x01",
        b"\x92\x81\xa1\xff\xc4\x01\x01\xc0",  # a key that is no UTF-8
        b"\x92\xdf\xff\xff\xff\xff",
        b"\x92\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 200_000,
        b"\x93\x81\xa1a\xc4\x01\x01\xc0" + b"\x91" * 200_000,  # a later field
    ],
    ids=lambda data: data[:16].hex(),
)
def test_a_right_check_around_a_wrong_body(data: bytes) -> None:
    assert_refused(PLAIN, bound(data))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_executed(protocol: int, tmp_path: Path) -> None:
    pickled = pickle.dumps(Trap(tmp_path / "caught"), protocol)
    for form in (PLAIN, SEALED):
        for payload in (pickled, bound(pickled), bytes((FORMAT, 0)) + pickled):
            with pytest.raises(UnreadableRecord):
                form.unpack(KEY, payload)
    with pytest.raises(UnreadableRecord):
        CODEC.decode(pickled)
    assert not (tmp_path / "caught").exists()
    pickle.loads(pickled)
    assert (tmp_path / "caught").exists()


@both
@pytest.mark.parametrize("version", [NEWEST + 1, 100, 255])
def test_a_newer_format_is_reported(form: Format, version: int) -> None:
    payload = form.pack(KEY, BODY)
    for newer in (bytes((version,)) + payload[1:], bytes((version, 7)), bytes((version, 0, 0))):
        assert_refused(form, newer, "newer format")


# Records that are stored already --------------------------------------------------------------

FIXED_KEY, SUCCESSOR = "k" * 42 + "1", "s" * 43
FIXED = {"user": b"\xa3ada", "n": b"\x01"}
OWNER = Owner("ada", "device", 11, 22, "p" * 43, 33)
EVERYTHING = Body(
    FIXED,
    5000,
    True,
    7000,
    True,
    OWNER,
    Origin("flask-session", "m" * 43, b"nonce", b"sealed", 9000),
    {"edge": 3},
    (Join(b"id", 4, {"a": b"\x01"}, 8000, ("a",)),),
)
BODIES = {
    "simple": Body(FIXED),
    "lifetime": Body(FIXED, 5000),
    "marked": Body(FIXED, marked=True),
    "debugged": Body(FIXED, debug_until=7000),
    "large": Body(FIXED, has_large=True),
    "owned": Body(FIXED, marked=True, has_large=True, owner=OWNER),
    "everything": EVERYTHING,
}
#: Written by an earlier version. Never change these: applications have them in their stores.
STORED = {
    "simple": ("02006b6b6b6b470ae2cb9282a475736572c404a3616461a16ec40101c0"),
    "lifetime": ("02006b6b6b6bad8701f79282a475736572c404a3616461a16ec40101cd1388"),
    "marked": ("02006b6b6b6bb9f9561b9382a475736572c404a3616461a16ec40101c0c3"),
    "debugged": ("02006b6b6b6b5c46cdd49482a475736572c404a3616461a16ec40101c0c2cd1b58"),
    "large": ("03006b6b6b6bd36ff7579582a475736572c404a3616461a16ec40101c0c2c0c3"),
    "owned": (
        "04006b6b6b6bf64e44db9682a475736572c404a3616461a16ec40101c0c3c0c396a3616461a66465"
        "766963650b16d92b7070707070707070707070707070707070707070707070707070707070707070"
        "707070707070707070707021"
    ),
    "everything": (
        "04006b6b6b6b6ea0cc889982a475736572c404a3616461a16ec40101cd1388c3cd1b58c396a36164"
        "61a66465766963650b16d92b70707070707070707070707070707070707070707070707070707070"
        "7070707070707070707070707070702195ad666c61736b2d73657373696f6ed92b6d6d6d6d6d6d6d"
        "6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6dc4056e6f"
        "6e6365c4067365616c6564cd232881a465646765039195c40269640481a161c40101cd1f4091a161"
    ),
}
SEALED_BODY = (
    "0402dfb417456e6e6e6e6e6e6e6e6e6e6e6ee8e84d67b455b2c8ad528449edc73b0f5e0392cb664f"
    "f5c5cfe1d57ced093cda9d536bd43b98562285872e53a51d8a7f16d814a77e58adae7ac62e2de5b3"
    "6da4615bfb742cb39eaa956579a2090876f842a324f3bc18a6aa323a10180c7d33afdb02"
)
POINTER = (
    "02006b6b6b6b70e2064f737373737373737373737373737373737373737373737373737373737373"
    "73737373737373737373737373"
)
SEALED_POINTER = (
    "0202dfb417456e6e6e6e6e6e6e6e6e6e6e6e0d199a61b443b37fda82965eff1526b82c71217bd5ff"
    "1015ddf6c7a9fa1f39c08d4513b191c0552186842dd612f896431091922e1e431e41964958"
)


@pytest.mark.parametrize("name", STORED)
def test_stored_bodies_stay_readable_and_are_written_the_same(name: str) -> None:
    payload = bytes.fromhex(STORED[name])
    assert PLAIN.unpack(FIXED_KEY, payload) == BODIES[name]
    assert PLAIN.pack(FIXED_KEY, BODIES[name]) == payload
    later = 1_000, 3_000
    assert PLAIN.envelope.seal_again(FIXED_KEY, payload, TIMES, later) == payload
    sealed = SEALED.pack(FIXED_KEY, BODIES[name])
    moved = SEALED.envelope.seal_again(FIXED_KEY, sealed, TIMES, later)
    assert moved[:2] == sealed[:2], "the same format"
    assert SEALED.unpack(FIXED_KEY, moved, *later) == BODIES[name]


def test_stored_sealed_records_and_pointers_stay_readable() -> None:
    sealed = a_format(b"e" * 32)
    assert sealed.unpack(FIXED_KEY, bytes.fromhex(SEALED_BODY)) == BODIES["owned"]
    for form, payload in ((PLAIN, POINTER), (sealed, SEALED_POINTER)):
        form.check_pointer(FIXED_KEY, SUCCESSOR, bytes.fromhex(payload), end=1500)


# Pointers ------------------------------------------------------------------------------------


@both
def test_a_pointer_is_bound_to_its_key_and_its_successor(form: Format) -> None:
    pointer = form.pack_pointer(KEY, OTHER_KEY)
    form.check_pointer(KEY, OTHER_KEY, pointer)
    third = session_key(new_token())
    for key, successor, payload in [
        (KEY, third, pointer),
        (third, OTHER_KEY, pointer),
        (KEY, "", pointer),
        (KEY, "é\ud800", pointer),
        (KEY, OTHER_KEY, b""),
        (KEY, OTHER_KEY, pointer[:-1]),
        (KEY, OTHER_KEY, form.pack(KEY, BODY)),
    ]:
        with pytest.raises(UnreadableRecord):
            form.check_pointer(key, successor, payload)


@both
def test_a_pointer_is_not_a_record(form: Format) -> None:
    assert_refused(form, form.pack_pointer(KEY, OTHER_KEY))


# Encryption ----------------------------------------------------------------------------------


def test_an_encrypted_payload_shows_nothing() -> None:
    secret = "correct horse battery staple"
    body = a_body({"password hint": secret, "list": [secret] * 5})
    payload = SEALED.pack(KEY, body)
    for clear in (secret, "horse", "password hint", "list"):
        assert clear.encode() in PLAIN.pack(KEY, body)
        assert clear.encode() not in payload
    assert NEW not in payload
    assert KEY.encode() not in payload
    # A cipher spreads its bytes evenly; text and MessagePack don't.
    counts = [SEALED.pack(KEY, a_body({"a": bytes(9_000)})).count(byte) for byte in range(256)]
    assert max(counts) < 36 + 10 * math.sqrt(36)


def test_the_same_body_is_never_sealed_alike() -> None:
    sealed = {SEALED.pack(KEY, BODY) for _ in range(200)}
    assert len(sealed) == 200
    assert len({payload[6:18] for payload in sealed}) == 200  # nonces


def test_keys_rotate() -> None:
    old = a_format(OLD).pack(KEY, BODY)
    rotating = a_format(NEW, OLD)
    assert content(rotating.unpack(KEY, old)) == content(BODY)
    new = rotating.pack(KEY, BODY)
    assert content(a_format(NEW).unpack(KEY, new)) == content(BODY)
    assert_refused(a_format(OLD), new, "unknown encryption key")
    assert_refused(a_format(NEW), old, "unknown encryption key")


def test_without_keys_an_encrypted_payload_is_unreadable() -> None:
    assert_refused(PLAIN, SEALED.pack(KEY, BODY), "unknown encryption key")


def test_plain_payloads_are_read_only_where_that_is_allowed() -> None:
    plain = PLAIN.pack(KEY, BODY)
    assert_refused(SEALED, plain)
    turning_on = a_format(NEW, allow_plain=True)
    assert content(turning_on.unpack(KEY, plain)) == content(BODY)
    assert turning_on.pack(KEY, BODY)[:2] == bytes((FORMAT, 2))
    assert_refused(turning_on, PLAIN.pack(OTHER_KEY, BODY))


def test_a_sealed_payload_does_not_pass_for_a_plain_one() -> None:
    payload = SEALED.pack(KEY, BODY)
    for form in (PLAIN, SEALED, a_format(NEW, allow_plain=True)):
        assert_refused(form, bytes((FORMAT, 0)) + payload[2:])
        assert_refused(form, bytes((FORMAT, 3)) + payload[2:])


def test_moved_under_another_key_it_does_not_open() -> None:
    payload = SEALED.pack(KEY, BODY)
    with pytest.raises(UnreadableRecord):
        SEALED.unpack(OTHER_KEY, payload)


def test_the_key_of_one_session_does_not_open_another() -> None:
    """Parts of two payloads under one key, or two keys, cannot be put together."""
    one, other = SEALED.pack(KEY, BODY), SEALED.pack(KEY, a_body({"user": "eve"}))
    assert_refused(SEALED, one[:18] + other[18:])
    assert_refused(SEALED, one[:6] + other[6:18] + one[18:])
    assert_refused(SEALED, one[:-16] + other[-16:])


def test_a_format_never_shows_its_keys() -> None:
    for shown in (repr(SEALED), str(SEALED), repr(Cipher([NEW]))):
        assert NEW.hex() not in shown
        assert repr(NEW) not in shown
