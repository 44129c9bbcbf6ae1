"""The state of one request's session, which every module of ``request`` works on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from os import getpid
from types import MappingProxyType
from typing import Any, Literal, cast

from flask import Flask, Request
from msgspec import Struct, field
from msgspec.structs import replace

from ..errors import SessionConflict, StoreUnavailable
from ..events import SessionConflicted, WriteDropped, logger
from ..processes import process
from ..repository.permanent import PERMANENT
from ..repository.races import tries
from ..repository.repository import Repository
from ..stores.base import Record
from ..users.rosters import Began
from ..values.marks import is_marked, split
from ..values.merge import Change, MergeFunction
from ..values.payload import Body, Join
from ..values.references import refers
from ..watching.tracing import Trace, TracedValues
from .rebasing import start_empty
from .state import (
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
)
from .tracking import TrackedValues
from .unreferenced import UnreferencedValues

NO_ATTEMPTS: Mapping[int, Attempt] = MappingProxyType({})
NO_EPOCHS: Mapping[str, int] = MappingProxyType({})
# Of UserLifecycle, which is derived from Lifecycle.
NO_USERS: Mapping[str | None, Any] = MappingProxyType({})
NO_BODY = Body({})
#: The session's key for confirmations of who the user is: a dict of the method to the time in
#: milliseconds.
CONFIRMED = "_confirmed"
#: The keys of marks about the session alone. A session with no other keys doesn't exist.
ABOUT_ITSELF = frozenset({PERMANENT, CONFIRMED})
ONE_KEY = "session[%a]"  # for log messages
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
    #: pending changes to rosters; no token may be sent until they are made
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
    policies: Mapping[str, MergeFunction] | None = None
    #: the epochs after this request revoked the sessions of users
    epochs: Mapping[str, int] = NO_EPOCHS
    #: the keys that a library set to sign the user in
    signed_in: Collection[str] = ()
    #: the values of users that the request looked at
    of_users: Mapping[str | None, Any] = NO_USERS
    #: the user's values in the session behind an old token, until they have joined
    behind: Behind | None = None
    #: the user whose values this session's values have joined, and the join, until it is closed
    joined: tuple[str, Join] | None = None
    #: the mark of an import by a cookie that several visitors may share
    mark: Record | None = None
    #: the key of the session that an old cookie led to
    imported: str | None = None
    #: the threads that run a function of ``update_atomic``
    in_function: set[int] | None = None
    #: the late changes that are in the log already
    reported: set[str] | None = None
    trace: Trace | None = None

    _presented: Presented | None = None
    _vetted: dict[str, bytes] | None = None

    def __repr__(self) -> str:
        """Hides the values and the token, since error trackers store local variables."""
        return f"<Lifecycle handle={self.handle!r}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("handle", self.handle)]

    def new_values(self, body: Body = NO_BODY) -> TrackedValues:
        """Values of any kind, for which each first look takes the mutex."""
        codec, now = self.repository.codec, self.repository.now if body.marked else None
        if self.trace is not None:
            return TracedValues(codec, body.values, now, self.mutex, _trace=self.trace)
        return TrackedValues(codec, body.values, now, self.mutex)

    @property
    def began(self) -> Began:
        """When the request began, for a sign-in."""
        return Began(*self._began)

    # -- phases

    def presented(self) -> Presented:
        """The token that the request brought, and how."""
        if self._presented is None:
            if getpid() != process.pid:
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

    # -- for the next save

    @property
    def lifetime(self) -> int | None:
        """The session's own idle timeout in milliseconds; None if it follows the settings."""
        lifetime, body = self.wishes.lifetime, self.seen.body
        return body.lifetime if lifetime is None and body is not None else lifetime

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

    def check_readable(self) -> None:
        """Raises an error if only other workers can read the record, and it must not be replaced.

        Sessions start again instead.
        """

    def find_new(self, *, discard: bool) -> bool:
        """Load a record that another request may have created. Sessions get new keys instead."""
        raise AssertionError("another request can't store this session for the first time")

    def must_stay(self) -> bool:
        """Whether an empty record must stay in the store."""
        return False

    @property
    def is_late(self) -> bool:
        """Whether the session was already saved with the response."""
        return self.phase == SAVED

    @property
    def is_in_socket(self) -> bool:
        """Whether a socket handler runs instead of a view, so that no response may be sent."""
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
        before = self.seen.body or NO_BODY
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
        if self.repository.check is not None:
            self.check_schema(changes)
        return changes

    def check_schema(self, changes: Mapping[str, Change]) -> None:
        """Let the session's schema check changed values that it has not checked yet."""
        for key, change in changes.items():
            if change.mine is not None and not refers(change.mine):
                _, plain = split(change.mine)
                if self.vetted.get(key) != plain:
                    self.repository.check(key, self.repository.codec.decode(plain))
                    self.vetted[key] = plain

    @property
    def vetted(self) -> dict[str, bytes]:
        """Encoded values that passed the session's schema."""
        if self._vetted is None:
            self._vetted = {}
        return self._vetted

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
        with self.mutex:
            self.wishes = replace(self.wishes, **wanted)
            block = self.block
            while block is not None:
                if not block.is_around:
                    block.before = replace(block.before, **wanted)
                block = block.outer

    def merge_by(self, policies: Mapping[str, MergeFunction]) -> None:
        """Let this request's saves merge these keys by these policies."""
        with self.mutex:
            self.policies = {**(self.policies or {}), **policies}

    # -- ending

    @property
    def handle(self) -> str | None:
        """The stored session's key, which is also its public name."""
        record = self.seen.record
        return record.key if record else None

    def forget(self) -> None:
        """Start again without a session. The instructions for the client's cookie stay."""
        if not self.opened or (
            self.trace is not None and not isinstance(self.values, TracedValues)
        ):
            self.values = self.new_values()
        else:
            start_empty(self.values)
        self.wishes = NO_WISHES
        self.attempts = NO_ATTEMPTS
        self.entry = None
        self.lease = None
        self.seen = Seen(for_others=self.seen.for_others)

    def end(self, during: str) -> None:
        """Drop this request's changes, since another request ended the session."""
        with self.mutex:
            handle = self.handle
            logger.info("Session %s ended while a request ran; its changes were dropped", handle)
            self.forget()
            self.ended = True
            self.cookie = "keep"
            self.repository.events.emit(WriteDropped, handle, f"ended before {during}")

    # -- checks

    def note_outage(self, error: StoreUnavailable, what: str) -> None:
        """Remember the outage, and log it once. ``what`` completes "A session could not be"."""
        if self.outage is None or self.outage.error is not error:
            self.outage = Outage(error)
            logger.log(error.log_level, "A session could not be %s: %s", what, error)

    # -- races

    def tries(self) -> Iterator[int]:
        """Count the races that a write loses. Raises ``SessionConflict`` after too many."""
        timeout = self.repository.settings.store_timeout
        return tries(timeout, partial(self.conflict, "too many races"))

    def conflict(self, reason: str) -> SessionConflict:
        """Count a lost race, and return its error."""
        self.repository.events.emit(SessionConflicted, self.handle or "", reason)
        return SessionConflict()


def worth_keeping(values: dict[str, bytes]) -> bool:
    """Whether a session with these values exists."""
    return not values.keys() <= ABOUT_ITSELF
