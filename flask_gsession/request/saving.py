"""Saves a session, at the latest while Flask processes the response, or renews it."""

from __future__ import annotations

from ..errors import (
    RosterUnreadable,
    SessionConflict,
    SessionEnded,
    StoreUnavailable,
    TransactionMisused,
    UnreadableRecord,
    ValueRefused,
)
from ..events import SessionRenewed, WriteDropped, logger
from ..repository.permanent import is_permanent
from ..stores.base import Record
from ..users.rosters import LOGIN
from ..values.payload import Owner
from .checks import check_not_in_retried_code
from .ending import destroy
from .following import resolve_attempts
from .joining import close_join
from .late_changes import report_abandoned
from .lifecycle import NO_ATTEMPTS, NO_USERS, Lifecycle
from .ownership import user_id_of
from .roster_entries import enter_roster, is_touch_due, take_back
from .state import NO_WISHES, SAVED, Block, Seen
from .user_values import adopt_trouble
from .writing import Commit, LostRace, needs_own_session


def end_request(life: Lifecycle, *, by_hand: bool = False) -> None:
    """Store the request's changes while Flask processes the response.

    ``by_hand``: the application itself saves the session. Flask may do so again later, and this
    response may never be sent, so a current token stays.
    """
    try:
        block = life.block  # once, since another thread may leave it
        if block is not None:
            _report_open_block(life, block, by_hand=by_hand)
        elif life.opened:
            if by_hand:
                _keep_token(life)
            elif life.mark is not None:
                _compare_with_parallel_requests(life, life.mark)
            stored = False
            unfinished = life.attempts is not NO_ATTEMPTS or life.entry or life.joined
            if life.values.base or life.wishes is not NO_WISHES or unfinished or life.written_large:
                with life.mutex:
                    try:
                        stored = commit(life, rotating=False if by_hand else None)
                    finally:
                        if life.written_large is not None:
                            life.drop_unreferenced()
                    if life.wishes.cleared and life.seen.record is None and not life.ended:
                        _end_presented(life)
            if not stored and life.renews and life.outage is None:
                _renew_if_due(life)
            if life.values.abandoned is not None:
                report_abandoned(life)
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
    if life.of_users is not NO_USERS:
        _save_users(life, by_hand=by_hand)


def _report_open_block(life: Lifecycle, block: Block, *, by_hand: bool) -> None:
    life.was_modified = is_modified(life)
    still_open = (
        f"A {block.kind} was still open when the session was saved: nothing of its block is stored"
    )
    if by_hand:
        raise TransactionMisused(still_open)
    logger.error("%s", still_open)


def commit(
    life: Lifecycle,
    *,
    transaction: Block | None = None,
    rotating: bool | None = None,
) -> bool:
    """Store the request's changes and wishes. Returns whether there were any.

    The caller holds the mutex. ``transaction``: store exactly on the version it began with, or
    raise ``LostRace``. ``rotating``: whether to rotate if that is wished. By default, rotates
    outside locks only: a lock belongs to the session's key, so the rotation waits until you leave
    the lock.
    """
    unfinished = life.attempts is not NO_ATTEMPTS or life.entry or life.joined
    if unfinished and life.outage is None and not _finish_earlier_write(life):
        return True
    changes, wishes = life.changes(), life.wishes
    if wishes is NO_WISHES:
        if not changes:
            return False
        rotating = False
    else:
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
    exactly = transaction is not None and not needs_own_session(life, rotating)
    if transaction is not None and exactly:
        seen = life.seen
        if transaction.version != (seen.record and seen.record.version):
            life.conflict("transaction")
            raise LostRace
    return Commit(life, exactly=exactly, changes=changes, rotating=rotating).run()


def _finish_earlier_write(life: Lifecycle) -> bool:
    """Complete an interrupted write. Returns False if the user's roster refuses the session."""
    if life.attempts is not NO_ATTEMPTS:
        resolve_attempts(life)
    if life.entry is not None and not enter_roster(life):
        return False
    if life.joined is not None:
        close_join(life)
    return True


def _save_users(life: Lifecycle, *, by_hand: bool) -> None:
    """Store the request's changes to users' values, after its session."""
    for values in life.of_users.values():
        if not life.ended:
            end_request(values, by_hand=by_hand)
            adopt_trouble(life, values)
            continue
        if values.opened and values.pending():
            logger.info("The session of a request ended: its changes to user values were dropped")
            values.repository.events.emit(WriteDropped, values.handle, "session ended")
        values.phase = SAVED


def _compare_with_parallel_requests(life: Lifecycle, mark: Record) -> None:
    """Set no cookie if it could replace the cookie of another request that also came first."""
    imports, wrote = life.repository.imports, life.was_modified or is_modified(life)
    if imports is None or life.cookie != "set":
        return
    began = int(life.began.time * 1000)
    if not imports.may_set_cookie(life.repository, mark, began, wrote=wrote):
        life.cookie = "keep"


def _end_presented(life: Lifecycle) -> None:
    """End the sessions of the request's other tokens, after it emptied one that isn't stored."""
    checked = life.presented().checked
    if life.seen.presented or (checked is not None and checked.refused):
        # It came with an old token, or with several: end the sessions they lead to as well.
        destroy(life)
    elif checked is not None:
        life.cookie = "delete"


def _keep_token(life: Lifecycle) -> None:
    """Keep the token, since no response may carry a new one."""
    seen = life.seen
    signs_in = life.wishes.rotation is not None and seen.is_old_token
    if signs_in or (seen.presented and seen.record is None and life.pending()):
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
        return life.opened and bool(life.pending())
    except ValueRefused:
        return True


def _renew_if_due(life: Lifecycle) -> None:
    """Move the idle expiry if that is due. An edge that is cut off can't touch the roster."""
    record, body, stored = life.seen.record, life.seen.body, life.values.stored
    if record is None or body is None:
        return
    has_user = body.owner is not None or LOGIN in stored
    if has_user and not life.repository.is_cut_off and is_touch_due(life):
        _save_to_touch(life)
        return
    idle_end = life.repository.expiry.due(record, stored, body.lifetime)
    if idle_end is not None:
        with life.mutex:
            _renew(life, life.seen, record, body.owner, idle_end)


def _renew(life: Lifecycle, seen: Seen, record: Record, owner: Owner | None, idle_end: int) -> None:
    if seen.record is not record:
        return  # another thread of the request has just stored something
    repository, values = life.repository, life.values
    if owner is not None:
        if repository.is_cut_off:
            idle_end = max(record.idle_expires_at, min(idle_end, owner.until * 1000))
        elif idle_end > owner.until * 1000:
            # A timeout was raised since the roster was last updated, so update it first.
            _save_to_touch(life)
            return
    try:
        renewed = repository.renew(
            record, life.body(values.stored, has_large=life.has_large), idle_end
        )
    except (StoreUnavailable, UnreadableRecord) as error:
        # This request read correct values and has nothing to write. The next one renews.
        logger.warning("A session could not be renewed: %s", error)
        return
    if renewed:
        record = record._replace(idle_expires_at=idle_end)
        life.seen = Seen(seen.token, record, seen.body, presented=seen.presented)
        if seen.token is not None and is_permanent(values.stored):
            life.cookie = "set"
        repository.events.emit(SessionRenewed, record.key)


def _save_to_touch(life: Lifecycle) -> None:
    """Save an unchanged session, since a save touches its user's roster."""
    life.wish(forced=True)
    try:
        with life.mutex:
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
    check_not_in_retried_code(life, "Binding a session from an earlier version")
    with life.mutex:
        life.wish(forced=True)
        commit(life, rotating=False)
    if life.ended:
        raise SessionEnded
