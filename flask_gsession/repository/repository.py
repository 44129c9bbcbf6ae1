"""Finds, creates, saves, rotates and renews the sessions of one application in their store.

This module holds what all sessions of an application share. ``request/`` holds the state of a
single request.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

from msgspec import Struct
from msgspec.structs import replace

from ..config import LiveSettings, Settings
from ..errors import (
    CutOff,
    LeaseLost,
    LockLost,
    LogoutUnconfirmed,
    SessionTooLarge,
    SettingError,
    StoreUnavailable,
    UnreadableRecord,
    ValueLost,
)
from ..events import Events, SessionRefused, SessionUnbound, logger
from ..stores.base import MAX_POINTERS, Clock, Deleted, Record, Store, milliseconds, new_version
from ..stores.parts import Blobs, Leases, parts_of
from ..tokens import Token, is_token, new_token, session_key
from ..users.joins import UserKey
from ..users.roster import drop
from ..users.rosters import MARGIN, Rosters
from ..values.codec import Codec
from ..values.encryption import Cipher
from ..values.large_values import LargeValueStorage, pieces_of
from ..values.marks import END_OF_TIME, marked, split
from ..values.merge import Merger
from ..values.payload import Body, Owner, PayloadFormat
from ..values.references import BLANK, BYTES, Reference, content_of, length_of, names_in, refers
from .imports import Imports
from .newcomers import Newcomers
from .races import tries, write

R = TypeVar("R")

_FOREVER = 100 * 366 * 86_400_000  # milliseconds; the idle expiry ends such a record earlier
PERMANENT = "_permanent"
_TRUE = b"\xc3"
# A replaced large value stays this long, for requests that loaded the session before.
BLOB_GRACE = 60_000  # milliseconds
_BLOB_MARGIN = 60_000  # milliseconds that a large value outlives its session
_NO_WARNING = ("unknown", "expired")  # an attacker could flood the log
# Options for the store: allow an earlier idle expiry. Stores without this option never see it.
_SHORTEN = {"shorten": True}
_NO_OPTIONS: dict[str, bool] = {}
_AT_ONCE = 100  # sessions that are deleted in one round trip


class Loaded(Struct, frozen=True, gc=False):
    """A live record and its decoded payload."""

    record: Record
    body: Body


class Update(NamedTuple, Generic[R]):
    """The result of an edit, and the record to store, if any: see ``Repository.update``."""

    result: R
    record: Record | None = None


class Repository:
    """Stores the sessions of one ``Session`` on one application."""

    def __init__(
        self,
        settings: Settings,
        live: LiveSettings,
        store: Store,
        events: Events,
        clock: Clock,
        blobs: Blobs | None = None,
    ) -> None:
        self.settings = settings
        self.live = live
        #: None if the store has no place for large values
        self.large_values: LargeValueStorage | None = None
        self._own_blobs: Blobs | None = None
        self.events = events
        #: Called before a session is stored for the first time. It can raise to prevent that.
        self.before_create: Callable[[], object] | None = None
        #: of an edge store, which keeps no strong reference to it
        self.reconciler: object = None
        #: the store that writes the journal; None without SESSION_JOURNAL
        self.journaling: Any = None
        #: takes over old sessions; None without SESSION_IMPORT
        self.imports: Imports | None = None
        #: Called with a session whose user has just confirmed who they are.
        self.on_confirm: Callable[[Any], object] | None = None
        #: whether the log has the duration of Flask-Login's remember-me cookie already
        self.warned_of_remember = False
        self.codec = Codec(settings.max_depth)
        self.merger = Merger(self.codec, settings.conflict, settings.merge_policies)
        keys = settings.encryption_keys
        cipher = Cipher(keys) if keys else None
        self._encrypts = bool(keys)
        self._payloads = PayloadFormat(
            max_bytes=settings.max_bytes,
            max_keys=settings.max_keys,
            cipher=cipher,
            allow_plain=settings.read_plain,
        )
        self.rosters = Rosters(settings, self._payloads, clock)
        self.use_store(store)
        places = self._own_blobs if blobs is None else blobs
        if places is not None:
            self.large_values = LargeValueStorage(
                places,
                max_bytes=settings.max_value_bytes,
                cipher=cipher,
                allow_plain=settings.read_plain,
            )
        #: for a clean-up, if large values are files, since files don't expire
        self.files = None if blobs is None else parts_of(blobs).upkeep
        limit = None if self.large_values is None else settings.spill_bytes
        self._inline = sys.maxsize if limit is None else limit
        self.codec.resolve = self._resolve
        #: Called with a request, and whether its token came in a header. Returns the version that
        #: this client wrote last, if the request names it.
        self.last_seen_version: Callable[[Any, bool], int | None] = lambda request, by_header: None
        #: the session's schema: raises for a wrong value, and returns the mark to store with it
        self.check: Any = None
        self.typed_keys: dict[str, Any] = {}
        #: the typed keys among them whose values belong to the user, not to the session
        self.user_keys: dict[str, UserKey] = {}
        self.clock = clock
        self._newcomers = Newcomers(settings.newcomers_per_minute, settings.newcomer_timeout)
        self._unseen = self._newcomers.unseen
        self._usual_span = self._span(settings.idle_timeout)
        self._permanent_span = (0.0, (0, 0))

    def use_store(self, store: Store) -> None:
        """Use this store from now on: the same as before, inside another wrapper."""
        before = self._own_blobs
        parts = parts_of(store)
        self.store, self.leases, self._own_blobs = store, parts.leases, parts.blobs
        #: serves the first read of a request; None without a near cache
        self.near = parts.near
        #: if the store goes on while its centre can't be reached
        self.edge = parts.edge
        self.rosters = self.rosters.through(store)
        if (
            self.large_values is not None
            and self.large_values.blobs is before
            and parts.blobs is not None
        ):
            self.large_values = self.large_values.through(parts.blobs)

    @property
    def is_cut_off(self) -> bool:
        """Whether this is an edge that works without its centre."""
        return self.edge is not None and bool(self.edge.cut_off)

    def find_near(self, key: str, version: int | None) -> Loaded | None:
        """The session under ``key`` from the near cache, or None if it isn't fresh enough there.

        ``version``: the version that the client has seen, if any; no other version will do. No
        round trip.
        """
        record = None if self.near is None else self.near.peek(key, version)
        if record is None:
            return None
        body = record.body
        if body is None:
            body = self.read(key, record)
            if body is None:
                return None
            if not self._encrypts:  # an encrypted session is never kept in plain form
                record.body = body
        return Loaded(record, body)

    def find(
        self,
        key: str,
        presented: bool = False,
        load: Callable[[str], Record | None] | None = None,
    ) -> Loaded | None:
        """The session under ``key``, or its successor after a rotation; None without a session.

        ``presented``: a client sent the key, so a miss is counted and logged. ``load`` replaces the
        store's ``load``. Raises ``UnreadableRecord`` and ``StoreUnavailable``. One round trip, one
        more for each rotation within the grace.
        """
        if load is None:
            load = self.store.load
        at = key
        passed: tuple[str, ...] = ()
        while True:
            record = load(at)
            # A store may still return an expired record.
            if record is None or self.clock() * 1000 >= record.idle_expires_at:
                if presented:
                    self._refuse_absent(key, record, rotated=at != key)
                return None
            body = self.read(at, record)
            if body is not None:
                if self._unseen and presented:
                    self._unseen.pop(at, None)
                return Loaded(record, body)
            passed += (at,)
            at = record.successor or ""
            if at in passed or len(passed) == MAX_POINTERS:
                raise UnreadableRecord("corrupt", "too many pointers")

    def read(self, key: str, record: Record) -> Body | None:
        """Decode the record under ``key``; None for a pointer.

        Raises ``UnreadableRecord``, also for a record that belongs to another key.
        """
        created, idle, absolute, payload, successor = record[2:]
        # The idle expiry may lie before the creation, if a clock was set back or is far behind.
        if not (0 <= created <= absolute and 0 <= idle <= absolute < END_OF_TIME):
            raise UnreadableRecord("corrupt", "times out of order")
        if successor is None:
            return self._payloads.unpack(key, payload, created, absolute)
        self._payloads.check_pointer(key, successor, payload, created, absolute, idle)
        return None

    def owner_of(self, record: Record) -> Owner | None:
        """The user that a session is bound to, if its record can be read."""
        times = record.created_at, record.absolute_expires_at
        try:
            return self._payloads.unpack(record.key, record.payload, *times).owner
        except UnreadableRecord:
            return None

    def latest_end(self) -> int:
        """The absolute end of a session that is created now, in milliseconds."""
        return self.now() + int(self.settings.absolute_timeout * 1000)

    def with_times(self, record: Record, other: Record) -> Record:
        """``other``, a copy of ``record`` with other times, with its payload bound to them."""

        def times(of: Record) -> tuple[int, ...]:
            fixed = of.created_at, of.absolute_expires_at
            return fixed if of.successor is None else (*fixed, of.idle_expires_at)

        payload = self._payloads.bind_again(record.key, record.payload, times(record), times(other))
        return other._replace(payload=payload)

    def draft_new(self, body: Body) -> tuple[str, Record]:
        """Draft a new session: its token and its record. Stores nothing."""
        now, absolute = self.now(), self.latest_end()
        token, key = self._new_token()
        record = Record(
            key=key,
            version=new_version(),
            created_at=now,
            idle_expires_at=self._newcomers.first_end(key, now, self._idle_end(body, absolute)),
            absolute_expires_at=absolute,
            payload=self._payloads.pack(key, body, now, absolute),
        )
        return token, record

    def draft_imported(self, key: str, body: Body, began: int | None, ends: int | None) -> Record:
        """Draft the record under ``key`` for a session that is taken over. Stores nothing.

        ``began`` and ``ends``: its creation and absolute end in the old system, to keep them.
        """
        now, absolute = self.now(), self.latest_end()
        if ends is not None:
            absolute = min(ends, absolute)
        created = now if began is None else min(began, now, absolute)
        return Record(
            key,
            new_version(),
            created,
            self._idle_end(body, absolute),
            absolute,
            self._payloads.pack(key, body, created, absolute),
        )

    def draft_other(self, key: str, content: bytes, end: int) -> Record:
        """Draft a record that is no session's. Stores nothing."""
        now = min(self.now(), end)
        payload = self._payloads.pack_other(key, content, now, end)
        return Record(key, new_version(), now, end, end, payload)

    def draft_renewable(self, key: str, content: bytes, end: int, old: Record | None) -> Record:
        """The same, for a record that replaces ``old`` and may end later than that one."""
        now = self.now()
        created, last = now, now + _FOREVER
        if old is not None:
            created, last = old.created_at, old.absolute_expires_at
        payload = self._payloads.pack_other(key, content, created, last)
        return Record(key, new_version(), created, min(max(now, end), last), last, payload)

    def read_other(self, record: Record) -> bytes:
        """The content of such a record. Raises ``UnreadableRecord``."""
        times = record.created_at, record.absolute_expires_at
        return self._payloads.unpack_other(record.key, record.payload, *times)

    def create(self, record: Record) -> None:
        """Store a new session. Raises ``KeyTaken``. One round trip."""
        if self.before_create is not None:
            self.before_create()
        self.store.create(record)

    def draft_next(
        self, old: Record, body: Body, restart_idle: bool = False, renew: bool = True
    ) -> Record:
        """Draft the record that replaces ``old``. Stores nothing.

        The idle expiry moves if that is due and ``renew`` is true, and always with
        ``restart_idle``.
        """
        key, _, created, idle_end, absolute = old[:5]
        if restart_idle:
            idle_end = self._idle_end(body, absolute)
        elif renew:
            idle_end = self.due(old, body.values, body.lifetime) or idle_end
        payload = self._pack(key, body, old, created, absolute)
        return Record(key, new_version(), created, idle_end, absolute, payload)

    def save(
        self,
        old: Record,
        record: Record,
        body: Body,
        lease: str | None = None,
        shorten: bool = False,
    ) -> None:
        """Replace ``old`` by ``record``. Raises ``Gone`` or ``Stale``.

        With ``lease``, raises ``LockLost`` unless the lease is still held. With ``shorten``, the
        idle expiry may move back. One round trip, one more if the session has large values and its
        idle expiry moves.
        """
        idle_end = record.idle_expires_at
        renewed = idle_end == old.idle_expires_at or self.renew_large(body, idle_end)
        if lease is None and not shorten:
            self.store.save(record, old.version)
        elif lease is None:
            self.store.save(record, old.version, shorten=True)
        else:
            with self._under_lease(lease) as leases:
                leases.save(record, old.version, lease, **(_SHORTEN if shorten else _NO_OPTIONS))
        if not renewed:
            self.renew_large(body, idle_end)

    def _pack(self, key: str, body: Body, old: Record, created: int, absolute: int) -> bytes:
        """The payload of ``body``, to replace ``old``. A session over a lowered limit may shrink.

        ``created`` and ``absolute``: creation and absolute end of the new record.
        """
        try:
            return self._payloads.pack(key, body, created, absolute)
        except SessionTooLarge:
            times = old.created_at, old.absolute_expires_at
            before = self._payloads.unpack(old.key, old.payload, *times)
            return self._payloads.pack(key, body, created, absolute, before=before.values)

    def end(self, old: Record, body: Body | None, lease: str | None = None) -> None:
        """Delete exactly this version of the session. Raises as ``save`` does. One round trip.

        Deletes the old record first, while old sessions are imported.
        """
        if self.imports is not None and body is not None:
            self.imports.end_old(self, body)
        if lease is None:
            deleted = self.store.delete(old.key, old.version)
        else:
            with self._under_lease(lease) as leases:
                deleted = leases.delete(old.key, old.version, lease)
        if isinstance(deleted, Deleted) and deleted.unconfirmed:
            raise LogoutUnconfirmed(deleted.unconfirmed)

    def draft_rotated(
        self, old: Record, body: Body, *, renew: bool = True, signs_in: bool = False
    ) -> tuple[str, Record]:
        """Draft a new token and record for the session of ``old``. Stores nothing.

        The idle expiry moves if ``renew`` is true. With ``signs_in``, the absolute lifetime starts
        again.
        """
        token, key = self._new_token()
        created, absolute = old.created_at, old.absolute_expires_at
        if signs_in:
            created, absolute, renew = self.now(), self.latest_end(), True
        return token, Record(
            key=key,
            version=new_version(),
            created_at=created,
            idle_expires_at=self._idle_end(body, absolute) if renew else old.idle_expires_at,
            absolute_expires_at=absolute,
            payload=self._pack(key, body, old, created, absolute),
        )

    def rotate(
        self,
        old: Record,
        record: Record,
        body: Body,
        grace: float,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> LogoutUnconfirmed | None:
        """Move the session to its new key. Raises as ``save`` does, and ``KeyTaken``.

        With ``shorten``, the idle expiry may move back. Returns an error if replicas may still know
        the old key. One round trip, one more if the session has large values.
        """
        idle_end = record.idle_expires_at
        # The idle expiry is further ahead than the settings allow now, so they were changed.
        unusual = old.idle_expires_at - idle_end > self._idle_span(body.values, body.lifetime)[1]
        more = _SHORTEN if shorten or unusual else _NO_OPTIONS
        pointer = self._pointer(old, record, grace)
        self.renew_large(body, record.idle_expires_at)
        if lease is None:
            replaced = self.store.replace(old.key, record, old.version, pointer, **more)
        else:
            with self._under_lease(lease) as leases:
                replaced = leases.replace(old.key, record, old.version, pointer, lease, **more)
        if replaced is not None and replaced.unconfirmed:
            return LogoutUnconfirmed(replaced.unconfirmed)
        return None

    def debug(self, key: str, until: int | None) -> tuple[str, bool] | None:
        """Log what requests do with the session until this time, in milliseconds; None ends that.

        The session stays as it is otherwise, and requests that are running keep their changes.
        Returns the session's handle, and whether it was debugged already, or None if there is no
        session. Raises ``SessionConflict`` after too many lost races. Two round trips, two more for
        each lost race.
        """

        def switch(loaded: Loaded | None) -> Update[tuple[str, bool] | None]:
            if loaded is None:
                return Update(None)
            old, body = loaded.record, loaded.body
            before = body.debug_until is not None and body.debug_until > self.now()
            if until is None and not before:
                return Update((old.key, False))
            body.debug_until = until
            payload = self._pack(old.key, body, old, old.created_at, old.absolute_expires_at)
            return Update((old.key, before), old._replace(version=new_version(), payload=payload))

        return self.update(key, switch)

    def update(
        self,
        key: str,
        edit: Callable[[Loaded | None], Update[R]],
        *,
        tried: dict[int, R] | None = None,
    ) -> R:
        """Store the record that ``edit`` makes, and return the result of this edit.

        ``edit`` gets the result of ``find(key)``, and makes a record for the same key, with a new
        version. It runs again after each lost race, so it must have no side effects. It may raise
        to refuse. ::

            def enter(loaded: Loaded | None) -> Update[bool]:
                if loaded is None:
                    return Update(True, first_record())
                if has_ended(loaded.body):
                    return Update(False)  # nothing to store
                return Update(True, next_record(loaded))

            entered = repository.update(key, enter)

        If the store holds a version that this call has sent, it was stored, and is not applied
        twice. After ``StoreUnavailable`` or an interrupt, the outcome is unknown. You can then call
        again with the same dict as ``tried``. Another writer may have replaced that version by now,
        so let the edit also recognise its own effect: an entry that is there needs no entering.

        Raises ``SessionConflict`` after too many lost races, and any error of ``find``, ``edit``
        and the store. Two round trips, two more for each lost race.
        """
        sent: dict[int, R] = {} if tried is None else tried

        def prepare() -> tuple[Record | None, Update[R]]:
            loaded = self.find(key)
            if loaded is None:
                return None, edit(None)
            if loaded.record.version in sent:
                return None, Update(sent[loaded.record.version])
            return loaded.record, edit(loaded)

        def send(step: tuple[Record | None, Update[R]], _: int) -> R:
            old, (result, record) = step
            if record is not None:
                sent[record.version] = result  # noted first: an interrupt may strike
                if old is None:
                    self.store.create(record)
                else:
                    self.store.save(record, old.version)
            return result

        return cast(R, write(prepare, send, partial(tries, self.settings.store_timeout)))

    def renew(self, record: Record, body: Body, idle_end: int) -> bool:
        """Renew the large values, then the record, so that no value expires before its record."""
        before = self.renew_large(body, idle_end)
        renewed = self.store.renew(record, idle_end)
        if not before:
            self.renew_large(body, idle_end)
        return renewed

    def delete(
        self,
        key: str,
        on_debug: Callable[[int], None] | None = None,
        *,
        owner: Owner | None = None,
        leave_roster: bool = True,
        signs_out: bool = True,
        body: Body | None = None,
    ) -> bool:
        """End the session under ``key``, following pointers, and release its large values.

        ``on_debug`` is called with the end of debugging, if the session is debugged. ``owner``: the
        user, if you know it, for a store that doesn't return the deleted record. ``leave_roster``:
        whether to remove the session from its user's roster. ``signs_out``: whether to report that.
        ``body``: the session's contents, if you know them. Returns whether there was a session.
        Raises as ``Store.delete`` does.

        One round trip, one more if it had large values, two more if it leaves a roster. While old
        sessions are imported, the old record goes first, which costs one more, and another one
        without ``body``.
        """
        if self.imports is not None:
            self._end_old(key, body)
        return self._deleted(key, self.store.delete(key), on_debug, owner, leave_roster, signs_out)

    def delete_many(self, keys: Sequence[str]) -> Iterator[Callable[[], bool]]:
        """End these sessions in their order, without removing them from rosters.

        Each yielded function returns or raises as ``delete`` does. A store with the part ``bulk``
        takes one round trip for up to a hundred sessions.
        """
        bulk = None if self.imports is not None else parts_of(self.store).bulk
        if bulk is None or len(keys) < 2:
            for key in keys:
                yield partial(self.delete, key, leave_roster=False)
            return
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            for key, deleted in zip(some, bulk.delete_many(some), strict=True):
                yield partial(self._deleted, key, deleted, None, None, False)

    def _deleted(
        self,
        key: str,
        deleted: Deleted | bool,
        on_debug: Callable[[int], None] | None,
        owner: Owner | None,
        leave_roster: bool,
        signs_out: bool = False,
    ) -> bool:
        if not isinstance(deleted, Deleted):
            deleted = Deleted(deleted)
        ended = key
        if deleted.record is not None:
            ended = deleted.record.key
            body = self._release_values(deleted.record, on_debug)
            owner = None if body is None else body.owner
        if leave_roster and owner is not None and deleted.found:
            self.leave_roster(owner, key, ended)
            if signs_out:
                self.events.emit(SessionUnbound, owner.user_id, owner.device_id)
        if deleted.unconfirmed:
            raise LogoutUnconfirmed(deleted.unconfirmed)
        return deleted.found

    def _end_old(self, key: str, body: Body | None) -> None:
        """Remove the old record that the session under ``key`` was made from."""
        assert self.imports is not None
        if body is None:
            try:
                loaded = self.find(key)
            except (UnreadableRecord, CutOff):  # an edge does so when it settles
                return
            if loaded is None:
                return
            body = loaded.body
        self.imports.end_old(self, body)

    def leave_roster(self, owner: Owner, *keys: str) -> None:
        """Remove these keys from the user's roster: their sessions ended, or changed their user.

        Two round trips. Never raises for an outage: the roster then lists the session until it
        would have expired.
        """
        ended = {*keys, *([owner.predecessor] if owner.predecessor else ())}
        try:
            self.rosters.change(owner.user_id, lambda roster: (drop(roster, ended), None))
        except StoreUnavailable as error:
            logger.warning("Session %s stays in its user's list: %s", keys[0], error)

    def save_owner(self, old: Record, body: Body, owner: Owner) -> None:
        """Store the owner of a session and change nothing else. Raises ``Stale`` and ``Gone``."""
        self.store.save(self.with_owner(old, body, owner), old.version)

    def with_owner(self, old: Record, body: Body, owner: Owner) -> Record:
        """The next version of the record, with this owner. Stores nothing."""
        times = old.created_at, old.absolute_expires_at
        payload = self._pack(old.key, replace(body, owner=owner), old, *times)
        return old._replace(version=new_version(), payload=payload)

    def draft_merged(self, old: Record, body: Body, idle_end: int) -> Record:
        """Draft the record of ``body``, to replace ``old``. Stores nothing."""
        created, absolute = old.created_at, old.absolute_expires_at
        payload = self._pack(old.key, body, old, created, absolute)
        return Record(old.key, new_version(), created, idle_end, absolute, payload)

    def listed_until(
        self,
        values: Mapping[str, bytes],
        lifetime: int | None,
        record: Record | None,
        *,
        signs_in: bool = False,
    ) -> int:
        """How long a roster may list a session that is entered now, in seconds since 1970.

        Renewals within ``SESSION_SEEN_INTERVAL`` don't touch the roster, so the entry lasts that
        much longer. ``record``: as it is stored; None for a new session. ``signs_in``: its absolute
        lifetime starts again.
        """
        absolute = self.latest_end() if record is None or signs_in else record.absolute_expires_at
        interval = int(self.settings.seen_interval * 1000)
        end = self.now() + self._idle_span(values, lifetime)[0] + interval
        if record is not None:
            end = max(end, record.idle_expires_at)
        return (min(end, absolute) + MARGIN) // 1000

    def _release_values(
        self, record: Record, on_debug: Callable[[int], None] | None
    ) -> Body | None:
        """Release the large values of an ended record. Returns its contents, if readable.

        Replicas may not know yet that it ended. A replica that takes over with this session has not
        heard of the release either; if the values are stored elsewhere, the session lacks them.
        """
        try:
            body = self._payloads.unpack(
                record.key, record.payload, record.created_at, record.absolute_expires_at
            )
        except UnreadableRecord:
            return None  # its large values, if any, expire
        if on_debug is not None and body.debug_until is not None:
            on_debug(body.debug_until)
        if body.has_large:
            self.discard(names_in(body.values.values()), 0)
        return body

    def has_large_value(
        self, values: Mapping[str, bytes], changed: Iterable[str], others: int = 0
    ) -> bool:
        """Whether one of the encoded values needs a place outside the record.

        Looks only at ``changed`` if no other value can be longer than ``others``, in bytes.
        """
        if others > self._inline:
            changed = values
        inline = self._inline
        for key in changed:  # noqa: SIM110  # a generator is slower
            if key in values and len(values[key]) > inline:
                return True
        return False

    def write_large(
        self,
        body: Body,
        expires_at: Callable[[], int],
        written: dict[tuple[int, bytes], Reference],
        before: Mapping[str, bytes],
    ) -> dict[str, bytes]:
        """Write the large values of ``body``, and return its values with references to them.

        ``written`` holds what this request wrote before, by kind and digest. Each value is written
        once, and added. ``before`` holds the session's values as they are stored. A value there
        that exceeds a lowered limit may stay as it is, or give way to a value of at most its
        length. Raises ``ValueRefused`` before it writes anything, and ``StoreUnavailable``.
        """
        values = body.values
        large = [key for key, raw in values.items() if len(raw) > self._inline and not refers(raw)]
        self._check_total(values, before)
        if not large:
            return values
        large_values = self.large_values
        assert large_values is not None  # or nothing is that large
        parts = {}
        for key in large:
            raw, stored = values[key], before.get(key)
            mark, plain = split(raw)
            length = len(content_of(plain)[1])
            if length > large_values.max_bytes and raw == stored:
                continue
            if length > length_of(stored):
                large_values.check(f"session[{ascii(key)[:60]}]", length)
            parts[key] = mark, plain
        values = dict(values)
        for key, (mark, _) in parts.items():
            values[key] = marked(BLANK, mark)
        self._payloads.check(replace(body, values=values), before)
        for key, (mark, plain) in parts.items():
            kind, content = content_of(plain)
            same = (kind, hashlib.sha256(content).digest())
            if same not in written:
                pieces = pieces_of(content, large_values.frame_bytes)
                written[same] = large_values.write(key, kind, pieces, expires_at, len(content))
            values[key] = marked(written[same].pack(), mark)
        return values

    def room_for(self, key: str, stored: Mapping[str, bytes]) -> int:
        """How many bytes a large value under ``key`` may have, with all the other large values."""
        there = self._large_lengths(stored)
        own, total, limit = there.pop(key, 0), sum(there.values()), self.settings.total_limit
        return max(limit - total, own)

    def _check_total(self, values: Mapping[str, bytes], before: Mapping[str, bytes]) -> None:
        """Raises ``SessionTooLarge`` if the large values of a session exceed the limit together.

        The values ``before`` may exceed it, if the setting was lowered since.
        """
        lengths = self._large_lengths(values)
        total, limit = sum(lengths.values()), self.settings.total_limit
        if total > limit and total > sum(self._large_lengths(before).values()):
            largest = max(lengths, key=lambda key: lengths[key])
            raise SessionTooLarge(
                "session",
                f"{total} bytes in large values; SESSION_MAX_TOTAL_BYTES allows {limit}; "
                f"the largest key is {ascii(largest)[:60]}",
            )

    def _large_lengths(self, values: Mapping[str, bytes]) -> dict[str, int]:
        """The length in bytes of each large value, by key."""
        return {
            key: length_of(raw) if refers(raw) else len(content_of(split(raw)[1])[1])
            for key, raw in values.items()
            if refers(raw) or len(raw) > self._inline
        }

    def _resolve(self, data: bytes) -> Any:
        """The value of a reference. Raises ``ValueLost`` and ``StoreUnavailable``."""
        if self.large_values is None:
            raise ValueLost("missing")
        reference = Reference.of(data)
        content = self.large_values.read(reference)
        if reference.kind == BYTES:
            return content
        try:
            return self.codec.decode(content)
        except UnreadableRecord:
            raise ValueLost("altered") from None

    def blobs_expire_at(self, body: Body, absolute: int | None = None) -> int:
        """When the large values of a session expire if it is stored about now, in milliseconds.

        ``absolute``: the session's absolute end; None for a new session.
        """
        if absolute is None:
            absolute = self.latest_end()
        return self._idle_end(body, absolute) + _BLOB_MARGIN

    def discard(self, names: Iterable[str], grace: int) -> None:
        """Delete these blobs in ``grace`` milliseconds. One round trip. No error in an outage."""
        if self.large_values is not None and (all_of := sorted(names)):
            self.large_values.discard(all_of, self.now() + grace)

    def renew_blobs(self, references: Iterable[Reference], end: int) -> None:
        """Keep these blobs until ``end``, in milliseconds. One round trip."""
        if self.large_values is not None:
            self.large_values.renew(sorted(reference.name for reference in references), end)

    def renew_large(self, body: Body, idle_end: int) -> bool:
        """Renew the large values of a session that is stored with this idle expiry next.

        False at an edge that is cut off: it renews them when it settles. It may reach its centre
        again before you store the session, so call this once more afterwards.
        """
        if body.has_large and self.large_values is not None:
            names = sorted(names_in(body.values.values()))
            try:
                self.large_values.renew(names, idle_end + _BLOB_MARGIN)
            except CutOff:
                return False
        return True

    @contextmanager
    def _under_lease(self, lease: str) -> Iterator[Leases]:
        """The leases, for a write under one. Translates ``LeaseLost`` to ``LockLost``."""
        assert self.leases is not None  # it gave the lease
        try:
            yield self.leases
        except LeaseLost:
            raise LockLost from None

    def _pointer(self, old: Record, record: Record, grace: float) -> Record | None:
        if grace == 0:
            return None
        absolute = old.absolute_expires_at
        end = min(self.now() + int(grace * 1000), absolute)
        return old._replace(
            version=record.version,
            idle_expires_at=end,
            payload=self._payloads.pack_pointer(old.key, record.key, old.created_at, absolute, end),
            successor=record.key,
        )

    def now(self) -> int:
        """The clock's time in milliseconds."""
        return milliseconds(self.clock)

    def due(self, record: Record, values: Mapping[str, bytes], lifetime: int | None) -> int | None:
        """The next idle expiry, or None if it need not move yet."""
        if self._unseen and record.key in self._unseen:
            return None
        if lifetime is None and PERMANENT not in values:  # every save comes by here
            span, step = self._usual_span
        else:
            span, step = self._idle_span(values, lifetime)
        absolute = record.absolute_expires_at
        end = int(self.clock() * 1000) + span
        if end > absolute:  # ``min`` takes longer
            end = absolute
        gain = end - record.idle_expires_at
        return end if gain >= step or (end == absolute and gain > 0) else None

    def is_permanent(self, values: Mapping[str, bytes]) -> bool:
        """Whether Flask's ``session.permanent`` is set among these encoded values."""
        return values.get(PERMANENT) == _TRUE

    def refused(self, reason: str, key: str | None, detail: str = "") -> None:
        """Count and log a token that led to no session."""
        if key is not None and reason not in _NO_WARNING:
            logger.warning(
                "Session %s refused: %s%s", key, reason, f" ({detail})" if detail else ""
            )
        self.events.emit(SessionRefused, reason, key)

    def _refuse_absent(self, key: str, record: Record | None, *, rotated: bool) -> None:
        """Say why there is no session, as far as the store still knows.

        ``record``: the expired record, if the store has it. ``rotated``: a pointer led to it.
        """
        if record is None:
            why = "not in the store: logged out, revoked, never issued, or expired and removed"
            self.refused(
                "unknown", key, "rotated away, and its successor has ended" if rotated else why
            )
        elif record.successor is not None:
            after = f"; it went on as {record.successor}" if record.successor else ""
            self.refused("unknown", key, f"rotated away, and the grace is over{after}")
        elif record.idle_expires_at == record.absolute_expires_at:
            self.refused("expired", key, "it reached its absolute timeout")
        else:
            self.refused("expired", key, "it was not used for as long as its idle timeout")

    def _idle_span(self, values: Mapping[str, bytes], lifetime: int | None) -> tuple[int, int]:
        """How far ahead the idle expiry is set, and its smallest step, in milliseconds."""
        if lifetime is not None:
            return self._span(lifetime / 1000)
        if not self.is_permanent(values):
            return self._usual_span
        known, span = self._permanent_span
        idle = self.live.permanent_lifetime()
        if idle != known:
            span = self._span(idle)
            self._permanent_span = (idle, span)
        return span

    def _span(self, idle: float) -> tuple[int, int]:
        # One interval beyond the idle timeout: the expiry is moved only once per interval, and
        # must not come early for a session that was used just before a move was due.
        step = self.settings.renew_interval_for(idle)
        return int((idle + step) * 1000), max(1, int(step * 1000))

    def _idle_end(self, body: Body, absolute: int) -> int:
        return min(
            milliseconds(self.clock) + self._idle_span(body.values, body.lifetime)[0], absolute
        )

    def _new_token(self) -> tuple[str, str]:
        factory: Any = self.settings.token_factory
        if factory is None:
            token = new_token(self.settings.id_length)
        else:
            made = factory()
            token = Token(made)
            if not isinstance(made, str) or not is_token(made):
                raise SettingError(
                    "SESSION_TOKEN_FACTORY must return 22 to 200 characters of A-Z a-z 0-9 - _ "
                    f"(it returned a {type(made).__name__} that is not)"
                )
        return token, session_key(token)
