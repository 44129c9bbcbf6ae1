"""The part ``journal`` of a store: see ``parts``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .base import Deleted, Record, Replaced


class Entries(NamedTuple):
    """A section of a journal: entries with their numbers, in order. ``first``: the oldest number
    kept.

    Numbers have no gaps, so a reader at number 7 has missed entries if ``first`` is beyond 8.
    """

    entries: list[tuple[int, bytes]]
    first: int

    def __repr__(self) -> str:
        return f"<Entries: {len(self.entries)}>"  # they name users


class JournalFigures(NamedTuple):
    """The state of a journal: its ``first`` and ``last`` number, both 0 if it is empty.

    ``due``: about how many expired sessions wait for their entry. ``oldest_due``: when the first of
    them expired, in milliseconds; 0 if none waits. ``consumers``: the number that each one has
    acknowledged.
    """

    first: int
    last: int
    due: int
    oldest_due: int
    consumers: dict[str, int]


class Journal(Protocol):
    """For a store that keeps a journal with its sessions, so that no end of a session is lost.

    Entries are opaque bytes. The writes below do the same as the verbs, for sessions only, and add
    the entries to the journal in the same step. A store that needs two steps ensures that a crash
    between them loses no entry of an end: see ``recover``.

    When a session that was written here expires, neither the store nor its server removes it: it
    stays until ``expire`` has added its last entry. As always, ``load`` may return it.
    """

    def begin(self, most: int) -> None:
        """Keep about ``most`` entries, and keep expired sessions. Called once, first."""

    def create(self, record: Record, entries: Sequence[bytes]) -> None:
        """Like ``Store.create``, but raises ``KeyTaken`` for an expired record as well."""

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        """Like ``Store.save`` or ``Leases.save``. Adds no entry."""

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        """Like ``Store.renew``."""

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
    ) -> Replaced | None:
        """Like ``Store.replace`` or ``Leases.replace``."""

    def end(
        self, key: str, expected_version: int, entries: Sequence[bytes], lease: str | None = None
    ) -> Deleted | bool:
        """Like ``Store.delete`` with a version, or ``Leases.delete``."""

    def due(self, limit: int) -> list[Record]:
        """Up to ``limit`` sessions that have expired, in about the order of their expiry."""

    def expire(self, expired: Sequence[tuple[Record, bytes]]) -> int:
        """Add an entry for each of these expired records, and remove the record. Returns how many.

        Leaves out records that were removed or written since they were loaded.
        """

    def recover(self) -> int:
        """Complete the writes of crashed processes. Returns how many entries that added."""

    def append(self, entries: Sequence[bytes], key: str | None = None) -> None:
        """Add entries that belong to no write. ``key``: the session that they are about."""

    def read(self, after: int, limit: int) -> Entries:
        """Up to ``limit`` entries after the number ``after``. Changes nothing."""

    def acknowledge(self, consumer: str, number: int) -> None:
        """Note that this consumer has everything up to ``number``. Never moves back."""

    def acknowledged(self, consumer: str) -> int | None:
        """The number that this consumer acknowledged last; None for a new one."""

    def forget(self, consumer: str) -> bool:
        """Remove a consumer. Returns whether there was one."""

    def figures(self) -> JournalFigures:
        """The state of the journal."""
