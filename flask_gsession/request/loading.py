"""Loads a session at the first look: from the store, the near cache or an old cookie."""

from __future__ import annotations

from time import perf_counter

from ..errors import StoreUnavailable, UnreadableRecord
from ..events import SessionDestroyed, logger
from ..repository.ending import delete_session
from ..repository.imports import Imports
from ..repository.repository import Loaded
from ..users.revoking import is_member
from ..values.payload import Body
from .debugging import trace_if_debugged
from .following import catch_up
from .late_changes import report_late
from .lifecycle import NO_BODY, Lifecycle
from .rebasing import start_empty
from .state import (
    FROM_STORE,
    IN_VIEW,
    NO_WISHES,
    NOTHING_SEEN,
    SAVED,
    NearLook,
    Outage,
    Presented,
    Seen,
    current_block,
)
from .tracking import Looks, TrackedValues


def load(life: Lifecycle) -> TrackedValues:
    """The values, loaded at the first call. Raises ``StoreUnavailable``."""
    if life.opened:
        return life.values
    with life.mutex:
        if life.opened:  # another thread was faster
            return life.values
        if life.outage is not None and life.outage.loading:
            return _continue_without(life, life.outage.error)
        presented, found = life.presented(), NO_BODY
        checked = presented.checked  # no token in local variables
        key = presented.handle if checked is None else checked.key
        try:
            if key:
                loaded = _find(life, key, presented)
                if loaded is not None:
                    found = loaded.body
                    token = None
                    if checked is not None and loaded.record.key == key:
                        token = checked.token
                        if checked.outdated:
                            life.cookie = "set"
                    life.seen = Seen(token, loaded.record, found, checked is not None)
                    if life.ended:
                        life.ended = False
            elif checked is not None:
                life.repository.refusals.note(checked.reason, None)
            if life.repository.imports is not None:
                found = _look_at_imports(life, life.repository.imports, found)
        except StoreUnavailable as error:
            logger.log(error.log_level, "A session could not be loaded: %s", error)
            return _continue_without(life, error)
        if found.marked or found.has_large or life.trace is not None:
            # Each look takes the mutex, or two threads would load one large value twice.
            life.values = life.new_values(found)
        else:
            looks: Looks = found.values, {}
            codec = life.repository.codec
            life.values = TrackedValues(codec, found.values, None, life.mutex, looks)
        life.opened = True
        return life.values


def _find(life: Lifecycle, key: str, presented: Presented) -> Loaded | None:
    """The session under ``key``, unless its record can't be read or it was revoked."""
    repository, began = life.repository, perf_counter()
    try:
        if repository.near is None:
            loaded = repository.find(key, presented.checked is not None)
        else:
            loaded = _find_near(life, key, presented)
        if loaded is None:
            return None
        owner, debug_until = loaded.body.owner, loaded.body.debug_until
        if owner is not None and not owner.seen and not is_member(repository, loaded):
            repository.refusals.note("revoked", key)  # it was never entered in its user's roster
            return None
    except UnreadableRecord as error:
        life.seen = Seen(for_others=error.for_others)
        repository.refusals.note(error.reason, key, error.detail)
        return None
    if debug_until is not None:
        trace_if_debugged(life, "load", began, debug_until)
    return loaded


def open_from_store(life: Lifecycle, what: str) -> TrackedValues:
    """Like ``load``, but bypasses the near cache, since ``what`` needs the stored state.

    Values that the request looked at or changed stay as they are. Raises ``StoreUnavailable``.
    """
    if life.repository.near is not None:
        with life.mutex:
            near = life.near
            if near is None:
                life.near = FROM_STORE
            elif near.hit and life.seen.record is near.record and not catch_up(life):
                life.end(what)
    return load(life)


def open_for_writing(life: Lifecycle, what: str, *details: str) -> TrackedValues:
    """The values, for a change of ``what % details``. Logs a change that comes too late.

    A transaction or a lock stores its own changes, even after the response.
    """
    values = life.values if life.opened else load(life)
    if life.phase == SAVED and (life.block is None or current_block.get() is not life.block):
        report_late(life, what, *details)
    if life.seen.for_others:
        life.check_readable()
    return values


def _find_near(life: Lifecycle, key: str, presented: Presented) -> Loaded | None:
    repository, near = life.repository, life.repository.near
    if near is None or life.request is None or presented.checked is None:
        return repository.find(key)
    if life.near is not FROM_STORE:
        version = repository.last_seen_version(life.request, presented.by_header)
        loaded = repository.find_near(key, version)
        if loaded is not None:
            life.near = NearLook(loaded.record, hit=True)
            return loaded
    loaded = repository.find(key, True, near.load_near)
    life.near = NearLook(None if loaded is None else loaded.record)
    return loaded


def _look_at_imports(life: Lifecycle, imports: Imports, found: Body) -> Body:
    """Take over the session of an old cookie, unless our own cookie led to a session."""
    presented, seen = life.presented(), life.seen
    if seen.record is not None:
        if not imports.has_ended(life.repository, found):
            return found
        logger.info("Session %s was ended by an old worker", seen.record.key)
        delete_session(life.repository, seen.record.key, body=found)
        life.repository.events.emit(SessionDestroyed, seen.record.key)
        life.seen = NOTHING_SEEN
        life.cookie, life.drops_old_cookie = "delete", True
        return NO_BODY
    refused = presented.checked is not None and presented.checked.refused
    elsewhere = presented.by_header or presented.handle is not None
    if life.request is None or elsewhere or refused or seen.for_others:
        return found
    taken = imports.take_over(life.repository, life.request)
    life.drops_old_cookie = taken.dead_cookie
    if taken.loaded is None:
        return found
    life.ended = False
    life.imported = taken.loaded.record.key
    life.mark = taken.mark
    life.seen = Seen(taken.token, taken.loaded.record, taken.loaded.body, presented=True)
    if taken.token is not None:
        life.cookie = "set"
    return taken.loaded.body


def _continue_without(life: Lifecycle, error: StoreUnavailable) -> TrackedValues:
    """Raise the outage, or continue with an empty session and let the response report it.

    A hook or error page must not raise while Flask processes the response.
    """
    if life.seen.record is not None:  # an old session could not be taken over
        life.seen = NOTHING_SEEN
    unseen = life.phase != IN_VIEW
    known = life.outage is not None and life.outage.unseen
    life.outage = Outage(error, loading=True, unseen=unseen or known)
    if not unseen:
        raise error
    life.values = life.new_values()
    return life.values


def reload(life: Lifecycle) -> None:
    """Discard this request's changes, and load again. The caller holds the mutex."""
    if life.seen.record is not None:
        # Discards changes only after loading, which may fail or be interrupted.
        if not catch_up(life, discard=True):
            life.end("reload")
        life.outage = None
        life.wishes = NO_WISHES
    elif life.is_of_user and life.opened:
        catch_up(life, discard=True)
        life.outage = None
    elif life.opened and life.cookie != "keep":
        life.outage = None
        life.wishes = NO_WISHES
        start_empty(life.values)
    else:
        life.outage = None
        life.opened = False
        life.forget()
        load(life)
