"""Requests that both the store and its leases make."""

from __future__ import annotations

from typing import Any

from ...protocol import gsession_pb2 as pb
from ...protocol.messages import to_message, to_record
from ..base import Deleted, Record, Replaced
from ..support import reason_of_end
from .channel import Channel


def done(channel: Channel, name: str, request: Any) -> None:
    """Make a call that returns nothing."""
    if not channel.call(name, request).done:
        raise channel.incomplete(name)


def flag(channel: Channel, name: str, request: Any) -> bool:
    """Make a call that returns a bool."""
    reply = channel.call(name, request)
    if not reply.HasField("value"):
        raise channel.incomplete(name)
    return bool(reply.value)


def save(
    channel: Channel, record: Record, expected_version: int, lease: str | None, shorten: bool
) -> None:
    request = pb.SaveRequest(
        record=to_message(record),
        expected_version=expected_version,
        lease=lease,
        shorten=shorten,
    )
    channel.settle(record.key)
    if not channel.write("Save", request, record.version, record.key).done:
        raise channel.incomplete("Save")


def replace(
    channel: Channel,
    key: str,
    record: Record,
    expected_version: int,
    pointer: Record | None,
    lease: str | None,
    shorten: bool,
) -> Replaced:
    request = pb.ReplaceRequest(
        key=key,
        record=to_message(record),
        expected_version=expected_version,
        pointer=None if pointer is None else to_message(pointer),
        lease=lease,
        shorten=shorten,
    )
    channel.settle(key, record.key)
    reply = channel.write("Replace", request, record.version, key, record.key)
    if not reply.HasField("unconfirmed"):
        raise channel.incomplete("Replace")
    return Replaced(reply.unconfirmed)


def delete(channel: Channel, key: str, expected_version: int | None, lease: str | None) -> Deleted:
    request = pb.DeleteRequest(key=key, expected_version=expected_version, lease=lease)
    why = reason_of_end()
    if not why.is_own:
        request.MergeFrom(pb.DeleteRequest(reason=why.reason, by=why.by))
    channel.settle(key)
    reply = channel.call("Delete", request)
    if not reply.HasField("found"):
        raise channel.incomplete("Delete")
    record = to_record(reply.record) if reply.HasField("record") else None
    return Deleted(reply.found, record, reply.unconfirmed)
