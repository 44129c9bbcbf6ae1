"""Notices that the file of a node was copied, or restored from a backup.

The changes that wait in such a file may have been settled already, and their sessions may have
ended since. So each time a node begins to settle changes, it increments a counter and sets a random
mark, in its file and at the centre. If the centre is ahead, or has another mark, another file with
the same id has settled since.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from base64 import urlsafe_b64encode
from typing import NamedTuple

from msgspec import MsgspecError
from msgspec.msgpack import decode, encode

from ...errors import Gone, KeyTaken, Stale
from ..base import KEY_LENGTH, Record, Store, new_version, unexpired
from ..parts import LOST_EXPIRY
from ..sqlite.file import in_transaction, on_connection
from .copy import Copy

_ATTEMPTS = 10
_COPIED = (
    "the node's file is a copy, or was restored from a backup: another file with its id has "
    "settled since, perhaps these changes too. They are not settled. Move the file away, with its "
    "-wal and -shm, and restart this node"
)


class _Turn(NamedTuple):
    number: int = 0
    mark: str = ""


class Claim:
    """The claim that the file of ``copy`` is the only one with its id."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self._prefix = copy.rows.prefix
        self.file = copy.file

    def renew(self, centre: Store, node: str) -> str:
        """Begin to settle changes. Returns why this file must not do so, or "". Two round trips."""
        key = key_of(node, self._prefix)
        for _ in range(_ATTEMPTS):
            own = (
                self._own()
            )  # before the centre's, since another process of this node may be settling too
            now = self._copy.now()
            there = unexpired(centre, key, now)
            theirs = _Turn() if there is None else _turn(there)
            if there is not None and theirs != own and theirs.number >= own.number:
                return _COPIED
            # A turn that hasn't reached the centre is sent again.
            turn = own
            if own.number <= theirs.number:
                turn = _Turn(own.number + 1, secrets.token_hex(8))
                if not self._begin(own, turn):
                    continue
            end = now + LOST_EXPIRY
            record = Record(key, new_version(), now, end, end, encode(turn))
            try:
                if there is None:
                    centre.create(record)
                else:
                    centre.save(record, there.version)
            except (KeyTaken, Stale, Gone):
                continue
            return ""
        return "other processes keep starting to settle"

    @on_connection
    def _own(self, db: sqlite3.Connection) -> _Turn:
        found = db.execute(
            "SELECT number, mark FROM gsession_edge_turns WHERE prefix = ?", (self._prefix,)
        ).fetchone()
        return _Turn() if found is None else _Turn(*found)

    @in_transaction(durable=True)  # or a power cut would look like a backup
    def _begin(self, db: sqlite3.Connection, before: _Turn, turn: _Turn) -> bool:
        """Store the turn before sending it. Returns False if another process was first."""
        done = db.execute(
            "INSERT INTO gsession_edge_turns (prefix, number, mark) VALUES (?, ?, ?) "
            "ON CONFLICT (prefix) DO UPDATE SET number = excluded.number, mark = excluded.mark "
            "WHERE number = ? AND mark = ?",
            (self._prefix, *turn, *before),
        )
        return done.rowcount == 1


def key_of(node: str, prefix: str) -> str:
    """A key that no session has. Includes the prefix: clients of a gRPC server share one store."""
    digest = hashlib.sha256(f"edge {node} {prefix}".encode()).digest()
    return urlsafe_b64encode(digest).decode()[: KEY_LENGTH - 1] + "-"


def _turn(record: Record) -> _Turn:
    try:
        return decode(record.payload, type=_Turn)
    except MsgspecError:
        return _Turn(-1)  # damaged
