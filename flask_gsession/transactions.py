"""Transactions: a piece of work on the session that is stored whole, on the state it saw."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

from flask import session as flask_session

from .errors import SettingError
from .keeper import ATTEMPTS
from .lifecycle import Lifecycle, LostRace

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Lifecycle)


class Transaction(Generic[S]):
    """One transaction on a session, from ``session.transaction()``.

    As a context manager it runs its block once: the block starts on what is stored, its changes
    are stored at its end and not with the response. ``SessionConflict`` says that another request
    stored something meanwhile: then nothing of the block was stored. A block that raises stores
    nothing either. ``run`` and the decorator ``session_transaction`` run the work again instead.

    Changes that the request made before are stored first. Two round trips, one more where there
    was something to store first.
    """

    def __init__(self, session: S) -> None:
        self._session = session

    def __enter__(self) -> S:
        self._session._begin()
        return self._session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._session._commit_exactly()
        else:
            self._session._roll_back()

    def run(self, function: Callable[[S], R]) -> R:
        """Call ``function(session)`` until what it did could be stored; what it returned last.

        ``function`` sees a fresh state on each run, and must have no side effects outside the
        session: it may run many times. Raises ``SessionConflict`` after too many lost races, and
        what ``function`` raises.
        """
        for losses in range(ATTEMPTS):
            if losses:
                self._session._pause(losses)
            try:
                with self as session:
                    return function(session)
            except LostRace:
                continue
        raise self._session._too_many_races()


def session_transaction(function: Callable[P, R]) -> Callable[P, R]:
    """Run a view, or any function called in a request, as a transaction on ``flask.session``.

    It runs again, on a fresh state, whenever another request changed the session meanwhile, so it
    must have no side effects outside the session. Works on async functions too. Put it below
    ``@app.route``. Raises what ``Transaction.run`` raises.
    """
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            session = current_session("session_transaction")
            for losses in range(ATTEMPTS):
                if losses:
                    session._pause(losses)
                try:
                    with Transaction(session):
                        return await function(*args, **kwargs)
                except LostRace:
                    continue
            raise session._too_many_races()

        return run_async  # type: ignore[return-value]  # the coroutine function that R stands for

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        session = current_session("session_transaction")
        return Transaction(session).run(lambda _: function(*args, **kwargs))

    return run


def current_session(needed_by: str) -> Lifecycle:
    """What ``flask.session`` stands for now. Raises ``SettingError`` where it is none of ours."""
    session = flask_session._get_current_object()  # type: ignore[attr-defined]  # a proxy
    if not isinstance(session, Lifecycle):
        raise SettingError(f"{needed_by} needs a Session(app) on the application and a SECRET_KEY")
    return session
