"""One request's hold on one session: loaded when first needed, saved once, with the response."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Concatenate, Literal, ParamSpec, TypeVar

from flask import Flask, Request
from msgspec import Struct
from werkzeug.exceptions import HTTPException

from .errors import (
    Gone,
    GSessionError,
    LockMisused,
    LogoutUnconfirmed,
    SessionClosed,
    SessionConflict,
    SessionEnded,
    Stale,
    StoreUnavailable,
    TransactionMisused,
    UnreadableRecord,
    ValueRefused,
)
from .events import (
    SessionConflicted,
    SessionCreated,
    SessionDestroyed,
    SessionRenewed,
    SessionRotated,
    SessionSaved,
    WriteDropped,
    logger,
)
from .keeper import ATTEMPTS, BLOB_GRACE, PERMANENT, RACE_BUDGETS, Keeper
from .marks import is_marked, split, unexpired
from .merge import Change, MergeFunction
from .payload import Body
from .references import Reference, names_in, refers
from .stores.base import Record
from .stores.wrappers import Call
from .tokens import Checked, session_key
from .tracing import Trace, TracedKeeper, TracedValues
from .tracking import TrackedValues

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Lifecycle")

_UNCONFIRMED = "A session ended, and that is not confirmed: %s"


def alone(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Of the threads that share the session of a request, one at a time does such a thing.

    What is stored and what is known of it change together.
    """

    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn:
            return method(self, *args, **kwargs)

    return call


class Presented(Struct, frozen=True, gc=False):
    """What the request brought: the checked token, None where it brought none."""

    checked: Checked | None = None
    by_header: bool = False


class LostRace(SessionConflict):
    """A transaction could not be stored: another request was faster."""


class Storing:
    """Around a write: unless it is known to have failed, what it refers to must stay.

    So it is after an outage, and after an interrupt that came between the write and its answer.
    """

    __slots__ = ("_session", "_unsure")

    def __init__(self, session: Lifecycle) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._unsure = self._session._unsure
        self._session._unsure = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, StoreUnavailable):
            return
        if issubclass(kind, (GSessionError, HTTPException)):
            self._session._unsure = self._unsure


class Lifecycle:
    """Loads a session when it is first looked at, and stores what a request did to it.

    ``present`` reads the token from the ``request``; it is called once, at the first look.
    ``_cookie`` says what is to become of the client's cookie.
    """

    # What a session starts with. Most requests never look at theirs, so nothing is made for them.
    accessed = False
    _presented: Presented | None = None
    _opened = False
    _closed = False
    _ended = False
    _failure: StoreUnavailable | None = None  # of loading
    _failed_unseen = False  # by everybody: it is for the answer to tell
    _for_others = False  # what is stored may be readable for another worker
    _in_doubt: StoreUnavailable | None = None  # of what came later: a write may have been applied
    _cookie: Literal["keep", "set", "delete"] = "keep"
    _token: str | None = None  # None also where the client holds a newer one than we know
    _record: Record | None = None
    _found = False  # by the token of the request
    _lifetime: int | None = None
    _race_ends = 0.0  # of time.monotonic
    _restart_idle = False
    _rotation: float | None = None
    _forced = False
    _cleared = False
    _in_transaction = False
    _in_function: int | None = None  # of update_atomic, in this thread
    _values: TrackedValues  # made when the session is looked at
    _lease: str | None = None  # held by this request
    _lease_pid = 0
    _policies: dict[str, MergeFunction] | None = None  # of keys that this request set
    _rotation_later: float | None = None  # at the end of the lock
    _lifetime_before: int | None = None  # the transaction or the lock
    # What was set before a transaction on a session that is not stored: no more than is no session.
    _pending: dict[str, Change] | None = None
    _trace: Trace | None = None  # of those who debug
    _tracked: Callable[..., TrackedValues] = TrackedValues
    _debug_until: int | None = None  # of this very session, in milliseconds
    _spilled = False  # whether a value may be a reference to a large one
    # Large values that this request wrote and no record refers to yet, by kind and digest.
    _placed: dict[tuple[int, bytes], Reference] | None = None
    _placed_until = 0  # the first of them expires, in milliseconds
    _unsure = False  # whether a record may refer to them all the same

    def __init__(
        self,
        keeper: Keeper,
        present: Callable[[Flask, Request], Presented],
        app: Flask,
        request: Request,
    ) -> None:
        self._keeper = keeper
        self._present = present
        self._app = app
        self._request = request
        self._thread = threading.get_ident()
        self._turn = threading.RLock()

    def _start_trace(self, trace: Trace) -> None:
        """Write down in ``trace`` what this request does from now on."""
        self._trace = trace
        self._keeper = TracedKeeper(self._keeper, trace)
        self._tracked = partial(TracedValues, trace)

    def _heed_order(self, operation: str, began: float, until: int) -> None:
        """The session that was met by this operation of the store is to be debugged until then."""
        if until <= self._keeper.now():
            return
        self._debug_until = until
        if self._trace is None:
            self._start_trace(Trace(by_order=True))
            assert self._trace is not None
            self._trace.calls.append(Call(operation, time.perf_counter() - began, None))

    def _forget(self) -> None:
        """Hold no session: as at the start, but for what the client is to be told."""
        self._values = self._tracked(self._keeper.codec)
        self._token = self._record = self._lifetime = self._rotation = self._lease = None
        self._debug_until = None
        self._found = self._restart_idle = self._forced = self._cleared = False

    def _look_at_request(self) -> Presented:
        if self._presented is None:
            self.accessed = True
            self._presented = self._present(self._app, self._request)
        return self._presented

    def _open(self) -> TrackedValues:
        if not self._opened:
            with self._turn:
                if not self._opened:
                    self._load()
        return self._values

    def _load(self) -> None:
        if self._failure is not None:
            late = self._past_the_view()
            if late is not None:
                self._failed_unseen |= late is Flask.handle_exception
                self._values = self._tracked(self._keeper.codec)
                return  # empty: the answer will not be one that was made from it
            raise self._failure
        checked = self._look_at_request().checked
        if checked is not None and checked.token is None:
            self._keeper.refused(checked.reason, None)
        elif checked is not None and checked.token is not None:
            key = session_key(checked.token)
            began = time.perf_counter()
            try:
                loaded = self._keeper.find(key, True)
            except UnreadableRecord as error:
                self._for_others = error.for_others
                self._keeper.refused(error.reason, key, error.detail)
            except StoreUnavailable as error:
                self._failure = error
                logger.log(error.log_level, "A session could not be loaded: %s", error)
                if self._past_the_view() is not None:
                    self._failed_unseen = True
                    self._values = self._tracked(self._keeper.codec)
                    return
                raise
            else:
                if loaded is not None:
                    self._ended = False
                    self._found = True
                    self._record, body = loaded.record, loaded.body
                    if body.debug_until is not None:
                        self._heed_order("load", began, body.debug_until)
                    if body.marked:
                        self._values = self._track(body)
                    else:
                        self._values = self._tracked(self._keeper.codec, body.values)
                    self._lifetime = body.lifetime
                    self._spilled = body.spilled
                    if self._record.key == key:
                        self._token = checked.token
                        if checked.outdated:
                            self._cookie = "set"
        if self._record is None:
            self._values = self._tracked(self._keeper.codec)
        self._opened = True

    def _track(self, body: Body) -> TrackedValues:
        keeper = self._keeper
        return self._tracked(keeper.codec, body.values, keeper.now if body.marked else None)

    def _body(self, stored: dict[str, bytes]) -> Body:
        """What to store when these are the values."""
        if self._values.now is None and not self._spilled:
            return Body(stored, self._lifetime, False, self._debug_until)
        return Body(
            stored,
            self._lifetime,
            self._values.now is not None and any(map(is_marked, stored.values())),
            self._debug_until,
            self._spilled and any(map(refers, stored.values())),
        )

    def _checked_changes(self) -> dict[str, Change]:
        """What this request changed. Raises what the schema of the session has to say of it."""
        changes = self._values.changes(self._keeper.settings.max_keys)
        check = self._keeper.check
        if check is not None:
            for key, change in changes.items():
                if change.mine is not None and not refers(change.mine):
                    _, plain = split(change.mine)
                    if self._vetted.get(key) != plain:
                        check(key, self._keeper.codec.decode(plain))
                        self._vetted[key] = plain
        return changes

    @cached_property
    def _vetted(self) -> dict[str, bytes]:
        """What the schema of the session found right, in encoded form."""
        return {}

    def _past_the_view(self) -> Callable[..., object] | None:
        """What Flask does where it is past the view and its errors; None where it is not.

        A hook, or a page for all errors, that raises there spoils whatever was answered. Asked only
        when a load failed, so it may be slow. What is async runs in a thread of its own, while that
        of the request waits for it.
        """
        stacks = (inspect.currentframe(), sys._current_frames().get(self._thread))
        for frame in stacks:
            while frame is not None:
                for step in (Flask.process_response, Flask.handle_exception):
                    if frame.f_code is step.__code__:
                        return step
                frame = frame.f_back
        return None

    def _open_for_writing(self) -> TrackedValues:
        self._check_open()
        return self._open()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed(
                "The session was already saved with the response; this write would be lost. "
                "Write to the session before a streamed body starts."
            )

    def _check_store(self) -> None:
        """An outage that this request has met is not waited for again.

        Nor is a write repeated that may have been applied: it could be applied twice.
        """
        if self._in_doubt is not None:
            raise self._in_doubt

    def _check_lease(self) -> None:
        """A forked child does not write under the lock of its parent."""
        if self._lease is not None and self._lease_pid != os.getpid():
            raise LockMisused("This lock is held by the process that entered it: not by its child.")

    def _met_outage(self, error: StoreUnavailable, what: str) -> None:
        if self._in_doubt is not error:
            self._in_doubt = error
            logger.log(error.log_level, "A session could not be %s: %s", what, error)

    def _may_run_again(self) -> bool:
        """Whether this is called by what a lost race repeats."""
        return self._in_transaction or self._in_function == threading.get_ident()

    def _check_no_transaction(self, what: str) -> None:
        if self._may_run_again():
            raise TransactionMisused(
                f"{what} cannot be done inside a transaction, or in the function of update_atomic: "
                "it could not be undone or run again. Do it before or after."
            )

    @alone
    def _begin(self) -> None:
        """Start a transaction on what is stored now."""
        self._check_open()
        self._check_no_transaction("A second transaction")
        self._check_store()
        seen_before = self._opened
        self._open()
        if seen_before:
            if self._has_changes():
                self._commit()
            if self._record is not None and not self._catch_up(afresh=True):
                self._end("a transaction")
        if self._ended:
            raise SessionEnded
        self._lifetime_before = self._lifetime
        self._pending = self._values.changes() if self._record is None else None
        self._in_transaction = True

    @alone
    def _commit_exactly(self) -> None:
        """Store a transaction on the very state it saw. Raises ``LostRace``."""
        try:
            changes = self._checked_changes()
            if self._record is None:
                self._commit()
            elif changes or self._something_to_save():
                self._write(changes, exactly=True)
        except BaseException:
            self._roll_back()
            raise
        self._in_transaction = False

    def _tell_conflict(self, reason: str) -> None:
        assert self._record is not None
        self._keeper.events.emit(SessionConflicted, self._record.key, reason)

    def _too_many_races(self) -> SessionConflict:
        self._tell_conflict("too many races")
        return SessionConflict()

    def _roll_back(self) -> None:
        """Forget what a transaction or a lock did."""
        pending = self._pending if self._in_transaction else None
        self._in_transaction = False
        self._rotation = None
        known = self._record is not None or pending is not None
        self._lifetime = self._lifetime_before if known else None
        values = self._values
        self._values = self._tracked(self._keeper.codec, values.stored, values.now)
        for key, change in (pending or {}).items():
            if change.mine is not None:
                self._values.give(key, change.mine, self._keeper.now)
        self._restart_idle = self._forced = self._cleared = False

    @alone
    def _destroy(self) -> None:
        self._check_open()
        self._check_no_transaction("Ending the session")
        presented = self._look_at_request()
        key: str | None = None
        if self._record is not None:
            key = self._record.key
        elif presented.checked is not None and presented.checked.token is not None:
            key = session_key(presented.checked.token)
        unconfirmed: LogoutUnconfirmed | None = None
        if key is not None:
            ordered = partial(self._heed_order, "delete", time.perf_counter())
            try:
                ended = self._keeper.delete(key, ordered)
            except UnreadableRecord as error:
                self._keeper.refused(error.reason, key, error.detail)
                ended = False
            except LogoutUnconfirmed as error:
                logger.error(_UNCONFIRMED, error)
                unconfirmed, ended = error, True
                self._let_go()
            except StoreUnavailable as error:
                self._met_outage(error, "ended")
                if not self._opened:
                    self._failure = error
                raise
            if ended:
                self._keeper.events.emit(SessionDestroyed, key)
        self._forget()
        self._opened = True
        self._ended = False
        self._failure = self._in_doubt = None
        self._failed_unseen = self._unsure = False
        self._cookie = "keep" if presented.checked is None else "delete"
        if unconfirmed is not None:
            raise unconfirmed

    def _refuse(self, reason: str, detail: str) -> None:
        """What was loaded turned out unreadable: go on as a new anonymous session."""
        self._keeper.refused(reason, self._record.key if self._record else None, detail)
        self._forget()
        self._cookie = "delete"  # or the next request would meet the same

    def _end(self, during: str) -> None:
        """The session ended under this request: nothing of it is stored any more."""
        handle = self._record.key if self._record else None
        logger.info("Session %s ended while a request ran; its changes were dropped", handle)
        self._keeper.events.emit(WriteDropped, handle, f"ended before {during}")
        self._forget()
        self._ended = True
        self._cookie = "keep"

    def _catch_up_after(self, losses: int) -> bool:
        """After a lost race: wait a little, then see what is stored, for a try at once."""
        self._pause(losses)
        return self._catch_up()

    def _pause(self, losses: int) -> None:
        """Wait a little. Raises ``SessionConflict`` when losing has taken too long by now."""
        now = time.monotonic()
        if losses == 1:
            self._race_ends = now + RACE_BUDGETS * self._keeper.settings.store_timeout
        elif now >= self._race_ends:
            raise self._too_many_races()
        self._keeper.pause(losses)

    def _catch_up(self, *, afresh: bool = False) -> bool:
        """See what other requests stored; False where the session is no more.

        What this request looked at or changed stays as it is, unless ``afresh``.
        """
        assert self._record is not None
        key = self._record.key
        try:
            loaded = self._keeper.find(key)
        except UnreadableRecord as error:
            self._for_others = error.for_others
            self._keeper.refused(error.reason, key, error.detail)
            return False
        except StoreUnavailable as error:
            self._met_outage(error, "loaded again")
            raise
        if loaded is None:
            return False
        self._record, body = loaded.record, loaded.body
        self._debug_until = body.debug_until
        if self._record.key != key:
            # Another request rotated the session. The client gets that token, not one of ours.
            self._token = None
            self._cookie = "keep"
            if self._rotation != 0:
                self._rotation = None
            # A rotation without grace, as at a login, is still done: whoever did the other one
            # must not hold the session after it.
        if afresh:
            self._values = self._track(body)
            self._rotation = None
            self._restart_idle = self._forced = self._cleared = False
        else:
            self._values.follow(body.values, self._keeper.now if body.marked else None)
        if not self._restart_idle:
            self._lifetime = body.lifetime
        self._spilled = body.spilled or bool(self._placed)
        return True

    def _save_and_close(self) -> None:
        """Store what this request changed, and accept no more writes."""
        closed, self._closed = self._closed, True
        # A transaction or a lock that another thread is in the middle of stores itself, or nothing.
        within = self._in_transaction or self._lease is not None
        if self._opened and not closed and not within:
            with self._turn:
                try:
                    self._commit()
                finally:
                    if self._placed:
                        self._drop_placed()
            emptied = self._cleared and self._record is None and not self._ended
            if emptied and self._look_at_request().checked is not None:
                self._cookie = "delete"

    def _commit(self) -> None:
        values = self._values
        changes = self._checked_changes()
        if self._in_doubt is not None:
            if changes or self._cleared or self._something_to_save():
                raise self._in_doubt
            return
        if self._ended:
            if changes:
                self._end("save")
        elif self._record is None:
            stored = {key: change.mine for key, change in changes.items() if change.mine}
            if values.now is not None:
                stored = unexpired(stored, values.now())
            if _worth_keeping(stored):
                try:
                    merged, stored = stored, self._put_away(stored)
                    with Storing(self):
                        self._token, self._record = self._keeper.create(self._body(stored))
                except StoreUnavailable as error:
                    self._met_outage(error, "created")
                    raise
                values.accept(stored, _as_stored(changes, merged, stored))
                self._let_go(after=stored)
                self._restart_idle = self._forced = self._cleared = False
                self._rotation = None
                self._cookie = "set"
                self._keeper.events.emit(SessionCreated, self._record.key)
        elif changes or self._something_to_save():
            self._write(changes)
        else:
            self._renew_if_due()

    def _write(self, changes: Mapping[str, Change], *, exactly: bool = False) -> None:
        """Put ``changes`` onto what is stored, trying again when another request was faster.

        With ``exactly`` it tries once, and raises ``LostRace``.
        """
        self._check_lease()
        keeper, values = self._keeper, self._values
        for losses in range(ATTEMPTS):
            if losses:
                if not self._catch_up_after(losses):
                    self._end("save")
                    return
                if not (changes or self._something_to_save()):
                    return
            old = self._record
            assert old is not None
            try:
                now = values.now() if values.now is not None else None
                merged = keeper.merger.apply(values.stored, changes, now, self._policies)
            except SessionConflict:
                self._tell_conflict("refused")
                raise
            except UnreadableRecord as error:
                keeper.events.emit(WriteDropped, old.key, error.reason)
                self._refuse(error.reason, error.detail)
                return
            toggled = PERMANENT in changes and (
                keeper.is_permanent(merged) != keeper.is_permanent(values.stored)
            )
            unconfirmed: LogoutUnconfirmed | None = None
            try:
                if self._cleared and not _worth_keeping(merged):
                    try:
                        keeper.end(old, self._lease)
                    except LogoutUnconfirmed as error:
                        logger.error(_UNCONFIRMED, error)
                        unconfirmed = error
                    keeper.events.emit(SessionDestroyed, old.key)
                    self._let_go()
                    self._forget()
                    self._cookie = "delete"
                    if unconfirmed is not None:
                        raise unconfirmed
                    return
                stored = merged
                if self._placed or keeper.any_large(merged, changes, len(old.payload)):
                    stored = self._put_away(merged)
                body = self._body(stored)
                if self._rotation is not None:
                    with Storing(self):
                        self._token, self._record, unconfirmed = keeper.rotate(
                            old,
                            body,
                            self._rotation,
                            self._lease,
                            restart_idle=toggled or self._restart_idle,
                        )
                    keeper.events.emit(SessionRotated, self._record.key, old.key)
                    self._cookie = "set"
                else:
                    with Storing(self):
                        self._record = keeper.save(
                            old,
                            body,
                            restart_idle=toggled or self._restart_idle,
                            lease=self._lease,
                        )
            except (Stale, Gone):
                if exactly:
                    self._tell_conflict("transaction")
                    raise LostRace from None
                continue
            except UnreadableRecord as error:
                keeper.refused(error.reason, old.key, error.detail)
                self._end("save")
                return
            except LogoutUnconfirmed:
                raise
            except StoreUnavailable as error:
                self._met_outage(error, "saved")
                raise
            if toggled:
                self._set_cookie_if_known()
            before = values.stored
            if stored is not merged:
                changes = _as_stored(changes, merged, stored)
            values.accept(stored, changes)
            self._rotation = None
            self._restart_idle = self._forced = self._cleared = False
            self._saved(old, stored, losses)
            self._let_go(before, stored)
            if unconfirmed is not None:
                logger.error(_UNCONFIRMED, unconfirmed)
                raise unconfirmed
            return
        raise self._too_many_races()

    def _saved(self, old: Record, stored: Mapping[str, bytes], losses: int) -> None:
        """The record replaced ``old``: tell the subscribers, and the client of a later expiry."""
        record = self._record
        assert record is not None
        self._keeper.events.emit(SessionSaved, record.key, len(record.payload), losses)
        moved = record.idle_expires_at != old.idle_expires_at
        if moved and self._keeper.is_permanent(stored):
            self._set_cookie_if_known()

    def _put_away(self, stored: dict[str, bytes]) -> dict[str, bytes]:
        """``stored`` with references to the large values, which are written where they are not."""
        keeper = self._keeper
        if not self._placed and not keeper.any_large(stored, stored):
            return stored
        body = Body(stored, self._lifetime, False, self._debug_until, True)
        absolute = self._record.absolute_expires_at if self._record else None
        if self._placed is None:
            self._placed = {}
        known = len(self._placed)
        first: int | None = self._placed_until if known else None  # when the first of them expires

        def expires_at() -> int:
            nonlocal first
            end = keeper.blobs_end(body, absolute)
            first = end if first is None else first
            return end

        found = keeper.put_away(body, expires_at, self._placed, self._values.stored)
        if self._placed:
            self._spilled = True
            end = expires_at()
            assert first is not None
            if first < end - BLOB_GRACE // 2:  # written long before
                keeper.renew_blobs(self._placed.values(), end)
                first = end
            self._placed_until = first
        return found

    def _let_go(
        self, before: Mapping[str, bytes] | None = None, after: Mapping[str, bytes] | None = None
    ) -> None:
        """A record with the values ``after`` replaced one with those ``before``.

        What the new one does not refer to stays for a while, for requests that still read it. With
        nothing after, the session ended, and nothing stays.
        """
        self._unsure = False
        if not self._spilled:
            return
        needed = names_in((after or {}).values())
        known = names_in((self._values.stored if before is None else before).values())
        left = known - needed
        self._keeper.discard(left, 0 if after is None else BLOB_GRACE)
        self._spilled = bool(needed)
        if self._placed:
            placed = self._placed.items()
            known |= needed
            self._placed = {same: ref for same, ref in placed if ref.name not in known}
            self._spilled = self._spilled or bool(self._placed)

    def _place(self, reference: Reference, end: int) -> None:
        """This request wrote a large value, which is kept until ``end``."""
        if not self._placed:
            self._placed, self._placed_until = {}, end
        self._placed[reference.kind, reference.digest] = reference
        self._spilled = True

    def _drop_placed(self) -> None:
        """Let go of what this request wrote and no record refers to."""
        if self._placed and not self._unsure and self._in_doubt is None:
            self._keeper.discard([reference.name for reference in self._placed.values()], 0)
        self._placed = None

    def _something_to_save(self) -> bool:
        """Whether there is something to save, or to end, although no value changed."""
        return (
            self._restart_idle
            or self._forced
            or self._rotation is not None
            or (self._cleared and not _worth_keeping(self._values.unexpired()))
        )

    def _has_changes(self) -> bool:
        """Whether there is anything at all that this request did and that is not stored."""
        return self._something_to_save() or self._cleared or bool(self._values.changes())

    def _renew_if_due(self) -> None:
        assert self._record is not None
        idle_end = self._keeper.due(self._record, self._values.stored, self._lifetime)
        if idle_end is None:
            return
        try:
            body = self._body(self._values.stored)
            renewed = self._keeper.renew(self._record, body, idle_end)
        except (StoreUnavailable, UnreadableRecord) as error:
            # What was read is right, and nothing was to be written: the next request renews.
            logger.warning("A session could not be renewed: %s", error)
            return
        if renewed:
            self._record = self._record._replace(idle_expires_at=idle_end)
            self._keeper.events.emit(SessionRenewed, self._record.key)
            if self._keeper.is_permanent(self._values.stored):
                self._set_cookie_if_known()

    def _set_cookie_if_known(self) -> None:
        if self._token is not None:
            self._cookie = "set"

    def _leads_nowhere(self) -> bool:
        """Whether there was a token, and no session is found by it, now or by another worker."""
        return (
            self._opened
            and self._record is None
            and not self._for_others
            and self._look_at_request().checked is not None
        )

    def _late_changes(self) -> list[str]:
        """The keys whose values were changed in place after the session was saved."""
        try:
            return list(self._values.changes()) if self._opened else []
        except ValueRefused as error:
            return [error.path]


def _as_stored(
    changes: Mapping[str, Change], merged: Mapping[str, bytes], stored: Mapping[str, bytes]
) -> Mapping[str, Change]:
    """The changes, with the references that were stored for large values."""
    if stored is merged:
        return changes
    return {
        key: change if merged.get(key) is not change.mine else Change(change.base, stored.get(key))
        for key, change in changes.items()
    }


def _worth_keeping(values: Mapping[str, bytes]) -> bool:
    """Whether a session with these values exists: Flask's permanent flag alone is nothing."""
    return len(values) > (PERMANENT in values)
