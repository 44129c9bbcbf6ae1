"""Turns debugging on and off for one session."""

from __future__ import annotations

from .repository import Loaded, Repository, Update


def debug_session(repository: Repository, key: str, until: int | None) -> tuple[str, bool] | None:
    """Turn on debugging for one session, or turn it off.

    ``until``: when debugging ends, in milliseconds since 1970; None turns it off. Nothing else
    about the session changes, and running requests keep their changes. Returns the session's
    handle and whether it was being debugged already; None without a session. Raises
    ``SessionConflict`` after too many lost races. Two round trips, two more for each lost race.
    """

    def switch(loaded: Loaded | None) -> Update[tuple[str, bool] | None]:
        if loaded is None:
            return Update(None)
        old, body = loaded.record, loaded.body
        before = body.debug_until is not None and body.debug_until > repository.now()
        if until is None and not before:
            return Update((old.key, False))
        body.debug_until = until
        return Update((old.key, before), repository.records.with_body(old, body))

    return repository.update(key, switch)
