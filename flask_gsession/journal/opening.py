"""Puts the journal around the store of an application."""

from __future__ import annotations

from ..errors import SettingError
from ..repository.repository import Repository
from ..stores.base import Clock, Record, Store
from ..stores.parts import parts_of
from .store import NOBODY, JournalingStore, Subject


def with_journal(store: Store, most: int, clock: Clock) -> JournalingStore:
    """``store`` with a journal. Raises ``SettingError`` if it can't keep one."""
    parts = parts_of(store)
    if parts.journal is None:
        raise SettingError(
            f"SESSION_JOURNAL can't be used with this SESSION_STORE, a {type(store).__name__}: "
            f"it keeps no journal. {_advice(store)}"
        )
    return JournalingStore(store, parts.journal, most, clock)


def _advice(store: Store) -> str:
    if parts_of(store).edge is not None:
        return (
            "The centre keeps the journal of edge nodes: set SESSION_JOURNAL where flask gsession "
            "serve runs, and make that the remote of the nodes"
        )
    if type(store).__name__ == "RemoteStore":
        return (
            "The application behind flask gsession serve keeps it: set SESSION_JOURNAL there "
            "instead"
        )
    return "It works with Redis, MongoDB, SQLite and memory, or your own store with a journal part"


def describe_by(store: JournalingStore, repository: Repository) -> None:
    """Let entries of ``store`` name the users of the sessions in ``repository``."""

    def describe(record: Record) -> Subject:
        body = repository.records.contents(record)
        owner = None if body is None else body.owner
        if owner is None:
            return NOBODY
        return Subject(owner.user_id, owner.device_id, owner.predecessor)

    store.use(describe)
    repository.journaling = store
