"""Writes a session: applies a request's changes to the stored state, in one retry loop.

Everything that can lose a race and try again goes through ``_Write``: the save with the response, a
transaction, ``update_atomic``, ``take``, a rotation, the removal of a lost value. A write is noted
before it is sent, and recognised by its version, so nothing is applied twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from werkzeug.exceptions import HTTPException

from ..errors import (
    CutOff,
    Gone,
    GSessionError,
    KeyTaken,
    LogoutUnconfirmed,
    RosterUnreadable,
    SessionConflict,
    SessionEnded,
    Stale,
    StoreError,
    StoreUnavailable,
    TransactionMisused,
    UnreadableRecord,
    ValueLost,
    ValueRefused,
)
from ..events import (
    SessionCreated,
    SessionDestroyed,
    SessionRenewed,
    SessionRotated,
    SessionSaved,
    SessionUnbound,
    WriteDropped,
    logger,
)
from ..repository.races import write
from ..repository.repository import PERMANENT
from ..stores.base import Record
from ..stores.interrupts import signal_interruption
from ..stores.support import exactly
from ..users.rosters import LOGIN
from ..values.marks import unexpired
from ..values.merge import Change, last, reject
from ..values.payload import Body
from ..values.references import holds
from .joining import close_join, hand_over, join_user, note_join, signs_in
from .lifecycle import CONFIRMED, NO_ATTEMPTS, NO_CHANGES, UNCONFIRMED, Lifecycle, worth_keeping
from .ownership import (
    Revoked,
    enter_roster,
    is_revoked,
    is_touch_due,
    prepare_owner,
    take_back,
    touch,
    user_id_of,
)
from .state import (
    NO_WISHES,
    SAVED,
    Attempt,
    Block,
    HidesFields,
    Seen,
    Wishes,
    current_block,
    without_rotation,
)
from .user_values import adopt_trouble

_TOKENS_TAKEN = 3


class LostRace(SessionConflict):
    """A transaction can't be stored, since another request was faster."""


class NotStored(SessionEnded):
    """This request itself has ended or emptied the session."""


class Edit(HidesFields, frozen=True):
    """The values to store over the state that was ``seen``.

    ``values`` are all values in encoded form. ``changes`` are the request's own among them, which
    stay pending until they are stored. Then ``settle`` is called, under the mutex.
    """

    seen: Seen
    values: dict[str, bytes]
    changes: Mapping[str, Change]
    wishes: Wishes = NO_WISHES
    settle: Callable[[], None] | None = None


#: Event types with their details, to emit when a write is complete; missing confirmations too.
Written = tuple[list[tuple[Any, ...]], LogoutUnconfirmed | None]


def commit(
    life: Lifecycle,
    *,
    transaction: Block | None = None,
    rotating: bool | None = None,
) -> bool:
    """Store the request's changes and wishes; whether there were any. The caller holds the mutex.

    ``transaction``: store exactly on the version it began with, or raise ``LostRace``.
    ``rotating``: whether to rotate if that is wished. By default, rotates outside locks only: a
    lock belongs to the session's key, so the rotation waits until you leave the lock.
    """
    if life.attempts and life.outage is None:
        life.resolve_attempts()
    if life.entry is not None and life.outage is None and not enter_roster(life):
        return True
    if life.joined is not None and life.outage is None:
        close_join(life)
    changes, wishes = life.changes(), life.wishes
    if not changes and wishes is NO_WISHES:
        return False
    if rotating is None:
        rotating = life.lease is None
    rotating = rotating and not life.is_in_socket
    if not (changes or wishes.cleared or life.has_wishes(rotating=rotating)):
        return False
    life.was_modified = True
    if life.outage is not None:
        raise life.outage.error
    if life.ended:
        if changes:
            life.end("save")
        return bool(changes)
    if transaction is not None and not _needs_own_session(life, rotating):
        seen = life.seen
        if transaction.version != (seen.record and seen.record.version):
            life.conflict("transaction")
            raise LostRace
    else:
        transaction = None
    exactly = transaction is not None
    return _Commit(life, exactly=exactly, changes=changes, rotating=rotating).run()


def _needs_own_session(life: Lifecycle, rotating: bool) -> bool:
    """Whether this is a sign-in with an old token, perhaps since another request rotated."""
    return rotating and life.wishes.rotation is not None and life.seen.is_old_token


def rewrite(
    life: Lifecycle,
    key: str,
    replace: Callable[[bytes | None], bytes | None],
    what: str,
    *,
    settle: Callable[[bytes | None], None],
    recover: Callable[[bytes, ValueLost], None],
) -> None:
    """Store ``replace(raw)`` for the encoded value of ``key`` now; None removes the key.

    ``replace`` runs again after a lost race, and may call the application. This request's other
    changes stay pending. A change of this very key is stored first. ``settle`` gets the stored
    value. ``recover`` is called for a large value that is lost. Raises ``SessionEnded`` if the
    session has ended, ``NotStored`` if this request ended it.
    """
    _Rewrite(life, what, key=key, replace=replace, settle=settle, recover=recover).run()
    if life.seen.record is None:
        raise SessionEnded


class _Write(Struct, eq=False):
    """One write of a session: ``edit`` returns what to store over the present state.

    With ``exactly``, a lost race raises ``LostRace``. These are methods, not closures, since
    Python calls methods faster after the first call.
    """

    life: Lifecycle
    what: str = "save"
    exactly: bool = False
    stale: Seen | None = None  # set if another request has replaced it
    taken: int = 0

    def edit(self) -> Edit | None:
        """The values to store; None if there are none. Runs again after each lost race."""
        raise NotImplementedError

    def run(self) -> bool:
        """Store the edit. False if there was nothing to store, or the session has ended."""
        life = self.life
        if life.lease is not None:
            life.check_lease()
        if life.repository.edge is None:
            written = write(self.edit, self.send, life.tries)
        else:
            with exactly(self.unmergeable()):
                written = write(self.edit, self.send, life.tries)
        if written is None:
            return False
        happened, unconfirmed = written
        for event in happened:
            life.repository.events.emit(*event)
        if unconfirmed is not None:
            logger.error(UNCONFIRMED, unconfirmed)
            raise unconfirmed
        return True

    def unmergeable(self) -> str:
        """The name of this write if an edge that is cut off can't queue it; or ""."""
        raise NotImplementedError

    def send(self, step: Edit, lost: int) -> Written | None:
        """Store this edit, unless another writer was faster. None if the session has ended."""
        life = self.life
        with life.mutex:
            if life.seen is not step.seen:  # another thread of this request was faster
                raise Stale
            try:
                return _store(life, step, lost)
            except Exception as error:
                self._failed(step, error)
                return None

    def _failed(self, step: Edit, error: Exception) -> None:
        """Raise the error that follows from a failed attempt. Returns if the session has ended."""
        life = self.life
        if isinstance(error, Revoked) and is_revoked(life):
            life.end(self.what)
            return
        if isinstance(error, (Revoked, Stale, Gone)):
            if self.exactly:
                life.conflict("transaction")
                raise LostRace from None
            if isinstance(error, Revoked):
                raise Stale from None
            self.stale = step.seen
        elif isinstance(error, KeyTaken):
            self.taken += 1
            if self.taken == _TOKENS_TAKEN:
                raise StoreError(
                    "Three new tokens in a row were taken: SESSION_TOKEN_FACTORY repeats itself"
                ) from None
        elif isinstance(error, UnreadableRecord):
            life.repository.refused(error.reason, life.handle, error.detail)
            life.end(self.what)
            return
        elif isinstance(error, StoreUnavailable) and not isinstance(error, LogoutUnconfirmed):
            life.note_outage(error, "created" if step.seen.record is None else "saved")
        raise error

    def _catch_up(self) -> bool:
        """Load what another request stored; False if the session has ended."""
        life, stale, self.stale = self.life, self.stale, None
        with life.mutex:
            if life.seen is not stale:
                return True
            if not life.catch_up():
                life.end(self.what)
                return False
            # An attempt may have arrived that is not in the roster yet.
            return life.entry is None or enter_roster(life)


class _Commit(_Write, eq=False, kw_only=True):
    """Stores all changes and wishes of the request; see ``commit``."""

    changes: Mapping[str, Change] | None  # for the first try
    rotating: bool

    def unmergeable(self) -> str:
        if self.exactly:
            return "a transaction"
        life = self.life
        policy_of, changes = life.repository.merger.policy_of, self.changes or NO_CHANGES
        refusing = (key for key in changes if policy_of(key, life.policies) is reject)
        key = next(refusing, None)
        return "" if key is None else f"session[{ascii(key)[:60]}], with the policy reject,"

    def edit(self) -> Edit | None:
        if self.stale is not None and not self._catch_up():
            return None
        life, changes = self.life, self.changes
        self.changes = None
        if life.wishes is not NO_WISHES and _needs_own_session(life, self.rotating):
            life.start_own_session()
            changes = None
        if life.repository.user_keys:
            user_id = signs_in(life)
            if user_id is not None and hand_over(life, user_id):
                changes = None
        if changes is None:
            changes = life.changes()
        if life.seen.record is None:
            return _new(life, changes)
        return _merged(life, changes, self.rotating)


class _Rewrite(_Write, eq=False, kw_only=True):
    """Replaces the value of one key in the store; see ``rewrite``."""

    key: str
    replace: Callable[[bytes | None], bytes | None]
    settle: Callable[[bytes | None], None]
    recover: Callable[[bytes, ValueLost], None]

    def run(self) -> bool:
        what = "" if self.life.repository.edge is None else self.unmergeable()
        if what:
            self.life.check_reaches_centre(what)
        return super().run()

    def unmergeable(self) -> str:
        life, key = self.life, self.key
        is_take = self.what == "take"
        policy = life.repository.merger.policy_of(key, life.policies)
        if not is_take and policy not in (last, reject):
            return ""  # it can be merged
        return f"{self.what} of session[{ascii(key)[:60]}]"

    def edit(self) -> Edit | None:
        if self.stale is not None and not self._catch_up():
            return None
        life, key = self.life, self.key
        while True:
            with life.mutex:
                if _needs_own_session(life, rotating=True):  # even inside a lock
                    life.start_own_session()
                beside = life.block is not None and current_block.get() is not life.block
                if not beside and life.seen.record is not None and life.values.has_changed(key):
                    commit(life)
                seen, values = life.seen, life.values
                if seen.record is None:
                    raise SessionEnded if life.ended else NotStored
                stored = values.unexpired()
                raw = stored.get(key)
            try:
                changed = self.replace(raw)
            except UnreadableRecord as error:
                life.refuse(error.reason, error.detail)
                raise SessionEnded from None
            except ValueLost as error:
                assert raw is not None  # a value was lost
                self.recover(raw, error)
                continue
            if changed != raw and not holds(raw, changed):
                stored = dict(stored)
                if changed is None:
                    del stored[key]
                else:
                    stored[key] = changed
                change = {key: Change(raw, changed)}
                return Edit(seen, stored, change, settle=partial(self.settle, changed))
            with life.mutex:
                if life.seen is seen:
                    if not values.has_changed(key):
                        self.settle(raw)
                    return None


def _merged(life: Lifecycle, changes: Mapping[str, Change], rotating: bool) -> Edit | None:
    """Merge the request's changes into the stored values. The caller holds the mutex."""
    values, repository = life.values, life.repository
    if not changes and not life.has_wishes(rotating=rotating):
        return None
    try:
        now = values.now() if values.now is not None else None
        merged = repository.merger.apply(values.stored, changes, now, life.policies)
    except SessionConflict:
        life.conflict("refused")
        raise
    except UnreadableRecord as error:
        repository.events.emit(WriteDropped, life.handle, error.reason)
        life.refuse(error.reason, error.detail)
        return None
    wishes = life.wishes
    if not rotating:
        wishes = without_rotation(wishes, but_binding=life.lease is None)
    return Edit(life.seen, merged, changes, wishes)


def _new(life: Lifecycle, changes: Mapping[str, Change]) -> Edit | None:
    """The first values of a new session; None if there are none, or it is too late for a token."""
    values = life.values
    stored = {key: change.mine for key, change in changes.items() if change.mine}
    if values.now is not None:
        stored = unexpired(stored, values.now())
    if life.is_of_user:
        return Edit(life.seen, stored, changes, life.wishes) if stored else None
    if life.is_late or not (worth_keeping(stored) or life.wishes.binding is not None):
        return None
    if life.presented().handle is not None:
        raise SessionEnded  # an ext.open() block can't send the token of a new session
    if life.repository.settings.permanent:
        stored.setdefault(PERMANENT, life.repository.codec.encode(PERMANENT, True))
    return Edit(life.seen, stored, changes, life.wishes)


def _store(life: Lifecycle, step: Edit, lost: int) -> Written:
    """Send one write, and adopt the stored state. The caller holds the mutex.

    ``lost``: how many races this write has lost so far.
    """
    repository, wishes, old = life.repository, step.wishes, step.seen.record
    merged = step.values
    owner = None if old is None or life.seen.body is None else life.seen.body.owner
    if old is not None and step.settle is None and not (worth_keeping(merged) or life.must_stay()):
        if wishes.binding is not None:
            bound = bool(wishes.binding.user_id)
        else:  # a user stays signed in, although the last message was shown
            bound = owner is not None and LOGIN not in step.changes
        if not bound and (owner is None or step.changes.keys() - {CONFIRMED} or wishes.cleared):
            return _end(life, old)
    stored = merged
    others = sys.maxsize if old is None else len(old.payload)
    before, has_large = life.values.stored, life.has_large
    if has_large or repository.has_large_value(merged, step.changes, others):
        body = Body(merged, life.lifetime, has_large=True)
        stored = life.unreferenced.write_large(
            body, old.absolute_expires_at if old else None, before
        )
        has_large = life.has_large
    body = life.body(stored, has_large=has_large)
    entry = None
    joining: Collection[str] = ()
    body.owner = owner
    plain = wishes.binding is None and wishes.rotation is None and LOGIN not in step.changes
    settled = owner is None and LOGIN not in merged
    if owner is not None:  # most saves of a bound session have nothing to do for its user
        settled = repository.clock() < owner.seen + repository.settings.seen_interval
    if not (plain and settled):
        body.owner, entry = prepare_owner(life, merged, step.changes, wishes, old)
        if body.joins or life.behind is not None or repository.user_keys:
            joining = join_user(life, body, step.changes, old)
        if joining:
            merged, stored = _without(merged, joining), _without(stored, joining)
            owner, body = body.owner, life.body(stored, has_large=has_large)
            body.owner, body.joins = owner, ()
    if body.joins or repository.user_keys:
        note_join(life, body, old)
    toggled = PERMANENT in step.changes and (
        repository.is_permanent(merged) != repository.is_permanent(before)
    )
    restart = toggled or wishes.lifetime is not None
    token: str | None = None
    if old is None:
        token, record = repository.draft_new(body)
    elif wishes.rotation is not None:
        signs_in = wishes.sign_in or (entry is not None and entry.binding is not None)
        renew = restart or life.renews
        token, record = repository.draft_rotated(old, body, renew=renew, signs_in=signs_in)
    else:
        record = repository.draft_next(old, body, restart_idle=restart, renew=life.renews)
        if body.owner is not None and record.idle_expires_at > body.owner.until * 1000:
            # It is renewed for longer than ever before, and its roster must know that first.
            try:
                body.owner = touch(life, body.owner, merged, old)
                record = repository.draft_next(old, body, restart_idle=restart, renew=life.renews)
            except CutOff:
                end = max(old.idle_expires_at, body.owner.until * 1000)
                record = record._replace(idle_expires_at=min(record.idle_expires_at, end))
    changes = step.changes if stored is merged else _as_stored(step.changes, merged, stored)
    pending = step.settle is None
    if entry is not None:
        entry = replace(entry, key=record.key)
    attempt = Attempt(record, token, body, changes if pending else NO_CHANGES, wishes, entry)
    life.attempts = {**life.attempts, record.version: attempt}
    if entry is not None:
        life.entry = entry
    unconfirmed = None
    try:
        if old is None:
            repository.create(record)
        elif wishes.rotation is not None:
            unconfirmed = repository.rotate(
                old, record, body, wishes.rotation, life.lease, shorten=restart
            )
        else:
            repository.save(old, record, body, life.lease, shorten=restart)
    except (GSessionError, HTTPException) as error:
        # After any other exception, or any that a signal handler raised, the outcome is unknown.
        if not isinstance(error, StoreUnavailable) and signal_interruption(error) is None:
            attempts = dict(life.attempts)
            del attempts[record.version]
            life.attempts = attempts
            life.entry = None
        raise
    moved = old is not None and record.idle_expires_at != old.idle_expires_at
    if pending:
        life.values.mark_saved(stored, changes)
    else:
        _take_over(life, step, stored, changes)
    for key in joining:
        life.values.drop(key)
    if token is not None:
        life.cookie = "set"
        current: str | None = token
    else:
        current = step.seen.token
        if current is not None and (toggled or (moved and repository.is_permanent(stored))):
            life.cookie = "set"
    life.seen = Seen(current, record, body, presented=step.seen.presented)
    if pending and life.wishes is not NO_WISHES:
        left = life.wishes
        rotation = None if wishes.rotation is not None else left.rotation
        binding = None if wishes.binding is not None else left.binding
        done = rotation is None and binding is None
        life.wishes = (
            NO_WISHES if done else Wishes(rotation=rotation, binding=binding, sign_in=left.sign_in)
        )
    # This write replaced the version that earlier attempts meant to replace, so they failed.
    life.attempts = NO_ATTEMPTS
    if has_large:
        life.unreferenced.release_replaced(before, stored)
    if life.entry is not None and not enter_roster(life):
        return [], None
    if life.joined is not None:
        close_join(life)
    if old is None:
        return [(SessionCreated, record.key)], None
    happened: list[tuple[Any, ...]] = [(SessionSaved, record.key, len(record.payload), lost)]
    if token is not None:
        happened.insert(0, (SessionRotated, record.key, old.key))
    return happened, unconfirmed


def _without(values: dict[str, bytes], keys: Collection[str]) -> dict[str, bytes]:
    return {key: raw for key, raw in values.items() if key not in keys}


def _take_over(
    life: Lifecycle, step: Edit, stored: dict[str, bytes], changes: Mapping[str, Change]
) -> None:
    """One value was replaced in the store. Changes of other keys stay pending."""
    values = life.values
    if life.trace is not None:
        for key, change in changes.items():
            life.trace.stored(key, change.base, change.mine)
    changed = {key: values.has_changed(key) for key in changes}
    values.rebase(stored)
    assert step.settle is not None
    if not any(changed.values()):
        step.settle()
    if not worth_keeping(stored) and (step.seen.body is None or step.seen.body.owner is None):
        life.wish(cleared=True)  # if it is still empty then, it ends with the response


def _end(life: Lifecycle, old: Record) -> Written:
    """The request emptied the session: end it, in the version it saw."""
    unconfirmed: LogoutUnconfirmed | None = None
    life.end_old_session()
    try:
        life.repository.end(old, life.seen.body, life.lease)
    except LogoutUnconfirmed as error:
        unconfirmed = error
    if life.seen.body is not None and life.seen.body.owner is not None:
        owner = life.seen.body.owner
        life.repository.leave_roster(owner, old.key)
        life.repository.events.emit(SessionUnbound, owner.user_id, owner.device_id)
    before = life.values.stored if life.has_large else None
    life.forget()
    life.cookie = "delete"
    if before is not None:
        life.unreferenced.release_replaced(before, None)
    return [(SessionDestroyed, old.key)], unconfirmed


def _renew_if_due(life: Lifecycle) -> None:
    """Move the idle expiry if that is due."""
    repository, seen, values = life.repository, life.seen, life.values
    if seen.record is None or seen.body is None:
        return
    owner = seen.body.owner
    cut_off = repository.edge is not None and repository.edge.cut_off  # from its roster, too
    if not cut_off and (owner is not None or LOGIN in values.stored) and is_touch_due(life):
        _save_to_touch(life)
        return
    idle_end = repository.due(seen.record, values.stored, seen.body.lifetime)
    if idle_end is None:
        return
    if owner is not None and idle_end > owner.until * 1000 and not cut_off:
        # A setting was raised since it was entered, and its roster must know that first.
        _save_to_touch(life)
        return
    if owner is not None and cut_off:
        idle_end = max(seen.record.idle_expires_at, min(idle_end, owner.until * 1000))
    try:
        renewed = repository.renew(
            seen.record, life.body(values.stored, has_large=life.has_large), idle_end
        )
    except (StoreUnavailable, UnreadableRecord) as error:
        # This request read correct values and has nothing to write. The next one renews.
        logger.warning("A session could not be renewed: %s", error)
        return
    if renewed:
        record = seen.record._replace(idle_expires_at=idle_end)
        life.seen = Seen(seen.token, record, seen.body, presented=seen.presented)
        if seen.token is not None and repository.is_permanent(values.stored):
            life.cookie = "set"
        repository.events.emit(SessionRenewed, record.key)


def _save_to_touch(life: Lifecycle) -> None:
    """Save an unchanged session, since a save touches its user's roster."""
    life.wish(forced=True)
    try:
        commit(life, rotating=False)
    except RosterUnreadable:
        raise
    except StoreUnavailable as error:
        # As for a renewal: the values are correct, and the next request touches the roster.
        logger.warning("A session could not be renewed: %s", error)


def bind_earlier(life: Lifecycle) -> None:
    """Bind a session that Flask-Login signed in with an earlier version, before its next save.

    Stores the request's changes as well. Three round trips. Raises ``SessionEnded`` if the session
    is older than the last revocation.
    """
    if life.is_late or user_id_of(life) is not None or not is_touch_due(life):
        return
    life.check_not_in_retried_code("Binding a session from an earlier version")
    with life.mutex:
        life.wish(forced=True)
        commit(life, rotating=False)
    if life.ended:
        raise SessionEnded


def _as_stored(
    changes: Mapping[str, Change], merged: Mapping[str, bytes], stored: Mapping[str, bytes]
) -> Mapping[str, Change]:
    """The changes, with references in place of large values."""
    return {
        key: change if merged.get(key) is not change.mine else Change(change.base, stored.get(key))
        for key, change in changes.items()
    }


def end_request(life: Lifecycle, *, by_hand: bool = False) -> None:
    """Store the request's changes while Flask processes the response.

    ``by_hand``: the application itself saves the session. Flask may do so again later, and this
    response may never be sent, so a current token stays.
    """
    try:
        if life.block is not None:
            life.was_modified = is_modified(life)
            still_open = (
                f"A {life.block.kind} was still open when the session was saved: nothing of its "
                "block is stored"
            )
            if by_hand:
                raise TransactionMisused(still_open)
            logger.error("%s", still_open)
        elif life.opened:
            if by_hand:
                _keep_token(life)
            elif life.mark is not None:
                _compare_with_parallel_requests(life, life.mark)
            with life.mutex:
                try:
                    stored = commit(life, rotating=False if by_hand else None)
                finally:
                    if life.written_large is not None:
                        life.drop_unreferenced()
                if not stored and life.renews and life.outage is None:
                    _renew_if_due(life)
                if life.wishes.cleared and life.seen.record is None and not life.ended:
                    _end_presented(life)
            if life.values.abandoned is not None:
                _report_abandoned(life)
            if life.entry is not None and not by_hand:
                take_back(life)  # of a block whose error the view has caught
    except ValueRefused:
        life.was_modified = True
        raise
    except StoreUnavailable:
        if not by_hand:
            take_back(life)
        raise
    finally:
        if not by_hand:
            life.phase = SAVED
    if life.of_users:
        _save_users(life, by_hand=by_hand)


def _save_users(life: Lifecycle, *, by_hand: bool) -> None:
    """Store the request's changes to users' values, after its session."""
    for values in life.of_users.values():
        if not life.ended:
            end_request(values, by_hand=by_hand)
            adopt_trouble(life, values)
            continue
        if values.opened and values.changes():
            logger.info("The session of a request ended: its changes to the user's were dropped")
            values.repository.events.emit(WriteDropped, values.handle, "session ended")
        values.phase = SAVED


def _compare_with_parallel_requests(life: Lifecycle, mark: Record) -> None:
    """Set no cookie that could replace the one of another first request."""
    imports, wrote = life.repository.imports, life.was_modified or is_modified(life)
    if imports is None or life.cookie != "set":
        return
    began = int(life.began.time * 1000)
    if not imports.may_answer(life.repository, mark, began, wrote=wrote):
        life.cookie = "keep"


def _end_presented(life: Lifecycle) -> None:
    """The request emptied a session that isn't stored, but may have come with other tokens."""
    checked = life.presented().checked
    if life.seen.presented or (checked is not None and checked.refused):
        # It came with an old token, or with several: end the sessions they lead to as well.
        life.destroy()
    elif checked is not None:
        life.cookie = "delete"


def _report_abandoned(life: Lifecycle) -> None:
    for key in life.values.changed_after_they_were_abandoned():
        logger.error(
            "session[%a] was changed through an object that left the session with a transaction, a "
            "lock, a reload or an update: the change is lost. Get the object from the session "
            "again after that.",
            key[:60],
        )


def _keep_token(life: Lifecycle) -> None:
    """Keep the token, since no response may carry a new one."""
    seen = life.seen
    signs_in = life.wishes.rotation is not None and seen.is_old_token
    if signs_in or (seen.presented and seen.record is None and life.values.changes()):
        raise SessionConflict(
            "A sign-in with an old token starts a session of its own, but here no response can "
            "carry its token. Sign in through an ordinary view."
        )
    if life.wishes.rotation is not None:
        logger.warning(
            "Session %s keeps its token despite a rotation: it was saved by hand, so perhaps no "
            "response carries a new one. Sign in through an ordinary view.",
            life.handle,
        )


def is_modified(life: Lifecycle) -> bool:
    """Whether the request changed the session, or wants it rotated, ended or saved."""
    if life.has_wishes():
        return True
    try:
        return life.opened and bool(life.values.changes())
    except ValueRefused:
        return True
