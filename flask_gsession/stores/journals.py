"""The part ``journal`` of a store: see ``parts``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .base import Deleted, Record, Replaced


class Entries(NamedTuple):
    """A part of a journal: entries with their numbers, in order. ``first``: the oldest kept one.

    Numbers have no gaps, so a reader at number 7 has missed entries if ``first`` is beyond 8.
    """

    entries: list[tuple[int, bytes]]
    first: int

    def __repr__(self) -> str:
        return f"<Entries: {len(self.entries)}>"  # they name users


class JournalFigures(NamedTuple):
    """The state of a journal: its ``first`` and ``last`` number (both 0: empty).

    ``due``: about how many expired sessions wait for their entry, and ``oldest_due`` the time in
    milliseconds at which the first of them was due; 0 if none waits. ``consumers``: the number
    that each has acknowledged.
    """

    first: int
    last: int
    due: int
    oldest_due: int
    consumers: dict[str, int]


class Journal(Protocol):
    """For a store that keeps a journal with its sessions: their ends are never lost.

    Entries are bytes of the caller's, opaque to the store. The writes below do what the verbs do,
    for sessions only, and add the entries to the journal in the same step. A store that needs two
    steps makes sure that a crash between them loses no entry of an end: see ``recover``.

    A session that was written here isn't removed when it expires, by the store or its server: it
    stays until ``expire`` has added its last entry. ``load`` may return it, as it always may.
    """

    def begin(self, most: int) -> None:
        """Called once, before anything else: keep about ``most`` entries, and expired sessions."""

    def create(self, record: Record, entries: Sequence[bytes]) -> None:
        """As ``Store.create``, but raises ``KeyTaken`` for an expired record as well."""

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        """As ``Store.save`` or ``Leases.save``, which add no entry."""

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        """As ``Store.renew``."""

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
        """As ``Store.replace`` or ``Leases.replace``."""

    def end(
        self, key: str, expected_version: int, entries: Sequence[bytes], lease: str | None = None
    ) -> Deleted | bool:
        """As ``Store.delete`` of a version, or ``Leases.delete``."""

    def due(self, limit: int) -> list[Record]:
        """Up to ``limit`` sessions that have expired, in about the order of their expiry."""

    def expire(self, expired: Sequence[tuple[Record, bytes]]) -> int:
        """Add an entry for each of these expired records, and remove it; how many that were.

        Leaves out those that were removed or written since they were loaded.
        """

    def recover(self) -> int:
        """Complete what crashed processes left half done; how many entries that added."""

    def append(self, entries: Sequence[bytes], key: str | None = None) -> None:
        """Add entries that belong to no write; ``key``: of the session that they are about."""

    def read(self, after: int, limit: int) -> Entries:
        """Up to ``limit`` entries behind the number ``after``. Changes nothing."""

    def acknowledge(self, consumer: str, number: int) -> None:
        """This consumer has everything up to ``number``. Never moves back."""

    def acknowledged(self, consumer: str) -> int | None:
        """The number that this consumer acknowledged last; None for a new one."""

    def forget(self, consumer: str) -> bool:
        """Remove a consumer; whether there was one."""

    def figures(self) -> JournalFigures:
        """The state of the journal."""
