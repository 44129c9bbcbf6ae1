"""The messages of an application to the open pages of a user: a small record for each user."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import urlsafe_b64encode
from functools import partial
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.msgpack import Decoder, Encoder

from ..errors import StoreUnavailable, UnreadableRecord
from ..repository.races import tries, write
from ..repository.repository import Repository
from ..stores.base import KEY_LENGTH, Record, unexpired
from ..values.damage import DECODING_ERRORS

#: Limits for each message as JSON, for the messages of one user, and for their age.
MOST_BYTES, MOST_MESSAGES, LIFE = 1024, 32, 60_000  # bytes, messages, milliseconds
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Message(Struct, array_like=True, frozen=True):
    """``id`` grows with each message of a user, and is close to its time in milliseconds."""

    id: int
    name: str
    data: bytes  # JSON

    def __repr__(self) -> str:
        return f"<Message {self.id} {self.name!r}: {len(self.data)} bytes>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("id", self.id), ("name", self.name)]


class _Messages(Struct, array_like=True):
    format: Annotated[int, Meta(ge=1, le=1)]
    messages: list[Message]


_encode = Encoder().encode
_decode = Decoder(_Messages).decode


def messages_key(user_id: str) -> str:
    """The key of the user's messages. No session key ends with its last character."""
    digest = hashlib.sha256(b"flask-gsession messages " + user_id.encode()).digest()
    return urlsafe_b64encode(digest).decode()[: KEY_LENGTH - 1] + "_"


def checked_message(name: object, data: object) -> tuple[str, bytes]:
    """The name, and the data as JSON. Raises ``ValueError``, which doesn't show the data."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"The name of a message is {ascii(name)[:80]}; allowed: 1 to 64 characters of A-Z a-z "
            "0-9 _ . : -"
        )
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            f"The data of the message {name!r} can't be sent as JSON: use dicts, lists, text, "
            "finite numbers, True, False and None"
        ) from None
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"The data of the message {name!r} has {len(text)} bytes as JSON; at most {MOST_BYTES} "
            "are allowed. Send a hint, and let the page load the data"
        )
    return str(name), text.encode()


def read_messages(repository: Repository, record: Record | None) -> tuple[Message, ...]:
    """The unexpired messages in a record. A damaged record has none."""
    if record is None or repository.now() >= record.idle_expires_at:
        return ()
    try:
        content = repository.other_records.read(record)
        messages = _decode(content).messages
    except (UnreadableRecord, *DECODING_ERRORS):
        return ()
    since = repository.now() - LIFE
    return tuple(message for message in messages if message.id > since)


def add_message(repository: Repository, user_id: str, name: str, data: bytes) -> None:
    """Append a message to the user's messages. Two round trips, two more for each lost race.

    Raises ``StoreUnavailable``.
    """
    key, store = messages_key(user_id), repository.store
    sent: set[int] = set()

    def prepare() -> tuple[int | None, Record] | None:
        try:
            there = unexpired(store, key, repository.now())
        except UnreadableRecord:
            store.delete(key)
            there = None
        if there is not None and there.version in sent:
            return None
        kept = read_messages(repository, there)[-(MOST_MESSAGES - 1) :]
        now = repository.now()
        number = max([now, *(message.id + 1 for message in kept)])
        content = _encode(_Messages(1, [*kept, Message(number, name, data)]))
        record = repository.other_records.draft(key, content, max(now, number) + LIFE)
        sent.add(record.version)
        return None if there is None else there.version, record

    def send(step: tuple[int | None, Record], _: int) -> None:
        version, record = step
        if version is None:
            store.create(record)
        else:
            store.save(record, version)

    write(prepare, send, partial(tries, repository.settings.store_timeout, _lost, patient=True))


def _lost() -> StoreUnavailable:
    return StoreUnavailable("too many simultaneous messages for one user", contention=True)
