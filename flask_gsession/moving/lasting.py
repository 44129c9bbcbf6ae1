"""The records that outlive sessions and keep old cookies dead: marks, and rosters with an epoch."""

from __future__ import annotations

from ..errors import UnreadableRecord
from ..repository.repository import Repository
from ..stores.base import Record, is_record_key, is_session_key
from ..users.format import unpack
from .mark import ENDING, Mark


def may_be_lasting(key: str) -> bool:
    """Whether this can be the key of a session, of a mark or of a roster."""
    return is_session_key(key) or (is_record_key(key) and key.endswith(ENDING))


def is_lasting(repository: Repository, record: Record) -> bool:
    """Whether this is a mark, or the roster of a user whose sessions were revoked at some time.

    An old cookie that was not imported before a revocation is refused by the roster's epoch.
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
