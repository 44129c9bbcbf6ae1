"""The values of a user in the store: one record for each user, separate from the sessions."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from ..errors import KeyTaken, Stale, UnreadableRecord, ValueLost
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
from ..stores.base import KEY_LENGTH, Record, new_version
from ..users.joins import NotJoined, closed, combined, joined
from ..values.large_values import pieces_of
from ..values.marks import is_marked, marked, split
from ..values.payload import Body, Join
from ..values.references import Reference, content_of, names_in, refers
from .repository import BLOB_GRACE, Loaded, Repository, Update

#: The ending of the keys of these records. No session key ends with its last character.
ENDING = "v_"
_LIFE = 100 * 366 * 86_400_000  # milliseconds; the idle expiry ends a record earlier
_DAY = 86_400_000
#: Events about sessions, which a user's values are not.
_OF_SESSIONS = (SessionCreated, SessionDestroyed, SessionRefused, SessionRenewed, SessionSaved)


def values_key(user_id: str) -> str:
    """The key of the record with the user's values."""
    digest = hashlib.sha256(b"flask-gsession user values " + user_id.encode()).digest()
    return urlsafe_b64encode(digest).decode()[: KEY_LENGTH - len(ENDING)] + ENDING


def may_be_user_values(key: str) -> bool:
    """Whether this can be the key of a user's values. The key of a roster may look the same."""
    return key.endswith(ENDING)


def is_user_values(repository: Repository, record: Record, *, for_others: bool = False) -> bool:
    """Whether a record holds the values of a user. ``for_others``: or may, to other workers."""
    if record.successor is not None or not may_be_user_values(record.key):
        return False
    try:
        return repository.read(record.key, record) is not None
    except UnreadableRecord as error:
        return for_others and error.for_others


class UserValuesRepository(Repository):
    """The application's repository, for the record of one user.

    Everything about values works as in sessions. But the record lives differently: it has one key,
    each use renews it for ``SESSION_USER_VALUES_LIFETIME``, and it counts as no session.
    """

    def __init__(self, repository: Repository, user_id: str) -> None:
        vars(self).update(vars(repository))
        self.user_id = user_id
        self.key = values_key(user_id)
        self.events = _EventsOfValues(repository.events)
        self.near = self.imports = self.before_create = self.check = None
        self._unseen = {}  # type: ignore[assignment]  # no newcomers
        lifetime = int(self.settings.user_values_lifetime * 1000)
        step = max(1, min(_DAY, lifetime // 20))
        self._usual_span = (lifetime + step, step)

    # -- keys and times

    def latest_end(self) -> int:
        return self.now() + _LIFE

    def _idle_span(self, values: Mapping[str, bytes], lifetime: int | None) -> tuple[int, int]:
        return self._usual_span

    def draft_new(self, body: Body) -> tuple[str, Record]:
        now, absolute = self.now(), self.latest_end()
        payload = self._payloads.pack(self.key, body, now, absolute)
        end = self._end(self._idle_end(body, absolute), body, absolute)
        return "", Record(self.key, new_version(), now, end, absolute, payload)

    def draft_next(
        self, old: Record, body: Body, restart_idle: bool = False, renew: bool = True
    ) -> Record:
        record = super().draft_next(old, body, restart_idle, renew)
        end = self._end(record.idle_expires_at, body, record.absolute_expires_at)
        return record._replace(idle_expires_at=end)

    @staticmethod
    def _end(idle_end: int, body: Body, absolute: int) -> int:
        """No join may be forgotten while its session can come back."""
        return min(max([idle_end, *(join.ends_at for join in body.joins)]), absolute)

    def create(self, record: Record) -> None:
        """As for a session, but a taken key is another device's record, to be merged with."""
        try:
            self.store.create(record)
        except KeyTaken:
            raise Stale from None

    def refused(self, reason: str, key: str | None, detail: str = "") -> None:
        logger.warning(
            "The values %s of a user can't be read: %s%s",
            key,
            reason,
            f" ({detail})" * bool(detail),
        )

    def capped(self, record: Record) -> Record:
        """An imported record, kept no longer than a record that is used now."""
        now, absolute = self.now(), min(record.absolute_expires_at, self.latest_end())
        idle = min(record.idle_expires_at, now + self._usual_span[0], absolute)
        created = min(record.created_at, now, absolute)
        capped = record._replace(
            created_at=created, idle_expires_at=idle, absolute_expires_at=absolute
        )
        return record if capped == record else self.with_times(record, capped)

    def remove_damaged(self) -> None:
        """Delete the record if no worker can read it. Raises ``UnreadableRecord`` if others may.

        Two round trips.
        """
        try:
            record = self.store.load(self.key)
        except UnreadableRecord:
            self.store.delete(self.key)
            return
        if record is None:
            return
        try:
            self.read(self.key, record)
        except UnreadableRecord as error:
            if error.for_others:
                raise
            self.store.delete(self.key, record.version)

    def forget(self) -> bool:
        """Delete the record and its large values. Whether there was one. One round trip."""
        return self.delete(self.key, leave_roster=False)

    # -- the steps of a sign-in

    def join(self, join: Join, values: Mapping[str, bytes], absolute_end: int) -> None:
        """Join the values of a session, unless they have in this revision or a later one.

        Raises ``NotJoined`` if they can't be, ``UnreadableRecord`` and ``StoreUnavailable``. Two
        round trips, two more for each lost race.
        """
        try:
            mine = {key: self._whole(key, raw) for key, raw in values.items()}
        except (ValueLost, UnreadableRecord) as error:
            raise NotJoined(str(error)) from error
        self._change_joins(
            lambda body: joined(body, join, mine, absolute_end, self.combine, self.now())
        )

    def combine(
        self, theirs: Mapping[str, bytes], base: Mapping[str, bytes], mine: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """See ``joins.combined``."""
        known = self.merger, self.codec, self.user_keys
        return combined(theirs, base, mine, *known, self.now())

    def close_join(self, join_id: bytes) -> None:
        """Note that the sign-in is complete. Two round trips."""

        self._change_joins(lambda body: closed(body, join_id, self.now()))

    def _change_joins(self, change: Callable[[Body], Body | None]) -> None:
        """Store the result of ``change``, if any, and release the large values that it replaces."""
        written: dict[tuple[int, bytes], Reference] = {}
        bases: dict[tuple[int, bytes], Reference] = {}
        replaced: set[str] = set()

        def edit(loaded: Loaded | None) -> Update[None]:
            before = Body({}) if loaded is None else loaded.body
            after = change(before)
            if after is None:
                return Update(None)
            end = self.blobs_expire_at(after)
            values = self.write_large(after, lambda: end, written, before.values)
            after = replace(
                after,
                values=values,
                joins=tuple(self._written(join, end, bases) for join in after.joins),
                marked=any(map(is_marked, values.values())),
                has_large=any(map(refers, values.values())),
            )
            replaced.clear()
            replaced.update(_names_in(before) - _names_in(after))
            if loaded is None:
                return Update(None, self.draft_new(after)[1])
            return Update(None, self.draft_next(loaded.record, after))

        self.update(self.key, edit)
        self.discard(replaced, BLOB_GRACE)

    def _written(self, join: Join, end: int, written: dict[tuple[int, bytes], Reference]) -> Join:
        """The join with references to its large values, which nothing else refers to."""
        large, found = self.large_values, dict(join.values)
        for key, raw in join.values.items():
            if large is None or len(raw) <= self._inline or refers(raw):
                continue
            mark, plain = split(raw)
            kind, content = content_of(plain)
            same = kind, hashlib.sha256(content).digest()
            if same not in written:
                pieces = pieces_of(content, large.frame_bytes)
                written[same] = large.write(key, kind, pieces, lambda: end, len(content))
            found[key] = marked(written[same].pack(), mark)
        return join if found == join.values else replace(join, values=found)

    def _release_values(
        self, record: Record, on_debug: Callable[[int], None] | None
    ) -> Body | None:
        body = super()._release_values(record, on_debug)
        if body is not None:
            self.discard(_names_in(body) - names_in(body.values.values()), 0)
        return body

    def _whole(self, key: str, raw: bytes) -> bytes:
        """The encoded value, with its bytes in place of a reference: those end with the session."""
        if not refers(raw):
            return raw
        mark, plain = split(raw)
        return marked(self.codec.encode(key, self.codec.decode(plain)), mark)


def _names_in(body: Body) -> set[str]:
    """The names of all large values of a user's record."""
    sides = (body.values, *(join.values for join in body.joins))
    return set().union(*(names_in(side.values()) for side in sides))


class _EventsOfValues(Events):
    """Passes on the events that aren't about sessions."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def emit(self, event: type[Event], *details: object) -> None:
        if event not in _OF_SESSIONS:
            self._events.emit(event, *details)
