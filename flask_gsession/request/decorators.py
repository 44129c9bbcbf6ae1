"""Decorators that run a view, or a function called in one, on ``flask.session``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from flask import session as flask_session

from ..config import Seconds
from ..errors import SettingError
from .loading import load
from .locking import Lock, check_times
from .session import SessionData, lifecycle_of
from .writing import LostRace

P = ParamSpec("P")
R = TypeVar("R")


def session_transaction(function: Callable[P, R]) -> Callable[P, R]:
    """Run a view, or any function called in a request, as a transaction on ``flask.session``.

    If another request changed the session in between, it runs again on a fresh state, so it must
    have no side effects outside the session. Works on async functions too. Put it below
    ``@app.route``. Raises as ``Transaction.run`` does.
    """
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            session = current_session("session_transaction")
            for _ in lifecycle_of(session).tries():
                try:
                    with session.transaction():
                        return await function(*args, **kwargs)
                except LostRace:
                    continue
            raise AssertionError("the tries end with a return or an error")

        return run_async  # type: ignore[return-value]  # the coroutine function that R stands for

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        session = current_session("session_transaction")
        return session.transaction().run(lambda _: function(*args, **kwargs))

    return run


def current_session(needed_by: str) -> SessionData:
    """The session behind ``flask.session``. Raises ``SettingError`` unless it is ours."""
    session = flask_session._get_current_object()  # type: ignore[attr-defined]  # a proxy
    if not isinstance(session, SessionData):
        raise SettingError(f"{needed_by} needs a Session(app) on the application and a SECRET_KEY")
    return session


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

    ``timeout`` and ``wait`` are as in ``session.lock()``. Works on async functions too. Put it
    below ``@app.route``. A session that isn't stored yet belongs to this request alone, so the
    function then runs without a lock. A streamed body is sent after the lock is released. Raises as
    ``session.lock()`` and its block do.
    """
    if function is not None and not callable(function):
        raise TypeError("session_lock takes timeout and wait by name: @session_lock(timeout=5)")
    check_times(timeout, wait)

    def lock_of(called: Callable[..., Any]) -> Lock[SessionData] | None:
        session = current_session("session_lock")
        life = lifecycle_of(session)
        load(life)
        if life.seen.record is None and not life.ended:
            return None
        return Lock(session, life, timeout, wait, f"{called.__module__}.{called.__qualname__}")

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
