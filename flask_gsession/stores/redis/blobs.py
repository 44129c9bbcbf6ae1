"""The part ``blobs`` of a Redis store. A large value is one string, to which frames are added."""

from __future__ import annotations

from collections.abc import Sequence

from ..parts import Blobs
from .commands import Commands, Script, packed

_WRITE, _EXPIRE = Script("blob_write"), Script("blob_expire")


class RedisBlobs(Blobs):
    """Keeps large values, which the server removes when they expire."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        commands = self._commands
        arguments = [b"%d" % offset, frame, b"%d" % max(1, expires_at - commands.now())]
        commands.run(commands.deadline(), _WRITE, [commands.names.blob(name)], arguments)

    def read_frame(self, name: str, offset: int, size: int) -> bytes | None:
        blob = self._commands.names.blob(name)
        request = packed(b"GETRANGE", blob, b"%d" % offset, b"%d" % (offset + size - 1))
        return self._commands.ask(self._commands.deadline(), blob, request) or None

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        self._expire(names, b"later", expires_at)

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        self._expire(names, b"earlier", at)

    def _expire(self, names: Sequence[str], which: bytes, at: int) -> None:
        commands = self._commands
        life = b"%d" % max(0, at - commands.now())
        for keys in self._batches([commands.names.blob(name) for name in names]):
            commands.run(commands.deadline(), _EXPIRE, keys, [which, life])

    def _batches(self, blobs: list[bytes]) -> list[list[bytes]]:
        """Group keys that one command can handle."""
        return [blobs]
