"""The calls of ``gsession.proto``, in the form that gRPC needs."""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from . import gsession_pb2 as pb

#: Enough for a page of a scan, or for the largest session that the settings allow.
LONGEST_MESSAGE = 64 * 1024 * 1024


class Method(NamedTuple):
    """One call: its path on the wire, and the classes of its two messages.

    ``streams``: whether both sides stream messages.
    """

    path: str
    request: type[Message]
    reply: type[Message]
    streams: bool = False


def methods_of(service: str) -> dict[str, Method]:
    """The calls of a service in ``gsession.proto``, by name."""
    return describe(pb.DESCRIPTOR.services_by_name[service])


def describe(described: Any) -> dict[str, Method]:
    """The calls of a service that protobuf describes, by name."""
    return {
        method.name: Method(
            f"/{described.full_name}/{method.name}",
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            method.client_streaming,
        )
        for method in described.methods
    }


def is_understood(message: Message) -> bool:
    """Whether a received message has only fields that this version knows.

    An unknown field may request different behaviour, so ignoring it would be wrong.
    """
    size = message.ByteSize()
    message.DiscardUnknownFields()
    return message.ByteSize() == size
