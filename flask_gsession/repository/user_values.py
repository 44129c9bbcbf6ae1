"""The values of a user in the store: one record for each user, separate from the sessions."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from ..config import Settings
from ..errors import UnreadableRecord, ValueLost
from ..events import (
    Event,
    Events,
    SessionCreated,
    SessionDestroyed,
    SessionRefused,
    SessionRenewed,
    SessionSaved,
    logger,
)
from ..stores.base import KEY_LENGTH, Clock, Record
from ..users.joins import NotJoined, closed, combined, joined
from ..values.marks import is_marked, marked, split
from ..values.payload import Body, Join
from ..values.references import refers
from .ending import delete_session
from .expiry import Expiry
from .idle_spans import FixedSpan, Span
from .large_values import BLOB_GRACE, Written, names_of
from .repository import Loaded, Repository, Update

#: The suffix of the keys of these records. No session key ends with its last character.
ENDING = "v_"
_LIFE = 100 * 366 * 86_400_000  # milliseconds; the idle expiry ends a record earlier
_DAY = 86_400_000
#: Events about sessions. A user's values aren't a session.
_OF_SESSIONS = (SessionCreated, SessionDestroyed, SessionRefused, SessionRenewed, SessionSaved)


def values_key(user_id: str) -> str:
    """The key of the record with the user's values."""
    digest = hashlib.sha256(b"flask-gsession user values " + user_id.encode()).digest()
    return urlsafe_b64encode(digest).decode()[: KEY_LENGTH - len(ENDING)] + ENDING


def may_be_user_values(key: str) -> bool:
    """Whether this can be the key of a user's values. The key of a roster may look the same."""
    return key.endswith(ENDING)


def is_user_values(repository: Repository, record: Record, *, for_others: bool = False) -> bool:
    """Whether a record holds the values of a user.

    ``for_others``: also True for a record that only other workers may be able to read.
    """
    if record.successor is not None or not may_be_user_values(record.key):
        return False
    try:
        return repository.records.read(record.key, record) is not None
    except UnreadableRecord as error:
        return for_others and error.for_others


def user_values_expiry(settings: Settings, clock: Clock) -> Expiry:
    """The rules for such a record: each use renews it for ``SESSION_USER_VALUES_LIFETIME``."""
    lifetime = int(settings.user_values_lifetime * 1000)
    step = max(1, min(_DAY, lifetime // 20))
    return Expiry(clock, FixedSpan(Span(lifetime + step, step)), _LIFE)


class UserValuesRecord:
    """The record with the values of one user.

    ``repository`` is a copy of the application's repository for this one record: it has a fixed
    key and the expiry of ``user_values_expiry``, and emits no events about sessions. Values work
    as they do in sessions.
    """

    def __init__(self, repository: Repository, user_id: str) -> None:
        self.key = key = values_key(user_id)
        expiry = user_values_expiry(repository.settings, repository.clock)
        self.repository = repository.for_records(expiry, lambda: ("", key))
        self.repository.events = _EventsOfValues(repository.events)
        self.repository.refusals = _RefusedValues()

    def capped(self, record: Record) -> Record:
        """An imported record, with times no later than if it were used now."""
        expiry = self.repository.expiry
        now, absolute = expiry.now(), min(record.absolute_expires_at, expiry.latest_end())
        idle = min(record.idle_expires_at, expiry.idle_end(Body({}), absolute))
        created = min(record.created_at, now, absolute)
        capped = record._replace(
            created_at=created, idle_expires_at=idle, absolute_expires_at=absolute
        )
        return record if capped == record else self.repository.records.with_times(record, capped)

    def remove_damaged(self) -> None:
        """Delete the record if no worker can read it. Two round trips.

        Raises ``UnreadableRecord`` if other workers may be able to read it.
        """
        store = self.repository.store
        try:
            record = store.load(self.key)
        except UnreadableRecord:
            store.delete(self.key)
            return
        if record is None:
            return
        try:
            self.repository.records.read(self.key, record)
        except UnreadableRecord as error:
            if error.for_others:
                raise
            store.delete(self.key, record.version)

    def forget(self) -> bool:
        """Delete the record and its large values. Returns whether there was one.

        One round trip, one more if it had large values.
        """
        return delete_session(self.repository, self.key, leave_roster=False)

    # -- the steps of a sign-in

    def join(self, join: Join, values: Mapping[str, bytes], absolute_end: int) -> None:
        """Join the values of a session, unless this revision or a later one has joined already.

        Raises ``NotJoined`` if they can't be joined, ``UnreadableRecord`` and ``StoreUnavailable``.
        Two round trips, two more for each lost race.
        """
        try:
            mine = {key: self._whole(key, raw) for key, raw in values.items()}
        except (ValueLost, UnreadableRecord) as error:
            raise NotJoined(str(error)) from error
        now = self.repository.now
        self._change_joins(lambda body: joined(body, join, mine, absolute_end, self.combine, now()))

    def combine(
        self, theirs: Mapping[str, bytes], base: Mapping[str, bytes], mine: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """See ``joins.combined``."""
        own = self.repository
        return combined(theirs, base, mine, own.merger, own.codec, own.user_keys, own.now())

    def close_join(self, join_id: bytes) -> None:
        """Note that the sign-in is complete. Two round trips."""
        self._change_joins(lambda body: closed(body, join_id, self.repository.now()))

    def _change_joins(self, change: Callable[[Body], Body | None]) -> None:
        """Store the result of ``change``, if any, and release the large values that it replaces."""
        repository, large = self.repository, self.repository.large
        written: Written = {}
        bases: Written = {}  # nothing else refers to the large values of a join
        replaced: set[str] = set()

        def edit(loaded: Loaded | None) -> Update[None]:
            before = Body({}) if loaded is None else loaded.body
            after = change(before)
            if after is None:
                return Update(None)
            end = repository.expiry.end_of_blobs(after)

            def with_references(join: Join) -> Join:
                return replace(join, values=large.write_all(join.values, lambda: end, bases))

            values = large.write(after, lambda: end, written, before.values)
            after = replace(
                after,
                values=values,
                joins=tuple(map(with_references, after.joins)),
                marked=any(map(is_marked, values.values())),
                has_large=any(map(refers, values.values())),
            )
            replaced.clear()
            replaced.update(names_of(before) - names_of(after))
            if loaded is None:
                return Update(None, repository.records.draft_new(after)[1])
            return Update(None, repository.records.draft_next(loaded.record, after))

        repository.update(self.key, edit)
        large.discard(replaced, BLOB_GRACE)

    def _whole(self, key: str, raw: bytes) -> bytes:
        """The encoded value itself, also for a reference: large values end with their session."""
        if not refers(raw):
            return raw
        codec = self.repository.codec
        mark, plain = split(raw)
        return marked(codec.encode(key, codec.decode(plain)), mark)


class _EventsOfValues(Events):
    """Passes on the events that aren't about sessions."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def emit(self, event: type[Event], *details: object) -> None:
        if event not in _OF_SESSIONS:
            self._events.emit(event, *details)


class _RefusedValues:
    """Logs that the values of a user can't be read."""

    def note(self, reason: str, key: str | None, detail: str = "") -> None:
        """See ``Refusals``."""
        logger.warning(
            "The values %s of a user can't be read: %s%s",
            key,
            reason,
            f" ({detail})" * bool(detail),
        )
