"""Ends sessions by their keys: in the store, in their user's roster, with their large values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..errors import CutOff, LogoutUnconfirmed, UnreadableRecord
from ..events import SessionUnbound
from ..stores.base import Deleted, Record
from ..stores.parts import parts_of
from ..values.payload import Body, Owner
from .imports import Imports
from .large_values import names_of
from .repository import Repository

_BATCH = 100  # sessions deleted in one round trip


def delete_session(
    repository: Repository,
    key: str,
    on_debug: Callable[[int], None] | None = None,
    *,
    owner: Owner | None = None,
    leave_roster: bool = True,
    signs_out: bool = True,
    body: Body | None = None,
) -> bool:
    """End the session under ``key``, following pointers, and release its large values.

    ``on_debug``: called with the end of debugging, if the session is being debugged. ``owner``: the
    user, if you know it, for a store that doesn't return the deleted record. ``leave_roster``:
    whether to remove the session from its user's roster. ``signs_out``: whether to emit
    ``SessionUnbound`` when it leaves the roster. ``body``: the session's contents, if you know
    them. Returns whether there was a session. Raises as ``Store.delete`` does.

    One round trip, one more if it had large values, two more if it leaves a roster. While old
    sessions are being imported, this deletes the old record first: one more round trip, or two
    without ``body``.
    """
    if repository.imports is not None:
        _end_old(repository, repository.imports, key, body)
    deleted = repository.store.delete(key)
    return _finish(repository, key, deleted, on_debug, owner, leave_roster, signs_out)


def delete_sessions(repository: Repository, keys: Sequence[str]) -> Iterator[Callable[[], bool]]:
    """End these sessions in order, without removing them from rosters.

    Each yielded function returns or raises as ``delete_session`` does. A store with the part
    ``bulk`` takes one round trip for up to a hundred sessions.
    """
    bulk = None if repository.imports is not None else parts_of(repository.store).bulk
    if bulk is None or len(keys) < 2:
        for key in keys:
            yield partial(delete_session, repository, key, leave_roster=False)
        return
    for start in range(0, len(keys), _BATCH):
        batch = keys[start : start + _BATCH]
        for key, deleted in zip(batch, bulk.delete_many(batch), strict=True):
            yield partial(_finish, repository, key, deleted, leave_roster=False, signs_out=False)


def _finish(
    repository: Repository,
    key: str,
    deleted: Deleted | bool,
    on_debug: Callable[[int], None] | None = None,
    owner: Owner | None = None,
    leave_roster: bool = True,
    signs_out: bool = True,
) -> bool:
    """Clean up after a session that was deleted."""
    if not isinstance(deleted, Deleted):
        deleted = Deleted(deleted)
    ended = key
    if deleted.record is not None:
        ended = deleted.record.key
        body = _release_values(repository, deleted.record)
        owner = None if body is None else body.owner
        if on_debug is not None and body is not None and body.debug_until is not None:
            on_debug(body.debug_until)
    if leave_roster and owner is not None and deleted.found:
        repository.rosters.leave(owner, key, ended)
        if signs_out:
            repository.events.emit(SessionUnbound, owner.user_id, owner.device_id)
    if deleted.unconfirmed:
        raise LogoutUnconfirmed(deleted.unconfirmed)
    return deleted.found


def _end_old(repository: Repository, imports: Imports, key: str, body: Body | None) -> None:
    """Remove the old record that the session under ``key`` was imported from."""
    if body is None:
        try:
            loaded = repository.find(key)
        except (UnreadableRecord, CutOff):  # an edge removes it when it settles
            return
        if loaded is None:
            return
        body = loaded.body
    imports.end_old(repository, body)


def _release_values(repository: Repository, record: Record) -> Body | None:
    """Release the large values of an ended record. Returns its contents, if readable.

    A replica may not have the end of the session yet. If it takes over, it still has the session,
    but lacks the large values if they are stored elsewhere.
    """
    body = repository.records.contents(record)
    if body is not None and (body.has_large or body.joins):
        repository.large.discard(names_of(body), 0)
    return body
