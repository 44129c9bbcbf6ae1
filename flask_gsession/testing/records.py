"""Records and blob names for tests of stores."""

from __future__ import annotations

import secrets
from typing import Any

from ..stores.base import Clock, Record, milliseconds, new_version
from ..tokens import new_token, session_key


def a_record(clock: Clock, *, idle: float = 60, absolute: float = 3600, **fields: Any) -> Record:
    """A live record with a random key. Its timeouts are in seconds from now."""
    now = milliseconds(clock)
    values: dict[str, Any] = {
        "key": session_key(new_token()),
        "version": new_version(),
        "created_at": now,
        "idle_expires_at": now + int(idle * 1000),
        "absolute_expires_at": now + int(absolute * 1000),
        "payload": bytes(range(256)),
    }
    return Record(**{**values, **fields})


def a_pointer(old: Record, new: Record, grace: float = 10) -> Record:
    """The pointer that a rotation from ``old`` to ``new`` leaves for ``grace`` seconds."""
    return old._replace(
        version=new.version,
        idle_expires_at=new.created_at + int(grace * 1000),
        payload=b"to " + new.payload,
        successor=new.key,
    )


def a_blob() -> str:
    """A random name for a blob."""
    return secrets.token_hex(16)
