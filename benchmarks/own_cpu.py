"""The extension's own time per request: on stores whose driver costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import hiredis
from flask import Flask

from benchmarks.candidates import NONE, OURS, sessionless, with_session
from benchmarks.measure import Effort, Spread, interleave, paired
from benchmarks.visitor import Visitor
from flask_gsession import Session
from flask_gsession.stores.redis import RedisStore
from flask_gsession.stores.redis_pool import ConnectionPool

SIZE = 1_000
"""Bytes in the session."""

REQUEST, ALONE = "a whole request", "the session alone"


@dataclass(frozen=True)
class OwnCpu:
    """Microseconds that one view takes longer than without a session.

    ``around`` says what was timed: a whole request, or the session alone (opened, used by the view,
    saved). Both count the same work; between two sessions a request runs a lot of Flask's code,
    after which ours comes back to cold caches.
    """

    store: str
    view: str
    around: str
    us: Spread


class InstantConnection:
    """A connection that answers at once: a dict instead of a server.

    It knows the commands that a session costs. What remains is our own work, the Redis store's
    included, as it runs with warm caches; waiting for a real server cools them for everybody.
    """

    def __init__(self) -> None:
        self.deadline = SimpleNamespace(at=None)
        self._values: dict[bytes, bytes] = {}
        self._reader = hiredis.Reader()

    def ask(self, request: bytes) -> Any:
        self._reader.feed(request)
        command, *args = self._reader.gets()
        if command == b"GET":
            return self._values.get(args[0])
        if command == b"SET":
            self._values[args[0]] = args[1]
            return b"OK"
        if command == b"EVALSHA":  # of the script that saves
            _, _, key, _, value, *_ = args
            self._values[key] = value
            return b"K" + value[1:9]
        raise NotImplementedError(command)

    def disconnect(self) -> None:
        pass


def own_cpu(effort: Effort) -> list[OwnCpu]:
    """Times a read and a write of a 1 KB session."""

    def on_memory(app: Flask) -> None:
        Session(app, store="memory://")

    def on_redis(app: Flask) -> None:
        store = RedisStore("redis://")
        store._pool = ConnectionPool(InstantConnection, 1)
        Session(app, store=store)

    return [*_measure("memory", on_memory, effort), *_measure("redis", on_redis, effort)]


def _measure(store: str, install: Callable[[Flask], None], effort: Effort) -> list[OwnCpu]:
    visitors = {NONE: sessionless(SIZE), OURS: with_session(SIZE, install)}
    found: list[OwnCpu] = []
    for view in ("read", "write"):
        for around in (ALONE, REQUEST):
            with ExitStack() as requests:
                calls = {
                    name: _session_alone(visitor, view, requests)
                    if around == ALONE
                    else visitor.prepare(f"/{view}")
                    for name, visitor in visitors.items()
                }
                figures = interleave(calls, effort)
            found.append(OwnCpu(store, view, around, Spread.of(paired(figures, OURS, minus=NONE))))
    return found


def _session_alone(visitor: Visitor, view: str, requests: ExitStack) -> Callable[[], object]:
    """One view of an app, and before and after it what Flask asks of the session."""
    app = visitor.app
    context = requests.enter_context(app.request_context(visitor.environ(f"/{view}")))
    function: Callable[[], str] = app.view_functions[view]  # type: ignore[assignment]
    interface = app.session_interface

    def call() -> object:
        response = app.response_class("ok")
        session = interface.open_session(app, context.request)
        if session is not None:
            context._session = session
        function()
        if session is not None:
            interface.save_session(app, session, response)
        return response

    return call
