"""Merges an edge node's offline changes into the sessions at its centre.

The node's store holds opaque records. This module reads them, with the application's keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

from msgspec import MsgspecError
from msgspec.msgpack import decode, encode
from werkzeug.exceptions import HTTPException

from .errors import (
    Gone,
    KeyTaken,
    LogoutUnconfirmed,
    SessionConflict,
    SessionTooLarge,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
    ValueRefused,
)
from .events import WriteDropped, logger
from .repository.ending import delete_session
from .repository.permanent import PERMANENT
from .repository.repository import Repository
from .stores.base import KEY_LENGTH, Record, Store, unexpired
from .stores.parts import Reconciler
from .users.joins import merge_joins
from .users.revoking import finish
from .users.roster import Roster, mark_ending
from .values.envelope import NEWEST
from .values.marks import is_marked
from .values.merge import DECLARED, Change, MergeFunction
from .values.payload import Body, Owner
from .values.references import refers

#: A record at the centre that shows nodes whether they can read each other's records.
GREETING_KEY = "flask-gsession-edge-greeting".ljust(KEY_LENGTH, "-")
_CHECK_VERSION = 1  # its version
# Milliseconds. Short, since the correct keys may have been replaced while no node settled.
_LIFE, _REFRESH = 86_400_000, 3_600_000
#: The errors with which a merge policy refuses; ``HTTPException`` comes from ``abort``.
_REFUSED = (SessionConflict, ValueRefused, HTTPException)
_MARKS = 16  # nodes that a session remembers


class SessionReconciler(Reconciler):
    """The reconciler of one application."""

    def __init__(self, repository: Repository, centre: Store) -> None:
        self._own = repository
        self._centre = centre

    @property
    def _repository(self) -> Repository:
        """The repository at the centre. The edge's own store still refuses calls that need it."""
        return self._own.through(self._centre)

    def incompatibility(self, centre: Store) -> str:
        """Why this node and the others at the centre can't read each other's records, or ""."""
        repository = self._repository
        try:
            there = unexpired(centre, GREETING_KEY, repository.now())
            if there is not None:
                version, newest = _read(repository.other_records.read(there))
                if version != _CHECK_VERSION or newest > NEWEST:
                    return (
                        "another version of Flask-GSession uses the centre, whose sessions "
                        "this one may not be able to merge: use the same version on all nodes"
                    )
        except UnreadableRecord as error:
            return (
                f"nodes of this centre use other keys ({error}): use the same "
                "SESSION_ENCRYPTION_KEYS on all nodes; until then nothing is settled, nor for a "
                "day after a node with other keys last settled"
            )
        now = repository.now()
        if there is None or now - there.created_at > _REFRESH:
            content = encode((_CHECK_VERSION, NEWEST))
            record = repository.other_records.draft(GREETING_KEY, content, now + _LIFE)
            with suppress(KeyTaken, Stale, Gone):  # another node was first
                if there is None:
                    centre.create(record)
                else:
                    centre.save(record, there.version)
        return ""

    def merge(
        self,
        base: Record,
        theirs: Record,
        mine: Record,
        typed: Collection[str],
        node: str,
        number: int,
    ) -> Record | None:
        """See ``Reconciler``."""
        repository = self._repository
        was, there, wanted = (_body(repository, record) for record in (base, theirs, mine))
        settled = there.settled or {}
        if settled.get(node, 0) >= number:
            return None
        changes = {
            key: Change(was.values.get(key), wanted.values.get(key))
            for key in {**was.values, **wanted.values}
            if was.values.get(key) != wanted.values.get(key)
        }
        now = repository.now() if was.marked or there.marked or wanted.marked else None
        policies = self._policies(typed)
        values = self._merged(theirs.key, there.values, changes, now, policies)
        owner = there.owner
        if owner is not None and was.owner is not None and wanted.owner is None:
            owner = None  # the user signed out at this node
        marks = {**{name: last for name, last in settled.items() if name != node}, node: number}
        body = Body(
            values,
            wanted.lifetime if wanted.lifetime != was.lifetime else there.lifetime,
            any(map(is_marked, values.values())),
            wanted.debug_until if wanted.debug_until != was.debug_until else there.debug_until,
            any(map(refers, values.values())),
            owner,
            there.origin,
            dict(list(marks.items())[-_MARKS:]),
            merge_joins(there.joins, wanted.joins),
        )
        end = mine.idle_expires_at
        if wanted.lifetime == was.lifetime and PERMANENT not in changes:
            end = max(end, theirs.idle_expires_at)
        end = min(end, theirs.absolute_expires_at)
        try:
            merged = repository.records.with_body(theirs, body, end)
        except SessionTooLarge:
            self._lost(theirs.key, "the merged session would be too large")
            body.values, body.marked, body.has_large = there.values, there.marked, there.has_large
            merged = repository.records.with_body(theirs, body, end)
        # Reads at this node have renewed the session, but not its large values.
        repository.large.renew_for(body, end)
        return merged

    def settled(self, base: Record, there: Record, mine: Record) -> None:
        """See ``Reconciler``. A user who signed out here leaves the roster."""
        owner = _body(self._repository, base).owner
        if owner is not None and _body(self._repository, mine).owner is None:
            self._repository.rosters.leave(owner, base.key, there.key)

    def end(self, key: str, last: Record) -> None:
        """See ``Reconciler``. An end that only other nodes can read is left to them."""
        repository = self._repository
        imports, repository.imports = repository.imports, None
        try:
            delete_session(repository, key, leave_roster=False)
        except UnreadableRecord:
            pass  # it can't be used anyway
        except LogoutUnconfirmed as error:  # no caller waits who could repeat it
            logger.error("Session %s ended at the centre, but %s", key, error)
        if not last.payload:
            return
        try:
            body = _body(repository, last)
        except UnreadableRecord as error:
            if error.for_others:
                raise
            return
        if body.owner is not None:
            self._sign_out(body.owner)
        if imports is not None:
            try:
                imports.end_old(repository, body)
            except StoreUnavailable as error:  # perhaps of another store than the centre's
                raise StoreUnavailable(
                    f"its old session could not be removed: {error.detail}", contention=True
                ) from error

    def dropped(self, base: Record | None, mine: Record, why: str) -> None:
        """See ``Reconciler``. If the user signed out here, ends the session that it became."""
        repository = self._repository
        repository.events.emit(WriteDropped, mine.key, f"edge: {why}")
        if base is None:
            return
        try:
            owner, now = (_body(repository, record).owner for record in (base, mine))
        except UnreadableRecord:
            return
        if owner is not None and now is None:
            self._sign_out(owner)

    def _merged(
        self,
        key: str,
        there: Mapping[str, bytes],
        changes: Mapping[str, Change],
        now: int | None,
        policies: Mapping[str, MergeFunction],
    ) -> dict[str, bytes]:
        """The values after the changes. Leaves out changes that a policy refuses."""
        apply = self._own.merger.apply
        with suppress(*_REFUSED):
            return apply(there, changes, now, policies)
        values = dict(there)
        for name, change in changes.items():
            try:
                values = apply(values, {name: change}, now, policies)
            except StoreUnavailable:
                raise
            except _REFUSED:
                self._lost(key, f"the merge policy of {ascii(name)[:60]} refused it")
        return values

    def _policies(self, names: Iterable[str]) -> dict[str, MergeFunction]:
        """The merge policies of these typed keys."""
        found = {}
        for name in names:
            used = self._own.typed_keys.get(name)
            known = list(DECLARED.get(name, ())) if used is None else [used]
            if len(known) > 1:
                raise StoreUnavailable(
                    f"several keys are named {ascii(name)[:60]}, and this process hasn't used its "
                    "own yet: its changes wait until a process that has used it settles",
                    contention=True,
                )
            merge = known[0].merge_function(self._own.merger.policies.get(name)) if known else None
            if merge is not None:
                found[name] = merge
        return found

    def _lost(self, key: str, why: str) -> None:
        logger.warning("Session %s: a change made at this edge is lost: %s", key, why)
        self._repository.events.emit(WriteDropped, key, f"edge: {why}")

    def _sign_out(self, owner: Owner) -> None:
        """End the device in its user's roster, and its current session."""
        repository = self._repository

        def step(roster: Roster) -> tuple[Roster, Roster]:
            device = roster.by_id(owner.device_id)
            after = roster if device is None else mark_ending(roster, {owner.device_id})
            return after, after

        after = repository.rosters.change(owner.user_id, step)
        with suppress(
            LogoutUnconfirmed
        ):  # it has ended at the primary; the next access to the roster asks again
            finish(repository, owner.user_id, after.ending, "edge")


def _body(repository: Repository, record: Record) -> Body:
    body = repository.records.read(record.key, record)
    if body is None:
        raise UnreadableRecord("corrupt", "a pointer in place of a session")
    return body


def _read(content: bytes) -> tuple[int, int]:
    try:
        version, newest = decode(content, type=tuple[int, int])
    except MsgspecError:
        raise UnreadableRecord("corrupt", "a damaged greeting") from None
    return version, newest
