"""Records that outlive sessions and keep old cookies invalid: marks, and rosters with an epoch."""

from __future__ import annotations

from ..errors import UnreadableRecord
from ..repository.repository import Repository
from ..stores.base import Record, is_record_key, is_session_key
from ..users.format import unpack
from .mark import ENDING, Mark


def may_outlive_sessions(key: str) -> bool:
    """Whether this can be the key of a session, a mark or a roster."""
    return is_session_key(key) or (is_record_key(key) and key.endswith(ENDING))


def outlives_sessions(repository: Repository, record: Record) -> bool:
    """Whether this is a mark, or the roster of a user whose sessions have ever been revoked.

    The roster's epoch refuses old cookies that were not imported before the revocation.
    """
    if record.successor is not None or not record.key.endswith(ENDING):
        return False
    try:
        content = repository.other_records.read(record)
    except UnreadableRecord:
        return False
    try:
        Mark.of(content)
    except UnreadableRecord:
        pass
    else:
        return True
    try:
        return unpack(content).epoch > 0
    except UnreadableRecord:
        return False
