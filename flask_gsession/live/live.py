"""``ext.live``: reports immediately when sessions end, and when values or devices change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from flask import Flask, current_app

from ..errors import SessionEnded
from ..events import logger
from ..processes import process, warn_without_threads
from ..stores.base import is_session_key
from ..users.rosters import checked_user_id
from .hints import Hints, Notify, Watch
from .messages import add_message, checked_message
from .states import State, Versions

_MOST = 10_000  # queued changes

F = TypeVar("F", bound=Callable[..., object])


class Change(NamedTuple):
    """A change in the session ``handle``; if that is None, a change of the user ``user_id``.

    ``keys``: the session's keys that were changed, added or removed; ``user_keys``: the user's.
    ``ended``: the session has ended. ``devices``: the user's list of devices changed. A change of a
    session also names its user. A change holds no values: load the ones you need.
    """

    handle: str | None
    user_id: str | None
    keys: frozenset[str] = frozenset()
    user_keys: frozenset[str] = frozenset()
    ended: bool = False
    devices: bool = False


Handler = Callable[[Change], object]


class Live:
    """The live updates of an application, from ``ext.live``: see :doc:`/how-to/live-updates`."""

    def __init__(self, hints: Callable[[], Hints]) -> None:
        #: of the current application
        self.hints = hints
        self._handlers: list[tuple[frozenset[str], Handler]] = []
        self._queue = _Queue(self._handle)

    def publish(self, user_id: str | int, name: str, data: Any = None) -> None:
        """Send a small message to all open pages of a user, on any machine.

        ``name``: up to 64 characters of ``A-Z a-z 0-9 _ . : -``. ``data``: anything that fits into
        1,024 bytes as JSON. Pages that are open now get it, and so do pages that reconnect within a
        minute. A page that reconnects gets at most the last 32 messages. Raises ``ValueError`` and
        ``StoreUnavailable``. Two round trips.
        """
        user_id = checked_user_id(user_id)
        name, content = checked_message(name, data)
        process.notice()
        add_message(self.hints().repository, user_id, name, content)

    def on_change(self, *keys: str) -> Callable[[F], F]:
        """Call the function with a ``Change`` when one of these keys changes.

        The keys belong to a session, or to a user's values. Without keys, it is called for every
        change, including ends and devices. ::

            @ext.live.on_change("cart")
            def cart_changed(change):
                ...

        The function is called for the sessions and users that this process watches: those with an
        open stream or socket in this process, and those you ``watch``. It runs in an application
        context. All functions run one after the other in one thread. An error is logged. Changes of
        one session that are waiting are merged into one.
        """
        if any(not isinstance(key, str) for key in keys):
            raise TypeError("on_change takes the names of keys: @ext.live.on_change('cart')")
        warn_without_threads("functions of ext.live.on_change are not called")

        def register(function: F) -> F:
            self._handlers.append((frozenset(keys), function))
            return function

        return register

    def watch(self, handle: str | None = None, *, user_id: str | int | None = None) -> Watch:
        """Let this process notice changes of a session or a user, until ``close()`` of the result.

        Call it for functions of ``on_change``; streams and sockets do so themselves. It doesn't
        renew the session. Needs an application context. Raises ``SessionEnded`` if there is no such
        session, ``ValueError`` and ``StoreUnavailable``. One to four round trips.
        """
        if (handle is None) == (user_id is None):
            raise ValueError("watch takes a handle, or user_id=, but not both")
        if handle is not None and not is_session_key(handle):
            raise ValueError("This is not the handle of a session: see session.handle")
        if user_id is not None:
            user_id = checked_user_id(user_id)
        watch = self.subscribe(handle, user_id, lambda *_: None)
        if handle is not None and watch.state.session is None:
            watch.close()
            raise SessionEnded("There is no session under this handle")
        return watch

    def subscribe(
        self,
        handle: str | None,
        user_id: str | None,
        notify: Notify,
        is_over: Callable[[], bool] = bool,
    ) -> Watch:
        """Like ``watch``, with the arguments of ``Watch``. Doesn't raise if there is no session."""
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy

        def tell(watch: Watch, before: State, after: State) -> None:
            notify(watch, before, after)
            if self._handlers:
                for change in changes_between(watch, before, after):
                    self._queue.add(app, change)

        return self.hints().watch(handle, user_id, tell, is_over)

    def _handle(self, app: Flask, change: Change) -> None:
        changed = change.keys | change.user_keys
        for keys, handler in self._handlers:
            if keys and keys.isdisjoint(changed):
                continue
            try:
                with app.app_context():
                    handler(change)
            except (
                BaseException
            ):  # SystemExit or gevent's Timeout, too: later changes need the thread
                logger.exception("A function of ext.live.on_change failed")


def changes_between(watch: Watch, before: State, after: State) -> list[Change]:
    """The change in the session and the change of its user, if there are any."""
    found = []
    was, now = before.session, after.session
    if watch.handle is not None and was is not None and was != now:
        keys = changed_keys(was.keys, {} if now is None else now.keys)
        handle = (now or was).handle
        if now is None:
            found.append(Change(handle, was.user_id, ended=True))
        elif keys:
            found.append(Change(handle, now.user_id, keys))
    user, next_user = before.user, after.user
    if user is not None and next_user is not None and user.user_id == next_user.user_id:
        keys = changed_keys(user.keys, next_user.keys)
        devices = user.devices != next_user.devices
        if keys or devices:
            found.append(Change(None, user.user_id, user_keys=keys, devices=devices))
    return found


def changed_keys(before: Versions, after: Versions) -> frozenset[str]:
    """The keys that were added or removed, or whose versions differ."""
    return frozenset(key for key in {*before, *after} if before.get(key) != after.get(key))


class _Queue:
    """Calls ``handle(app, change)`` in its own thread, which ends when the queue is empty."""

    def __init__(self, handle: Callable[[Flask, Change], object]) -> None:
        self._handle = handle
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._waiting: dict[tuple[Flask, str | None, str | None], Change] = {}
        self._runs = False

    def add(self, app: Flask, change: Change) -> None:
        """Queue a change. Merges it into a waiting change of the same session or user."""
        with self._lock:
            key = (app, change.handle, change.user_id)
            there = self._waiting.pop(key, None)
            if there is not None:
                change = change._replace(
                    keys=there.keys | change.keys,
                    user_keys=there.user_keys | change.user_keys,
                    ended=there.ended or change.ended,
                    devices=there.devices or change.devices,
                )
            self._waiting[key] = change
            if len(self._waiting) > _MOST:
                del self._waiting[next(iter(self._waiting))]
                logger.warning(
                    "Functions of ext.live.on_change are too slow: a change was dropped, because "
                    "%d others wait",
                    _MOST,
                )
            if not self._runs:
                thread = threading.Thread(target=self._run, name="gsession-changes", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the system can't start a thread
                    logger.warning("Functions of ext.live.on_change are called later: %s", error)
                else:
                    self._runs = True

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._runs = False
                    return
                key = next(iter(self._waiting))
                change = self._waiting.pop(key)
            self._handle(key[0], change)
