"""Session locks: one request at a time, by a lease in the store that every save names."""

from __future__ import annotations

import asyncio
import contextvars
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Generic, TypeVar

from flask import has_request_context, request

from ..config import Seconds, lock_timeout, lock_wait
from ..errors import (
    Gone,
    LockLost,
    LockMisused,
    LogoutUnconfirmed,
    QueueFull,
    SessionEnded,
    SessionLocked,
    SettingError,
    StoreUnavailable,
)
from ..events import LockAcquired, LockExpired, LockRefused, LockReleased, logger
from ..stores.base import MAX_POINTERS
from ..stores.parts import Leases
from .blocks import begin_block, leave_block, roll_back
from .checks import check_store, in_retried_code
from .following import catch_up
from .lease_renewal import release_lease, renewer
from .lifecycle import Lifecycle
from .loading import load
from .saving import commit
from .state import Block, current_block
from .waiting import client, may_wait, stop_waiting

S = TypeVar("S")

_NEVER = float("inf")


class Lock(Generic[S]):
    """A session's lock, from ``session.lock()``: for ``with`` and ``async with``.

    The block starts with the stored state. Its changes are stored at its end, in a step that checks
    that the lock is still held; then the lock is released. If the block raises, nothing is stored.
    Only requests that take the lock wait for each other.

    The request's earlier changes are stored first. Four round trips, one more if there were any.
    """

    def __init__(
        self,
        session: S,
        life: Lifecycle,
        timeout: Seconds | None = None,
        wait: Seconds | None = None,
        function: str | None = None,
    ) -> None:
        check_times(timeout, wait)
        repository = life.repository
        settings = repository.settings
        if repository.leases is None:
            raise SettingError(
                "The store of this Session cannot keep session locks: it has no part "
                "flask_gsession.stores.Leases"
            )
        self._session = session
        self._life = life
        self._block: Block | None = None
        self._store: Leases = repository.leases
        self._timeout = lock_timeout(settings.lock_timeout if timeout is None else timeout)
        self._wait = lock_wait(settings.lock_wait if wait is None else wait)
        self._function = function
        self._called_from = ""
        self._owner = ""
        self._key: str | None = None  # the key whose lease we hold or may be queued for
        self._held = False
        self._lost = self._moved = self._abandoned = False
        self._warn_after = settings.lock_warn
        self._pid = 0
        self._since = self._extend_at = self._warn_at = 0.0  # of time.monotonic

    def __enter__(self) -> S:
        self._claim()
        current_block.set(self._block)
        return self._session

    def _claim(self) -> None:
        life = self._life
        with life.mutex:
            if in_retried_code(life):
                raise LockMisused(
                    "You can't take a lock inside a transaction, or in the function of "
                    "update_atomic: these may run again. Take the lock around them."
                )
            if life.locked:
                raise LockMisused(
                    "This request already holds the session's lock; a lock inside a lock would "
                    "wait for itself."
                )
            life.locked = True
        try:
            self._enter()
        except BaseException:
            life.locked = False
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._held:
            raise LockMisused("This lock is not held: it was released before, or never entered.")
        if self._pid != os.getpid():
            raise LockMisused(
                "The process that entered this lock holds it. A forked child can't release it."
            )
        self._held = False
        wrote = True
        try:
            if kind is None:
                wrote = self._commit()
            else:
                self._end_block(roll_back)
        except LockLost:
            self._lost = True
            raise
        finally:
            self._leave()
        if self._lost and not wrote:
            raise LockLost

    async def __aenter__(self) -> S:
        """Like ``with``, without blocking the event loop."""
        # Not a task: an ending loop cancels its tasks, but the thread would continue.
        enter = partial(contextvars.copy_context().run, self._claim)
        entering = asyncio.get_running_loop().run_in_executor(None, enter)
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError as error:
            self._abandoned = True
            while not entering.done():
                with suppress(asyncio.CancelledError):  # cancelled again
                    await asyncio.wait([entering])
            entering.exception()  # seen
            self._abandoned = False
            if self._held:
                self.__exit__(type(error), error, None)
            raise
        current_block.set(self._block)
        return self._session

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    # -- entering

    def _enter(self) -> None:
        life = self._life
        check_store(life)
        load(life)
        with life.mutex:
            commit(life)
        self._check_stored()
        self._called_from = _called_from(self._function)
        self._owner = secrets.token_hex(16)
        self._pid = os.getpid()
        self._lost = self._moved = False
        began = time.monotonic()
        try:
            self._acquire_current(began)
            self._emit(LockAcquired, self._since - began)
        except SessionLocked as error:
            reason = "too many waiters" if self._key is None else "wait over"
            self._release()
            waited = time.monotonic() - began
            self._emit(LockRefused, reason, waited)
            logger.info("A request did not get a lock: %s", error)
            raise
        except BaseException as error:
            if isinstance(error, StoreUnavailable):
                life.note_outage(error, "locked")
            with life.mutex:
                life.lease = None
                if self._block is not None:
                    leave_block(life, self._block)
            self._release()
            raise

    def _check_stored(self) -> None:
        if self._life.ended:
            raise SessionEnded
        if self._life.seen.record is None:
            raise LockMisused(
                "This session isn't stored yet, so no other request has it, and there is nothing "
                "to lock. Use @session_lock, which then runs without a lock, or lock only if "
                "session.handle is not None."
            )

    def _acquire_current(self, began: float) -> None:
        """Acquire the lease of the session, following rotations, and load the stored state."""
        life = self._life
        for _ in range(MAX_POINTERS):
            key = life.handle
            if key is None:
                raise SessionEnded
            held = self._acquire(key, began + self._wait)
            if held:
                self._held = True
                renewer.add(self)
            with life.mutex:
                # Changes by other threads and tasks during the wait don't belong to the block,
                # so store them now.
                commit(life, rotating=not held)
                if life.seen.record is None or not catch_up(life, discard=True):
                    if not life.ended:
                        life.end("a lock")
                    raise SessionEnded
                if held and life.handle == key:
                    life.lease, life.lease_pid = self._owner, self._pid
                    self._block = begin_block(life, "lock")
                    return
            self._release()
        raise SessionLocked("The session was rotated too often while this request waited")

    def _acquire(self, key: str, until: float) -> bool:
        """Wait for the lease. Returns False if the session is no longer under ``key``."""
        address = client()
        try:
            return self._wait_for_lease(key, until, address)
        finally:
            stop_waiting(address, self._owner)

    def _wait_for_lease(self, key: str, until: float, address: str) -> bool:
        most = self._life.repository.settings.lock_client_waiters
        waiters = self._life.repository.settings.lock_waiters if self._wait else 0
        self._key = key
        while True:
            asked = time.monotonic()
            try:
                pause = self._store.acquire(key, self._owner, int(self._timeout * 1000), waiters)
            except Gone:
                self._key = None
                return False
            except QueueFull:
                self._key = None
                raise SessionLocked(
                    f"Another request holds the session's lock, and {waiters} more wait for it"
                    if waiters
                    else "Another request holds the session's lock, and this one doesn't wait"
                ) from None
            if pause == 0:
                self._since = time.monotonic()
                self._extend_at = asked + self._timeout / 3
                self._warn_at = self._since + self._warn_after if self._warn_after else _NEVER
                return True
            left = until - time.monotonic()
            if left <= 0 or self._abandoned:
                raise SessionLocked(
                    f"The session's lock was not free within {self._wait:g} seconds"
                )
            if not may_wait(address, self._owner, most):
                self._release()
                self._key = None
                raise SessionLocked(
                    f"{most} requests of this client already wait for locks in this process "
                    "(SESSION_LOCK_CLIENT_WAITERS)"
                )
            self._store.wait_for_release(key, self._owner, min(left, pause / 1000))

    # -- leaving

    def _commit(self) -> bool:
        """Store the block's changes. Returns whether there were any."""
        life = self._life
        if life.lease is None and not life.ended:
            self._end_block(leave_block)
            return True  # the block ended the session; later changes belong to a new one
        try:
            with life.mutex:
                wrote = commit(life, rotating=True)
                if life.ended:
                    raise SessionEnded
                # The lease ends with its session, and a rotation leaves it behind. A sign-in
                # with an old token moves to a new session instead.
                own = life.lease is None and life.handle is not None
                self._moved = wrote and life.handle != self._key and not own
        except LogoutUnconfirmed:
            self._moved = True
            self._end_block(leave_block)  # it was stored
            raise
        except BaseException:
            self._end_block(roll_back)
            raise
        self._end_block(leave_block)
        return wrote

    def _end_block(self, end: Callable[[Lifecycle, Block], None]) -> None:
        if self._block is not None:
            end(self._life, self._block)
            self._block = None

    def _leave(self) -> None:
        """Release the lock, and report it."""
        life = self._life
        if self._moved:
            renewer.discard(self)
        elif not self._release() and life.lease is not None:
            # life.lease is None if the session ended, and its lease with it, or was unreadable.
            self._lost = True
        with life.mutex:
            life.lease = None
            life.locked = False
            self._end_block(roll_back)  # if an exception interrupted that
        held = time.monotonic() - self._since
        if self._lost:
            logger.warning(
                "The lock of session %s expired before %s was done, after %.1f seconds",
                self._key,
                self._called_from,
                held,
            )
        self._emit(LockExpired if self._lost else LockReleased, held)
        if self._warn_after and held >= self._warn_after:
            self._warn("was", held)

    def _release(self) -> bool:
        """Release the lease, or leave the queue. Returns whether it was held until now."""
        self._held = False
        renewer.discard(self)
        if self._key is None:
            return False
        if self._life.outage is not None:
            # This request has already met an outage, and should not wait again.
            renewer.run(partial(release_lease, self._store, self._key, self._owner))
            return True
        return release_lease(self._store, self._key, self._owner)

    # -- while it is held

    def due(self) -> float:
        """When to call ``maintain`` next, by ``time.monotonic``."""
        return min(self._extend_at, self._warn_at)

    def maintain(self) -> None:
        """Extend the lease and warn, if that is due. Called by the renewing thread."""
        now = time.monotonic()
        if now >= self._warn_at:
            self._warn_at = _NEVER
            self._warn("has been", now - self._since)
        if now >= self._extend_at:
            self._extend_at = now + self._timeout / 3
            key = self._key
            if key is None:
                return
            try:
                extended = self._store.extend(key, self._owner, int(self._timeout * 1000))
            except StoreUnavailable as error:
                logger.warning("A lock could not be extended: %s", error)
                self._extend_at = now + self._timeout / 10
                return
            if not extended and self._held:
                self._lost = True
                self._extend_at = _NEVER

    def _warn(self, was: str, held: float) -> None:
        logger.warning(
            "The lock of session %s %s held for %.1f seconds in %s (SESSION_LOCK_WARN): other "
            "requests of this visitor wait for it. Move slow work before or after the lock.",
            self._key,
            was,
            held,
            self._called_from,
        )

    def _emit(self, event: type, *details: object) -> None:
        self._life.repository.events.emit(event, self._key or self._life.handle, *details)


def check_times(timeout: object, wait: object) -> None:
    for name, value, check in (("timeout", timeout, lock_timeout), ("wait", wait, lock_wait)):
        if value is not None:
            try:
                check(value)
            except ValueError as error:
                raise ValueError(f"{name} is {value!r}; allowed: {error}") from None


def _called_from(function: str | None) -> str:
    view = f"the view {request.endpoint!r}" if has_request_context() else None
    return " of ".join(filter(None, (function, view))) or "code outside a request"
