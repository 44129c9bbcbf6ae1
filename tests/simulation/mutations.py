"""Ways to break the code, each of which the simulation must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from msgspec import structs

from flask_gsession.errors import Gone
from flask_gsession.repository.expiry import Expiry
from flask_gsession.repository.records import SessionRecords
from flask_gsession.repository.repository import Repository
from flask_gsession.request import following, rewriting, saving, session, storing, writing
from flask_gsession.request.lifecycle import Lifecycle
from flask_gsession.request.loading import load
from flask_gsession.request.session import SessionData
from flask_gsession.request.state import NO_WISHES
from flask_gsession.request.tracking import TrackedValues
from flask_gsession.stores.base import Deleted, Record
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.values.envelope import Envelope
from flask_gsession.values.marks import split
from flask_gsession.values.merge import Change, Merger
from flask_gsession.values.payload import Body
from tests.simulation.plan import Plan


@dataclass(frozen=True)
class Mutation:
    """One way to break the code: `broken` takes the place of an attribute.

    `among` says which plans can show a fault that is rare among all of them.
    """

    name: str
    owner: Any
    attribute: str
    broken: Any
    among: Callable[[Plan], bool] | None = None

    def apply(self) -> AbstractContextManager[Any]:
        """Break the code for the length of the context."""
        return mock.patch.object(self.owner, self.attribute, self.broken)


_save = MemoryStore.save
_repository_save = Repository.save
_apply = Merger.apply
_catch_up = following.catch_up
_commit = saving.commit
_settle_attempts = following.settle_attempts
_rebase = TrackedValues.rebase
_draft_rotated = SessionRecords.draft_rotated
_rewrite = rewriting.rewrite


def _expect_any_version(
    self: MemoryStore, record: Record | None, version: int, lease: str | None = None
) -> Record:
    if record is None or record.successor is not None:
        raise Gone
    return record


def _save_or_create(self: MemoryStore, record: Record, expected_version: int, **how: Any) -> None:
    try:
        _save(self, record, expected_version, **how)
    except Gone:
        self._records[record.key] = record


def _apply_without_deletes(
    self: Merger, stored: Mapping[str, Any], changes: Mapping[str, Change], *more: Any
) -> Any:
    if any(stored.get(key) != change.base for key, change in changes.items()):
        changes = {key: change for key, change in changes.items() if change.mine is not None}
    return _apply(self, stored, changes, *more)


def _renew_whatever_is_there(self: MemoryStore, record: Record, idle_expires_at: int) -> bool:
    there = self._records.get(record.key, record)
    self._records[record.key] = there._replace(idle_expires_at=idle_expires_at)
    return True


def _open_whatever_key(self: Envelope, key: str, payload: bytes, times: Any) -> bytes:
    return payload[10:]


#: The five that were asked for.
REQUIRED = (
    Mutation("no version check", MemoryStore, "_expect", _expect_any_version),
    Mutation("create on save", MemoryStore, "save", _save_or_create),
    Mutation("no own-key check", Envelope, "open", _open_whatever_key),
    Mutation("merge without deletes", Merger, "apply", _apply_without_deletes),
    Mutation("late renewal", MemoryStore, "renew", _renew_whatever_is_there),
)


def _create_where_gone(
    self: Repository, old: Record, record: Record, body: Body, *more: Any, **how: Any
) -> None:
    try:
        _repository_save(self, old, record, body, *more, **how)
    except Gone:
        self.create(self.records.draft_new(body)[1])


def _replace_again(
    self: MemoryStore,
    key: str,
    record: Record,
    expected_version: int,
    pointer: Record | None,
    **how: Any,
) -> None:
    if self._unexpired(key) is None:
        raise Gone
    self._records[record.key] = record
    if pointer is None:
        del self._records[key]
    else:
        self._records[key] = pointer


def _delete_the_pointer_only(
    self: MemoryStore, key: str, expected_version: int | None = None
) -> Deleted:
    if expected_version is not None:
        self._expect(self._unexpired(key), expected_version)
    record = self._unexpired(key)
    self._records.pop(key, None)
    return Deleted(record is not None, record)


def _lasting_pointer(self: SessionRecords, old: Record, record: Record, grace: float) -> Record:
    return old._replace(
        version=record.version,
        payload=self._envelope.seal(
            old.key,
            record.key.encode(),
            (old.created_at, old.absolute_expires_at, old.idle_expires_at),
        ),
        successor=record.key,
    )


def _leave_rotations_to_others(life: Lifecycle, **how: Any) -> bool:
    key = life.handle
    found = _catch_up(life, **how)
    if life.handle != key:
        life.wishes = NO_WISHES
    return found


def _commit_in_doubt(life: Lifecycle, **how: Any) -> bool:
    life.outage = None
    return _commit_without_attempts(life, **how)


def _commit_without_attempts(life: Lifecycle, **how: Any) -> bool:
    life.attempts = {}
    return _commit(life, **how)


def _settle_and_forget(life: Lifecycle, *seen: Any, **how: Any) -> Any:
    try:
        return _settle_attempts(life, *seen, **how)
    finally:
        life.attempts = {}


def _settle_and_expect_none(life: Lifecycle, there: Record, before: Record, **how: Any) -> Any:
    if there.version == before.version:
        life.attempts = {}
    return _settle_attempts(life, there, before, **how)


def _rotate_with_any_token(life: Lifecycle, grace: float) -> None:
    load(life)
    if life.seen.record is not None:
        life.wish(rotation=grace)


def _follow_and_forget(
    self: TrackedValues, stored: dict[str, Any], now: Any = None, saved: Any = None
) -> None:
    if saved:
        _rebase(self, stored, now, saved)
    if now is not None:
        self.look_for_marks(now)
    for key in self.live.keys() - self.base.keys():
        del self.live[key]
    self.stored = stored
    self.looks = None


def _idle_end_alone(self: Expiry, body: Body, absolute: int) -> int:
    return self.now() + self._spans.of(body.values, body.lifetime).length


def _drop_silently(self: Lifecycle, during: str) -> None:
    self.forget()
    self.ended = True


def _destroy_the_cookie_only(life: Lifecycle) -> None:
    life.forget()
    life.opened = True
    life.cookie = "delete"


def _take_with_the_response(self: SessionData, key: str, default: Any = None) -> Any:
    return self.pop(key, default)


def _take_what_was_seen_first(
    life: Lifecycle, key: str, replace: Callable[[Any], Any], what: str, **how: Any
) -> None:
    seen: list[Any] = []

    def once(raw: Any) -> Any:
        if what != "take" or not seen:
            seen.append(replace(raw))
        return seen[-1]

    _rewrite(life, key, once, what, **how)


def _apply_whatever_expired(self: Merger, stored: Any, changes: Any, *more: Any) -> Any:
    return _apply(self, stored, changes, None, *more[1:])


def _rotate_without_marks(self: SessionRecords, old: Record, body: Body, **how: Any) -> Any:
    values = {key: split(raw)[1] for key, raw in body.values.items()}
    return _draft_rotated(self, old, structs.replace(body, values=values), **how)


FURTHER = (
    Mutation("taken with the response", SessionData, "take", _take_with_the_response),
    Mutation("taken twice in a race", session, "rewrite", _take_what_was_seen_first),
    Mutation("a merge revives the expired", Merger, "apply", _apply_whatever_expired),
    Mutation("a ttl lost at a rotation", SessionRecords, "draft_rotated", _rotate_without_marks),
    Mutation("read after it expired", TrackedValues, "_has_expired", lambda *args: False),
    Mutation("a new session where one is gone", Repository, "save", _create_where_gone),
    Mutation("two successors", MemoryStore, "replace", _replace_again),
    Mutation("logout of the pointer only", MemoryStore, "delete", _delete_the_pointer_only),
    Mutation("pointers that last", SessionRecords, "draft_pointer", _lasting_pointer),
    Mutation("login left to another rotation", writing, "catch_up", _leave_rotations_to_others),
    Mutation("doubtful write repeated", saving, "commit", _commit_in_doubt),
    Mutation("attempts forgotten", saving, "commit", _commit_without_attempts),
    Mutation(
        "attempts forgotten at a refusal",
        following,
        "settle_attempts",
        _settle_and_forget,
        among=lambda plan: plan.strikes,
    ),
    Mutation(
        "attempts forgotten that may arrive",
        following,
        "settle_attempts",
        _settle_and_expect_none,
        among=lambda plan: plan.strikes,
    ),
    Mutation("an old token that rotates", writing, "needs_own_session", lambda *life, **how: False),
    Mutation("an old token that is asked to", session, "rotate_soon", _rotate_with_any_token),
    Mutation("an emptied session kept", storing, "_is_emptied", lambda *step: False),
    Mutation("looked-at values forgotten", TrackedValues, "rebase", _follow_and_forget),
    Mutation("later wins everywhere", Merger, "_resolve", lambda *args: args[-1]),
    Mutation("never renewed", Expiry, "due", lambda *args: None),
    Mutation("no absolute expiry", Expiry, "idle_end", _idle_end_alone),
    Mutation("dropped silently", Lifecycle, "end", _drop_silently),
    Mutation("logout of the cookie", session, "destroy", _destroy_the_cookie_only),
)
