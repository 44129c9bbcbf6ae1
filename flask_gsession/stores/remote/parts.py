"""The parts of a remote store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ...protocol import gsession_pb2 as pb
from ...protocol.messages import to_record
from ..base import Deleted, Record, Replaced
from ..parts import Finding, Page, Tidied
from .channel import Channel
from .requests import delete, done, flag, replace, save

_LOOK_AGAIN = 0.05  # seconds, if the server has no free thread that could wait


class RemoteLeases:
    """The session locks of the remote store."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        save(self._channel, record, expected_version, lease, shorten)

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
        return replace(self._channel, key, record, expected_version, pointer, lease, shorten)

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted:
        return delete(self._channel, key, expected_version, lease)

    def acquire(self, key: str, owner: str, lease_ms: int, max_waiters: int) -> int:
        request = pb.AcquireRequest(
            key=key, owner=owner, lease_ms=lease_ms, max_waiters=max_waiters
        )
        reply = self._channel.call("Acquire", request)
        if not reply.HasField("wait_ms"):
            raise self._channel.incomplete("Acquire")
        return int(reply.wait_ms)

    def extend(self, key: str, owner: str, lease_ms: int) -> bool:
        request = pb.ExtendRequest(key=key, owner=owner, lease_ms=lease_ms)
        return flag(self._channel, "Extend", request)

    def release(self, key: str, owner: str) -> bool:
        return flag(self._channel, "Release", pb.ReleaseRequest(key=key, owner=owner))

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        request = pb.WaitForReleaseRequest(key=key, owner=owner, seconds=seconds)
        reply = self._channel.call("WaitForRelease", request, seconds)
        if not reply.value:
            time.sleep(min(seconds, _LOOK_AGAIN))


class RemoteBlobs:
    """The large values in the remote store."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def write_frame(self, name: str, offset: int, frame: bytes, expires_at: int) -> None:
        request = pb.WriteFrameRequest(
            name=name, offset=offset, frame=bytes(frame), expires_at=expires_at
        )
        done(self._channel, "WriteFrame", request)

    def read_frame(self, name: str, offset: int, size: int) -> bytes | None:
        request = pb.ReadFrameRequest(name=name, offset=offset, size=size)
        reply = self._channel.call("ReadFrame", request)
        found = reply.WhichOneof("found")
        if found is None:
            raise self._channel.incomplete("ReadFrame")
        return reply.frame if found == "frame" else None

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        done(self._channel, "RenewBlobs", pb.BlobsRequest(names=names, at=expires_at))

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        done(self._channel, "DiscardBlobs", pb.BlobsRequest(names=names, at=at))


class RemoteScans:
    """Scans, cleans up and counts the remote store's records."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def scan(self, cursor: str = "", limit: int = 200, begins: str = "") -> Page:
        request = pb.ScanRequest(cursor=cursor, limit=limit, begins=begins)
        reply = self._complete("Scan", request, "cursor")
        records = [to_record(record) for record in reply.records]
        return Page(records, list(reply.unreadable), reply.cursor)

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        request = pb.TidyRequest(cursor=cursor, limit=limit, dry_run=dry_run)
        reply = self._complete("Tidy", request, "cursor")
        return Tidied(dict(reply.found), reply.seen, reply.cursor)

    def count(self) -> int:
        return int(self._complete("Count", pb.CountRequest(), "count").count)

    def _complete(self, name: str, request: Any, field: str) -> Any:
        reply = self._channel.call(name, request)
        if not reply.HasField(field):
            raise self._channel.incomplete(name)
        return reply


class RemoteChecks:
    """The checks of the remote store, and of the connection to it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def check(self) -> list[Finding]:
        hello = self._channel.call("Hello", pb.HelloRequest())
        if not hello.done:
            raise self._channel.incomplete("Hello")
        findings = []
        missing = {"leases", "blobs", "scans", "upkeep", "counts"} - {*hello.parts}
        for part in sorted(missing - self._channel.address.without):
            findings.append(
                Finding(
                    "error",
                    "parts of the remote store",
                    f"it has no {part}",
                    "Add it to the URL: ?without=" + ",".join(sorted(missing)),
                )
            )
        if "checks" in hello.parts:
            reply = self._channel.call("Check", pb.CheckRequest())
            if not reply.done:
                raise self._channel.incomplete("Check")
            findings += [
                Finding(each.severity, each.check, each.found, each.advice)
                for each in reply.findings
            ]
        return findings
