"""The extension's own time per request: on stores whose driver costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hiredis
import redis
from flask import Flask

from benchmarks.candidates import NONE, OURS, sessionless, with_session
from benchmarks.measure import Effort, Spread, interleave, paired
from flask_gsession import Session

SIZE = 1_000
"""Bytes in the session."""


@dataclass(frozen=True)
class OwnCpu:
    """Microseconds that one view takes longer than without a session."""

    store: str
    view: str
    us: Spread


class InstantRedis(redis.ConnectionPool):
    """A pool, and the one connection in it, that answers at once: a dict instead of a server.

    It knows the commands that a session costs. What remains is our own work, the Redis store's
    included, as it runs with warm caches; waiting for a real server cools them for everybody.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[bytes, bytes] = {}
        self._answer: Any = None
        self._reader = hiredis.Reader()

    def get_connection(self, *_: Any, **__: Any) -> Any:
        return self

    def release(self, connection: Any) -> None:
        pass

    def send_packed_command(self, requests: tuple[bytes], *_: Any) -> None:
        self._reader.feed(requests[0])
        command, *args = self._reader.gets()
        if command == b"GET":
            self._answer = self._values.get(args[0])
        elif command == b"SET":
            self._values[args[0]] = args[1]
            self._answer = b"OK"
        elif command == b"EVALSHA":  # of the script that saves
            _, _, key, _, value, *_ = args
            self._values[key] = value
            self._answer = b"K" + value[1:9]
        else:
            raise NotImplementedError(command)

    def read_response(self, *_: Any, **__: Any) -> Any:
        return self._answer


def own_cpu(effort: Effort) -> list[OwnCpu]:
    """Times a read and a write of a 1 KB session."""

    def on_memory(app: Flask) -> None:
        Session(app, store="memory://")

    def on_redis(app: Flask) -> None:
        Session(app, store=redis.Redis(connection_pool=InstantRedis()))

    return [*_measure("memory", on_memory, effort), *_measure("redis", on_redis, effort)]


def _measure(store: str, install: Callable[[Flask], None], effort: Effort) -> list[OwnCpu]:
    visitors = {NONE: sessionless(SIZE), OURS: with_session(SIZE, install)}
    found: list[OwnCpu] = []
    for view in ("read", "write"):
        calls = {name: visitor.prepare(f"/{view}") for name, visitor in visitors.items()}
        figures = interleave(calls, effort)
        found.append(OwnCpu(store, view, Spread.of(paired(figures, OURS, minus=NONE))))
    return found
