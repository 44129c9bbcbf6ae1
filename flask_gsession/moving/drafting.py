"""Drafts a new session from the contents of an old one."""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from ..errors import SessionTooLarge
from ..repository.repository import Loaded, Repository
from ..tokens import session_key
from ..values.marks import is_marked
from ..values.payload import Body, Origin
from ..values.references import Reference
from .entering import owner_of
from .mark import seal_origin, token_of
from .source import Contents


def new_key(
    repository: Repository, label: str, name: str, nonce: bytes, expires_at: int | None
) -> tuple[str, Origin]:
    """The key of a new session, and its origin."""
    secret = repository.live.secret_keys()[0]
    token = token_of(secret, label, name, nonce)
    return session_key(token), seal_origin(secret, label, name, nonce, expires_at)


def draft_session(
    repository: Repository, key: str, contents: Contents, origin: Origin, knows_users: bool
) -> tuple[Loaded, tuple[str, ...]]:
    """The new session, and the keys that were left out. Writes large values.

    If it is too large, values are left out, the largest first.
    """
    values, dropped = dict(contents.values), list(contents.dropped)
    written: dict[tuple[int, bytes], Reference] = {}
    while True:
        body = Body(values, contents.lifetime, any(map(is_marked, values.values())), origin=origin)
        try:
            if repository.large.is_any_too_long(values, values):
                end = repository.expiry.end_of_blobs(body)
                referring = replace(body, has_large=True)
                stored = repository.large.write(referring, partial(int, end), written, {})
                body = replace(referring, values=stored, has_large=bool(written))
            if knows_users:
                body = replace(body, owner=owner_of(repository, body, contents))
            record = repository.records.draft_imported(key, body, contents.began, contents.ends)
        except SessionTooLarge:
            largest = max(values, key=lambda name: len(values[name]))
            dropped.append(ascii(largest)[:60])
            del values[largest]
            continue
        if contents.idle_ends is not None:
            idle = min(contents.idle_ends, record.idle_expires_at)
            record = record._replace(idle_expires_at=idle)
        return Loaded(record, body), tuple(dropped)
