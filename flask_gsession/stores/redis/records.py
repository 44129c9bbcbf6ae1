"""The verbs of a store in Redis, one command each. A write may require a lease."""

from __future__ import annotations

from struct import Struct

from ...errors import Gone, KeyTaken
from ..base import MAX_POINTERS, Deleted, Record, Replaced, Store, too_many_pointers
from .commands import Commands, Script, packed
from .confirmation import Confirmation
from .layout import pack, unpack, version

SAVE, RENEW = Script("save"), Script("renew")
REPLACE, DELETE = Script("replace"), Script("delete")
_CONDITION = Struct(">QQQ?")  # of the script that saves


class Records(Store):
    """Keeps records. ``logout_replicas``: how many replicas must confirm the end of a session.

    The argument ``deadline`` of a method: when it has to end, if it is a step of another call.
    """

    confirms_logouts = True

    def __init__(self, commands: Commands, logout_replicas: int) -> None:
        self.commands = commands
        self.names = commands.names
        self.logout_replicas = logout_replicas

    def create(self, record: Record) -> None:
        self._create(record, self.commands.deadline())

    def _create(self, record: Record, deadline: float) -> bool:
        """Like ``create``. Returns whether the record is new."""
        commands, name = self.commands, self.names.record(record.key)
        life = commands.life(record, commands.now())
        request = packed(b"SET", name, pack(record), b"NX", b"PX", b"%d" % life)
        if commands.ask(deadline, name, request) is not None:
            return True
        there = self.load_unexpired(record.key, deadline)
        if there is None:  # expired by its own times, but not by the server's clock yet
            commands.ask(deadline, name, packed(b"DEL", name))
            if commands.ask(deadline, name, request) is not None:
                return True
        if there is None or there.version != record.version:
            raise KeyTaken
        return False

    # Most requests run ``load`` and ``save``, so these build names and requests inline.

    def load(self, key: str, deadline: float | None = None) -> Record | None:
        commands = self.commands
        name = self.names.start + key.encode() + b"}"
        request = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)
        return commands.call(deadline or commands.deadline(), name, request, unpack, key)

    def load_unexpired(self, key: str, deadline: float) -> Record | None:
        """Like ``load``, but None for a record that has expired by its own times."""
        record = self.load(key, deadline)
        expired = record is None or self.commands.now() >= record.idle_expires_at
        return None if expired else record

    def save(
        self,
        record: Record,
        expected_version: int,
        *,
        shorten: bool = False,
        lease: str | None = None,
        deadline: float | None = None,
    ) -> None:
        commands = self.commands
        value = pack(record)
        deadline, now = deadline or commands.deadline(), commands.now()
        condition = _CONDITION.pack(expected_version, now, commands.life(record, now), shorten)
        keys = [self.names.start + record.key.encode() + b"}"]
        arguments = [condition, value]
        if lease is not None:
            keys.append(self.names.lease(record.key))
            arguments.append(lease.encode())
        reply = commands.run(deadline, SAVE, keys, arguments, value[1:9])
        if reply[:1] == b"R":
            later, shorten = renewed_since(record, reply)
            self.save(later, expected_version, shorten=shorten, lease=lease, deadline=deadline)

    def renew(self, record: Record, idle_expires_at: int, deadline: float | None = None) -> bool:
        later = min(max(idle_expires_at, record.idle_expires_at), record.absolute_expires_at)
        renewed = record._replace(idle_expires_at=later, payload=b"", successor=None)
        commands = self.commands
        now = commands.now()
        arguments = [pack(renewed), b"%d" % commands.life(renewed, now), b"%d" % now]
        keys = [self.names.record(record.key)]
        try:
            commands.run(deadline or commands.deadline(), RENEW, keys, arguments)
        except Gone:
            return False
        return True

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
        lease: str | None = None,
        deadline: float | None = None,
    ) -> Replaced:
        commands = self.commands
        deadline = deadline or commands.deadline()
        confirmation = Confirmation(0 if pointer else self.logout_replicas)
        names, now, value = self.names, commands.now(), pack(record)
        keys = [names.record(key), names.record(record.key), names.lease(key)]
        arguments = [
            version(expected_version),
            value,
            b"%d" % commands.life(record, now),
            b"%d" % now,
            b"" if pointer is None else pack(pointer),
            b"%d" % (0 if pointer is None else commands.life(pointer, now)),
            (lease or "").encode(),
            names.channels,
            b"" if shorten else b"%d" % record.idle_expires_at,
        ]
        reply = commands.run(deadline, REPLACE, keys, arguments, value[1:9], confirmation)
        if reply[:1] != b"R":
            return Replaced(confirmation.missing)
        later, shorten = renewed_since(record, reply)
        return self.replace(
            key, later, expected_version, pointer, shorten=shorten, lease=lease, deadline=deadline
        )

    def delete(
        self, key: str, expected_version: int | None = None, *, lease: str | None = None
    ) -> Deleted:
        deadline = self.commands.deadline()
        if expected_version is None:
            return self._delete_any(key, deadline)
        confirmation = Confirmation(self.logout_replicas)
        self.remove(key, deadline, version(expected_version), b"0", lease, confirmation)
        return Deleted(True, None, confirmation.missing)

    def _delete_any(self, key: str, deadline: float) -> Deleted:
        """Delete any version, and follow pointers."""
        confirmation = Confirmation(self.logout_replicas)
        # Successors are deleted before their pointers, so that a repeat still finds them.
        pointers: dict[str, None] = {}
        ended = None
        for _ in range(MAX_POINTERS):
            reply = self.remove(key, deadline, confirmation=confirmation)
            if reply[:1] != b"P":
                ended = reply[1:] if reply[:1] == b"K" else None
                break
            pointers[key] = None
            key = unpack(key, reply[1:]).successor or ""
            if key in pointers:
                break
        else:
            raise too_many_pointers()
        for pointer in reversed(pointers):
            self.remove(pointer, deadline, pointers=b"1")
        # If a reply was lost, it is unknown whether there was a record.
        record = unpack(key, ended) if ended else None
        return Deleted(ended is not None, record, confirmation.missing)

    def remove(
        self,
        key: str,
        deadline: float,
        wanted: bytes = b"",
        pointers: bytes = b"0",
        lease: str | None = None,
        confirmation: Confirmation | None = None,
    ) -> bytes:
        """Run the script that deletes a record. Returns its reply.

        ``wanted``: the version; empty: any. ``pointers``: b"1" to delete a pointer as well.
        """
        keys = self._keys_to_remove(key, lease)
        now, owner = b"%d" % self.commands.now(), (lease or "").encode()
        arguments = [wanted, now, pointers, owner, self.names.channels]
        return self.commands.run(deadline, DELETE, keys, arguments, confirmation=confirmation)

    def deletion_arguments(self, key: str) -> list[bytes]:
        """The arguments of the script, to delete any version, but no pointer."""
        keys = self._keys_to_remove(key, None)
        rest = [b"", b"%d" % self.commands.now(), b"0", b"", self.names.channels]
        return [b"%d" % len(keys), *keys, *rest]

    def _keys_to_remove(self, key: str, lease: str | None) -> list[bytes]:
        return [self.names.record(key), self.names.lease(key)]


def renewed_since(record: Record, reply: bytes) -> tuple[Record, bool]:
    """The record to store instead, since another request has renewed the session.

    Also returns whether the stored idle expiry must move back to the absolute expiry.
    """
    stored = int(reply[1:].partition(b" ")[0])
    end = record.absolute_expires_at
    return record._replace(idle_expires_at=min(stored, end)), stored > end
