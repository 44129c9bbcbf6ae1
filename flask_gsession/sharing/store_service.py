"""Offers a store over gRPC to services with the grant ``store``."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from ..errors import StoreUnavailable
from ..protocol import gsession_pb2 as pb
from ..protocol.messages import to_message, to_record
from ..protocol.methods import LONGEST_MESSAGE, methods_of
from ..stores.base import Deleted, Record, Replaced, Store
from ..stores.parts import parts_of
from ..stores.support import Mergeable, because, mergeable, time_left
from .grants import Grant
from .server import Denied, Refused, Service
from .watch import watch
from .writes import Writes

_LONGEST_WAIT = 1.0  # seconds, for the release of a lease
_LARGEST_PAGE = 1000  # records
_MOST_BYTES = LONGEST_MESSAGE // 2  # of the payloads in a page
_TO_SETTLE = 5.0  # seconds, to settle a cancelled write
_TO_BEGIN = 5.0  # seconds until changes of the store must arrive
#: A cut-off edge doesn't know the merge policies of another application.
_OF_OTHERS = Mergeable("a write of another service")


class StoreService(Service):
    """Answers the calls of a ``RemoteStore`` from ``store``.

    ``waiters``: how many threads of the server may wait for the release of a session lock.
    """

    methods = methods_of("Store")

    def __init__(self, store: Store, waiters: int = 8) -> None:
        self._store = store
        self._parts = parts_of(store)
        self._waiters = threading.BoundedSemaphore(waiters)
        self._ending = threading.Event()
        #: distinguishes this server from others behind the same name
        self._number = secrets.randbits(64)
        self._writes = Writes()
        self._calls: dict[str, Callable[[Any], Any]] = {
            name: getattr(self, f"_{_snake(name)}")
            for name, method in self.methods.items()
            if not method.streams
        }

    def answer(self, name: str, request: Any, grant: Grant) -> Any:
        if not grant.store:
            raise Denied("the grant `store`")
        if self._parts.edge is None:
            return self._calls[name](request)
        with mergeable(_OF_OTHERS):
            return self._calls[name](request)

    def answer_stream(self, name: str, requests: Iterator[Any], grant: Grant) -> Iterator[Any]:
        """The replies to a watcher of the store's changes."""
        if not grant.store:
            raise Denied("the grant `store`")
        changes = self._part("changes")
        return watch(changes, requests, _TO_BEGIN, self._ending.is_set, self._number)

    def stop(self) -> None:
        """End the streams."""
        self._ending.set()

    def _part(self, name: str) -> Any:
        part = getattr(self._parts, name)
        if part is None:
            raise Refused(
                grpc.StatusCode.UNIMPLEMENTED,
                f"the store has no {name}: clients need ?without={name} in their URL",
            )
        return part

    def _hello(self, request: Any) -> Any:
        parts = [name for name, part in self._parts._asdict().items() if part is not None]
        confirms = getattr(self._store, "confirms_logouts", False)
        return pb.HelloReply(parts=parts, confirms_logouts=confirms, done=True)

    def _settle(self, request: Any) -> Any:
        if not self._writes.settle(request.versions, time_left(_TO_SETTLE)):
            raise StoreUnavailable("a cancelled write is still running", contention=True)
        return _DONE

    def _create(self, request: Any) -> Any:
        record = to_record(request.record)
        with self._writes.of(record.version):
            self._store.create(record)
        return _DONE

    def _load(self, request: Any) -> Any:
        record = self._store.load(request.key)
        if not request.name_server:
            return _ABSENT if record is None else pb.LoadReply(record=to_message(record))
        if record is None:
            return pb.LoadReply(absent=pb.Absent(), server=self._number)
        return pb.LoadReply(record=to_message(record), server=self._number)

    def _save(self, request: Any) -> Any:
        arguments: list[Any] = [to_record(request.record), request.expected_version]
        store: Any = self._store
        if request.HasField("lease"):
            store = self._part("leases")
            arguments.append(request.lease)
        with self._writes.of(request.record.version):
            store.save(*arguments, **_shorten(request))
        return _DONE

    def _renew(self, request: Any) -> Any:
        renewed = self._store.renew(to_record(request.record), request.idle_expires_at)
        return pb.Flag(value=bool(renewed))

    def _replace(self, request: Any) -> Any:
        pointer: Record | None = to_record(request.pointer) if request.HasField("pointer") else None
        record, version = to_record(request.record), request.expected_version
        arguments: list[Any] = [request.key, record, version, pointer]
        store: Any = self._store
        if request.HasField("lease"):
            store = self._part("leases")
            arguments.append(request.lease)
        with self._writes.of(record.version):
            replaced: Replaced | None = store.replace(*arguments, **_shorten(request))
        return pb.ReplaceReply(unconfirmed="" if replaced is None else replaced.unconfirmed)

    def _delete(self, request: Any) -> Any:
        arguments: list[Any] = [request.key]
        store: Any = self._store
        if request.HasField("expected_version"):
            arguments.append(request.expected_version)
        if request.HasField("lease"):
            store = self._part("leases")
            arguments.append(request.lease)
        by = request.by if request.HasField("by") else None
        with because(request.reason or None, by):
            deleted = store.delete(*arguments)
        if not isinstance(deleted, Deleted):
            return pb.DeleteReply(found=bool(deleted))
        record = None if deleted.record is None else to_message(deleted.record)
        return pb.DeleteReply(found=deleted.found, record=record, unconfirmed=deleted.unconfirmed)

    def _acquire(self, request: Any) -> Any:
        wait = self._part("leases").acquire(
            request.key, request.owner, request.lease_ms, request.max_waiters
        )
        return pb.AcquireReply(wait_ms=wait)

    def _extend(self, request: Any) -> Any:
        extended = self._part("leases").extend(request.key, request.owner, request.lease_ms)
        return pb.Flag(value=bool(extended))

    def _release(self, request: Any) -> Any:
        return pb.Flag(value=bool(self._part("leases").release(request.key, request.owner)))

    def _wait_for_release(self, request: Any) -> Any:
        leases = self._part("leases")
        if not self._waiters.acquire(blocking=False):
            return pb.Flag(value=False)  # no thread is free, so the caller polls instead
        try:
            seconds = min(max(request.seconds, 0.0), _LONGEST_WAIT)
            leases.wait_for_release(request.key, request.owner, seconds)
        finally:
            self._waiters.release()
        return pb.Flag(value=True)

    def _write_frame(self, request: Any) -> Any:
        self._part("blobs").write_frame(
            request.name, request.offset, request.frame, request.expires_at
        )
        return _DONE

    def _read_frame(self, request: Any) -> Any:
        frame = self._part("blobs").read_frame(request.name, request.offset, request.size)
        if frame is None:
            return pb.ReadFrameReply(absent=pb.Absent())
        return pb.ReadFrameReply(frame=bytes(frame))

    def _renew_blobs(self, request: Any) -> Any:
        self._part("blobs").renew_blobs(list(request.names), request.at)
        return _DONE

    def _discard_blobs(self, request: Any) -> Any:
        self._part("blobs").discard_blobs(list(request.names), request.at)
        return _DONE

    def _scan(self, request: Any) -> Any:
        limit = max(1, min(request.limit, _LARGEST_PAGE))
        scan = self._part("scans").scan
        page = scan(request.cursor, limit, request.begins)
        while limit > 1 and (size := sum(len(each.payload) for each in page.records)) > _MOST_BYTES:
            limit = max(1, limit * _MOST_BYTES // (2 * size))
            page = scan(request.cursor, limit, request.begins)
        records = [to_message(record) for record in page.records]
        return pb.ScanReply(records=records, unreadable=page.unreadable, cursor=page.cursor)

    def _tidy(self, request: Any) -> Any:
        limit = max(1, request.limit)
        tidied = self._part("upkeep").tidy(request.cursor, limit, dry_run=request.dry_run)
        return pb.TidyReply(found=tidied.found, seen=tidied.seen, cursor=tidied.cursor)

    def _count(self, request: Any) -> Any:
        return pb.CountReply(count=self._part("counts").count())

    def _check(self, request: Any) -> Any:
        findings = [pb.Finding(**found._asdict()) for found in self._part("checks").check()]
        return pb.CheckReply(findings=findings, done=True)


_DONE = pb.Done(done=True)
_ABSENT = pb.LoadReply(absent=pb.Absent())


def _shorten(request: Any) -> dict[str, bool]:
    """Passes ``shorten`` on only if it is set, since third-party stores may not know it."""
    return {"shorten": True} if request.shorten else {}


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
