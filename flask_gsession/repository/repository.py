"""Finds, creates, saves, rotates, renews and ends the sessions of one application in their store.

This package holds what all sessions of an application share. ``request/`` holds the state of a
single request.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

from msgspec import Struct

from ..config import LiveSettings, Settings
from ..errors import LeaseLost, LockLost, LogoutUnconfirmed, UnreadableRecord
from ..events import Events
from ..stores.base import MAX_POINTERS, Clock, Deleted, Record, Store
from ..stores.parts import Blobs, Leases, parts_of
from ..users.joins import UserKey
from ..users.rosters import Rosters
from ..values.codec import Codec
from ..values.encryption import Cipher
from ..values.envelope import Envelope
from ..values.large_values import LargeValueStorage
from ..values.merge import Merger
from ..values.payload import Body, BodyFormat
from .expiry import Expiry
from .idle_spans import SessionSpans
from .imports import Imports
from .large_values import LargeValues
from .newcomers import Newcomers
from .other_records import OtherRecords
from .races import tries, write
from .records import SessionRecords, new_session_token
from .refusals import Refusals, SessionRefusals, why_absent

R = TypeVar("R")

# Options for the store: allow an earlier idle expiry. Stores without this option never see it.
_SHORTEN = {"shorten": True}
_NO_OPTIONS: dict[str, bool] = {}


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
        self.clock = clock
        keys = settings.encryption_keys
        cipher = Cipher(keys) if keys else None
        bodies = BodyFormat(settings.max_bytes, settings.max_keys)
        envelope = Envelope(cipher, settings.read_plain)
        self.expiry = Expiry(
            clock,
            SessionSpans(settings, live),
            int(settings.absolute_timeout * 1000),
            Newcomers(settings.newcomers_per_minute, settings.newcomer_timeout),
            settings.seen_interval,
        )
        self._unseen = self.expiry.newcomers.unseen
        #: The clock's time in milliseconds.
        self.now = self.expiry.now
        self.records = SessionRecords(
            bodies, envelope, self.expiry, partial(new_session_token, settings)
        )
        self.other_records = OtherRecords(envelope, self.now)
        self.rosters = Rosters(settings, envelope, clock)
        self.codec = Codec(settings.max_depth)
        self.merger = Merger(self.codec, settings.conflict, settings.merge_policies)
        self._own_blobs = parts_of(store).blobs
        places = self._own_blobs if blobs is None else blobs
        storage = None
        if places is not None:
            storage = LargeValueStorage(
                places,
                max_bytes=settings.max_value_bytes,
                cipher=cipher,
                allow_plain=settings.read_plain,
            )
        self.large = LargeValues(storage, settings, bodies, self.codec, self.now)
        #: for a clean-up, if large values are files, since files don't expire
        self.files = None if blobs is None else parts_of(blobs).upkeep
        self.use_events(events)
        self.use_store(store)
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
        #: whether the warning about Flask-Login's remember-me cookie has been logged
        self.warned_of_remember = False
        #: Called with a request, and whether its token came in a header. Returns the version that
        #: this client wrote last, if the request names it.
        self.last_seen_version: Callable[[Any, bool], int | None] = lambda request, by_header: None
        #: Checks a value by the schema, if any, and returns the mark to store with the value.
        self.check: Any = None
        self.typed_keys: dict[str, Any] = {}
        #: the typed keys whose values belong to the user, not to the session
        self.user_keys: dict[str, UserKey] = {}

    def use_events(self, events: Events) -> None:
        """Emit through these events from now on."""
        self.events = events
        self.refusals: Refusals = SessionRefusals(events)

    def use_store(self, store: Store) -> None:
        """Use this store from now on: the same as before, inside another wrapper."""
        before, storage = self._own_blobs, self.large.storage
        parts = parts_of(store)
        self.store, self.leases, self._own_blobs = store, parts.leases, parts.blobs
        #: serves the first read of a request; None without a near cache
        self.near = parts.near
        #: None unless the store is an edge, which works while its centre can't be reached
        self.edge = parts.edge
        self.rosters = self.rosters.through(store)
        if storage is not None and storage.blobs is before and parts.blobs is not None:
            self.large = self.large.through(parts.blobs, self.codec)
        self.codec.resolve = self.large.resolve

    def through(self, store: Store) -> Repository:
        """A copy that uses another wrapper of the same store, also for large values."""
        other = copy.copy(self)
        other.codec = Codec(self.settings.max_depth)
        other.use_store(store)
        return other

    def for_records(self, expiry: Expiry, new_token: Callable[[], tuple[str, str]]) -> Repository:
        """A copy for records of another kind in the same store, which aren't sessions.

        The copy has no schema, imports, limit on new sessions or near cache.
        """
        other = copy.copy(self)
        other.expiry = expiry
        other.records = self.records.with_rules(expiry, new_token)
        other.near = other.imports = other.before_create = other.check = None
        return other

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
            body = self.records.read(key, record)
            if body is None:
                return None
            if not self.settings.encryption_keys:  # never keep encrypted contents decrypted
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
        record = (load or self.store.load)(key)
        # A store may still return an expired record.
        if record is None or self.clock() * 1000 >= record.idle_expires_at:
            if presented:
                self._note_absence(key, record)
            return None
        body = self.records.read(key, record)
        if body is None:
            return self._follow(key, record, presented, load or self.store.load)
        if self._unseen and presented:
            self._unseen.pop(key, None)
        return Loaded(record, body)

    def _follow(
        self, key: str, pointer: Record, presented: bool, load: Callable[[str], Record | None]
    ) -> Loaded | None:
        """The session at the end of the pointers that begin under ``key``."""
        record, passed = pointer, [key]
        while True:
            at = record.successor or ""
            if at in passed or len(passed) == MAX_POINTERS:
                raise UnreadableRecord("corrupt", "too many pointers")
            passed.append(at)
            found = load(at)
            if found is None or self.clock() * 1000 >= found.idle_expires_at:
                if presented:
                    self._note_absence(key, found, rotated=True)
                return None
            body = self.records.read(at, found)
            if body is not None:
                return Loaded(found, body)
            record = found

    def _note_absence(self, key: str, record: Record | None, *, rotated: bool = False) -> None:
        """Note that the token of this key leads to no session."""
        reason, detail = why_absent(record, rotated=rotated)
        self.refusals.note(reason, key, detail)

    def create(self, record: Record) -> None:
        """Store a new session. Raises ``KeyTaken``. One round trip."""
        if self.before_create is not None:
            self.before_create()
        self.store.create(record)

    def save(
        self,
        old: Record,
        record: Record,
        body: Body,
        lease: str | None = None,
        shorten: bool = False,
    ) -> None:
        """Replace ``old`` with ``record``. Raises ``Gone`` or ``Stale``.

        With ``lease``, raises ``LockLost`` unless the lease is still held. With ``shorten``, the
        idle expiry may move back. One round trip, one more if the session has large values and its
        idle expiry moves.
        """
        idle_end = record.idle_expires_at
        renewed = idle_end == old.idle_expires_at or self.large.renew_for(body, idle_end)
        if lease is None and not shorten:
            self.store.save(record, old.version)
        elif lease is None:
            self.store.save(record, old.version, shorten=True)
        else:
            with self._under_lease(lease) as leases:
                leases.save(record, old.version, lease, **(_SHORTEN if shorten else _NO_OPTIONS))
        if not renewed:
            self.large.renew_for(body, idle_end)

    def end(self, old: Record, body: Body | None, lease: str | None = None) -> None:
        """Delete exactly this version of the session. Raises as ``save`` does. One round trip.

        While old sessions are being imported, deletes the old record first.
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

        With ``shorten``, the idle expiry may move back. Returns ``LogoutUnconfirmed`` if replicas
        may still accept the old key. One round trip, one more if the session has large values.
        """
        idle_end = record.idle_expires_at
        shorten = shorten or self.expiry.is_too_late(old.idle_expires_at, idle_end, body)
        more = _SHORTEN if shorten else _NO_OPTIONS
        pointer = self.records.draft_pointer(old, record, grace) if grace else None
        self.large.renew_for(body, idle_end)
        if lease is None:
            replaced = self.store.replace(old.key, record, old.version, pointer, **more)
        else:
            with self._under_lease(lease) as leases:
                replaced = leases.replace(old.key, record, old.version, pointer, lease, **more)
        if replaced is not None and replaced.unconfirmed:
            return LogoutUnconfirmed(replaced.unconfirmed)
        return None

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

        If the store holds a version that this call has sent, the edit is not applied again. After
        ``StoreUnavailable`` or an interrupt, the outcome is unknown. You can then call again with
        the same dict as ``tried``. Another writer may have replaced that version by now, so let the
        edit also recognise its own effect, for example an entry that it has added.

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
                sent[record.version] = result  # first, since an interrupt may follow the write
                if old is None:
                    self.store.create(record)
                else:
                    self.store.save(record, old.version)
            return result

        return cast(R, write(prepare, send, partial(tries, self.settings.store_timeout)))

    def renew(self, record: Record, body: Body, idle_end: int) -> bool:
        """Renew the large values, then the record, so that no value expires before its record."""
        before = self.large.renew_for(body, idle_end)
        renewed = self.store.renew(record, idle_end)
        if not before:
            self.large.renew_for(body, idle_end)
        return renewed

    @contextmanager
    def _under_lease(self, lease: str) -> Iterator[Leases]:
        """The store's leases, for a write that needs one. Turns ``LeaseLost`` into ``LockLost``."""
        assert self.leases is not None  # the lease came from there
        try:
            yield self.leases
        except LeaseLost:
            raise LockLost from None
