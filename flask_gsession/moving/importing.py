"""Imports the sessions of an archive into a store."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import BinaryIO

from msgspec.structs import replace

from ..errors import Gone, KeyTaken, RosterUnreadable, Stale, UnreadableRecord
from ..repository.ending import delete_session
from ..repository.large_values import BLOB_GRACE
from ..repository.repository import Loaded, Repository
from ..repository.user_values import UserValuesRecord, is_user_values, may_be_user_values
from ..stores.base import Record, Store, is_session_key, unexpired
from ..users.roster import Since, is_revoked_since
from ..values.envelope import NOT_ENCRYPTED
from ..values.payload import Body, Owner
from ..values.references import reference_in, refers
from .archive import Frame, check_archive
from .entering import enter
from .lasting import outlives_sessions

_REVOKED = "revoked since their sign-in"


class Importer:
    """Puts records and frames into ``store``: the repository's store, or a stand-in for it."""

    def __init__(
        self,
        repository: Repository,
        store: Store,
        *,
        overwrite: bool = False,
        dry_run: bool = False,
    ) -> None:
        self._repository = repository
        self._store = store
        self._overwrite = overwrite
        self._dry_run = dry_run
        #: why records can't be read, and how often for each reason
        self.problems: Counter[str] = Counter()
        self._unreadable: set[str] = set()
        self._user_values = UserValuesRecord(repository, "")

    def check(self, source: BinaryIO) -> int:
        """Check a whole archive, and collect ``problems``. Returns the number of records.

        Raises ``ArchiveError``.
        """
        large_values = self._repository.large.storage is not None
        return check_archive(source, self._check_record, large_values=large_values)

    def _check_record(self, record: Record) -> Body | None:
        problem, body = self._read(record)
        if problem:
            self.problems[problem] += 1
            self._unreadable.add(record.key)
        return body

    def is_first(self, record: Record) -> bool:
        """Whether to import the record before the sessions, because they depend on it."""
        return not is_session_key(record.key) and not is_user_values(self._repository, record)

    def put(self, record: Record) -> str:
        """Import a record, and return the outcome in words.

        A session never ends later than one that is created now. A stored session with the same key
        stays as it is, unless ``overwrite`` is set. A session that is bound to a user is entered in
        the user's roster, unless the user's sessions were revoked since its sign-in.
        """
        problem, body = self._read(record)
        if problem:
            return "unreadable"
        if not is_session_key(record.key):
            if body is None:
                return self._put_lasting(record)
            record, now = self._user_values.capped(record), self._repository.now()
            return "expired" if now >= record.idle_expires_at else self._put(record, now)
        record, now = self._capped(record), self._repository.now()
        if now >= record.idle_expires_at:
            return "expired"
        if body is None or body.owner is None:
            return self._put(record, now)
        try:
            return self._put_bound(record, body, body.owner, now)
        except RosterUnreadable:
            return "of a user whose list of sessions can't be read"

    def _put_bound(self, record: Record, body: Body, owner: Owner, now: int) -> str:
        """Import a session whose token a client still has: store it, then enter it.

        Until it is entered, a request with this session checks the roster first.
        """
        repository = self._repository
        since = Since(None, record.created_at)
        roster = repository.rosters.look(owner.user_id).roster
        kept = any(each.key == record.key and not each.ending for each in roster.devices)
        if not kept and is_revoked_since(roster, since):
            return _REVOKED
        bound = repository.records.with_owner(record, body, replace(owner, seen=0))
        done = self._put(bound._replace(version=record.version), now)
        if not self._dry_run and done in ("imported", "overwritten", "there already"):
            body.owner = replace(
                owner, until=repository.expiry.listed_until(body.values, body.lifetime, record)
            )
            if not enter(repository, Loaded(record, body), since, b""):
                delete_session(repository, record.key, leave_roster=False)
                return _REVOKED
        return done

    def _put_lasting(self, record: Record) -> str:
        """Import a mark or a roster, with its times, unless there is one."""
        if self._repository.now() >= record.idle_expires_at:
            return "expired"
        try:
            if not self._dry_run:
                self._store.create(record)
            elif unexpired(self._store, record.key, self._repository.now()) is not None:
                return "there already"
        except (KeyTaken, UnreadableRecord):
            return "there already"
        return "imported"

    def _put(self, record: Record, now: int) -> str:
        store = self._store
        try:
            there = unexpired(store, record.key, now)
            if there is None:
                if not self._dry_run:
                    store.create(record)
                return "imported"
            if there.version == record.version:
                return "there already"
            if self._overwrite and record.successor is None:
                if not self._dry_run:
                    store.save(record, there.version)
                return "overwritten"
        except (
            KeyTaken,
            Gone,
            Stale,
            UnreadableRecord,
        ):  # another process was first, or there is no record
            pass
        return "changed since and kept"

    def put_frame(self, frame: Frame) -> None:
        """Import a piece of a large value if ``put`` will import the session it belongs to."""
        repository = self._repository
        of_user = may_be_user_values(frame.key)
        latest = (self._user_values.repository if of_user else repository).expiry.latest_end()
        now, end = repository.now(), min(frame.expires_at, latest + BLOB_GRACE)
        if self._dry_run or frame.key in self._unreadable or now >= end:
            return
        try:
            there = unexpired(self._store, frame.key, now)
        except UnreadableRecord:
            return
        if there is not None:
            same = there.version == frame.version
            if not self._overwrite or same or there.successor is not None:
                return
            # The stored session may refer to this value, so never shorten its life.
            end = max(end, there.absolute_expires_at + BLOB_GRACE)
        assert repository.large.storage is not None  # otherwise, check_archive fails
        with suppress(Gone):  # another process removed it; the value is lost
            repository.large.storage.blobs.write_frame(frame.blob, frame.offset, frame.frame, end)

    def _read(self, record: Record) -> tuple[str, Body | None]:
        """Why the application can't read a record ("" if it can), and the record's body.

        A pointer has an empty body.
        """
        of_user = is_user_values(self._repository, record)
        if not is_session_key(record.key) and not of_user:
            lasting = outlives_sessions(self._repository, record)
            return "" if lasting else "not the key of a session", None
        try:
            body = self._repository.records.read(record.key, record)
            if body is None:
                return "", Body({})
            for raw in body.values.values():
                if refers(raw):
                    reference_in(raw)
        except UnreadableRecord as error:
            known = NOT_ENCRYPTED in error.detail
            return f"{error.reason} ({error.detail})" if known else error.reason, None
        return "", body

    def _capped(self, record: Record) -> Record:
        """The record, ending no later than a session that this application creates now."""
        repository = self._repository
        now = repository.now()
        absolute = min(record.absolute_expires_at, repository.expiry.latest_end())
        capped = record._replace(
            created_at=min(record.created_at, now, absolute),
            idle_expires_at=min(record.idle_expires_at, absolute),
            absolute_expires_at=absolute,
        )
        return record if capped == record else repository.records.with_times(record, capped)
