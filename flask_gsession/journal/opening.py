"""Puts the journal around the store of an application."""

from __future__ import annotations

from ..errors import SettingError
from ..repository.repository import Repository
from ..stores.base import Clock, Record, Store
from ..stores.parts import parts_of
from .store import NOBODY, JournalingStore, Subject


def with_journal(store: Store, most: int, clock: Clock) -> JournalingStore:
    """``store`` with its journal. Raises ``SettingError`` if it can't keep one."""
    parts = parts_of(store)
    if parts.journal is None:
        raise SettingError(
            f"SESSION_JOURNAL can't be used with this SESSION_STORE, a {type(store).__name__}: "
            f"it keeps no journal. {_advice(store)}"
        )
    return JournalingStore(store, parts.journal, most, clock)


def _advice(store: Store) -> str:
    if parts_of(store).edge is not None:
        return "Of edge nodes the centre keeps it: set SESSION_JOURNAL on all others, and not here"
    if type(store).__name__ == "RemoteStore":
        return (
            "The application behind flask gsession serve keeps it: set SESSION_JOURNAL there, "
            "and not here"
        )
    return "It works with Redis, MongoDB, SQLite and memory, and a store with the part journal"


def describe_by(store: JournalingStore, repository: Repository) -> None:
    """Let entries of ``store`` say whose the sessions of ``repository`` are."""

    def describe(record: Record) -> Subject:
        owner = repository.owner_of(record)
        if owner is None:
            return NOBODY
        return Subject(owner.user_id, owner.device_id, owner.predecessor)

    store.use(describe)
    repository.journaling = store
