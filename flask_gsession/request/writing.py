"""Writes a session: applies a request's changes to the stored state, in one retry loop.

Everything that can lose a race and try again goes through ``Write``: the save with the response, a
transaction, ``update_atomic``, ``take``, a rotation, the removal of a lost value. A write is noted
before it is sent, and recognised by its version, so nothing is applied twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ..errors import (
    Gone,
    KeyTaken,
    LogoutUnconfirmed,
    SessionConflict,
    SessionEnded,
    Stale,
    StoreError,
    StoreUnavailable,
    UnreadableRecord,
)
from ..events import WriteDropped, logger
from ..repository.permanent import PERMANENT
from ..repository.races import write
from ..stores.support import Mergeable, mergeable
from ..values.marks import unexpired
from ..values.merge import Change, reject
from .checks import check_lease
from .ending import refuse
from .following import catch_up
from .joining import hand_over, signs_in
from .lifecycle import UNCONFIRMED, Lifecycle, worth_keeping
from .own_session import start_own_session
from .roster_entries import Revoked, enter_roster, is_revoked
from .state import NO_WISHES, Seen, without_rotation
from .storing import Edit, Written, store
from .tracking import NO_CHANGES

_TOKENS_TAKEN = 3


class LostRace(SessionConflict):
    """A transaction can't be stored, since another request was faster."""


def needs_own_session(life: Lifecycle, rotating: bool) -> bool:
    """Whether this is a sign-in with an old token, perhaps since another request rotated."""
    return rotating and life.wishes.rotation is not None and life.seen.is_old_token


class Write(Struct, eq=False):
    """One write of a session: ``edit`` returns what to store over the present state.

    With ``exactly``, a lost race raises ``LostRace``. These are methods, not closures, since
    Python calls methods faster after the first call.
    """

    life: Lifecycle
    what: str = "save"
    exactly: bool = False
    stale: Seen | None = None  # set if another request has replaced it
    taken: int = 0

    def __repr__(self) -> str:
        """Hides the values, since error trackers store local variables."""
        return f"<{type(self).__name__}>"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []

    def edit(self) -> Edit | None:
        """The values to store; None if there are none. Runs again after each lost race."""
        raise NotImplementedError

    def run(self) -> bool:
        """Store the edit. False if there was nothing to store, or the session has ended."""
        life = self.life
        if life.lease is not None:
            check_lease(life)
        if life.repository.edge is None:
            written = write(self.edit, self.send, life.tries)
        else:
            with mergeable(Mergeable(self.unmergeable(), frozenset(life.policies or ()))):
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
        """Store this edit, unless another writer was faster. None if the session has ended.

        The caller holds the mutex, and has seen this state of the session.
        """
        try:
            return store(self.life, step, lost)
        except Exception as error:
            self._failed(step, error)
            return None

    def _failed(self, step: Edit, error: Exception) -> None:
        """Raise the error that follows from a failed attempt. Returns if the session has ended."""
        life = self.life
        if isinstance(error, Revoked) and is_revoked(life):
            life.end(self.what)
            return
        # The key of a user's values is fixed: if it is taken, another device was faster.
        is_taken = isinstance(error, KeyTaken) and life.is_of_user
        if is_taken or isinstance(error, (Revoked, Stale, Gone)):
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
            life.repository.refusals.note(error.reason, life.handle, error.detail)
            life.end(self.what)
            return
        elif isinstance(error, StoreUnavailable) and not isinstance(error, LogoutUnconfirmed):
            life.note_outage(error, "created" if step.seen.record is None else "saved")
        raise error

    def catch_up(self) -> bool:
        """Load what another request stored. Returns False if the session has ended."""
        life, stale, self.stale = self.life, self.stale, None
        with life.mutex:
            if life.seen is not stale:
                return True
            if not catch_up(life):
                life.end(self.what)
                return False
            # An attempt may have been stored that is not in the roster yet.
            return life.entry is None or enter_roster(life)


class Commit(Write, eq=False, kw_only=True):
    """Stores all changes and wishes of the request; see ``saving.commit``.

    The caller of ``run`` holds the mutex.
    """

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
        if self.stale is not None and not self.catch_up():
            return None
        life, changes = self.life, self.changes
        self.changes = None
        if (life.wishes is not NO_WISHES or life.repository.user_keys) and self._signs_in():
            changes = None
        if changes is None:
            changes = life.changes()
        if life.seen.record is None:
            return _new(life, changes)
        if not changes and not life.has_wishes(rotating=self.rotating):
            return None
        values, repository = life.values, life.repository
        try:
            now = None if values.now is None else values.now()
            merged = repository.merger.apply(values.stored, changes, now, life.policies)
        except SessionConflict:
            life.conflict("refused")
            raise
        except UnreadableRecord as error:
            repository.events.emit(WriteDropped, life.handle, error.reason)
            refuse(life, error.reason, error.detail)
            return None
        wishes = life.wishes
        if wishes is not NO_WISHES and not self.rotating:
            wishes = without_rotation(wishes, but_binding=life.lease is None)
        return Edit(life.seen, merged, changes, wishes)

    def _signs_in(self) -> bool:
        """Prepare a sign-in. Returns whether that changed anything."""
        life, changed = self.life, False
        if needs_own_session(life, self.rotating):
            start_own_session(life)
            changed = True
        user_id = signs_in(life) if life.repository.user_keys else None
        return (user_id is not None and hand_over(life, user_id)) or changed


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
