"""Session locks: one request at a time, held by a lease in the store that every save names."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, overload

from flask import has_request_context, request

from .config import Seconds, lock_timeout, lock_wait
from .errors import (
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
from .events import LockAcquired, LockExpired, LockRefused, LockReleased, logger
from .lifecycle import Lifecycle
from .processes import process
from .stores.base import MAX_POINTERS
from .stores.parts import Leases
from .transactions import current_session

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Lifecycle)

_NEVER = float("inf")


class Lock(Generic[S]):
    """The lock of a session, from ``session.lock()``: for ``with`` and ``async with``.

    The block starts on what is stored. Its changes are stored at its end, in a step that checks
    that the lock is still held, and then the lock is given back. A block that raises stores
    nothing. Only those who lock wait for each other.

    Changes that the request made before are stored first. Four round trips, one more where there
    was something to store first.
    """

    def __init__(
        self,
        session: S,
        timeout: Seconds | None = None,
        wait: Seconds | None = None,
        function: str | None = None,
    ) -> None:
        _check_times(timeout, wait)
        keeper = session._keeper
        settings = keeper.settings
        if keeper.leases is None:
            raise SettingError(
                "The store of this Session cannot keep session locks: it lacks what "
                "flask_gsession.stores.Leases asks for"
            )
        self._session = session
        self._store: Leases = keeper.leases
        self._timeout = lock_timeout(settings.lock_timeout if timeout is None else timeout)
        self._wait = lock_wait(settings.lock_wait if wait is None else wait)
        self._function = function
        self._place = ""
        self._owner = ""
        self._key: str | None = None  # under which we hold the lease, or may stand in its queue
        self._held = False
        self._lost = self._moved = self._abandoned = False
        self._warns = settings.lock_warn
        self._pid = 0
        self._since = self._extend_at = self._warn_at = 0.0  # of time.monotonic

    def __enter__(self) -> S:
        session = self._session
        session._check_open()
        if session._may_run_again():
            raise LockMisused(
                "A lock cannot begin inside a transaction, or in the function of update_atomic: "
                "these may run again. Take the lock around them."
            )
        claim = object()
        if vars(session).setdefault("_locked", claim) is not claim:
            raise LockMisused(
                "This request has the lock of the session already; a lock inside a lock would wait "
                "for itself."
            )
        try:
            self._enter()
        except BaseException:
            del vars(session)["_locked"]
            raise
        return session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._held:
            raise LockMisused("This lock is not held: it was released before, or never entered.")
        if self._pid != os.getpid():
            raise LockMisused("This lock is held by the process that entered it: not by its child.")
        self._held = False
        wrote = True
        try:
            if kind is None:
                wrote = self._commit()
            else:
                self._roll_back()
        except LockLost:
            self._lost = True
            raise
        finally:
            self._leave()
        if self._lost and not wrote:
            raise LockLost

    async def __aenter__(self) -> S:
        """As ``with``; the event loop does not wait."""
        # No task: a loop that ends cancels those, and the thread would go on.
        enter = partial(contextvars.copy_context().run, self.__enter__)
        entering = asyncio.get_running_loop().run_in_executor(None, enter)
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError as error:
            self._abandoned = True
            while not entering.done():
                with suppress(asyncio.CancelledError):  # once more
                    await asyncio.wait([entering])
            entering.exception()  # seen
            self._abandoned = False
            if self._held:
                self.__exit__(type(error), error, None)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    # -- entering

    def _enter(self) -> None:
        session = self._session
        session._check_store()
        session._open()
        if session._has_changes():
            session._commit()
        self._check_stored()
        self._place = _place(self._function)
        self._owner = secrets.token_hex(16)
        self._pid = os.getpid()
        self._lost = self._moved = False
        began = time.monotonic()
        try:
            self._take(began)
            session._lease, session._lease_pid = self._owner, self._pid
            session._lifetime_before = session._lifetime
            self._emit(LockAcquired, self._since - began)
        except SessionLocked as error:
            reason = "too many waiters" if self._key is None else "wait over"
            self._give_back()
            waited = time.monotonic() - began
            self._emit(LockRefused, reason, waited)
            logger.info("A request did not get a lock: %s", error)
            raise
        except BaseException as error:
            if isinstance(error, StoreUnavailable):
                session._met_outage(error, "locked")
            session._lease = None
            self._give_back()
            raise

    def _check_stored(self) -> None:
        if self._session._ended:
            raise SessionEnded
        if self._session._record is None:
            raise LockMisused(
                "This session is not stored yet, so nobody else can have it, and there is nothing "
                "to lock. Use @session_lock, which then runs without a lock, or lock where "
                "session.handle is not None."
            )

    def _take(self, began: float) -> None:
        """Get the lease of the session, wherever it is rotated to, and see what is stored then."""
        session = self._session
        for _ in range(MAX_POINTERS):
            assert session._record is not None
            key = session._record.key
            held = self._stand_in_line(key, began + self._wait)
            if held:
                self._held = True
                _renewer.add(self)
            if not session._catch_up(afresh=True):
                session._end("a lock")
                raise SessionEnded
            if held and session._record.key == key:
                return
            self._give_back()
        raise SessionLocked("The session is rotated again and again")

    def _stand_in_line(self, key: str, until: float) -> bool:
        """Whether the lease is held now; False where the session is under ``key`` no more."""
        waiters = self._session._keeper.settings.lock_waiters if self._wait else 0
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
                    f"Another request holds the lock of the session, and {waiters} more wait for it"
                    if waiters
                    else "Another request holds the lock of the session, and this one does not wait"
                ) from None
            if pause == 0:
                self._since = time.monotonic()
                self._extend_at = asked + self._timeout / 3
                self._warn_at = self._since + self._warns if self._warns else _NEVER
                return True
            left = until - time.monotonic()
            if left <= 0 or self._abandoned:
                raise SessionLocked(
                    f"The lock of the session was not free within {self._wait:g} seconds"
                )
            self._store.wait_for_release(key, self._owner, min(left, pause / 1000))

    # -- leaving

    def _commit(self) -> bool:
        """Store what the block did; whether there was something."""
        session = self._session
        later, session._rotation_later = session._rotation_later, None
        if session._lease is None and not session._ended:
            return True  # the block ended the session: what it did then is a new one's
        if session._lease is not None:
            session._rotation = later
        try:
            wrote = session._has_changes()
            if wrote:
                session._commit()
                if session._ended:
                    raise SessionEnded
                # The lease goes with the session, and stays behind with the key of a rotation.
                self._moved = session._record is None or session._record.key != self._key
        except LogoutUnconfirmed:
            self._moved = True  # it was stored
            raise
        except BaseException:
            self._roll_back()
            raise
        return wrote

    def _roll_back(self) -> None:
        session = self._session
        session._rotation = session._rotation_later = None
        session._roll_back()

    def _leave(self) -> None:
        """Let the session go."""
        session = self._session
        if self._moved:
            _renewer.discard(self)
        elif not self._give_back() and session._lease is not None:
            # Without a lease the session ended, and took it along; unless it was unreadable.
            self._lost = True
        session._lease = None
        del vars(session)["_locked"]
        held = time.monotonic() - self._since
        if self._lost:
            logger.warning(
                "The lock of session %s ran out before %s was done, after %.1f seconds",
                self._key,
                self._place,
                held,
            )
        self._emit(LockExpired if self._lost else LockReleased, held)
        if self._warns and held >= self._warns:
            self._warn("was", held)

    def _give_back(self) -> bool:
        """Release the lease, or leave the queue; whether we held it until now."""
        self._held = False
        _renewer.discard(self)
        if self._key is None:
            return False
        if self._session._in_doubt is not None:
            # This request has waited for the store already, and need not wait again.
            _renewer.run(partial(_release, self._store, self._key, self._owner))
            return True
        return _release(self._store, self._key, self._owner)

    # -- meanwhile

    def _due(self) -> float:
        return min(self._extend_at, self._warn_at)

    def _tend(self) -> None:
        """Extend the lease, and warn, where it is time to; called by the renewing thread."""
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
            "requests of this visitor wait for it. Do what is slow before or after the lock.",
            self._key,
            was,
            held,
            self._place,
        )

    def _emit(self, event: type, *details: object) -> None:
        record = self._session._record
        handle = self._key or (record.key if record else None)
        self._session._keeper.events.emit(event, handle, *details)


def _release(store: Leases, key: str, owner: str) -> bool:
    try:
        return store.release(key, owner)
    except StoreUnavailable as error:
        logger.warning("A lock could not be given back, and will run out: %s", error)
        return True  # as far as we know


class _Renewer:
    """Extends the leases that this process holds, in one thread, while there are any.

    It knows locks only as long as somebody else does: one that was lost with its thread runs out.
    """

    def __init__(self) -> None:
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._locks: weakref.WeakSet[Lock[Any]] = weakref.WeakSet()
        self._errands: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._running = False
        self._wakes_at = 0.0

    def add(self, lock: Lock[Any]) -> None:
        """Look after a lock from now on."""
        process.notice()
        with self._changed:
            self._locks.add(lock)
            self._wake(lock._due())

    def discard(self, lock: Lock[Any]) -> None:
        """Look after it no more."""
        process.notice()
        with self._changed:
            self._locks.discard(lock)

    def run(self, errand: Callable[[], object]) -> None:
        """Do this once, soon; where no thread can be had, when there is one again."""
        process.notice()
        with self._changed, suppress(RuntimeError):
            self._errands.append(errand)
            self._wake(0.0)

    def _wake(self, due: float) -> None:
        if not self._running:
            threading.Thread(target=self._work, name="gsession-locks", daemon=True).start()
            self._running = True
        elif due < self._wakes_at:
            self._changed.notify()

    def _work(self) -> None:
        while True:
            self._do_next()
            with self._changed:
                if not (self._locks or self._errands):
                    self._running = False
                    return

    def _do_next(self) -> None:
        for errand in self._next():
            try:
                errand()
            except Exception:
                logger.exception("A lock could not be looked after")

    def _next(self) -> list[Callable[[], object]]:
        """What is to be done now, after a wait for it."""
        with self._changed:
            self._wakes_at = min((lock._due() for lock in self._locks), default=0.0)
            if not self._errands:
                self._changed.wait(max(0.001, self._wakes_at - time.monotonic()))
            now = time.monotonic()
            errands = [*self._errands, *(lock._tend for lock in self._locks if lock._due() <= now)]
            self._errands.clear()
            return errands


_renewer = _Renewer()


@overload
def session_lock(function: Callable[P, R]) -> Callable[P, R]: ...


@overload
def session_lock(
    *, timeout: Seconds | None = None, wait: Seconds | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def session_lock(
    function: Callable[..., Any] | None = None,
    *,
    timeout: Seconds | None = None,
    wait: Seconds | None = None,
) -> Callable[..., Any]:
    """Run a view, or any function called in a request, under the lock of ``flask.session``.

    ``timeout`` and ``wait`` are those of ``session.lock()``. Works on async functions too. Put it
    below ``@app.route``. A session that is not stored yet is nobody else's: the function then runs
    without a lock. A streamed body is sent after the lock was given back.
    Raises what ``session.lock()`` and its block raise.
    """
    if function is not None and not callable(function):
        raise TypeError("session_lock takes timeout and wait by name: @session_lock(timeout=5)")
    _check_times(timeout, wait)

    def lock_of(called: Callable[..., Any]) -> Lock[Lifecycle] | None:
        session = current_session("session_lock")
        session._open()
        if session._record is None and not session._ended:
            return None
        return Lock(session, timeout, wait, f"{called.__module__}.{called.__qualname__}")

    def decorate(called: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(called):

            @functools.wraps(called)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                lock = lock_of(called)
                if lock is None:
                    return await called(*args, **kwargs)
                async with lock:
                    return await called(*args, **kwargs)

            return run_async

        @functools.wraps(called)
        def run(*args: Any, **kwargs: Any) -> Any:
            lock = lock_of(called)
            if lock is None:
                return called(*args, **kwargs)
            with lock:
                return called(*args, **kwargs)

        return run

    return decorate if function is None else decorate(function)


def _check_times(timeout: object, wait: object) -> None:
    for name, value, check in (("timeout", timeout, lock_timeout), ("wait", wait, lock_wait)):
        if value is not None:
            try:
                check(value)
            except ValueError as error:
                raise ValueError(f"{name} is {value!r}; allowed: {error}") from None


def _place(function: str | None) -> str:
    view = f"the view {request.endpoint!r}" if has_request_context() else None
    return " of ".join(filter(None, (function, view))) or "code outside a request"
