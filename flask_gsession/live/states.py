"""The public state of a session and its user: versions, never values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from ..repository.repository import Repository
from ..users.roster import Roster
from ..values.marks import unexpired
from ..values.payload import Body
from .messages import Message

_PURPOSE = b"flask-gsession live "
Versions = Mapping[str, str]


class SessionState(Struct, frozen=True):
    """A session at one moment.

    ``handle``: its current key. ``ends``: when it ends if it isn't used, in milliseconds.
    ``user_id``: the user it is bound to. ``keys``: the version of each value.
    """

    handle: str
    ends: int
    user_id: str | None
    keys: Versions

    def __repr__(self) -> str:
        return f"<SessionState {self.handle}>"


class UserState(Struct, frozen=True):
    """A user at one moment: the version of the list of devices, and of each value."""

    user_id: str
    devices: str
    keys: Versions
    messages: tuple[Message, ...] = ()

    def __repr__(self) -> str:
        return "<UserState>"


class State(Struct, frozen=True):
    """``session`` is None once it has ended; ``user`` is None unless it is bound to one."""

    session: SessionState | None = None
    user: UserState | None = None


class Digests:
    """Makes versions that are the same in all processes with one ``SECRET_KEY``.

    They are keyed, so that nobody can guess a value and compare versions.
    """

    def __init__(self, repository: Repository) -> None:
        self._live = repository.live
        self._known: tuple[object, bytes] = (None, b"")

    def of(self, *parts: bytes) -> str:
        """The version of these parts: 12 characters."""
        secret = self._live.secret_keys()[0]
        known, key = self._known
        if known is not secret:
            raw = secret.encode() if isinstance(secret, str) else secret or b""
            key = hashlib.sha256(_PURPOSE + raw).digest()
            self._known = (secret, key)
        digest = hashlib.blake2b(digest_size=6, key=key)
        for part in parts:
            digest.update(b"%d:%b" % (len(part), part))
        return digest.hexdigest()

    def of_body(self, created: int, body: Body, now: int) -> dict[str, str]:
        """The version of each value. ``created`` keeps versions the same through rotations."""
        values = unexpired(body.values, now) if body.marked else body.values
        salt = b"%d" % created
        return {key: self.of(salt, key.encode(), raw) for key, raw in values.items()}

    def of_devices(self, user_id: str, roster: Roster) -> str:
        """The version of the list of devices and their labels, ignoring when each was seen."""
        shown: list[Any] = [(each.id, each.label, each.tags) for each in roster.members]
        return self.of(b"devices", user_id.encode(), repr(shown).encode())
