"""The size of a session in Redis, and whether its cost grows with the number of sessions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from flask import Flask

from benchmarks.backends.on_redis import RedisBackend
from benchmarks.candidates import NONE, OURS, THEIRS, sessionless, with_session
from benchmarks.measure import Effort, Spread, interleave, paired
from benchmarks.visitor import Visitor

SIZE = 200
"""Bytes in each session."""

FEW, MANY = 1_000, 1_000_000

_EACH_BALLAST = """
local value = redis.call('GET', KEYS[1])
for number = tonumber(ARGV[2]), tonumber(ARGV[3]) do
    local key = ARGV[1] .. redis.sha1hex(number)
    %s
end
"""
_FILL = _EACH_BALLAST % "redis.call('SET', key, value, 'PX', 7200000)"
_EMPTY = _EACH_BALLAST % "redis.call('UNLINK', key)"
_CHUNK = 5_000
"""Keys per script: short enough that the server answers others in between."""


@dataclass(frozen=True)
class Weight:
    """Bytes of server memory per session: of the key alone, and of all that came with it."""

    candidate: str
    key_bytes: float
    used_memory: float


@dataclass(frozen=True)
class Growth:
    """Microseconds that one view adds to a request, with so many sessions in the store."""

    store: str
    view: str
    sessions: int
    overhead: Spread


def weights(url: str, sessions: int) -> list[Weight]:
    """Creates that many sessions with each candidate, by that many first visits."""
    found: list[Weight] = []
    with closing(RedisBackend(url)) as backend:
        installs: dict[str, tuple[Callable[[Flask], None], str]] = {
            THEIRS: (backend.flask_session, backend.their_prefix),
            OURS: (backend.ours, backend.our_prefix),
        }
        for name, (install, prefix) in installs.items():
            visitor = with_session(SIZE, install)
            create = Visitor(visitor.app).prepare(f"/seed/{SIZE}")
            before = backend.client.info("memory")["used_memory"]
            for _ in range(sessions):
                create()
            after = backend.client.info("memory")["used_memory"]
            keys = list(islice(backend.client.scan_iter(f"{prefix}*", count=1_000), 100))
            found.append(
                Weight(
                    name,
                    key_bytes=fmean(backend.client.memory_usage(key) or 0 for key in keys),
                    used_memory=(after - before) / sessions,
                )
            )
    return found


def growth(url: str, effort: Effort, few: int = FEW, many: int = MANY) -> list[Growth]:
    """Times ours with few sessions, with many, and with few again.

    The last step distinguishes a slow store from a machine that got slower: both runs with
    few sessions count as one. The ballast is one real record under other keys.
    """
    found: dict[tuple[str, int], list[float]] = {}
    with closing(RedisBackend(url)) as backend:
        visitors = {NONE: sessionless(SIZE), OURS: with_session(SIZE, backend.ours)}
        (record,) = backend.client.scan_iter(f"{backend.our_prefix}*", count=1_000)

        def measure(sessions: int) -> None:
            for view in ("read", "write"):
                calls = {name: visitor.prepare(f"/{view}") for name, visitor in visitors.items()}
                overhead = paired(interleave(calls, effort), OURS, minus=NONE)
                found.setdefault((view, sessions), []).extend(overhead)

        fill(backend, record, 1, few)
        measure(few)
        fill(backend, record, few + 1, many)
        measure(many)
        empty(backend, few + 1, many)
        measure(few)
    return [
        Growth("redis", view, sessions, Spread.of(figures))
        for (view, sessions), figures in found.items()
    ]


def fill(backend: RedisBackend, record: bytes, first: int, last: int) -> None:
    """Copies the record under other keys, numbered from the first to the last."""
    _ballast(backend, _FILL, record, first, last)


def empty(backend: RedisBackend, first: int, last: int) -> None:
    """Deletes these copies."""
    _ballast(backend, _EMPTY, b"", first, last)


def _ballast(backend: RedisBackend, script: str, record: bytes, first: int, last: int) -> None:
    run = backend.client.register_script(script)
    for start in range(first, last + 1, _CHUNK):
        end = min(start + _CHUNK - 1, last)
        run(keys=[record], args=[f"{backend.place}ballast:", start, end])
