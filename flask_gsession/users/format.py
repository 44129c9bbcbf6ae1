"""A roster as bytes: MessagePack, for each device about 65 bytes plus its label.

::

    roster      array: 1 (the format), epoch, clock, array of the devices
    device      array: id (6 bytes), session key (32 bytes), created, seen and expires (seconds; the
                latter two relative to created), flags, network, label, tags. Empty fields at the
                end are left out.

Flags: 1 ending, 2 remembered. New fields go to the ends of the arrays.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.msgpack import Decoder, Encoder

from ..errors import UnreadableRecord
from ..values.damage import DECODING_ERRORS, check_damage
from .roster import Device, Roster

FORMAT = 1
_ENDING, _REMEMBERED = 1, 2
_URL_SAFE, _STANDARD = bytes.maketrans(b"+/", b"-_"), bytes.maketrans(b"-_", b"+/")
_Natural = Annotated[int, Meta(ge=0, lt=2**53)]


class _Start(Struct, array_like=True):
    format: int


class _Device(Struct, array_like=True):
    id: Annotated[bytes, Meta(min_length=1, max_length=32)]
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    created: _Natural
    seen: _Natural
    expires: _Natural
    flags: int = 0
    network: bytes = b""
    label: str = ""
    tags: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "<_Device>"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return []


class _Roster(Struct, array_like=True):
    format: int
    epoch: _Natural
    clock: int
    devices: list[_Device]


_encode = Encoder().encode
_decode_start = Decoder(_Start).decode
_decode = Decoder(_Roster).decode


def pack(roster: Roster) -> bytes:
    return _encode((FORMAT, roster.epoch, roster.clock, list(map(_pack, roster.devices))))


def unpack(content: bytes) -> Roster:
    """The roster. Raises ``UnreadableRecord``."""
    try:
        number = _decode_start(content).format
        if number > FORMAT:
            raise UnreadableRecord("newer format", f"roster {number}; this one reads {FORMAT}")
        packed = _decode(content)
    except DECODING_ERRORS as error:
        check_damage(_decode, content, error)
    return Roster(packed.epoch, packed.clock, tuple(map(_unpack, packed.devices)))


def _pack(device: Device) -> tuple[object, ...]:
    flags = device.ending * _ENDING | device.remembered * _REMEMBERED
    end: list[object] = [flags, device.network, device.label, device.tags]
    while end and not end[-1]:
        end.pop()
    created = device.created
    seen, expires = max(device.seen - created, 0), max(device.expires - created, 0)
    return (_bytes(device.id), _bytes(device.key), created, seen, expires, *end)


def _unpack(packed: _Device) -> Device:
    created = packed.created
    return Device(
        _text(packed.id),
        _text(packed.key),
        created,
        created + packed.seen,
        created + packed.expires,
        packed.label,
        packed.network,
        packed.tags,
        remembered=bool(packed.flags & _REMEMBERED),
        ending=bool(packed.flags & _ENDING),
    )


# Several times faster than the module base64, which matters for a thousand devices.
def _bytes(text: str) -> bytes:
    return a2b_base64(text.encode().translate(_STANDARD) + b"=" * (-len(text) % 4))


def _text(data: bytes) -> str:
    return b2a_base64(data, newline=False).translate(_URL_SAFE, b"=").decode()
