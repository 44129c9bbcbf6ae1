"""The sweep moves expired sessions into the journal. One process at a time runs it."""

from __future__ import annotations

import time
from contextlib import suppress

from ..errors import Gone, KeyTaken, Stale, StoreError, StoreUnavailable
from ..stores.base import KEY_LENGTH, Clock, Record, milliseconds, new_version
from .store import JournalingStore

#: The key of the sweeping process's ticket. It can't collide with a session key.
SWEEP_KEY = "flask-gsession-journal".ljust(KEY_LENGTH, "-")
_LEASE = 30_000  # milliseconds after which another process takes over from a dead one
_YEAR = 366 * 86_400_000  # milliseconds
_INTERVAL = 5.0  # seconds between two checks in one process
_STEPS = 20  # per sweep; then consumers continue


class Sweeper:
    """Sweeps when a sweep is due. Any number of processes may call it; one at a time sweeps."""

    def __init__(self, store: JournalingStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._next = 0.0

    def run_if_due(self) -> int:
        """Returns how many expired sessions were found. If there were any, more may be waiting."""
        if time.monotonic() < self._next:
            return 0
        found = self.run()
        if not found:
            self._next = time.monotonic() + _INTERVAL
        return found

    def run(self) -> int:
        """Sweep now, unless another process is sweeping. Raises ``StoreUnavailable``."""
        try:
            ticket = self._take_ticket()
        except KeyTaken:
            return 0
        swept = 0
        try:
            swept += self._store.journal.recover()
            for _ in range(_STEPS):
                found = self._store.sweep()
                swept += found
                if not found:
                    break
                if ticket is not None:
                    ticket = self._renewed(ticket)
        except Gone:  # this process was paused, and another one took over
            return swept
        finally:
            if ticket is not None:
                with suppress(StoreError, Stale, Gone):
                    self._store.delete(SWEEP_KEY, ticket.version)
        return swept

    def _take_ticket(self) -> Record | None:
        """Raises ``KeyTaken`` if another process has the ticket. None if the store refuses it."""
        now = milliseconds(self._clock)
        ticket = Record(SWEEP_KEY, new_version(), now, now + _LEASE, now + _YEAR, b"sweep")
        try:
            self._store.create(ticket)
        except StoreUnavailable:
            # A full Redis refuses writes that need memory. The sweep frees some, and two sweeps at
            # once only do the same work twice. If the store is down, the next step raises.
            return None
        return ticket

    def _renewed(self, ticket: Record) -> Record:
        now = milliseconds(self._clock)
        if ticket.idle_expires_at - now > _LEASE * 2 // 3:
            return ticket
        if not self._store.renew(ticket, now + _LEASE):
            raise Gone
        return ticket._replace(idle_expires_at=now + _LEASE)
