"""A Flask application for HTTP tests. Its requests run functions of the test.

::

    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=[]))
    response = visitor.ask(lambda session: session["cart"].append("mug"))
    assert visitor.another_tab().run(dict) == {"cart": ["mug"]}

`ask` sends a request whose view calls the function with `flask.session`, and gives the response.
`run` also expects the status 200, and returns the function's result. A request within a request, or
within a hook of `site.store`, writes an interleaving down as it shall happen.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import bson
from flask import Flask, Response, session
from flask.testing import FlaskClient
from pymongo import MongoClient
from redis import Redis
from werkzeug.test import TestResponse

from flask_gsession import Session
from flask_gsession.events import Event
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.base import OTHER_ENDS, Clock
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import HookedStore

T = TypeVar("T")

# A busy machine must not look like an outage.
PATIENCE = 10.0  # seconds
STUCK = 30.0  # seconds; nothing here takes that long unless it is stuck


class Visitor(FlaskClient):
    """A browser: keeps its cookies between requests."""

    site: Site

    def ask(self, function: Callable[[Any], object], **options: Any) -> TestResponse:
        """Send a request whose view calls `function(flask.session)`.

        A response that it returns is the answer, anything else gives an empty page. `options`
        are those of the test client's `open`.
        """
        return self._ask(function, options)[0]

    def run(self, function: Callable[[Any], Any], **options: Any) -> Any:
        """The result of `function(flask.session)` in a request that must end with status 200."""
        response, visit = self._ask(function, options)
        assert response.status_code == 200, response.get_data(as_text=True)
        return visit.result

    def _ask(
        self, function: Callable[[Any], object], options: dict[str, Any]
    ) -> tuple[TestResponse, Visit]:
        with self.site.visit(function) as visit:
            return self.open(visit.path, **options), visit

    @property
    def cookie(self) -> str | None:
        """The value of the session cookie."""
        cookie = self.get_cookie(self.site.cookie_name)
        return cookie.value if cookie else None

    @property
    def token(self) -> str:
        """The session token, without its signature."""
        assert self.cookie is not None
        return self.cookie.partition(".")[0]

    def another_tab(self) -> Visitor:
        """A second window of this browser: the same cookie, until either gets another one."""
        assert self.cookie is not None
        return self.site.visitor(self.cookie)


class Visit:
    """The task of one request, and its result."""

    def __init__(self, number: int, function: Callable[[Any], object]) -> None:
        self.path = f"/do/{number}"
        self.function = function
        self.result: object = None


class Site:
    """An application with a `Session` on one store. A context manager; closes the store.

    :param url: the store's, a `SESSION_STORE` URL.
    :param prefix: the store's key prefix.
    :param config: `app.config` from before `init_app`.
    :param timeout: the store's, in seconds.
    :param store: the store of another site, to share its records.
    :param settings: of the `Session`.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        clock: Clock,
        *,
        config: dict[str, Any] | None = None,
        timeout: float = PATIENCE,
        store: HookedStore | None = None,
        **settings: Any,
    ) -> None:
        self.url, self.prefix = url, prefix
        self.clock: Any = clock
        options = StoreOptions(prefix=prefix, clock=clock, timeout=timeout)
        self.store = store or HookedStore(open_store(url, options)[0])
        self.app = Flask(__name__)
        self.app.test_client_class = Visitor
        self.app.config.update({"SECRET_KEY": "a key for tests", **(config or {})})
        self.ext = Session(self.app, store=self.store, clock=clock, **settings)
        self.events: list[Event] = []
        self.ext.on(Event, self.events.append)
        self.inside = look_inside(self)
        self._visits: dict[int, Visit] = {}
        self._numbers = itertools.count()
        self.app.add_url_rule("/do/<int:number>", view_func=self._do, methods=["GET", "POST"])
        self.app.add_url_rule("/untouched", view_func=lambda: "without the session")

    @property
    def cookie_name(self) -> str:
        """The session cookie's name."""
        return str(self.app.extensions["gsession"][self.ext].repository.live.cookie_name())

    def visitor(self, cookie: str | None = None) -> Visitor:
        """A new browser; with the session cookie `cookie`, where one is given."""
        visitor = self.app.test_client()
        assert isinstance(visitor, Visitor)
        visitor.site = self
        if cookie is not None:
            visitor.set_cookie(self.cookie_name, cookie)
        return visitor

    @contextmanager
    def visit(self, function: Callable[[Any], object]) -> Iterator[Visit]:
        """A page that does `function`, while the block runs."""
        number = next(self._numbers)
        self._visits[number] = visit = Visit(number, function)
        try:
            yield visit
        finally:
            del self._visits[number]

    def _do(self, number: int) -> Response | str:
        visit = self._visits[number]
        visit.result = visit.function(session)
        return visit.result if isinstance(visit.result, Response) else ""

    def before_each(self, operation: str, *steps: Callable[[], object]) -> None:
        """Run the next step before each of the next calls of `operation`.

        A call that a step makes itself runs none: whole requests can be steps.
        """

        def hook() -> None:
            steps[0]()
            self.before_each(operation, *steps[1:])

        if steps:
            self.store.before(operation, hook)

    def before_a_write(self, step: Callable[[], object]) -> None:
        """Run `step` once, before the next call that changes a stored session."""
        operations = ("save", "delete", "replace")

        def hook() -> None:
            for operation in operations:
                hooks = self.store._hooks[("before", operation)]
                if hook in hooks:
                    hooks.remove(hook)
            step()

        for operation in operations:
            self.store.before(operation, hook)

    def stored(self) -> dict[str, bytes]:
        """The contents of the store, pointers included: raw data by key."""
        return self.inside.stored()

    def sessions(self) -> dict[str, bytes]:
        """The same without the rosters of users, and records of other kinds."""
        stored = self.stored().items()
        return {key: raw for key, raw in stored if key.rstrip("}")[-1] not in OTHER_ENDS}

    @contextmanager
    def counted(self) -> Iterator[Count]:
        """Count the commands that the store's server gets during the block."""
        self.inside.commands()  # the first look opens connections, or turns the profiler on
        calls, trips, commands = len(self.store.calls), *self.inside.commands()
        count = Count()
        yield count
        trips_after, commands_after = self.inside.commands()
        count.calls = self.store.calls[calls:]
        count.trips = len(count.calls)
        count.commands = None
        if trips is not None:
            count.trips = trips_after - trips
            count.commands = commands_after - commands

    def happened(self, kind: type[Event]) -> list[Any]:
        """The events of this type so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.inside.close()
        self.store.close()


class SiteMaker:
    """Makes sites on one store, and closes them at the end of the `with` block."""

    def __init__(self, url: str, prefix: str, clock: Clock) -> None:
        self._where = (url, prefix, clock)
        self._sites: list[Site] = []

    def __call__(self, **settings: Any) -> Site:
        """A new site, on the same server or file as the others."""
        site = Site(*self._where, **settings)
        self._sites.append(site)
        return site

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for site in self._sites:
            site.__exit__(None, None, None)


class Count:
    """The counts of store calls, round trips and commands of the server.

    Where the store has no server, or one that others use too, a call counts as one round trip,
    and `commands` is None.
    """

    calls: Sequence[str]
    trips: int
    commands: Counter[str] | None


class Inside:
    """Reads a store's records and counts its commands, bypassing the store's code."""

    def stored(self) -> dict[str, bytes]:
        """Raw contents by key."""
        raise NotImplementedError

    def blobs(self) -> dict[str, list[bytes]]:
        """The stored frames of the large values, by name."""
        raise NotImplementedError

    def spoil(self, name: str, frame: bytes | None) -> None:
        """Put this in the place of the first frame of a large value; None: remove all of it."""
        raise NotImplementedError

    def commands(self) -> tuple[Any, Counter[str]]:
        """Round trips until now, None where nobody counts them, and how many of which command."""
        return None, Counter()

    def close(self) -> None:
        """Release connections."""


class InsideMemory(Inside):
    """The records in this process."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def stored(self) -> dict[str, bytes]:
        return {key: repr(tuple(record)).encode() for key, record in self._store._records.items()}

    def blobs(self) -> dict[str, list[bytes]]:
        return {name: [*blob.frames.values()] for name, blob in self._store._blobs.items()}

    def spoil(self, name: str, frame: bytes | None) -> None:
        if frame is None:
            del self._store._blobs[name]
        else:
            self._store._blobs[name].frames[0] = frame


class InsideSQLite(Inside):
    """The rows of a database file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def stored(self) -> dict[str, bytes]:
        return {row[0]: repr(row).encode() for row in self.rows("*")}

    def blobs(self) -> dict[str, list[bytes]]:
        found: dict[str, list[bytes]] = {}
        for name, _, frame in self.rows("*", "gsession_frame"):
            found.setdefault(name.partition(":")[2], []).append(frame)
        assert found.keys() == {row[0].partition(":")[2] for row in self.rows("*", "gsession_blob")}
        return found

    def spoil(self, name: str, frame: bytes | None) -> None:
        with closing(sqlite3.connect(self._path)) as db, db:
            if frame is None:
                db.execute("DELETE FROM gsession_blob WHERE name LIKE ?", (f"%{name}",))
            else:
                db.execute(
                    "UPDATE gsession_frame SET frame = ? WHERE name LIKE ? AND start = 0",
                    (frame, f"%{name}"),
                )

    def rows(self, columns: str, table: str = "gsession") -> list[tuple[Any, ...]]:
        """These columns of all records."""
        with (
            suppress(sqlite3.OperationalError),  # no file, or no table yet
            closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as db,
        ):
            return db.execute(f"SELECT {columns} FROM {table}").fetchall()
        return []


class InsideRedis(Inside):
    """The keys under a prefix, and the server's own statistics."""

    def __init__(self, url: str, prefix: str) -> None:
        self.client = Redis.from_url(url, socket_timeout=PATIENCE)
        self._prefix = prefix

    def stored(self) -> dict[str, bytes]:
        keys = list(self.client.scan_iter(f"{self._prefix}{{*", count=1000))
        return {key.decode(): self.client.get(key) or b"" for key in keys}

    def blobs(self) -> dict[str, list[bytes]]:
        keys = list(self.client.scan_iter(f"{self._prefix}blob:*", count=1000))
        return {key.decode()[-33:-1]: [self.client.get(key) or b""] for key in keys}

    def spoil(self, name: str, frame: bytes | None) -> None:
        key = f"{self._prefix}blob:{{{name}}}"
        if frame is None:
            self.client.delete(key)
        else:
            self.client.set(key, frame, keepttl=True)

    def commands(self) -> tuple[int | None, Counter[str]]:
        """Each command that is sent is one read event of the server; commands of scripts aren't."""
        if "GSESSION_TEST_REDIS_URL" in os.environ:  # others may use that server, too
            return None, Counter()
        before, now = self._look(), self._look()
        while before != now:  # somebody's connection was just closed
            before, now = now, self._look()
        return now

    def _look(self) -> tuple[int, Counter[str]]:
        info = self.client.info("everything")
        names = [name for name in info if name.startswith("cmdstat_")]
        calls = Counter({name.removeprefix("cmdstat_"): info[name]["calls"] for name in names})
        looks = calls.pop("info", 0)
        # The end of a connection is a read, too; of one that a test before left to the collector.
        ended = info["total_connections_received"] - info["connected_clients"]
        return info["total_reads_processed"] - looks - ended, calls

    def close(self) -> None:
        self.client.close()


class InsideMongoDB(Inside):
    """The documents of a database, and its profile of every operation."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: MongoClient[dict[str, Any]] | None = None

    @property
    def database(self) -> Any:
        """The database of the store."""
        if self._client is None:
            self._client = MongoClient(self._url, timeoutMS=int(PATIENCE * 1000))
        return self._client.get_default_database("gsession")

    def stored(self) -> dict[str, bytes]:
        # Without the marker that a rotation leaves for a repeat: no token leads to it.
        found = self.database["gsession"].find({"successor": {"$ne": ""}})
        return {document["_id"]: bson.encode(document) for document in found}

    def blobs(self) -> dict[str, list[bytes]]:
        found: dict[str, list[bytes]] = {}
        for document in self.database["gsession_blobs"].find(sort=["_id"]):
            found.setdefault(document["_id"].split(":")[1], []).append(document["frame"])
        return found

    def spoil(self, name: str, frame: bytes | None) -> None:
        wanted = {"_id": {"$regex": f":{name}:"}}
        if frame is None:
            self.database["gsession_blobs"].delete_many(wanted)
        else:
            self.database["gsession_blobs"].update_one(wanted, {"$set": {"frame": frame}})

    def commands(self) -> tuple[int, Counter[str]]:
        """Operations on the store's collection, as the profiler of its database wrote them."""
        self.database.command("profile", 2)
        ours = {"ns": f"{self.database.name}.gsession"}
        profile = self.database["system.profile"].find(ours, {"op": True})
        operations = Counter(entry["op"] for entry in profile)
        return operations.total(), operations

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def look_inside(site: Site) -> Inside:
    """The `Inside` of a site's store."""
    parts = urlsplit(site.url)
    if parts.scheme == "memory":
        store = site.store.store
        assert isinstance(store, MemoryStore)
        return InsideMemory(store)
    if parts.scheme == "sqlite":
        return InsideSQLite(parts.path[1:])
    if parts.scheme in ("mongodb", "mongodb+srv"):
        return InsideMongoDB(site.url)
    if parts.scheme in ("grpc", "edge", "redis+cluster"):
        return Inside()  # the far store knows, or many servers
    return InsideRedis(site.url, site.prefix)


def until(done: Callable[[], object]) -> None:
    """Wait until another thread, process or server has done something."""
    end = time.monotonic() + STUCK
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def within(seconds: float, act: Callable[[], T]) -> T:
    """The result of ``act()``, in less than this many seconds.

    It may try again: a busy machine is slow sometimes, a fault always.
    """
    took: list[float] = []
    while len(took) < 4:
        began = time.monotonic()
        result = act()
        took.append(time.monotonic() - began)
        if took[-1] < seconds:
            return result
        assert took[-1] < STUCK / 2, took
    raise AssertionError(f"it never took less than {seconds} seconds, but {took}")


@contextmanager
def hasty(store: Any, seconds: float) -> Iterator[None]:
    """For the length of the block a call of a Redis or MongoDB store may take this long only."""
    timed = store.commands if hasattr(store, "commands") else store.driver
    before, timed.timeout = timed.timeout, seconds
    try:
        yield
    finally:
        timed.timeout = before


def at_once(*functions: Callable[[], object]) -> None:
    """Run each function in a thread, all starting together. Raises the error of one of them."""
    start = threading.Barrier(len(functions))
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        start.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
