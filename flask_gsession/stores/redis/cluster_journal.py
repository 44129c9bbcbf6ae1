"""The part ``journal`` in a Redis Cluster, where session, index and stream are in different slots.

Why the steps come in this order (``tests/simulation/journal_model.py`` explores the others):

- The index is written before the session. Otherwise, a crash in between would leave a session that
  no sweep looks for when it expires. A place without a session is removed when it is due.
- An ended session is not deleted, but replaced with a marker that holds its last entry. Then the
  entry is journaled, and then the marker is deleted. If the session were deleted first, a crash
  would lose the entry. The index leads the sweep to a marker that was left behind.
- The marker is written before the entry. Otherwise, the session could be saved in between, and
  live on although the journal says that it ended.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import Gone, KeyTaken, Stale, StoreUnavailable, UnreadableRecord
from ...events import logger
from ..base import Deleted, Record, Replaced, new_version
from .commands import Commands, Script, packed
from .confirmation import Confirmation
from .journal import HOLD, RedisJournal, held_life
from .layout import pack, version

_END, _UNMARK = Script("journal_end"), Script("journal_unmark")
_SOON = 10_000  # milliseconds after which the sweep looks whether a process stopped half-way


class ClusterJournal(RedisJournal):
    """The journal in a Cluster: one step after the other."""

    #: A rotation and its entry may be separated by a crash.
    in_two_steps = True

    def __init__(self, records: Any, kind: Callable[[Any, int], Any]) -> None:
        super().__init__(records)
        held: Any = _Held(records.commands)
        self._held = kind(held, records.logout_replicas)

    def create(self, record: Record, entries: Sequence[bytes]) -> None:
        deadline = self._commands.deadline()
        self._expect(record)
        name = self._records.names.record(record.key)
        commands = self._held.commands
        life = commands.life(record, commands.now())
        request = packed(b"SET", name, pack(record), b"NX", b"PX", b"%d" % life)
        if self._commands.ask(deadline, name, request) is None:
            try:
                there = self._records.load(record.key, deadline)
            except UnreadableRecord:
                raise KeyTaken from None
            if there is None or there.version != record.version:
                raise KeyTaken
        self.append(entries)

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        self._expect(record)
        self._held.save(record, expected_version, shorten=shorten, lease=lease)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        self._expect(record)
        return bool(self._held.renew(record, idle_expires_at))

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        entries: Sequence[bytes],
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> Replaced:
        self._expect(record)
        replaced: Replaced = self._held.replace(
            key, record, expected_version, pointer, shorten=shorten, lease=lease
        )
        self.append(entries)
        self._leave(key)
        return replaced

    def end(
        self, key: str, expected_version: int, entries: Sequence[bytes], lease: str | None = None
    ) -> Deleted:
        commands = self._commands
        # Lets the sweep find the marker soon, even if the session is older than the journal.
        self._place(key, commands.now() + _SOON)
        keys = [self._records.names.record(key)]
        if lease is not None:
            keys.append(self._records.names.lease(key))
        confirmation = Confirmation(self._records.logout_replicas)
        marker = self._marker(key, entries)
        self._mark(keys, marker, expected_version, lease, confirmation)
        self._held.end_lease(key, commands.deadline())
        try:
            self._settle(marker, entries)
        except StoreUnavailable as error:  # the session has ended; the marker keeps the entries
            logger.warning("The end of session %s will be journaled later: %s", key, error)
        return Deleted(True, None, confirmation.missing)

    def _mark(
        self,
        keys: list[bytes],
        marker: Record,
        expected_version: int,
        lease: str | None,
        confirmation: Confirmation | None = None,
        expired: bytes = b"0",
    ) -> bytes:
        arguments = [
            version(expected_version),
            b"%d" % self._commands.now(),
            pack(marker),
            b"%d" % HOLD,
            (lease or "").encode(),
            expired,
        ]
        deadline = self._commands.deadline()
        return self._commands.run(deadline, _END, keys, arguments, confirmation=confirmation)

    def _marker(self, key: str, entries: Sequence[bytes]) -> Record:
        """The record in the place of an ended session: an expired pointer to nowhere."""
        content = json.dumps([b64encode(entry).decode() for entry in entries]).encode()
        now = self._commands.now()
        return Record(key, new_version(), now, now, now, content, "")

    def _settle(self, marker: Record, entries: Sequence[bytes]) -> None:
        """Add the entries, then remove the marker."""
        self.append(entries)
        name = [self._records.names.record(marker.key)]
        self._commands.run(self._commands.deadline(), _UNMARK, name, [pack(marker)[:9]])
        self._leave(marker.key)

    def _pointer(self, bucket: bytes, record: Record) -> None:
        if record.successor == "" and record.payload:  # a process stopped before the entries
            try:
                entries = [b64decode(entry) for entry in json.loads(record.payload)]
            except (ValueError, TypeError):
                entries = []
            self._settle(record, entries)
        else:
            super()._pointer(bucket, record)

    def expire(self, expired: Sequence[tuple[Record, bytes]]) -> int:
        removed = 0
        for record, entry in expired:
            name = self._records.names.record(record.key)
            if not record.version:  # gone or unreadable, so no marker can replace it
                self.append([entry])
                self._call(name, packed(b"DEL", name))
                self._leave(record.key)
                removed += 1
                continue
            marker = self._marker(record.key, [entry])
            try:
                status = self._mark([name], marker, record.version, None, expired=b"1")
            except (Gone, Stale):
                continue
            if status == b"K":
                self._settle(marker, [entry])
                removed += 1
        return removed

    # -- the index

    def _expect(self, record: Record) -> None:
        """Let the sweep look for this session when it expires, or earlier."""
        bucket, due = self._names.due(record.key), b"%d" % record.idle_expires_at
        self._call(bucket, packed(b"ZADD", bucket, b"NX", due, record.key.encode()))

    def _leave(self, key: str) -> None:
        bucket = self._names.due(key)
        self._call(bucket, packed(b"ZREM", bucket, key.encode()))

    def _all(self, names: Sequence[bytes], requests: Sequence[bytes]) -> Sequence[Any]:
        return [self._answer(*each) for each in zip(names, requests, strict=True)]

    def _answer(self, name: bytes, request: bytes) -> Any:
        try:
            return self._call(name, request)
        except UnreadableRecord as error:  # junk of another type
            return error


class _Held:
    """The commands, which keep a session until a sweep ends it, even after it has expired."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def __getattr__(self, name: str) -> Any:
        return getattr(self._commands, name)

    def life(self, record: Record, now: int) -> int:
        return held_life(record, now)
