"""The parts of an edge store that see its sessions: leases, reads from the cache, and bulk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..base import OTHER_ENDS, Deleted, Record, Replaced
from ..parts import Bulk, Leases, NearFigures, NearReads, NearRecord
from ..wrappers.wrapper import LeasesWrapper

if TYPE_CHECKING:
    from .store import EdgeStore

_LOCK = "a lock"


class EdgeLeases(LeasesWrapper):
    """Leases live at the centre, so calls that need one fail without it."""

    def __init__(self, store: EdgeStore, leases: Leases) -> None:
        super().__init__(leases)
        self._store = store

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        self._store.check_settled(record.key, _LOCK)
        began = self._store.copy.time()
        more = {"shorten": True} if shorten else {}
        self._leases.save(record, expected_version, lease, **more)
        self._store.note_copied(record, began)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str,
        *,
        shorten: bool = False,
    ) -> Replaced | None:
        ask = partial(self._leases.replace, shorten=True) if shorten else self._leases.replace
        return self._store.replace_by(ask, key, record, expected_version, pointer, lease)

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted | bool:
        return self._store.delete_by(self._leases.delete, key, expected_version, lease)

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        self._store.check_settled(key, _LOCK)
        return self._leases.acquire(key, owner, lease_ms, max_waiters)


class EdgeNear(NearReads):
    """Reads that this process's listener has proved fresh, unless the node has newer changes."""

    def __init__(self, store: EdgeStore, near: NearReads) -> None:
        self.bound = near.bound
        self._store = store
        self._near = near
        self._bound_ms = int(near.bound * 1000)
        self._confirm_after = store.confirm_after

    def peek(self, key: str, version: int | None = None) -> NearRecord | None:
        copy = self._store.copy
        confirmed_at = copy.plain_since(key)
        if confirmed_at is None:
            return None  # no copy yet, or changed or ended here
        record = self._near.peek(key, version)
        if record is not None:
            proven = copy.time() - self._bound_ms
            if proven - confirmed_at > self._confirm_after:
                copy.confirmed(record, proven)
        return record

    def load_near(self, key: str) -> Record | None:
        return self._store.load_by(self._near.load_near, key)

    def figures(self) -> NearFigures:
        return self._near.figures()


class EdgeBulk(Bulk):
    """Deletes in bulk at the centre, except sessions with queued changes here."""

    def __init__(self, store: EdgeStore, bulk: Bulk) -> None:
        self._store = store
        self._bulk = bulk

    def delete_many(self, keys: Sequence[str]) -> list[Deleted]:
        store = self._store
        plain = not store.cut_off and all(
            key[-1:] not in OTHER_ENDS and self._is_plain(key) for key in keys
        )
        if not plain:
            return [_deleted(store.delete(key)) for key in keys]
        deleted = self._bulk.delete_many(keys)
        for key, ended in zip(keys, deleted, strict=True):
            if ended:
                store.copy.ended(key, ended.record)
        return deleted

    def _is_plain(self, key: str) -> bool:
        found = self._store.copy.state_of(key)
        return found is None or not found.is_queued


def _deleted(answer: Any) -> Deleted:
    return answer if isinstance(answer, Deleted) else Deleted(bool(answer))
