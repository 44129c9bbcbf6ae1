"""The entries of the journal, in JSON. They hold no tokens and no values."""

from __future__ import annotations

import json
from os import urandom
from typing import Any

from msgspec import DecodeError, Struct
from msgspec import json as as_json
from msgspec.structs import replace

CREATED, BOUND, ROTATED, ENDED, EXPIRED = "created", "bound", "rotated", "ended", "expired"
GAP = "gap"
KINDS = (CREATED, BOUND, ROTATED, ENDED, EXPIRED)


class Entry(Struct, frozen=True, omit_defaults=True):
    """One entry. ``at``: milliseconds since 1970. ``previous``: the handle before a rotation.

    ``id``: random if not given. After a crash, a store may add an entry twice, with the same id.
    """

    at: int
    kind: str
    handle: str | None = None
    owner: str | None = None
    device: str | None = None
    reason: str | None = None
    by: str | None = None
    previous: str | None = None
    id: str = ""

    def pack(self) -> bytes:
        """The entry as bytes, with an id."""
        return as_json.encode(replace(self, id=self.id or urandom(8).hex()))


_decode = as_json.Decoder(Entry).decode


def unpack(data: bytes) -> Entry:
    """The entry. A malformed one gets the kind ``"unreadable"``, so it doesn't block consumers."""
    try:
        return _decode(data)
    except (DecodeError, RecursionError):
        return Entry(0, "unreadable")


def as_line(fields: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
