"""Take-overs by the real code, in simulated schedules: parallel requests, crashes, lost answers.

Each schedule begins with an old record and a browser that has its cookie. A few requests run over
one memory store and one old store, both with the scheduler in between. The answers to the outside
world are checked: see `Schedule.judge`. The protocol itself is in `importing`.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any, NamedTuple

from flask import Flask, Response

from flask_gsession import Session
from flask_gsession.errors import StoreUnavailable
from flask_gsession.interface import GSessionInterface
from flask_gsession.request.session import SessionData, lifecycle_of
from flask_gsession.stores import StoreOptions
from flask_gsession.stores.base import Deleted, Record
from flask_gsession.stores.foreign import Foreign, ForeignValues
from flask_gsession.stores.memory import MemoryStore

from .scheduler import (
    Fault,
    Interrupted,
    Killed,
    Scheduler,
    Task,
    VirtualClock,
    current_task,
    simulated_surroundings,
)

START = 4_000_000_000_000  # milliseconds
SID = "o" * 43
NAME = f"session:{SID}"
OLD_LIFE = 1000  # seconds
UNTIL = 5000  # seconds after the start


class Stepped:
    """A store whose calls wait their turn and may fail."""

    def call(self, operation: str, done: Callable[[], Any]) -> Any:
        task = current_task()
        if task is None:
            return done()
        fault = task.pause(operation)
        if fault is Fault.BEFORE or fault is Fault.CROSSED:
            raise StoreUnavailable("simulated: nothing done")
        answer = done()
        if fault is Fault.AFTER:
            raise StoreUnavailable("simulated: the answer is lost")
        if fault is Fault.STRUCK_AFTER:
            task.struck = True
            raise Interrupted
        if fault is Fault.DIES_AFTER:
            task.killed = True
            raise Killed
        return answer


class NewStore(Stepped):
    """A memory store."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        self.inner = MemoryStore(StoreOptions(clock=self._clock))

    def create(self, record: Record) -> None:
        self.call("create", lambda: self.inner.create(record))

    def load(self, key: str) -> Record | None:
        return self.call("load", lambda: self.inner.load(key))  # type: ignore[no-any-return]

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        self.call("save", lambda: self.inner.save(record, expected_version, shorten=shorten))

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        return bool(self.call("renew", lambda: self.inner.renew(record, idle_expires_at)))

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> None:
        def done() -> None:
            self.inner.replace(key, record, expected_version, pointer, shorten=shorten)

        self.call("replace", done)

    def delete(self, key: str, expected_version: int | None = None) -> Deleted:
        deleted: Deleted = self.call("delete", lambda: self.inner.delete(key, expected_version))
        return deleted

    def close(self) -> None:
        """Nothing to release."""


class OldStore(Stepped, ForeignValues):
    """Flask-Session's records."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.records: dict[str, Foreign] = {}

    def put(self, values: dict[str, Any]) -> None:
        self.records[NAME] = Foreign(pickle.dumps(values), self._clock.now + OLD_LIFE * 1000)

    def get(self) -> dict[str, Any] | None:
        found = self.records.get(NAME)
        if found is None or self._clock.now >= (found.expires_at or 0):
            return None
        values: dict[str, Any] = pickle.loads(found.value)
        return values

    def load(self, name: str) -> Foreign | None:
        return self.call(  # type: ignore[no-any-return]
            "load", lambda: self.records.get(name) if self.get() is not None else None
        )

    def delete(self, name: str) -> None:
        self.call("delete", lambda: self.records.pop(name, None))

    def names(self, prefix: str) -> Iterator[str]:
        return iter(self.records)


class Request(Task):
    """A running request, and its operations."""

    does = ""


def current_visit() -> str:
    """The operation of the running request; "" outside of any."""
    task = current_task()
    return task.does if isinstance(task, Request) else ""


class Visit(NamedTuple):
    """One request: its operations, and its cookies."""

    name: str
    does: str  # read, write, logout, sign in, or of an old worker: write back, old logout
    cookies: str  # jar: the browser's cookies; old: only the old one


class Outcome:
    """The answer to a request, if its response arrived."""

    def __init__(self) -> None:
        self.served: str | None = None  # the handle of the session that the view saw
        self.by_old_cookie = False
        self.status = 0


class Schedule:
    """One run: its requests, and their observable results."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed
        rng = Random(seed)
        self.rng = rng
        self.watching = rng.random() < 0.25
        # A logout beside a sign-in ends the session from before it, if it comes late.
        kinds = ["read", "write", "write", rng.choice(("logout", "sign in"))]
        kinds += ["write back", "old logout"] if rng.random() < 0.5 else []
        self.visits = [
            Visit(f"{number}", rng.choice(kinds), rng.choice(("jar", "jar", "old")))
            for number in range(rng.randint(2, 4))
        ]
        self.trace: list[str] = []
        self.token: str | None = None  # of the browser
        self.has_old = True
        self.known: list[str] = []  # cookies that were sent
        self.saved: set[str] = set()
        self.roots: dict[str, str] = {}  # handles: the handle that the import made
        self.ended = self.asked = self.signed_in = self.written_back = self.old_ended = False
        self.wrong: str | None = None

    def run(self) -> str | None:
        """The violation; None without one."""
        world = self.world
        world.begin(self.watching)
        if self.rng.random() < 0.3:
            self.visit(Visit("first", "read", "jar"))
        scheduler = Scheduler(world.clock, lambda: [], self.trace.append)
        tasks = [Request(visit.name, self._task(visit)) for visit in self.visits]
        rate = self.rng.choice((0, 0, 0.1, 0.3))
        try:
            scheduler.run(tasks, self.rng, fault_rate=rate, stay=self.rng.choice((0, 0.5)))
        except Exception as error:
            self.wrong = self.wrong or f"{type(error).__name__}: {error}"
        return self.wrong or self.judge()

    def _task(self, visit: Visit) -> Callable[[], object]:
        return lambda: self.visit(visit)

    def visit(self, visit: Visit, *, lost: bool = False) -> Outcome:
        """One request. `lost`: its answer doesn't arrive."""
        outcome = Outcome()
        if visit.does in ("old logout", "write back"):
            with contextlib.suppress(StoreUnavailable, Interrupted):
                self._old_worker(visit)
            return outcome
        token = self.token if visit.cookies == "jar" else None
        has_old = self.has_old or visit.cookies == "old"
        ended, old_ended, signed_in = self.ended, self.old_ended, self.signed_in
        outcome.by_old_cookie = token is None
        session = self.world.open(token, has_old)
        response = self.world.app.response_class()
        life = lifecycle_of(session)
        task = current_task()
        if isinstance(task, Request):
            task.does = visit.does
        try:
            self._view(visit, session, outcome)
        except StoreUnavailable:
            response.status_code = 503
        except Interrupted:
            response.status_code = 500
        life.begin_response(response)
        try:
            self.world.interface.save_session(self.world.app, session, response)
        except Interrupted:
            response.status_code = 500
        outcome.status = response.status_code
        if outcome.served is not None:
            self._served(visit, outcome, ended, old_ended, signed_in)
        if task is not None and task.pause("response") is Fault.LOST:
            lost = True
        if not lost:
            self._receive(visit, outcome, response)
        return outcome

    def _old_worker(self, visit: Visit) -> None:
        old = self.world.old
        if visit.does == "old logout":
            self.asked = True
            old.delete(NAME)
            self.old_ended = True
            return
        values = old.call("load", old.get)
        if values is not None:

            def put() -> None:
                self.written_back |= old.get() is None
                old.put({**values, "back": 1})

            old.call("save", put)

    def _view(self, visit: Visit, session: SessionData, outcome: Outcome) -> None:
        if visit.does == "logout":
            self.asked = True
            outcome.served = session.handle if "old" in session else None
            session.destroy()
            return
        if "old" not in session:
            return
        outcome.served = session.handle
        if visit.does == "write":
            session[visit.name] = 1
        elif visit.does == "sign in":
            session["user"] = visit.name
            session.rotate(grace=0)

    def _served(
        self, visit: Visit, outcome: Outcome, ended: bool, old_ended: bool, signed_in: bool
    ) -> None:
        """A view saw the session."""
        handle = str(outcome.served)
        if ended and not self._has_old_logout():
            self._fail(f"{visit.name} was served after the end")
        if old_ended and self.watching and not self.written_back:
            self._fail(f"{visit.name} was served after a logout at an old worker")
        if outcome.by_old_cookie:
            if signed_in:
                self._fail(f"{visit.name}: the old cookie leads to the sign-in")
            self.roots.setdefault(handle, handle)
            if len(set(self.roots.values())) > 1:
                self._fail(f"{visit.name} was served another session")

    def _receive(self, visit: Visit, outcome: Outcome, response: Response) -> None:
        """The browser gets the answer."""
        for name, value in cookies_in(response):
            if name == "session":
                self.has_old = self.has_old and bool(value)
            elif value:
                self.token = value
                self.known.append(value)
            else:
                self.token = None
        if outcome.status != 200:
            return
        if visit.does == "logout":
            self.ended = True
        elif visit.does == "write" and outcome.served is not None:
            self.saved.add(visit.name)
        elif visit.does == "sign in" and outcome.served is not None:
            self.signed_in = True

    def judge(self) -> str | None:
        """The invariants once no request runs any more."""
        world, inner = self.world, self.world.store.inner
        oldest = world.interface.repository.settings.absolute_timeout  # of cookies, too
        latest = max(START + UNTIL * 1000, world.clock.now + int(oldest * 1000)) + 3_600_000
        for key, record in inner._records.items():
            if key.endswith("_") and record.idle_expires_at > latest:
                return "a mark without an end"
        if self._has_old_logout():
            return self.wrong
        if self.ended:
            for visit in (Visit("probe", "read", "old"), Visit("probe", "read", "jar")):
                if self.visit(visit).served:
                    return "served after the end"
            for token in self.known:
                self.token = token
                if self.visit(Visit("probe", "read", "jar")).served:
                    return "an earlier token is served after the end"
            if world.old.get() is not None and not self.written_back:
                return "the old record is left after a logout"
            return self.wrong
        if self.signed_in and self.visit(Visit("probe", "read", "old"), lost=True).served:
            return "the old cookie leads to the sign-in"
        if self.asked or self.signed_in or any(v.does == "sign in" for v in self.visits):
            return self.wrong
        for lost in (True, True, False):
            outcome = self.visit(Visit("probe", "read", "jar"), lost=lost)
            if not outcome.served:
                return "no way in"
        session = world.open(self.token, self.has_old)
        if not self.saved <= set(session):
            return "a write is lost"
        self.visit(Visit("probe", "logout", "jar"))
        return self.wrong or self.judge()

    def _has_old_logout(self) -> bool:
        """Whether a documented limit applies: an old worker ended the old session.

        Unless it is watched, and stays away, a request that had seen it may still import it.
        """
        old_logout = any(visit.does == "old logout" for visit in self.visits)
        return old_logout and (self.written_back or not self.watching)

    def _fail(self, what: str) -> None:
        self.wrong = self.wrong or what


class World:
    """One application for many schedules. A context manager that simulates the surroundings."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.clock.now = START
        self.store = NewStore(self.clock)
        self.old = OldStore(self.clock)
        self.app = Flask("takeovers")
        self.app.config.update(
            SECRET_KEY="simulation",
            SESSION_TYPE="filesystem",
            SESSION_IMPORT_UNTIL=(START / 1000) + UNTIL,
            PROPAGATE_EXCEPTIONS=True,
        )
        self.app.register_error_handler(Interrupted, lambda error: ("interrupted", 500))
        Session(self.app, store=self.store, clock=self.clock, breaker_failures=0)
        interface = self.app.session_interface
        assert isinstance(interface, GSessionInterface)
        self.interface = interface
        self.takeover: Any = interface.repository.imports
        for source in self.takeover._sources:
            source.store = self.old
        self._environ = dict(self.app.test_request_context("/").request.environ)
        self._stack = contextlib.ExitStack()

    def begin(self, watching: bool) -> None:
        self.clock.now = START
        self.store.begin()
        self.old.records.clear()
        self.old.put({"old": 1})
        self.takeover._watch = watching

    def open(self, token: str | None, has_old: bool) -> SessionData:
        """The session of a request with these cookies."""
        environ = dict(self._environ)
        cookies = [f"session={SID}"] if has_old else []
        cookies += [f"session_gs={token}"] if token is not None else []
        environ["HTTP_COOKIE"] = "; ".join(cookies)
        session = self.interface.open_session(self.app, self.app.request_class(environ))
        assert session is not None
        return session

    def search(self, seeds: Iterable[int]) -> tuple[int, str, Schedule] | None:
        """The first seed whose schedule goes wrong, and how."""
        for seed in seeds:
            schedule = Schedule(self, seed)
            wrong = schedule.run()
            if wrong is not None:
                return seed, wrong, schedule
        return None

    def __enter__(self) -> World:
        self._stack.enter_context(simulated_surroundings())
        log = logging.getLogger("flask_gsession")
        self._stack.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True
        self._stack.enter_context(self.app.test_request_context("/"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def cookies_in(response: Response) -> list[tuple[str, str]]:
    """The names and values of the cookies that a response sets."""
    pairs = []
    for header in response.headers.getlist("Set-Cookie"):
        name, _, rest = header.partition("=")
        pairs.append((name, rest.partition(";")[0]))
    return pairs
