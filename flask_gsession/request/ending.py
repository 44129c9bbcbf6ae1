"""Ends a session: by this request, or because its record can't be used."""

from __future__ import annotations

import time
from functools import partial

from ..errors import LogoutUnconfirmed, StoreUnavailable, UnreadableRecord
from ..events import SessionDestroyed, logger
from ..repository.ending import delete_session
from ..tokens import session_key
from .checks import check_not_in_retried_code
from .debugging import trace_if_debugged
from .lifecycle import UNCONFIRMED, Lifecycle
from .loading import load
from .state import Outage


def destroy(life: Lifecycle) -> None:
    """End the session in the store now; see ``SessionData.destroy``."""
    with life.mutex:
        check_not_in_retried_code(life, "Ending the session")
        presented = life.presented()
        if life.repository.imports is not None:
            load(life)  # an old cookie may lead to a session
            end_old_session(life)
        keys = [attempt.record.key for attempt in life.attempts.values()]
        owner = None if life.seen.body is None else life.seen.body.owner
        if life.seen.record is not None:
            keys.insert(0, life.seen.record.key)
        is_presented = life.seen.record is not None and life.seen.presented
        checked = presented.checked
        if not is_presented and life.imported is not None:
            keys.append(life.imported)
        if not is_presented and checked is not None:
            # Even if the token was refused, and this request has created another session since.
            keys.extend(map(session_key, checked.signed))
        unconfirmed: LogoutUnconfirmed | None = None
        bodies = {key: life.seen.body for key in keys[:1] if life.seen.record is not None}
        emitted = []
        for key in dict.fromkeys(keys):
            on_debug = partial(trace_if_debugged, life, "delete", time.perf_counter())
            try:
                ended = delete_session(
                    life.repository, key, on_debug, owner=owner, body=bodies.get(key)
                )
            except UnreadableRecord as error:
                life.repository.refusals.note(error.reason, key, error.detail)
                continue
            except LogoutUnconfirmed as error:
                logger.error(UNCONFIRMED, error)
                unconfirmed, ended = error, True
            except StoreUnavailable as error:
                life.note_outage(error, "ended")
                if not life.opened:
                    life.outage = Outage(error, loading=True)
                raise
            if ended:
                emitted.append(key)
        known = life.values.stored if life.has_large else None
        life.forget()
        if unconfirmed is not None and known is not None:
            life.unreferenced.release_replaced(known, None)
        life.opened = True
        life.ended = False
        life.outage = None
        life.cookie = "keep" if presented.checked is None else "delete"
        life.drops_old_cookie = life.repository.imports is not None
        for key in emitted[:1]:
            life.repository.events.emit(SessionDestroyed, key)
        if unconfirmed is not None:
            raise unconfirmed


def end_old_session(life: Lifecycle) -> None:
    """Remove the old record of the request's old cookie, if the session came from another one.

    There is one if the user went back to the old workers in between, in a rollback.
    """
    imports, request = life.repository.imports, life.request
    if imports is not None and request is not None:
        imports.end_presented(life.repository, request, life.seen.body)


def refuse(life: Lifecycle, reason: str, detail: str) -> None:
    """Continue with a new anonymous session, since the loaded record can't be read."""
    with life.mutex:
        life.repository.refusals.note(reason, life.handle, detail)
        life.forget()
        life.cookie = "delete"  # otherwise, the next request would load the same record


def leads_nowhere(life: Lifecycle) -> bool:
    """Whether the request has a token that leads to no session, here or in any other worker."""
    return (
        life.opened
        and life.seen.record is None
        and not life.seen.for_others
        and life.presented().checked is not None
    )
