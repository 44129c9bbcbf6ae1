"""A real application whose sessions lie in a store with the scheduler in between."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from flask import Flask

from flask_gsession import Session
from flask_gsession.errors import Gone, Stale, StoreUnavailable
from flask_gsession.events import WriteDropped
from flask_gsession.interface import GSessionInterface
from flask_gsession.request.session import SessionData
from flask_gsession.stores import StoreOptions
from flask_gsession.stores.base import Deleted, Record, milliseconds
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.tokens import session_key
from flask_gsession.values.marks import split

from .audit import Visit
from .model import Fleeting, Mirror, Model, Values, Violation, shown
from .plan import ABSOLUTE, GRACE, IDLE, PERMANENT, POLICIES, RENEW
from .scheduler import Fault, Interrupted, Killed, Task, VirtualClock, current_task

CALLS = ("create", "load", "save", "renew", "replace", "delete")

#: The settings that differ between sites.
SITES: dict[str, dict[str, Any]] = {
    "last": {},
    "reject": {"conflict": "reject"},
    "keep-response": {"on_store_error": "keep-response"},
}


class Request(Task):
    """A running request, and the facts about it."""

    mirror: Mirror
    visit: Visit


def running() -> Request:
    task = current_task()
    assert isinstance(task, Request)
    return task


class SimulatedStore:
    """A memory store whose every call waits its turn, may fail, and is judged by the model."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.begin(Random(0))

    def begin(self, rng: Random) -> None:
        """Forget everything; `rng` picks the answers that get crossed."""
        self.rng = rng
        self.inner = MemoryStore(StoreOptions(clock=self._clock))
        #: faults and refused writes
        self.counts: Counter[str] = Counter()
        self.model: Model
        self._late: list[Callable[[], None]] = []

    @property
    def records(self) -> dict[str, Record]:
        """The stored records, expired ones included."""
        return self.inner._records

    def create(self, record: Record) -> None:
        running().mirror.send(record)
        request, fault, begun = self._arrive("create")

        def create() -> Callable[[], None]:
            self.inner.create(record)
            return self.model.create(request.mirror, record, begun)

        self._hold_back(request, fault, create, record, record.key, 0)
        arrived = create()
        self._leave(request, fault, f"{self.model.name(record.key)} {self._shown(record)}")
        arrived()

    def load(self, key: str) -> Record | None:
        request, fault, _ = self._arrive("load")
        record = self.inner.load(key)
        mirror = request.mirror
        self.model.loaded(mirror, key, self._unexpired(record))
        self._leave(request, fault, f"{self.model.name(key)} {self._shown(record)}")
        if fault is Fault.CROSSED:
            others = [other for name, other in self.records.items() if name != key]
            if others:
                mirror.crossed = True
                other = self.rng.choice(others)
                unusable = self._unexpired(other) is not None  # else it is as good as none
                self.model.heard(mirror, key, None, foreign=unusable)
                return other
        self.model.heard(mirror, key, self._unexpired(record))
        return record

    def _unexpired(self, record: Record | None) -> Record | None:
        """The answer to a load as the request must take it."""
        now = milliseconds(self._clock)
        return None if record is None or now >= record.idle_expires_at else record

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        running().mirror.send(record)
        request, fault, begun = self._arrive("save")

        def save() -> Callable[[], None]:
            self.inner.save(record, expected_version, shorten=shorten)
            stored = self.records[record.key]
            return self.model.save(request.mirror, stored, expected_version, begun)

        self._hold_back(request, fault, save, record, record.key, expected_version)
        with self._judged(request, fault, record.key, expected_version, record.version):
            arrived = save()
        self._leave(request, fault, f"{self.model.name(record.key)} {self._shown(record)}")
        arrived()

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        request, fault, begun = self._arrive("renew")
        done = self.inner.renew(record, idle_expires_at)
        self.model.renew(request.mirror, record, idle_expires_at, done, begun)
        self._leave(request, fault, f"{self.model.name(record.key)} {done}")
        return done

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> None:
        if record.version in running().mirror.sent:  # a repeat, which asks whether it was stored
            self.inner.replace(key, record, expected_version, pointer, shorten=shorten)
            return
        running().mirror.send(record)
        request, fault, begun = self._arrive("replace")

        def replace() -> Callable[[], None]:
            self.inner.replace(key, record, expected_version, pointer, shorten=shorten)
            stored = self.records[record.key]
            return self.model.replace(request.mirror, key, stored, expected_version, pointer, begun)

        self._hold_back(request, fault, replace, record, key, expected_version)
        with self._judged(request, fault, key, expected_version, record.version):
            arrived = replace()
        names = f"{self.model.name(key)} by {self.model.name(record.key)}"
        self._leave(request, fault, f"{names} {self._shown(record)}")
        arrived()

    def delete(self, key: str, expected_version: int | None = None) -> Deleted:
        request, fault, begun = self._arrive("delete")
        with self._judged(request, fault, key, expected_version):
            done = self.inner.delete(key, expected_version)
        arrived = self.model.delete(request.mirror, key, expected_version, done.found, begun)
        self._leave(request, fault, f"{self.model.name(key)} {done.found}")
        arrived()
        return done

    def close(self) -> None:
        """Nothing to release."""

    def _hold_back(
        self,
        request: Request,
        fault: Fault,
        write: Callable[[], object],
        record: Record,
        key: str,
        expected: int,
    ) -> None:
        """Leave the request without an answer, if its write is to be still on its way."""

        def arrive() -> None:
            what = "arrives late"
            try:
                write()
            except (Stale, Gone) as error:
                what += f": {type(error).__name__}"
                self.model.refused(request.mirror, key, expected, type(error).__name__)
            self.counts["arrived late"] += 1
            self.model.trace(f"{request.name:4} {self.model.name(key)} {what}")

        if fault in (Fault.LATE, Fault.STRUCK_LATE):
            request.mirror.sent[record.version].late = True
            self._late.append(arrive)
        if fault is Fault.LATE:
            raise StoreUnavailable("simulated: on its way")
        if fault is Fault.STRUCK_LATE:
            request.struck = True
            raise Interrupted

    def deliver(self, rng: Random) -> None:
        """Let a write arrive that is on its way, or not yet."""
        if self._late and rng.random() < 0.25:
            self._late.pop(int(rng.random() * len(self._late)))()

    def settle(self, rng: Random) -> None:
        """Let each write that is on its way arrive, or be lost."""
        while self._late:
            arrive = self._late.pop()
            if rng.random() < 0.5:
                arrive()

    def _arrive(self, operation: str) -> tuple[Request, Fault, int]:
        request = running()
        begun = self._clock.now
        fault = request.pause(operation)
        if fault is not Fault.NONE:
            self.counts["faults"] += 1
            self.counts[fault.name] += 1
            if fault not in (Fault.STRUCK_AFTER, Fault.STRUCK_LATE):
                request.mirror.faulted = True
        if fault is Fault.BEFORE:
            raise StoreUnavailable("simulated: nothing done")
        return request, fault, begun

    def _leave(self, request: Request, fault: Fault, what: str) -> None:
        self.model.trace(f"{request.name:4} {request.waits_for} {what}")
        if fault is Fault.AFTER:
            raise StoreUnavailable("simulated: the answer is lost")
        if fault is Fault.STRUCK_AFTER:
            request.struck = True
            raise Interrupted
        if fault is Fault.DIES_AFTER:
            request.killed = True
            raise Killed

    @contextlib.contextmanager
    def _judged(
        self,
        request: Request,
        fault: Fault,
        key: str,
        expected: int | None,
        sent: int | None = None,
    ) -> Iterator[None]:
        try:
            yield
        except (Stale, Gone) as error:
            name = type(error).__name__
            self.counts[name] += 1
            self.model.refused(request.mirror, key, expected, name)
            self._leave(request, fault, f"{self.model.name(key)} {name}")
            request.mirror.attempts.pop(sent or 0, None)
            raise

    def _shown(self, record: Record | None) -> str:
        if record is None:
            return "nothing"
        if record.successor is not None:
            return f"-> {self.model.name(record.successor)}"
        return shown(self.model.line_of[record.key].values) if self.model.tracing else ""


class Site:
    """One application, for many schedules."""

    def __init__(self, clock: VirtualClock, settings: dict[str, Any]) -> None:
        self.store = SimulatedStore(clock)
        self.tokens: dict[str, tuple[str, str]] = {}  # key: token, browser
        self.app = Flask("simulation")
        self.app.secret_key = "simulation"
        self.app.config["PROPAGATE_EXCEPTIONS"] = True
        self.app.config["PERMANENT_SESSION_LIFETIME"] = PERMANENT
        self.app.register_error_handler(Interrupted, lambda error: ("interrupted", 500))
        ext = Session(
            self.app,
            clock=clock,
            store=self.store,
            idle_timeout=IDLE,
            absolute_timeout=ABSOLUTE,
            renew_interval=RENEW,
            rotation_grace=GRACE,
            merge_policies=POLICIES,
            token_factory=self._new_token,
            **settings,
        )
        ext.on(WriteDropped, self._on_dropped)
        interface = self.app.session_interface
        assert isinstance(interface, GSessionInterface)
        self.interface = interface
        self.repository = interface.repository
        self.default_policy = settings.get("conflict", "last")
        self._environ = dict(self.app.test_request_context("/").request.environ)

    def open(self, cookie: str | None) -> SessionData:
        """The session of a request with this cookie."""
        environ = dict(self._environ)
        if cookie is not None:
            environ["HTTP_COOKIE"] = f"session={cookie}"
        session = self.interface.open_session(self.app, self.app.request_class(environ))
        assert session is not None
        return session

    def sign(self, token: str) -> str:
        """The cookie that holds a token."""
        return self.interface.tokens.signing(self.app).signer.sign(token)

    def decode(self, record: Record) -> Values:
        """The values in a record."""
        body = self.repository.records.read(record.key, record)
        assert body is not None
        values = {}
        for key, raw in body.values.items():
            mark, plain = split(raw)
            values[key] = value = self.repository.codec.decode(plain)
            if mark.expires_at:
                values[key] = Fleeting(value, mark.expires_at)
        return values

    def _new_token(self) -> str:
        token = f"{len(self.tokens):032d}"
        self.tokens[session_key(token)] = (token, running().mirror.browser)
        return token

    def _on_dropped(self, event: WriteDropped) -> None:
        request = running()
        self.store.model.trace(f"{request.name:4} dropped: {event.reason}")
        if event.reason == "store unavailable":
            request.mirror.unsaved = request.visit.told_dropped = True
            return
        if request.mirror.state != "ended":
            raise Violation(f"dropped its changes, though its session is {request.mirror.state}")
        request.mirror.dropped = request.visit.told_dropped = True
