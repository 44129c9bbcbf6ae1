"""The cost of knowing a user's sessions, and the losses of the usual list of sessions."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any

import redis
from flask import Flask, session

from benchmarks.backends.on_redis import RedisBackend
from benchmarks.footprint import empty, fill
from benchmarks.measure import Effort, Spread, interleave, paired, ratios
from benchmarks.visitor import Visitor
from flask_gsession import Session
from flask_gsession.users.roster import Device, Roster
from flask_gsession.users.rosters import new_device_id, roster_key

SIGN_IN = "a sign-in and a logout"
READ, WRITE = "a read, bound", "a write, bound"
DEVICES, REVOKE_ALL = "devices() of", "revoke_all() of"
OF_SESSION, OF_USER = "memory of a bound session", "memory of a user"
MANY = "a sign-in and a logout with many users"
LOST, SURVIVING = "lost sign-ins", "sessions that survive a revoke-all"
OURS, LIST = "Flask-GSession", "a list in the store: get, edit, set"
LABEL = "Firefox on Windows"
NUMBERS = (1, 10, 1000)
AT_ONCE = 50  # sign-ins of one user
_THREADS = 16


@dataclass(frozen=True)
class UserCost:
    """A figure and its baseline. ``limit``: the target, if there is one."""

    what: str
    beside: str
    unit: str
    figure: Spread
    limit: float | None = None


def users(url: str, effort: Effort, few: int = 1_000, many: int = 1_000_000) -> list[UserCost]:
    """All figures; ``url`` is of a Redis. ``few`` and ``many``: users."""
    with closing(RedisBackend(url)) as backend:
        site = _Site(backend)
        return [
            *_sign_ins(site, effort),
            *_requests(effort),
            *_lists(site, effort),
            *_memory(site),
            *_growth(site, effort, few, many),
            *_races(site),
        ]


class _Site:
    """An application on the server of the backend."""

    def __init__(self, backend: RedisBackend) -> None:
        self.backend = backend
        self.app = _application(backend.ours)
        ((self.ext, interface),) = self.app.extensions["gsession"].items()
        self.repository = interface.repository

    def key(self, record_key: str) -> bytes:
        """The key of a record in Redis."""
        pattern = f"{self.backend.our_prefix}*{record_key}*"
        (found,) = self.backend.client.scan_iter(pattern, count=10_000)
        return bytes(found)


def _application(install: Callable[[Flask], object]) -> Flask:
    app = Flask("bench")
    app.secret_key = "a benchmark's secret key, of a sensible length"
    install(app)

    @app.get("/plain/in")
    def plain_in() -> str:
        session.rotate(grace=0)  # type: ignore[attr-defined]  # Flask's type
        session["user"] = "17"
        return "ok"

    @app.get("/bound/in/<user>")
    def bound_in(user: str) -> str:
        session.bind(user, label=LABEL)  # type: ignore[attr-defined]
        session["user"] = user
        return "ok"

    @app.get("/out")
    def out() -> str:
        session.destroy()  # type: ignore[attr-defined]
        return "ok"

    @app.get("/read")
    def read() -> str:
        return str(session["user"])

    @app.get("/write")
    def write() -> str:
        session["number"] = secrets.randbits(30)
        return "ok"

    @app.get("/none")
    def none() -> str:
        return "17"

    return app


def _cycle(app: Flask, path: str) -> Callable[[], object]:
    """A visitor who signs in and out."""

    def call() -> None:
        visitor = Visitor(app)
        visitor.visit(path)
        visitor.visit("/out")

    return call


def _exactly(figure: float) -> Spread:
    return Spread(figure, figure, figure)


def _sign_ins(site: _Site, effort: Effort) -> Iterator[UserCost]:
    calls = {name: _cycle(site.app, f"/{name}") for name in ("plain/in", "bound/in/17")}
    plain, bound = interleave(calls, effort).values()
    beside = "the same without a user"
    yield UserCost(SIGN_IN, beside, "x", Spread.of(ratios(bound, plain)))
    trips = [
        site.backend.traffic(call, effort.counted_requests).round_trips for call in calls.values()
    ]
    yield UserCost(SIGN_IN, beside, "trips more", _exactly(trips[1] - trips[0]), 4)


def _requests(effort: Effort) -> Iterator[UserCost]:
    """On memory, since a server's time would hide the difference."""
    app = _application(lambda app: Session(app, store="memory://", newcomers_per_minute=None))
    visitors = {}
    for name in ("plain/in", "bound/in/17"):
        visitors[name] = Visitor(app)
        visitors[name].visit(f"/{name}")
    for what, path in ((READ, "/read"), (WRITE, "/write")):
        calls = {name: visitor.prepare(path) for name, visitor in visitors.items()}
        calls["none"] = visitors["plain/in"].prepare("/none")
        found: list[float] = []
        while not found:  # in a short run on a busy machine, every pair may be dropped
            figures = interleave(calls, effort)
            plain, bound = (paired(figures, name, minus="none") for name in visitors)
            found = list(ratios(bound, plain))
        yield UserCost(what, "the same unbound", "x", Spread.of(found), 1.05)


def _lists(site: _Site, effort: Effort) -> Iterator[UserCost]:
    ext, now = site.ext, site.repository.now() // 1000
    with site.app.app_context():
        calls = {}
        for number in NUMBERS:
            devices = (
                Device(new_device_id(), secrets.token_urlsafe(32), now, now, now + 9999, LABEL)
                for _ in range(number)
            )
            roster = Roster(devices=tuple(devices))
            site.repository.rosters.change(f"has {number}", lambda _, new=roster: (new, None))
            calls[number] = lambda number=number: ext.users.devices(f"has {number}")
        timed = interleave({str(number): call for number, call in calls.items()}, effort)
        for number, call in calls.items():
            trips = site.backend.traffic(call, 3).round_trips
            yield UserCost(f"{DEVICES} {number}", "", "us", Spread.of(timed[str(number)]))
            yield UserCost(f"{DEVICES} {number}", "", "trips", _exactly(trips), 1)
        fresh = count()
        for number in (1, 10, 100):
            prepared = [f"ends {next(fresh)}" for _ in range(2)]  # traffic() calls it twice
            for user in prepared:
                for _ in range(number):
                    Visitor(site.app).visit(f"/bound/in/{user}")
            trips = site.backend.traffic(
                lambda: ext.users.revoke_all(prepared.pop()),  # noqa: B023  # it is called at once
                1,
            ).round_trips
            # Four, and the deletes, which share round trips.
            yield UserCost(f"{REVOKE_ALL} {number}", "", "commands", _exactly(trips), 4 + number)


def _memory(site: _Site) -> Iterator[UserCost]:
    client = site.backend.client

    def weight(record_key: str) -> int:
        return int(client.memory_usage(site.key(record_key)) or 0)

    def record_of(path: str) -> int:
        visitor = Visitor(site.app)
        visitor.visit(path)
        with site.app.test_request_context(environ_overrides=visitor.environ("/read")):
            return weight(str(session.handle))  # type: ignore[attr-defined]

    owner = record_of("/bound/in/17") - record_of("/plain/in")
    first = weight(roster_key("17"))
    more = 99
    for _ in range(more):
        Visitor(site.app).visit("/bound/in/17")
    each = (weight(roster_key("17")) - first) / more
    beside = "the same without a user"
    yield UserCost(OF_SESSION, beside, "bytes more", _exactly(owner + each), 160)
    yield UserCost(OF_USER, "no roster", "bytes more", _exactly(first - each), 300)


def _growth(site: _Site, effort: Effort, few: int, many: int) -> Iterator[UserCost]:
    backend, call = site.backend, _cycle(site.app, "/bound/in/42")
    Visitor(site.app).visit("/bound/in/42")  # this user stays, so the roster does, too
    record = site.key(roster_key("42"))
    figures: dict[int, list[float]] = {few: [], many: []}
    fill(backend, record, 1, few)
    for users in (few, many, few):
        if users == many:
            fill(backend, record, few + 1, many)
        figures[users] += interleave({"cycle": call}, effort)["cycle"]
        if users == many:
            empty(backend, few + 1, many)
    middle = Spread.of(figures[few]).median
    spread = Spread.of([each / middle for each in figures[many]])
    yield UserCost(MANY, f"{many:,} users beside {few:,}", "x", spread, 1.1)


# -- the usual way


class _List:
    """A list of sessions for each user, as applications keep it in a cache."""

    def __init__(self, url: str, prefix: str) -> None:
        self._client: Any = redis.Redis.from_url(url)
        self._prefix = prefix

    def sign_in(self, user: str) -> None:
        token = secrets.token_urlsafe(32)
        self._client.set(f"{self._prefix}session:{token}", user)
        there = json.loads(self._client.get(f"{self._prefix}list:{user}") or "[]")
        self._client.set(f"{self._prefix}list:{user}", json.dumps([*there, token]))

    def listed(self, user: str) -> int:
        return len(json.loads(self._client.get(f"{self._prefix}list:{user}") or "[]"))

    def revoke_all(self, user: str) -> None:
        for token in json.loads(self._client.get(f"{self._prefix}list:{user}") or "[]"):
            self._client.delete(f"{self._prefix}session:{token}")
        self._client.delete(f"{self._prefix}list:{user}")

    def usable(self) -> int:
        return sum(1 for _ in self._client.scan_iter(f"{self._prefix}session:*", count=10_000))


class _Ours:
    """The same with ours."""

    def __init__(self, site: _Site) -> None:
        self._site = site
        self._visitors: list[Visitor] = []

    def sign_in(self, user: str) -> None:
        visitor = Visitor(self._site.app)
        visitor.visit(f"/bound/in/{user}")
        self._visitors.append(visitor)

    def listed(self, user: str) -> int:
        with self._site.app.app_context():
            return len(self._site.ext.users.devices(user))

    def revoke_all(self, user: str) -> None:
        with self._site.app.app_context():
            self._site.ext.users.revoke_all(user)

    def usable(self) -> int:
        handles = 0
        for visitor in self._visitors:
            with self._site.app.test_request_context(environ_overrides=visitor.environ("/read")):
                handles += session.get("user") is not None
        return handles


def _races(site: _Site) -> Iterator[UserCost]:
    usual = _List(site.backend.url, f"{site.backend.place}usual:")
    for name, way in ((OURS, _Ours(site)), (LIST, usual)):
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(way.sign_in, ["at once"] * AT_ONCE))
        limit = 0 if name == OURS else None
        lost = AT_ONCE - way.listed("at once")
        yield UserCost(LOST, name, f"of {AT_ONCE} at once", _exactly(lost), limit)
        way.revoke_all("at once")
        yield UserCost(SURVIVING, name, f"of {AT_ONCE}", _exactly(way.usable()), limit)
