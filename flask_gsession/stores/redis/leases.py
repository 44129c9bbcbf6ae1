"""The part ``leases`` of a Redis store. A lease and its queue are one string beside the record."""

from __future__ import annotations

import time

from ...errors import LeaseLost
from ..base import Deleted, Record, Replaced
from ..lease import ASK_AGAIN, WAITER_LIFE, poll
from ..parts import Leases
from .commands import Commands, Script, packed
from .layout import lease_of
from .records import Records
from .wakeup import WakeUps

_LEASE = Script("lease")


def ask_for_lease(
    commands: Commands,
    keys: list[bytes],
    operation: bytes,
    owner: bytes,
    *more: bytes,
    deadline: float | None = None,
) -> bytes:
    """Run the lease script. The first of ``keys`` is the lease."""
    arguments = [operation, owner, b"%d" % commands.now(), b"%d" % WAITER_LIFE]
    deadline = deadline or commands.deadline()
    return commands.run(deadline, _LEASE, keys, [*arguments, commands.names.channels, *more], owner)


class RedisLeases(Leases):
    """Lends sessions. ``wake_ups`` notifies waiters when a lease becomes free."""

    def __init__(self, records: Records, wake_ups: WakeUps) -> None:
        self._records = records
        self._commands = records.commands
        self._names = records.names
        self._wake_ups = wake_ups

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        self._records.save(record, expected_version, shorten=shorten, lease=lease)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str,
        *,
        shorten: bool = False,
    ) -> Replaced:
        return self._records.replace(
            key, record, expected_version, pointer, shorten=shorten, lease=lease
        )

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted:
        return self._records.delete(key, expected_version, lease=lease)

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        name = owner.encode()
        self._wake_ups.expect(name)
        waiting = False
        try:
            deadline = self._commands.deadline()
            reply = ask_for_lease(
                self._commands,
                self._keys_to_acquire(key, deadline),
                b"acquire",
                name,
                b"%d" % lease_ms,
                b"%d" % max_waiters,
                self._wake_ups.channel,
                deadline=deadline,
            )
            waiting = reply[:1] == b"W"
            return max(1, min(int(reply[1:].partition(b" ")[0]), ASK_AGAIN)) if waiting else 0
        finally:
            if not waiting:
                self._wake_ups.forget(name)

    def _keys_to_acquire(self, key: str, deadline: float) -> list[bytes]:
        return [self._names.lease(key), self._names.record(key)]

    def extend(self, key: str, owner: str, lease_ms: int) -> bool:
        keys, name = [self._names.lease(key)], owner.encode()
        return ask_for_lease(self._commands, keys, b"extend", name, b"%d" % lease_ms)[:1] == b"K"

    def release(self, key: str, owner: str) -> bool:
        name = owner.encode()
        self._wake_ups.forget(name)
        try:
            keys = [self._names.lease(key)]
            return ask_for_lease(self._commands, keys, b"release", name)[:1] == b"K"
        except LeaseLost:
            return False

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        commands, name = self._commands, self._names.lease(key)

        def may_go_on() -> bool:
            text = commands.ask(commands.deadline(), name, packed(b"GET", name))
            return lease_of(text).is_turn_of(owner, commands.now())

        end = time.monotonic() + seconds
        if not self._wake_ups.wait(owner.encode(), seconds):
            poll(may_go_on, end - time.monotonic())
