"""Base classes for wrappers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..base import Deleted, Record, Replaced, Store
from ..parts import Blobs, Bulk, Leases, NearFigures, NearReads, NearRecord, parts_of


class Wrapper(Store):
    """A store around ``store`` that forwards all calls: override the methods you want to change.

    It has the parts of ``store``. Writes under a session lock go to the part ``leases``, and large
    values to ``blobs``. If your wrapper must see them, wrap the part too, as ``CallWrapper`` does.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        parts = parts_of(store)
        self.leases, self.blobs, self.scans = parts.leases, parts.blobs, parts.scans
        self.upkeep, self.counts, self.checks = parts.upkeep, parts.counts, parts.checks
        self.changes, self.near, self.bulk = parts.changes, parts.near, parts.bulk
        self.edge, self.journal = parts.edge, parts.journal

    def create(self, record: Record) -> None:
        self.store.create(record)

    def load(self, key: str) -> Record | None:
        return self.store.load(key)

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        _may_shorten(self.store.save, shorten)(record, expected_version)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        return self.store.renew(record, idle_expires_at)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> Replaced | None:
        replace = _may_shorten(self.store.replace, shorten)
        return replace(key, record, expected_version, pointer)  # type: ignore[no-any-return]

    def delete(self, key: str, expected_version: int | None = None) -> Deleted | bool:
        return self.store.delete(key, expected_version)

    def close(self) -> None:
        self.store.close()


class LeasesWrapper(Leases):
    """The part ``leases`` around another one: forwards the calls that only concern the lock."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        return self._leases.acquire(key, owner, lease_ms, max_waiters)

    def extend(self, key: str, owner: str, lease_ms: int) -> bool:
        return self._leases.extend(key, owner, lease_ms)

    def release(self, key: str, owner: str) -> bool:
        return self._leases.release(key, owner)

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        self._leases.wait_for_release(key, owner, seconds)


def _may_shorten(method: Callable[..., Any], shorten: bool) -> Callable[..., Any]:
    return partial(method, shorten=True) if shorten else method


#: Makes a call: the operation's name, the method of the wrapped store, and its arguments.
CallMaker = Callable[..., Any]


def innermost(store: Store) -> Store:
    """The store inside all wrappers. Don't write to it directly, past the wrappers.

    An edge counts as a store, not as a wrapper, since its centre is another server.
    """
    while isinstance(store, Wrapper):
        edge: object = store.edge
        if edge is store:
            break
        store = store.store
    return store


class CallWrapper(Wrapper):
    """A store around ``store`` that makes each call by ``call(operation, method, *arguments)``.

    This includes all calls of a request: the verbs except ``close``, and the parts ``leases``
    (except ``wait_for_release``), ``blobs``, ``bulk`` (one ``delete`` for all keys) and ``near``
    (except ``peek``, which makes no call).
    """

    def __init__(self, store: Store, call: CallMaker) -> None:
        super().__init__(store)
        self.call = call
        if self.leases is not None:
            self.leases = _CalledLeases(self.leases, call)
        if self.blobs is not None:
            self.blobs = _CalledBlobs(self.blobs, call)
        if self.near is not None:
            self.near = _CalledNear(self.near, call)
        if self.bulk is not None:
            self.bulk = _CalledBulk(self.bulk, call)

    def create(self, record: Record) -> None:
        self.call("create", self.store.create, record)

    def load(self, key: str) -> Record | None:
        return self.call("load", self.store.load, key)  # type: ignore[no-any-return]

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        self.call("save", _may_shorten(self.store.save, shorten), record, expected_version)

    def renew(self, record: Record, idle_expires_at: int) -> Any:
        return self.call("renew", self.store.renew, record, idle_expires_at)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> Any:
        replace = _may_shorten(self.store.replace, shorten)
        return self.call("replace", replace, key, record, expected_version, pointer)

    def delete(self, key: str, expected_version: int | None = None) -> Any:
        if expected_version is None:
            return self.call("delete", self.store.delete, key)
        return self.call("delete", self.store.delete, key, expected_version)


class _CalledLeases(Leases):
    def __init__(self, leases: Leases, call: CallMaker) -> None:
        self._leases = leases
        self._call = call

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        save = _may_shorten(self._leases.save, shorten)
        self._call("save", save, record, expected_version, lease)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str,
        *,
        shorten: bool = False,
    ) -> Any:
        replace = _may_shorten(self._leases.replace, shorten)
        return self._call("replace", replace, key, record, expected_version, pointer, lease)

    def delete(self, key: str, expected_version: int, lease: str) -> Any:
        return self._call("delete", self._leases.delete, key, expected_version, lease)

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> Any:
        return self._call("acquire", self._leases.acquire, key, owner, lease_ms, max_waiters)

    def extend(self, key: str, owner: str, lease_ms: int) -> Any:
        return self._call("extend", self._leases.extend, key, owner, lease_ms)

    def release(self, key: str, owner: str) -> Any:
        return self._call("release", self._leases.release, key, owner)

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        self._leases.wait_for_release(key, owner, seconds)


class _CalledBulk(Bulk):
    def __init__(self, bulk: Bulk, call: CallMaker) -> None:
        self._bulk = bulk
        self._call = call

    def delete_many(self, keys: Sequence[str]) -> Any:
        return self._call("delete", self._bulk.delete_many, keys)


class _CalledNear(NearReads):
    def __init__(self, near: NearReads, call: CallMaker) -> None:
        self.bound = near.bound
        self._near = near
        self._call = call

    def peek(self, key: str, version: int | None = None) -> NearRecord | None:
        return self._near.peek(key, version)

    def load_near(self, key: str) -> Record | None:
        return self._call("load", self._near.load_near, key)  # type: ignore[no-any-return]

    def figures(self) -> NearFigures:
        return self._near.figures()


class _CalledBlobs(Blobs):
    def __init__(self, blobs: Blobs, call: CallMaker) -> None:
        self._blobs = blobs
        self._call = call

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        self._call("write_frame", self._blobs.write_frame, name, offset, frame, expires_at)

    def read_frame(self, name: str, offset: int, size: int) -> Any:
        return self._call("read_frame", self._blobs.read_frame, name, offset, size)

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        self._call("renew_blobs", self._blobs.renew_blobs, names, expires_at)

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        self._call("discard_blobs", self._blobs.discard_blobs, names, at)
