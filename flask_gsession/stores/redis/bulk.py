"""Deletes several sessions of one Redis in one round trip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.exceptions import RedisError

from ...errors import UnreadableRecord
from ..base import Deleted
from ..interrupts import reraise_interruption
from ..parts import Bulk
from .commands import packed
from .layout import unpack
from .pool import ask_all
from .records import DELETE, Records


class RedisBulk(Bulk):
    """The part ``bulk``. If a reply is missing or unexpected, its session is deleted again."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def delete_many(self, keys: Sequence[str]) -> list[Deleted]:
        if not keys:
            return []
        first = self._records.delete(keys[0])  # also loads the script on the server
        answers = self._ask(keys[1:])
        pairs = zip(keys[1:], answers, strict=True)
        return [first, *(self._deleted(key, answer) for key, answer in pairs)]

    def _ask(self, keys: Sequence[str]) -> Sequence[Any]:
        commands = self._records.commands
        requests = [
            packed(b"EVALSHA", DELETE.sha, *self._records.deletion_arguments(key)) for key in keys
        ]
        if not requests:
            return []
        try:
            return ask_all(commands.pool, commands.deadline(), requests)
        except (RedisError, OSError) as error:
            reraise_interruption(error)
            return [None] * len(keys)

    def _deleted(self, key: str, answer: Any) -> Deleted:
        if answer == b"N":
            return Deleted(False)
        if type(answer) is bytes and answer[:1] == b"K":
            try:
                return Deleted(True, unpack(key, answer[1:]))
            except UnreadableRecord:
                pass  # the reply to another command
        return self._records.delete(key)  # follows pointers
