"""Reads the records of another package on our server, to take over old sessions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from .base import Record


class Foreign(NamedTuple):
    """A value of another package, as it is stored. ``expires_at``: milliseconds; None: never."""

    value: bytes
    expires_at: int | None

    def __repr__(self) -> str:
        return f"<Foreign value: {len(self.value)} bytes>"


class ForeignValues(Protocol):
    """Values of another package, by their names. Each method may raise ``StoreUnavailable``."""

    def load(self, name: str) -> Foreign | None:
        """The value, or None if there is none or it has expired. One round trip."""

    def delete(self, name: str) -> None:
        """Remove the value, if it is there. One round trip."""

    def names(self, prefix: str) -> Iterator[str]:
        """The names that begin with ``prefix``, in any order, perhaps with duplicates."""


class Together(Protocol):
    """For foreign values on the server that also keeps our records: two steps in one round trip."""

    def load_both(self, name: str, key: str) -> tuple[Foreign | None, Record | None]:
        """The foreign value, and after that our record under ``key``, as ``Store.load`` does."""

    def create_both(self, record: Record, mark: Record) -> Record | None:
        """Create both records unless there is one under the key of ``mark``: then returns that."""
