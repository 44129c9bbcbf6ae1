"""Converts records to messages and back."""

from __future__ import annotations

from ..errors import UnreadableRecord
from ..stores.base import Record
from . import gsession_pb2 as pb


def to_message(record: Record) -> pb.Record:
    """The message of a record. Raises ``UnreadableRecord`` if a time exceeds 64 bits."""
    try:
        return pb.Record(
            key=record.key,
            version=record.version,
            created_at=record.created_at,
            idle_expires_at=record.idle_expires_at,
            absolute_expires_at=record.absolute_expires_at,
            payload=record.payload,
            successor=record.successor,
        )
    except ValueError:
        raise UnreadableRecord("corrupt", "a number or a text is out of range") from None


def to_record(message: pb.Record) -> Record:
    """The record of a message."""
    return Record(
        message.key,
        message.version,
        message.created_at,
        message.idle_expires_at,
        message.absolute_expires_at,
        message.payload,
        message.successor if message.HasField("successor") else None,
    )
