"""What an entry of the journal says, and how it is written: as JSON, without token or value."""

from __future__ import annotations

import json
from typing import Any

from msgspec import DecodeError, Struct
from msgspec import json as as_json

CREATED, BOUND, ROTATED, ENDED, EXPIRED = "created", "bound", "rotated", "ended", "expired"
GAP = "gap"
KINDS = (CREATED, BOUND, ROTATED, ENDED, EXPIRED)


class Entry(Struct, frozen=True, omit_defaults=True):
    """One entry. ``at``: milliseconds since 1970. ``previous``: the handle before a rotation."""

    at: int
    kind: str
    handle: str | None = None
    owner: str | None = None
    device: str | None = None
    reason: str | None = None
    by: str | None = None
    previous: str | None = None

    def pack(self) -> bytes:
        return as_json.encode(self)


_decode = as_json.Decoder(Entry).decode


def unpack(data: bytes) -> Entry:
    """The entry. One that can't be read is passed on as such, so that it blocks no consumer."""
    try:
        return _decode(data)
    except (DecodeError, RecursionError):
        return Entry(0, "unreadable")


def as_line(fields: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
