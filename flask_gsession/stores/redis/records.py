"""The verbs on records in Redis, each of them one command; a write may name a lease."""

from __future__ import annotations

from ...errors import KeyTaken
from ..base import MAX_POINTERS, Deleted, Record, Replaced, too_many_pointers
from .commands import Commands, Script
from .confirmation import Confirmation
from .layout import RECORD, header, pack, unpack, unpack_any, version
from .pool import packed

SAVE, RENEW = Script("save"), Script("renew")
REPLACE, DELETE = Script("replace"), Script("delete")


class Records:
    """Keeps records. ``logout_replicas``: how many must have the end of a session."""

    def __init__(self, commands: Commands, logout_replicas: int) -> None:
        self.commands = commands
        self.names = commands.names
        self.logout_replicas = logout_replicas

    def create(self, record: Record, deadline: float) -> bool:
        """As ``Store.create``; whether it was not there yet."""
        ask, name = self.commands.ask, self.names.record(record.key)
        life = self.commands.life(record)
        request = packed(b"SET", name, pack(record), b"NX", b"PX", life)
        if ask(deadline, name, request) is not None:
            return True
        there = self.load_unexpired(record.key, deadline)
        if there is None:  # expired by its own times, though not by the server's yet
            ask(deadline, name, packed(b"DEL", name))
            if ask(deadline, name, request) is not None:
                return True
        if there is None or there.version != record.version:
            raise KeyTaken
        return False

    def load(self, key: str, deadline: float) -> Record | None:
        """As ``Store.load``."""
        name = self.names.record(key)
        # ``packed``, written out: every load comes by here.
        request = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)
        return self.commands.call(deadline, name, request, unpack_any, key)

    def load_unexpired(self, key: str, deadline: float) -> Record | None:
        """As ``load``, but None for a record that has expired by its own times."""
        record = self.load(key, deadline)
        expired = record is None or self.commands.now() >= record.idle_expires_at
        return None if expired else record

    def save(self, record: Record, expected_version: int, lease: str | None, shorten: bool) -> None:
        """As ``Store.save``, under a lease or not."""
        commands = self.commands
        deadline = commands.deadline()
        keys = [self.names.record(record.key)]
        holder = []
        if lease is not None:
            keys.append(self.names.lease(record.key))
            holder.append(lease.encode())
        mine = version(record.version)
        later: Record | None = record
        while later is not None:
            record = later
            arguments = [
                version(expected_version),
                pack(record),
                commands.life(record),
                commands.now_text(),
                b"" if shorten else b"%d" % record.idle_expires_at,
                *holder,
            ]
            reply = commands.run(deadline, SAVE, keys, arguments, mine)
            if reply[:1] != b"R":
                return
            later, shorten = renewed_since(record, reply)

    def renew(self, record: Record, idle_expires_at: int, deadline: float) -> None:
        """As ``Store.renew``; raises ``Gone`` instead of returning False."""
        later = min(max(idle_expires_at, record.idle_expires_at), record.absolute_expires_at)
        renewed = record._replace(idle_expires_at=later)
        commands = self.commands
        arguments = [header(RECORD, renewed), commands.life(renewed), commands.now_text()]
        commands.run(deadline, RENEW, [self.names.record(record.key)], arguments)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str | None,
        shorten: bool,
    ) -> Replaced:
        """As ``Store.replace``, under a lease or not."""
        commands = self.commands
        deadline = commands.deadline()
        confirmation = Confirmation(0 if pointer else self.logout_replicas)
        names = self.names
        keys = [names.record(key), names.record(record.key), names.lease(key)]
        later: Record | None = record
        while later is not None:
            record = later
            left = (b"", b"0") if pointer is None else (pack(pointer), commands.life(pointer))
            arguments = [
                version(expected_version),
                pack(record),
                commands.life(record),
                commands.now_text(),
                *left,
                (lease or "").encode(),
                names.channels,
                b"" if shorten else b"%d" % record.idle_expires_at,
            ]
            mine = version(record.version)
            reply = commands.run(deadline, REPLACE, keys, arguments, mine, confirmation)
            later, shorten = renewed_since(record, reply)
        return Replaced(confirmation.missing)

    def delete(self, key: str) -> Deleted:
        """As ``Store.delete`` of any version."""
        deadline = self.commands.deadline()
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
        # If an answer is lost, nobody knows whether there was a record.
        record = unpack(key, ended) if ended else None
        return Deleted(ended is not None, record, confirmation.missing)

    def delete_version(self, key: str, expected_version: int, lease: str | None) -> Deleted:
        """As ``Store.delete`` of a version, under a lease or not."""
        confirmation = Confirmation(self.logout_replicas)
        wanted = version(expected_version)
        self.remove(key, self.commands.deadline(), wanted, lease=lease, confirmation=confirmation)
        return Deleted(True, None, confirmation.missing)

    def remove(
        self,
        key: str,
        deadline: float,
        wanted: bytes = b"",
        pointers: bytes = b"0",
        lease: str | None = None,
        confirmation: Confirmation | None = None,
    ) -> bytes:
        """Run the script that deletes the version ``wanted``, or any, and maybe ``pointers``."""
        keys = self._keys_to_remove(key, lease)
        now, owner = self.commands.now_text(), (lease or "").encode()
        arguments = [wanted, now, pointers, owner, self.names.channels]
        return self.commands.run(deadline, DELETE, keys, arguments, confirmation=confirmation)

    def words_to_remove(self, key: str) -> list[bytes]:
        """The arguments of the script that deletes any version, but no pointer."""
        keys = self._keys_to_remove(key, None)
        rest = [b"", self.commands.now_text(), b"0", b"", self.names.channels]
        return [b"%d" % len(keys), *keys, *rest]

    def _keys_to_remove(self, key: str, lease: str | None) -> list[bytes]:
        return [self.names.record(key), self.names.lease(key)]


def renewed_since(record: Record, reply: bytes) -> tuple[Record | None, bool]:
    """The value to store instead if ``reply`` says that another request renewed the session.

    Also whether it may be earlier than the stored expiry, since the absolute expiry limits it.
    """
    if reply[:1] != b"R":
        return None, False
    stored = int(reply[1:].partition(b" ")[0])
    end = record.absolute_expires_at
    return record._replace(idle_expires_at=min(stored, end)), stored > end
