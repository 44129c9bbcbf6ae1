"""One request's dealings with one session: loading, following other requests, ending."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

from flask import Flask, Request
from msgspec import Struct, field
from msgspec.structs import replace

from ..errors import (
    CutOff,
    Gone,
    KeyTaken,
    LockMisused,
    LogoutUnconfirmed,
    RotationRefused,
    SessionConflict,
    Stale,
    StoreUnavailable,
    TransactionMisused,
    UnreadableRecord,
    ValueRefused,
)
from ..events import SessionConflicted, SessionDestroyed, WriteDropped, logger
from ..processes import process
from ..repository.imports import Imports
from ..repository.races import tries
from ..repository.repository import PERMANENT, Loaded, Repository
from ..stores.base import Record
from ..stores.wrappers import Call
from ..tokens import session_key
from ..users.revoking import is_member
from ..users.rosters import Began
from ..values.marks import is_marked, split
from ..values.merge import Change, MergeFunction, last
from ..values.payload import Body, Join
from ..values.references import refers
from ..watching.tracing import Trace, TracedRepository, TracedValues
from .state import (
    FROM_STORE,
    IN_RESPONSE,
    IN_VIEW,
    NO_WISHES,
    NOTHING_SEEN,
    SAVED,
    Attempt,
    Behind,
    Block,
    Entry,
    NearLook,
    Outage,
    Presented,
    Seen,
    Wishes,
    current_block,
    remaining,
    without_rotation,
)
from .tracking import Looks, TrackedValues
from .unreferenced import UnreferencedValues

NO_ATTEMPTS: Mapping[int, Attempt] = MappingProxyType({})
NO_CHANGES: dict[str, Change] = {}
NO_EPOCHS: Mapping[str, int] = MappingProxyType({})
# Of UserLifecycle, which is derived from Lifecycle.
NO_USERS: Mapping[str | None, Any] = MappingProxyType({})
_NO_BODY = Body({})
#: The session's key for confirmations of who the user is: a dict of the method to the time in
#: milliseconds.
CONFIRMED = "_confirmed"
ONE_KEY = "session[%a]"  # for log messages
_TOO_LATE = (
    "%s was changed after the session had been saved with the response: the change is lost. Write "
    "to the session before the response is returned, and before a streamed body starts."
)
_AFTER_THE_BLOCK = (
    "%s was changed after the block of ext.open() had saved the session: the change is lost. Write "
    "to the session inside the block."
)
UNCONFIRMED = "A session ended, but replicas have not confirmed it: %s"


class Lifecycle(Struct, eq=False):
    """Holds what a request knows about its session, and what the next save should do with it.

    ``present`` reads the token from the ``request``. It is called once, at the first look.
    ``mutex`` guards the values, ``seen`` and ``wishes``, so that threads of a request never
    separate the values from the version that guards them. It is never held while application code
    runs or while a lock is awaited.
    """

    repository: Repository
    present: Callable[[Flask, Any], Presented]
    app: Flask
    request: Request | None
    _began: tuple[float, int]
    phase: str
    mutex: Any = field(default_factory=threading.RLock)

    seen: Seen = NOTHING_SEEN
    wishes: Wishes = NO_WISHES
    outage: Outage | None = None
    #: writes with an unknown outcome, by the version they would store
    attempts: Mapping[int, Attempt] = NO_ATTEMPTS
    #: pending changes to rosters; until they are made, no token may leave
    entry: Entry | None = None
    near: NearLook | None = None
    #: set when the session is loaded
    values: TrackedValues = cast(TrackedValues, None)
    opened: bool = False
    #: another request ended the session while this one ran
    ended: bool = False
    #: what the response does with the client's cookie
    cookie: Literal["keep", "set", "delete"] = "keep"
    #: the request has another library's or store's cookie that leads nowhere
    drops_old_cookie: bool = False
    #: whether Flask makes an error page for an unhandled exception
    error_page: bool = False
    #: whether this request counts as use of the session, and moves its idle expiry
    renews: bool = True
    #: whether the request had changed the session when it was saved
    was_modified: bool = False

    block: Block | None = None
    #: whether this request holds a lock or waits for one
    locked: bool = False
    #: the lease of the lock that this request holds
    lease: str | None = None
    lease_pid: int = 0
    #: the large values that this request wrote and no record refers to yet
    written_large: UnreferencedValues | None = None
    #: the merge policies of keys that this request set
    policies: dict[str, MergeFunction] | None = None
    #: the epochs after this request revoked the sessions of users
    epochs: Mapping[str, int] = NO_EPOCHS
    #: the keys that a library set to sign the user in
    signed_in: Collection[str] = ()
    #: the values of users that the request looked at
    of_users: Mapping[str | None, Any] = NO_USERS
    #: what the session behind an old token has for the user, until it has joined
    behind: Behind | None = None
    #: the user whose values this session's have joined, and the join, until it is closed
    joined: tuple[str, Join] | None = None
    #: of a take-over by a cookie that several visitors may have
    mark: Record | None = None
    trace: Trace | None = None

    _presented: Presented | None = None
    _imported: str | None = None  # the key of the session that an old cookie led to
    _in_function: set[int] | None = None  # threads that run a function of update_atomic
    _vetted: dict[str, bytes] | None = None
    _reported: set[str] | None = None

    def __repr__(self) -> str:
        """Hides the values and the token, since error trackers store local variables."""
        return f"<Lifecycle handle={self.handle!r}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("handle", self.handle)]

    def _new_values(self, body: Body = _NO_BODY) -> TrackedValues:
        codec, now = self.repository.codec, self.repository.now if body.marked else None
        if self.trace is not None:
            return TracedValues(codec, body.values, now, self.mutex, _trace=self.trace)
        looks: Looks | None = None
        if now is None and not body.has_large:  # or two threads would load one large value twice
            looks = body.values, {}
        return TrackedValues(codec, body.values, now, self.mutex, looks)

    @property
    def began(self) -> Began:
        """When the request began, for a sign-in."""
        return Began(*self._began)

    # -- phases

    def presented(self) -> Presented:
        """The token that the request brought, and how."""
        if self._presented is None:
            process.notice()
            self._presented = self.present(self.app, self.request)
        return self._presented

    def begin_response(self, response: Any) -> Any:
        """Called when Flask begins to process the response."""
        if self.phase == IN_VIEW:
            self.phase = IN_RESPONSE
        if self.of_users is not NO_USERS:
            for values in self.of_users.values():
                values.begin_response(response)
        return response

    def begin_error_page(self) -> None:
        """Called when Flask begins to make an error page for an unhandled exception."""
        self.error_page = True
        if self.phase == IN_VIEW:
            self.phase = IN_RESPONSE
        for values in self.of_users.values():
            values.begin_error_page()

    # -- loading

    def open(self) -> TrackedValues:
        """The values, loaded at the first call. Raises ``StoreUnavailable``."""
        if not self.opened:
            with self.mutex:
                if not self.opened:
                    self._load()
        return self.values

    def open_from_store(self, what: str) -> TrackedValues:
        """Like ``open``, but bypasses the near cache, since ``what`` needs the stored state.

        Values that the request looked at or changed stay as they are. Raises ``StoreUnavailable``.
        """
        if self.repository.near is not None:
            with self.mutex:
                near = self.near
                if near is None:
                    self.near = FROM_STORE
                elif near.hit and self.seen.record is near.record and not self.catch_up():
                    self.end(what)
        return self.open()

    def open_for_writing(self, what: str, *details: str) -> TrackedValues:
        """The values, for a change of ``what % details``. Logs a change that comes too late.

        A transaction or a lock stores its own changes, even after the response.
        """
        values = self.values if self.opened else self.open()
        if self.phase == SAVED and (self.block is None or current_block.get() is not self.block):
            self.report_late(what, *details)
        return values

    def report_late(self, what: str, *details: str) -> None:
        """Log, once, that a change is lost because the session is already saved.

        Tests that look at a finished request get no message, as with Flask's own session.
        """
        if self._reported is None:
            self._reported = set()
        what %= tuple(detail[:60] for detail in details)
        environ = {} if self.request is None else self.request.environ
        if what not in self._reported and "werkzeug.debug.preserve_context" not in environ:
            self._reported.add(what)
            logger.error(_TOO_LATE if self.request is not None else _AFTER_THE_BLOCK, what)

    def _load(self) -> None:
        repository, outage = self.repository, self.outage
        if outage is not None and outage.loading:
            self._go_on_without(outage.error)
            return
        presented = self.presented()
        checked, key = presented.checked, presented.handle  # keep the token out of local variables
        found = _NO_BODY
        if checked is not None:
            if checked.token is None:
                repository.refused(checked.reason, None)
            else:
                key = checked.key
        if key is not None:
            began = time.perf_counter()
            try:
                if repository.near is None:
                    loaded = repository.find(key, checked is not None)
                else:
                    loaded = self._find_near(key, presented)
                owner = None if loaded is None else loaded.body.owner
                if loaded and owner and not owner.seen and not is_member(repository, loaded):
                    repository.refused("revoked", key)
                    loaded = None
            except UnreadableRecord as error:
                self.seen = Seen(for_others=error.for_others)
                repository.refused(error.reason, key, error.detail)
            except StoreUnavailable as error:
                logger.log(error.log_level, "A session could not be loaded: %s", error)
                self._go_on_without(error)
                return
            else:
                if loaded is not None:
                    record, found = loaded.record, loaded.body
                    if found.debug_until is not None:
                        self.trace_if_debugged("load", began, found.debug_until)
                    token = None
                    if checked is not None and record.key == key:
                        token = checked.token
                        if checked.outdated:
                            self.cookie = "set"
                    self.seen = Seen(token, record, found, checked is not None)
                    if self.ended:
                        self.ended = False
        if repository.imports is not None:
            try:
                found = self._look_at_imports(repository.imports, found)
            except StoreUnavailable as error:
                logger.log(error.log_level, "An old session could not be taken over: %s", error)
                self.seen = NOTHING_SEEN
                self._go_on_without(error)
                return
        self.values = self._new_values(found)
        self.opened = True

    def _find_near(self, key: str, presented: Presented) -> Loaded | None:
        repository, near = self.repository, self.repository.near
        if near is None or self.request is None or presented.checked is None:
            return repository.find(key)
        if self.near is not FROM_STORE:
            version = repository.last_seen_version(self.request, presented.by_header)
            loaded = repository.find_near(key, version)
            if loaded is not None:
                self.near = NearLook(loaded.record, hit=True)
                return loaded
        loaded = repository.find(key, True, near.load_near)
        self.near = NearLook(None if loaded is None else loaded.record)
        return loaded

    def _look_at_imports(self, imports: Imports, found: Body) -> Body:
        """Take over the session of an old cookie, unless our own cookie led to a session."""
        presented, seen = self.presented(), self.seen
        if seen.record is not None:
            if not imports.has_ended(self.repository, found):
                return found
            logger.info("Session %s was ended by an old worker", seen.record.key)
            self.repository.delete(seen.record.key, body=found)
            self.repository.events.emit(SessionDestroyed, seen.record.key)
            self.seen = NOTHING_SEEN
            self.cookie, self.drops_old_cookie = "delete", True
            return _NO_BODY
        refused = presented.checked is not None and presented.checked.refused
        elsewhere = presented.by_header or presented.handle is not None
        if self.request is None or elsewhere or refused or seen.for_others:
            return found
        taken = imports.take_over(self.repository, self.request)
        self.drops_old_cookie = taken.dead_cookie
        if taken.loaded is None:
            return found
        self.ended = False
        self._imported = taken.loaded.record.key
        self.mark = taken.mark
        self.seen = Seen(taken.token, taken.loaded.record, taken.loaded.body, presented=True)
        if taken.token is not None:
            self.cookie = "set"
        return taken.loaded.body

    def _go_on_without(self, error: StoreUnavailable) -> None:
        """Raise the outage, or let the response report it.

        A hook or error page must not raise while Flask processes the response.
        """
        unseen = self.phase != IN_VIEW
        known = self.outage is not None and self.outage.unseen
        self.outage = Outage(error, loading=True, unseen=unseen or known)
        if not unseen:
            raise error
        self.values = self._new_values()

    def catch_up(self, *, afresh: bool = False) -> bool:
        """Load what other requests stored; False if the session has ended.

        Values that this request looked at or changed stay as they are, unless ``afresh``. A write
        of its own with an unknown outcome is recognised. Raises ``SessionConflict`` if it can't
        know whether such a write was stored, and repeating it would do harm.
        """
        seen = self.seen
        assert seen.record is not None
        key = seen.record.key
        try:
            loaded = self.repository.find(key)
            if loaded is None and self.attempts:
                loaded = self._find_rotated(seen.record)
        except UnreadableRecord as error:
            self.seen = Seen(record=seen.record, for_others=error.for_others)
            self.repository.refused(error.reason, key, error.detail)
            return False
        except StoreUnavailable as error:
            self.note_outage(error, "loaded again")
            raise
        if loaded is None:
            return False
        record, body = loaded.record, loaded.body
        token = seen.token if record.key == key else None
        wishes = self.wishes
        own = self._settle_attempts(record, seen.record, repeats=not afresh)
        if own is not None:
            self.values.mark_saved(own.body.values, own.changes)
            wishes = remaining(own.wishes, wishes)
            self.entry = own.entry
            if own.token is not None:
                token = own.token
                self.cookie = "set"
        elif token is None and seen.token is not None:
            # Another request rotated the session, and gives the client its token.
            self.cookie = "keep"
            if wishes.rotation != 0:
                wishes = without_rotation(wishes)
        now = self.repository.now if body.marked else None
        if afresh:
            self.values.restart(body.values, now)
            wishes = Wishes(
                rotation=wishes.rotation, binding=wishes.binding, sign_in=wishes.sign_in
            )
        else:
            self.values.rebase(body.values, now)
        if self.written_large is not None:
            self.written_large.mark_referenced(body.values)
        self.wishes = wishes
        self.seen = Seen(token, record, body, presented=seen.presented)
        return True

    def _find_rotated(self, before: Record) -> Loaded | None:
        """The session that one of the attempts moved from ``before`` to another key.

        Where a rotation takes two steps, the first may be all that was done before somebody logged
        out. So it is repeated, which does nothing now but say whether it was stored.
        """
        for attempt in self.attempts.values():
            grace, record = attempt.wishes.rotation, attempt.record
            if record.key == before.key or grace is None:
                continue
            loaded = self.repository.find(record.key)
            if loaded is not None and loaded.record.version == record.version:
                try:
                    self.repository.rotate(before, record, attempt.body, grace, shorten=True)
                except (Gone, Stale, KeyTaken):
                    continue
            if loaded is not None:  # another request that wrote to it has reached it
                return loaded
        return None

    def _settle_attempts(self, there: Record, before: Record, *, repeats: bool) -> Attempt | None:
        """Return the attempt that was stored, as the stored record proves.

        While the version from ``before`` is there, any attempt may still arrive. ``repeats``:
        pending changes will be stored again, even if an attempt already stored them.
        """
        if there.version == before.version:
            if not repeats:  # a late attempt stores changes that this request has discarded
                self.attempts = {
                    version: replace(attempt, changes=NO_CHANGES)
                    for version, attempt in self.attempts.items()
                }
            return None
        own = self.attempts.get(there.version)
        for attempt in self.attempts.values():
            # Only this attempt makes that key, so it was stored, whatever others did to it since.
            if attempt.record.key == there.key != before.key:
                own = attempt
        if own is None and repeats:
            # Another writer's version: on top of an attempt, or instead of it. The attempts stay
            # noted, so that repeating them never seems safe.
            policy_of = self.repository.merger.policy_of
            for other in self.attempts.values():
                for key in other.changes:
                    if policy_of(key, self.policies) is not last and self.values.has_changed(key):
                        raise self.conflict("unknown outcome")
        self.attempts = NO_ATTEMPTS
        return own

    def resolve_attempts(self) -> None:
        """Find out whether interrupted writes were stored. No round trip if there were none."""
        if not self.attempts or self.ended:
            return
        if self.seen.record is not None:
            if not self.catch_up():
                self.end("save")
            return
        for attempt in self.attempts.values():
            try:
                loaded = self.repository.find(attempt.record.key)
            except UnreadableRecord:
                continue
            except StoreUnavailable as error:
                self.note_outage(error, "loaded again")
                raise
            if loaded is None:
                continue  # it may still arrive, as a session whose token nobody gets
            self.attempts = NO_ATTEMPTS
            self.values.mark_saved(attempt.body.values, attempt.changes)
            self.values.rebase(loaded.body.values)
            self.wishes = remaining(attempt.wishes, self.wishes)
            self.entry = attempt.entry
            self.cookie = "set"
            self.seen = Seen(attempt.token, loaded.record, loaded.body)
            if self.written_large is not None:
                self.written_large.mark_referenced(loaded.body.values)
            return

    # -- for the next save

    @property
    def lifetime(self) -> int | None:
        """The session's own idle timeout in milliseconds; None if it follows the settings."""
        if self.wishes.lifetime is not None:
            return self.wishes.lifetime
        return None if self.seen.body is None else self.seen.body.lifetime

    @property
    def has_large(self) -> bool:
        """Whether a value may be a reference to a large value."""
        body, unreferenced = self.seen.body, self.written_large
        return (body is not None and body.has_large) or (
            unreferenced is not None and bool(unreferenced.references)
        )

    @property
    def is_of_user(self) -> bool:
        """Whether these are the values of a user, not a session."""
        return False

    def must_stay(self) -> bool:
        """Whether an empty record must stay in the store."""
        return False

    @property
    def is_late(self) -> bool:
        """Whether the session was already saved with the response."""
        return self.phase == SAVED

    @property
    def is_in_socket(self) -> bool:
        """Whether no view runs, but a socket handler, whose response nobody may send."""
        request = self.request
        return (
            self.phase == IN_VIEW and request is not None and request.routing_exception is not None
        )

    @property
    def unreferenced(self) -> UnreferencedValues:
        """The large values that this request wrote and no record refers to yet."""
        if self.written_large is None:
            self.written_large = UnreferencedValues(self.repository)
        return self.written_large

    def drop_unreferenced(self) -> None:
        """Release the large values that this request wrote and no record refers to."""
        if self.written_large is not None:
            self.written_large.release(unsure=bool(self.attempts) or self.outage is not None)

    def body(self, stored: dict[str, bytes], *, has_large: bool) -> Body:
        """The contents to store with these values."""
        before = self.seen.body or _NO_BODY
        lifetime, until = self.wishes.lifetime, before.debug_until
        return Body(
            stored,
            before.lifetime if lifetime is None else lifetime,
            self.values.now is not None and any(map(is_marked, stored.values())),
            None if until is None or until <= self.repository.now() else until,
            has_large and any(map(refers, stored.values())),
            before.owner,
            before.origin,
            before.settled,
            before.joins,
        )

    def pending(self) -> dict[str, Change]:
        """This request's changes so far, unchecked. Raises ``ValueRefused``."""
        with self.mutex:
            return self.values.changes()

    def changes(self) -> dict[str, Change]:
        """This request's changes, for a save. The caller holds the mutex.

        Raises ``ValueRefused``, also if one breaks the schema.
        """
        changes = self.values.changes(self.repository.settings.max_keys)
        check = self.repository.check
        if check is not None:
            for key, change in changes.items():
                if change.mine is not None and not refers(change.mine):
                    _, plain = split(change.mine)
                    if self.vetted.get(key) != plain:
                        check(key, self.repository.codec.decode(plain))
                        self.vetted[key] = plain
        return changes

    @property
    def vetted(self) -> dict[str, bytes]:
        """Encoded values that passed the session's schema."""
        if self._vetted is None:
            self._vetted = {}
        return self._vetted

    @property
    def is_unchanged(self) -> bool:
        """Whether a save has nothing to do, and no earlier one is incomplete."""
        return (
            not self.values.base
            and self.wishes is NO_WISHES
            and self.attempts is NO_ATTEMPTS
            and self.entry is None
            and self.joined is None
            and self.written_large is None
        )

    def has_wishes(self, *, rotating: bool = True) -> bool:
        """Whether the next save has something to do, even if no value changed."""
        wishes = self.wishes
        if wishes is NO_WISHES:
            return False
        return (
            wishes.lifetime is not None
            or wishes.forced
            or (wishes.binding is not None and (rotating or self.lease is None))
            or (rotating and wishes.rotation is not None)
            or (wishes.cleared and not worth_keeping(self.values.unexpired()))
        )

    def wish(self, **wanted: Any) -> None:
        """Let the next save do this too, even if an open block of another thread fails."""
        self.wishes = replace(self.wishes, **wanted)
        block = self.block
        while block is not None:
            if not block.is_around:
                block.before = replace(block.before, **wanted)
            block = block.outer

    def rotate_soon(
        self, grace: float, signed_in: Collection[str] = (), *, confirms: bool = False
    ) -> None:
        """Rotate with the next save, at the end of a lock, or with a transaction.

        An old token never yields a new one for the same session: with one, only a sign-in (no
        ``grace``) has an effect, and it starts a session of its own. ``signed_in``: the keys that a
        library has just set for a user whose identity doesn't depend on this session. ``confirms``:
        the user stays the same. Otherwise, a rotation without grace ends earlier confirmations.
        """
        self.open()
        if self.presented().handle is not None:
            raise RotationRefused(
                "A session from ext.open() can't be rotated, and nobody can sign in to it: no "
                "response would carry the new token. Do that in a view."
            )
        if self.phase == SAVED:
            self.report_late("The token of the session")
            return
        with self.mutex:
            if self.seen.record is None and not self.attempts:
                return
            if self.seen.is_old_token and grace > 0:
                logger.info(
                    "Session %s was not rotated: the request holds an old token of it",
                    self.handle,
                )
                return
            self.signed_in = signed_in
            earlier = self.wishes.rotation
            self.wish(rotation=grace if earlier is None else min(earlier, grace))
            if grace == 0 and not confirms:
                self.forget_confirmations()
            if self.seen.is_old_token and self.block is None:
                self.start_own_session()

    def forget_confirmations(self) -> None:
        """Drop confirmations from earlier requests, since another user may continue the session."""
        if CONFIRMED in self.values and not self.values.has_changed(CONFIRMED):
            del self.values[CONFIRMED]

    def start_own_session(self) -> None:
        """Continue with a new session that takes nothing over, for a sign-in.

        Either the request came with an old token, or it has just revoked the session of another
        user. The new session keeps the values that this request assigned, and so the sign-in
        itself. A value that was assigned unchanged may come from the old session, so it goes,
        unless a library has just signed in with it. The old session stays as it is.
        """
        values = self.values
        changes = values.changes()
        kept = {key: values.raw(key) for key in changes if values.was_assigned(key)}
        kept.update((key, values.raw(key)) for key in self.signed_in if key in values)
        if self.repository.user_keys or (self.seen.body is not None and self.seen.body.joins):
            self._keep_for_user(changes)
            kept = {key: raw for key, raw in kept.items() if key not in self.repository.user_keys}
        # If no other key is left, and these go as well, this was a logout instead of a sign-in.
        emptied = kept.keys() >= set(values)
        logger.info("A sign-in started a session of its own beside session %s", self.handle)
        binding = self.wishes.binding
        if binding is not None and not binding.user_id:
            binding = None
        values.clear()
        self.seen = Seen(presented=True)
        self.wishes = Wishes(cleared=emptied, binding=binding)
        self.entry = None
        self.attempts = NO_ATTEMPTS
        self.lease = None
        for key, raw in kept.items():
            if raw is not None:
                values.set_encoded(key, raw, self.repository.now)

    def _keep_for_user(self, changes: Mapping[str, Change]) -> None:
        """Note what the old session has for the user who signs in. It stays there as well."""
        keys, body, record = self.repository.user_keys, self.seen.body, self.seen.record
        mine = {key: change for key, change in changes.items() if key in keys}
        join, values, ends_at = None, {}, 0
        if body is not None and body.joins and body.owner is None and record is not None:
            join, ends_at = body.joins[0], record.absolute_expires_at
            values = {key: raw for key, raw in self.values.stored.items() if key in join.keys}
        self.behind = Behind(join, values, ends_at, mine)
        self.joined = None  # that session goes on, and may have more for the user later

    # -- ending

    @property
    def handle(self) -> str | None:
        """The stored session's key, which is also its public name."""
        return self.seen.record.key if self.seen.record else None

    def end_old_session(self) -> None:
        """Remove the record of the old cookie, if the session that ends was made from another one.

        It is there after a rollback, in which the user came back to the old workers.
        """
        imports, request = self.repository.imports, self.request
        if imports is not None and request is not None:
            imports.end_presented(self.repository, request, self.seen.body)

    def destroy(self) -> None:
        """End the session in the store now; see ``SessionData.destroy``."""
        with self.mutex:
            self.check_not_in_retried_code("Ending the session")
            presented = self.presented()
            if self.repository.imports is not None:
                self.open()  # an old cookie may lead to a session
                self.end_old_session()
            keys = [attempt.record.key for attempt in self.attempts.values()]
            owner = None if self.seen.body is None else self.seen.body.owner
            if self.seen.record is not None:
                keys.insert(0, self.seen.record.key)
            is_its = self.seen.record is not None and self.seen.presented
            checked = presented.checked
            if not is_its and self._imported is not None:
                keys.append(self._imported)
            if not is_its and checked is not None:
                # Even if it was refused, and this request created another session since.
                keys.extend(map(session_key, checked.signed))
            unconfirmed: LogoutUnconfirmed | None = None
            bodies = {key: self.seen.body for key in keys[:1] if self.seen.record is not None}
            emitted = []
            for key in dict.fromkeys(keys):
                heed = partial(self.trace_if_debugged, "delete", time.perf_counter())
                try:
                    ended = self.repository.delete(key, heed, owner=owner, body=bodies.get(key))
                except UnreadableRecord as error:
                    self.repository.refused(error.reason, key, error.detail)
                    continue
                except LogoutUnconfirmed as error:
                    logger.error(UNCONFIRMED, error)
                    unconfirmed, ended = error, True
                except StoreUnavailable as error:
                    self.note_outage(error, "ended")
                    if not self.opened:
                        self.outage = Outage(error, loading=True)
                    raise
                if ended:
                    emitted.append(key)
            known = self.values.stored if self.has_large else None
            self.forget()
            if unconfirmed is not None and known is not None:
                self.unreferenced.release_replaced(known, None)
            self.opened = True
            self.ended = False
            self.outage = None
            self.cookie = "keep" if presented.checked is None else "delete"
            self.drops_old_cookie = self.repository.imports is not None
            for key in emitted[:1]:
                self.repository.events.emit(SessionDestroyed, key)
            if unconfirmed is not None:
                raise unconfirmed

    def reload(self) -> None:
        """Discard this request's changes, and load again. The caller holds the mutex."""
        if self.seen.record is not None:
            # Discards changes only after loading, which may fail or be interrupted.
            if not self.catch_up(afresh=True):
                self.end("reload")
            self.outage = None
            self.wishes = NO_WISHES
        elif self.opened and self.cookie != "keep":
            self.outage = None
            self.wishes = NO_WISHES
            self.values.clear()
        else:
            self.outage = None
            self.opened = False
            self.forget()
            self.open()

    def forget(self) -> None:
        """Start again without a session. The instructions for the client's cookie stay."""
        if not self.opened or (
            self.trace is not None and not isinstance(self.values, TracedValues)
        ):
            self.values = self._new_values()
        else:
            self.values.clear()
        self.wishes = NO_WISHES
        self.attempts = NO_ATTEMPTS
        self.entry = None
        self.lease = None
        self.seen = Seen(for_others=self.seen.for_others)

    def refuse(self, reason: str, detail: str) -> None:
        """The loaded record turned out unreadable: continue with a new anonymous session."""
        with self.mutex:
            self.repository.refused(reason, self.handle, detail)
            self.forget()
            self.cookie = "delete"  # or the next request would meet the same record

    def end(self, during: str) -> None:
        """Another request ended the session: drop this request's changes."""
        with self.mutex:
            handle = self.handle
            logger.info("Session %s ended while a request ran; its changes were dropped", handle)
            self.forget()
            self.ended = True
            self.cookie = "keep"
            self.repository.events.emit(WriteDropped, handle, f"ended before {during}")

    def leads_nowhere(self) -> bool:
        """Whether the request has a token that leads to no session, here or in any other worker."""
        return (
            self.opened
            and self.seen.record is None
            and not self.seen.for_others
            and self.presented().checked is not None
        )

    # -- checks

    def check_store(self) -> None:
        """Raises the outage that this request has met, to avoid a second wait."""
        if self.outage is not None:
            raise self.outage.error

    def check_reaches_centre(self, what: str) -> None:
        """Raises ``CutOff`` on an edge that is cut off, as ``what`` needs the centre."""
        edge = self.repository.edge
        if edge is not None and self.repository.is_cut_off:
            raise CutOff(f"{what} needs the centre: {edge.cut_off}")

    def check_lease(self) -> None:
        """Raises ``LockMisused`` in a forked child, which may not write under its parent's lock."""
        if self.lease is not None and self.lease_pid != os.getpid():
            raise LockMisused(
                "The process that entered this lock holds it. A forked child can't write under it."
            )

    def note_outage(self, error: StoreUnavailable, what: str) -> None:
        """Keep the outage, and log it once."""
        if self.outage is None or self.outage.error is not error:
            self.outage = Outage(error)
            logger.log(error.log_level, "A session could not be %s: %s", what, error)

    def in_retried_code(self) -> bool:
        """Whether the caller is code that runs again after a lost race."""
        if self.block is not None and self.block.kind == "transaction":
            return True
        return self._in_function is not None and threading.get_ident() in self._in_function

    def check_not_in_retried_code(self, what: str) -> None:
        """Raises ``TransactionMisused`` in code that runs again after a lost race."""
        if self.in_retried_code():
            raise TransactionMisused(
                f"{what} isn't possible inside a transaction, or in the function of update_atomic: "
                "it could not be undone or run again. Do it before or after."
            )

    def call(self, function: Callable[[Any], Any], value: Any) -> Any:
        """Call the function of an ``update_atomic`` with ``value``."""
        thread = threading.get_ident()
        with self.mutex:
            self._in_function = {*(self._in_function or ()), thread}
        try:
            return function(value)
        finally:
            with self.mutex:
                self._in_function = self._in_function - {thread}

    # -- races

    def tries(self) -> Iterator[int]:
        """Count the races that a write loses. Raises ``SessionConflict`` after too many."""
        timeout = self.repository.settings.store_timeout
        return tries(timeout, partial(self.conflict, "too many races"))

    def conflict(self, reason: str) -> SessionConflict:
        """Count a lost race, and return its error."""
        self.repository.events.emit(SessionConflicted, self.handle or "", reason)
        return SessionConflict()

    # -- blocks

    def begin_block(self, kind: Literal["transaction", "lock"]) -> Block:
        """Let further changes belong to a transaction or a lock. The caller holds the mutex."""
        pending = self.values.changes() if self.seen.record is None else None
        block = Block(kind, self.seen, self.wishes, self.block, pending)
        self.block = self.values.block = block
        return block

    def leave_block(self, block: Block) -> None:
        """Let further changes no longer belong to this block."""
        with self.mutex:
            inner = self.block
            if inner is block:
                self.block = self.values.block = block.outer
            while inner is not None:  # another thread may have begun a block inside this one
                if inner.outer is block:
                    inner.outer = block.outer
                inner = inner.outer
        if current_block.get() is block:
            current_block.set(block.within)

    def roll_back(self, block: Block) -> None:
        """Discard the changes of a transaction or a lock, and leave it."""
        with self.mutex:
            self.wishes = block.before
            for key in self.values.roll_back(block):
                logger.error(
                    "session[%a] was changed inside and outside a block that failed: both changes "
                    "are lost",
                    key[:60],
                )
            if self.seen.record is None and block.pending is not None:
                for key, change in block.pending.items():
                    if change.mine is not None and key not in self.values:
                        self.values.set_encoded(key, change.mine, self.repository.now)
            self.leave_block(block)

    # -- debugging

    def start_trace(self, trace: Trace) -> None:
        """Record in ``trace`` what this request does from now on."""
        self.trace = trace
        self.repository = TracedRepository(self.repository, trace)

    def trace_if_debugged(self, operation: str, began: float, until: int) -> None:
        """Start a trace if this session is still debugged, beginning with this store operation."""
        if until <= self.repository.now():
            return
        if self.trace is None:
            self.start_trace(Trace(by_order=True))
            assert self.trace is not None
            self.trace.calls.append(Call(operation, time.perf_counter() - began, None))

    def late_changes(self) -> list[str]:
        """The keys of values that were changed in place after the session was saved."""
        if not self.opened:
            return []
        try:
            return list(self.pending())
        except ValueRefused as error:
            return [error.path]


def worth_keeping(values: dict[str, bytes]) -> bool:
    """Whether a session with these values exists. Marks about the session alone don't count."""
    return len(values) > (PERMANENT in values) + (CONFIRMED in values)
