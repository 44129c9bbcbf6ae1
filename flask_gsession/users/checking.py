"""What the doctor says about users' rosters."""

from __future__ import annotations

from collections.abc import Iterator

from flask import Flask

from ..errors import StoreError, UnreadableRecord
from ..repository.repository import Repository
from ..stores.base import Record, is_record_key, is_session_key
from ..stores.parts import Finding, parts_of
from .rebuilding import LOGIN

_PAGES = 10  # of the store that are looked at, so that a large one takes no longer


def check_users(repository: Repository, app: Flask) -> Iterator[Finding]:
    """Look at some of the records: rosters that can't be read, and users that none knows.

    Nothing without rosters. About ten round trips.
    """
    rosters = damaged = unbound = 0
    try:
        for record in _some(repository):
            if is_session_key(record.key):
                unbound += _is_unbound(repository, record)
            elif record.key.endswith("_") and is_record_key(record.key):
                rosters += 1
                damaged += not _can_be_read(repository, record)
    except StoreError:  # which other checks report
        return
    if damaged:
        found = f"{damaged} of {rosters} lists of users' sessions can't be read"
        advice = "These users get 503. Repair the lists: flask gsession users rebuild"
        yield Finding("error", "users", found, advice)
    elif rosters:
        yield Finding("ok", "users", "their lists of sessions can be read")
    if unbound and hasattr(app, "login_manager"):
        found = f"{unbound} sessions are from before users had lists, which may be incomplete"
        advice = "They enter when they are used. To enter them now: flask gsession users rebuild"
        yield Finding("warning", "users", found, advice)


def _some(repository: Repository) -> Iterator[Record]:
    scans = parts_of(repository.store).scans
    cursor = ""
    for _ in range(_PAGES if scans is not None else 0):
        assert scans is not None
        page = scans.scan(cursor)
        yield from page.records
        cursor = page.cursor
        if not cursor:
            return


def _is_unbound(repository: Repository, record: Record) -> bool:
    try:
        body = repository.read(record.key, record)
    except UnreadableRecord:
        return False
    return body is not None and body.owner is None and LOGIN in body.values


def _can_be_read(repository: Repository, record: Record) -> bool:
    try:
        repository.rosters.read(record)
    except UnreadableRecord:
        return False
    return True
