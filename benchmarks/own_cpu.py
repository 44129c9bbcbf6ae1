"""The extension's own time per request, without the driver's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import hiredis
import redis
from flask import Flask

from benchmarks.backends.on_redis import BareRedis
from benchmarks.candidates import FLOOR, NONE, OURS, on_bare_driver, sessionless, with_session
from benchmarks.measure import Effort, Spread, interleave, paired
from benchmarks.visitor import Visitor
from flask_gsession import Session
from flask_gsession.stores.redis import RedisStore
from flask_gsession.stores.redis.pool import ConnectionPool

SIZE = 1_000
"""Bytes in the session."""

REQUEST, ALONE = "a whole request", "the session alone"


@dataclass(frozen=True)
class OwnCpu:
    """Microseconds that one view takes longer than without a session, the driver's work aside.

    On memory there is no driver. On Redis the same commands, sent by redis-py, are taken off; for
    that, its connection answers at once, as ours does.

    ``around``: what was timed, a whole request or the session alone (opened, used by the view,
    saved). Both count the same work; between two sessions a request runs a lot of Flask's code,
    after which ours comes back to cold caches.
    """

    store: str
    view: str
    around: str
    us: Spread

    @property
    def where(self) -> str:
        """The store, and whose time is taken off."""
        return self.store if self.store == "memory" else f"{self.store} beyond redis-py"


class InstantConnection:
    """A connection that answers at once: a dict instead of a server.

    It knows the commands that a session costs. What remains is our own work, the Redis store's
    included, as it runs with warm caches; waiting for a real server cools them for everybody.
    """

    _sock = _parser = None  # no socket that a server could have closed

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self.deadline = SimpleNamespace(at=None)
        self._values = values
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
        if command == b"SCRIPT":
            return hashlib.sha1(args[1], usedforsecurity=False).hexdigest().encode()
        raise NotImplementedError(command)

    def disconnect(self) -> None:
        pass


class InstantDriverConnection(redis.Connection):
    """redis-py's own connection, except that the same dict takes the place of the socket."""

    def __init__(self, *, values: dict[bytes, bytes], **options: Any) -> None:
        super().__init__(**options)
        self._instant = InstantConnection(values)
        self._answer: Any = None

    def connect(self) -> None: ...

    def can_read(self, timeout: float = 0) -> bool:
        return False

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        self._answer = self._instant.ask(b"".join(command))

    def read_response(self, *args: Any, **options: Any) -> Any:
        return self._answer


def own_cpu(effort: Effort) -> list[OwnCpu]:
    """Times a read and a write of a 1 KB session."""

    def on_memory(app: Flask) -> None:
        Session(app, store="memory://")

    values: dict[bytes, bytes] = {}

    def on_redis(app: Flask) -> None:
        store = RedisStore("redis://")
        store.commands.pool = ConnectionPool(lambda: InstantConnection(values), 1)
        Session(app, store=store)

    memory = {NONE: sessionless(SIZE), OURS: with_session(SIZE, on_memory)}
    ours = with_session(SIZE, on_redis)
    beside = {FLOOR: on_bare_driver(_driver(values)), OURS: ours}
    return [*_measure("memory", memory, NONE, effort), *_measure("redis", beside, FLOOR, effort)]


def _driver(values: dict[bytes, bytes]) -> BareRedis:
    """redis-py on a copy of the only session there is."""
    pool = redis.ConnectionPool(connection_class=InstantDriverConnection, values=values)
    (key,) = values
    return BareRedis(redis.Redis(connection_pool=pool), key, "")


def _measure(
    store: str, visitors: dict[str, Visitor], without: str, effort: Effort
) -> list[OwnCpu]:
    found: list[OwnCpu] = []
    for view in ("read", "write"):
        for around in (ALONE, REQUEST):
            with ExitStack() as requests:
                calls = {  # ours comes last, so that its request is the current one
                    name: _session_alone(visitor, view, requests)
                    if around == ALONE
                    else visitor.prepare(f"/{view}")
                    for name, visitor in visitors.items()
                }
                figures = interleave(calls, effort)
            found.append(
                OwnCpu(store, view, around, Spread.of(paired(figures, OURS, minus=without)))
            )
    return found


def _session_alone(visitor: Visitor, view: str, requests: ExitStack) -> Callable[[], object]:
    """One view of an app, with Flask's calls to the session before and after it."""
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
