"""Sessions by their handle: for jobs, socket handlers and administration."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from flask import Flask

from .errors import (
    LogoutUnconfirmed,
    SessionEnded,
    StoreUnavailable,
    TransactionMisused,
    UnreadableRecord,
)
from .events import WriteDropped
from .processes import process
from .repository.repository import Loaded, Repository
from .request.confirming import checked_methods, confirmed_at
from .request.debugging import start_trace
from .request.lifecycle import Lifecycle
from .request.loading import load
from .request.saving import end_request
from .request.session import SessionData, lifecycle_of
from .request.state import SAVED, Presented
from .stores.base import is_session_key
from .users.revoking import is_member
from .values.marks import split, unexpired
from .watching.debug import report
from .watching.tracing import Trace

T = TypeVar("T")

_NOT_THERE = (
    "There is no session under this handle: it has ended or expired, or it was rotated and the "
    "grace period of its old token is over."
)


class OpenSession:
    """A session by its handle, from ``ext.open(handle)``: for ``with`` and ``async with``.

    The block gets the session as a view gets ``flask.session``. Its changes are stored at its end,
    merged with the changes of parallel requests. If the block raises, they are dropped, except for
    changes that ``update_atomic`` or a transaction stored at once. Each use loads the session
    again.

    Entering raises ``SessionEnded`` if there is no such session. Leaving raises ``SessionEnded`` if
    the session ended before the changes could be stored, ``TransactionMisused`` if a transaction or
    lock is still open, and the errors of a save. In the block, a rotation and a sign-in raise
    ``RotationRefused``. One round trip, one more for changes or a renewal that is due.
    """

    def __init__(self, repository: Repository, app: Flask, handle: str | None, renew: bool) -> None:
        self._repository = repository
        self._app = app
        self._handle = checked_handle(handle)
        self._renew = renew
        self._session: SessionData | None = None

    def __enter__(self) -> SessionData:
        if self._session is not None:
            raise TransactionMisused(
                "This block is open already: call ext.open() again for each block"
            )
        process.notice()
        presented = Presented(handle=self._handle)
        session = SessionData(self._repository, lambda *_: presented, self._app, None)
        life = lifecycle_of(session)
        if self._repository.settings.debug:
            start_trace(life, Trace())
        session.accessed = True
        life.renews = self._renew
        load(life)
        if life.seen.record is None:
            raise SessionEnded(_NOT_THERE)
        self._session = session
        return session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        session, self._session = self._session, None
        assert session is not None  # it was entered
        life = lifecycle_of(session)
        try:
            if kind is None:
                save(life)
        except Exception as raised:
            error = raised
            raise
        finally:
            with life.mutex:
                life.phase = SAVED
                for each in (life, *life.of_users.values()):
                    each.drop_unreferenced()
            report(session, None, error)

    async def __aenter__(self) -> SessionData:
        """Like ``with``, but without blocking the event loop."""
        return await in_a_thread(self.__enter__)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await in_a_thread(partial(self.__exit__, kind, error, traceback))


def save(life: Lifecycle) -> None:
    """Store the changes of a block. Raises ``SessionEnded`` if their record ended before."""
    try:
        end_request(life, by_hand=True)
    except StoreUnavailable as error:
        if not isinstance(
            error, LogoutUnconfirmed
        ):  # after LogoutUnconfirmed, everything is stored
            life.repository.events.emit(WriteDropped, life.handle, "store unavailable")
        raise
    if life.ended and life.was_modified:
        raise SessionEnded


async def in_a_thread(function: Callable[[], T]) -> T:
    """Call ``function`` in a thread. A cancelled task waits for it to finish.

    Otherwise, a session could be saved although its task was cancelled.
    """
    run: Callable[[], T] = partial(contextvars.copy_context().run, function)
    running = asyncio.get_running_loop().run_in_executor(None, run)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):  # cancelled again
                await asyncio.wait([running])
        running.exception()  # marks it as retrieved
        raise


def peek(repository: Repository, handle: str | None) -> SessionPeek | None:
    """See ``Session.peek``."""
    process.notice()
    key = checked_handle(handle)
    try:
        loaded = repository.find(key)
    except UnreadableRecord as error:
        repository.refusals.note(error.reason, key, error.detail)
        return None
    if loaded is None:
        return None
    owner, imports = loaded.body.owner, repository.imports
    if owner is not None and not owner.seen and not is_member(repository, loaded):
        repository.refusals.note("revoked", key)
        return None
    if imports is not None and imports.has_ended(repository, loaded.body):
        return None
    return SessionPeek(repository, loaded)


def checked_handle(handle: object) -> str:
    """Raises ``ValueError`` for an impossible handle, without showing it: it may be a token."""
    if handle is None:
        raise ValueError(
            "handle is None: a session has a handle once it is stored, with the response of the "
            "request that creates it, or at the end of a session.transaction()"
        )
    if not isinstance(handle, str) or not is_session_key(handle):
        raise ValueError(
            "This is not the handle of a session: 43 characters of A-Z a-z 0-9 - _, from "
            "session.handle, the log or `flask gsession list`"
        )
    return handle


class SessionPeek(Mapping[str, Any]):
    """The contents of a session at one moment, from ``ext.peek(handle)``: a read-only mapping.

    Each read of a value returns a fresh copy. Each read of a large value loads it, which costs
    round trips, and raises ``ValueLost`` if it is gone.
    """

    def __init__(self, repository: Repository, loaded: Loaded) -> None:
        self._repository = repository
        self._record = loaded.record
        self._owner = loaded.body.owner
        self._at = repository.now()
        self._values = unexpired(loaded.body.values, self._at)

    def __getitem__(self, key: str) -> Any:
        try:
            return self._repository.codec.decode(split(self._values[key])[1])
        except UnreadableRecord:  # from a newer version
            raise KeyError(key) from None

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        """Hides the values, since error trackers show local variables."""
        return f"<SessionPeek handle={self.handle!r} keys={len(self)}>"

    def ttl(self, key: str) -> float | None:
        """The seconds from the peek until the value of ``key`` expires, or None."""
        end = split(self._values[key])[0].expires_at
        return (end - self._at) / 1000 if end else None

    def confirmed_at(self, method: str | Collection[str] | None = None) -> datetime | None:
        """When the user last confirmed who they are (UTC): see ``session.confirmed_at``."""
        signed_in = None if self._owner is None else self._owner.signed_in * 1000 or None
        at = confirmed_at(self, signed_in, checked_methods(method))
        return None if at is None else _utc(at)

    @property
    def handle(self) -> str:
        """The session's handle at the time of the peek. A rotation changes it."""
        return self._record.key

    @property
    def created_at(self) -> datetime:
        """When the session was first stored (UTC)."""
        return _utc(self._record.created_at)

    @property
    def expires_at(self) -> datetime:
        """When the session ends if it is not used again (UTC)."""
        return _utc(self._record.idle_expires_at)


def _utc(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
