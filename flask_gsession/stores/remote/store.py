"""Sessions in the store behind a ``flask gsession serve``, over gRPC."""

from __future__ import annotations

from ...live.listener import Listener
from ...protocol import gsession_pb2 as pb
from ...protocol.messages import to_message, to_record
from ..base import Deleted, Record, Replaced, Store
from ..support import StoreOptions
from .address import Address
from .changes import RemoteSource
from .channel import Channel
from .parts import RemoteBlobs, RemoteChecks, RemoteLeases, RemoteScans
from .requests import delete, flag, replace, save


class RemoteStore(Store):
    """The store behind the server at ``url``. Each call takes one round trip. Doesn't connect at
    first.

    The server's settings apply: its key prefix, its clock, its SESSION_LOGOUT_REPLICAS. It has the
    parts of the remote store, except those that the URL lists as missing:
    ``?without=leases,blobs``.
    """

    def __init__(self, url: str, options: StoreOptions | None = None) -> None:
        options = options or StoreOptions()
        address = Address.of(url)
        self.channel = channel = Channel(address, options.timeout)
        scans = RemoteScans(channel)
        parts = {
            "leases": RemoteLeases(channel),
            "blobs": RemoteBlobs(channel),
            "scans": scans,
            "upkeep": scans,
            "counts": scans,
            "checks": RemoteChecks(channel),
            "changes": self._listener(channel),
        }
        for name, part in parts.items():
            setattr(self, name, None if name in address.without else part)

    def create(self, record: Record) -> None:
        channel, request = self.channel, pb.CreateRequest(record=to_message(record))
        channel.settle(record.key)
        if not channel.write("Create", request, record.version, record.key).done:
            raise channel.incomplete("Create")

    def load(self, key: str) -> Record | None:
        channel = self.channel
        channel.settle(key)
        heard = self._source.number
        reply = channel.call("Load", pb.LoadRequest(key=key, name_server=heard is not None))
        if heard is not None:
            if not reply.HasField("server"):
                raise channel.incomplete("Load")
            self._source.answered_by(reply.server, heard)
        found = reply.WhichOneof("found")
        if found == "absent":
            return None
        if found != "record" or reply.record.key != key:
            raise channel.incomplete("Load")
        return to_record(reply.record)

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        save(self.channel, record, expected_version, None, shorten)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        request = pb.RenewRequest(record=to_message(record), idle_expires_at=idle_expires_at)
        return flag(self.channel, "Renew", request)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> Replaced:
        return replace(self.channel, key, record, expected_version, pointer, None, shorten)

    def delete(self, key: str, expected_version: int | None = None) -> Deleted:
        return delete(self.channel, key, expected_version, None)

    def close(self) -> None:
        if self.changes is not None:
            self.changes.close()
        self.channel.close()

    def _listener(self, channel: Channel) -> Listener:
        self._source = source = RemoteSource(channel)
        listener = Listener(source)
        source.interval = lambda: listener.interval
        return listener
