"""Users and devices in the deterministic simulation: requests interleaved at every store call.

Three clients and an administrator sign in, rotate, write, sign out and revoke, all at once, while
answers are lost, processes die, and signals interrupt requests anywhere. The invariants are checked
from the outside, by the tokens and answers that the clients have.

`SIM_SCHEDULES` says how many schedules, `SIM_SEEDS` the first one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any
from unittest import mock

import pytest
from flask import Flask

from flask_gsession import Session, SessionConflict, StoreUnavailable
from flask_gsession.errors import SignInRefused, TooManySessions
from flask_gsession.interface import GSessionInterface
from flask_gsession.request import roster_entries, storing
from flask_gsession.request.saving import end_request
from flask_gsession.request.session import SessionData, lifecycle_of
from flask_gsession.stores.base import Deleted, Record
from flask_gsession.tokens import session_key
from flask_gsession.users import roster, users
from tests.simulation.pausing import PausingStore, Violation, search
from tests.simulation.scheduler import (
    Fault,
    Interrupted,
    Scheduler,
    Task,
    VirtualClock,
    current_task,
)
from tests.users.test_every_step import (
    entered_any,
    entered_late,
    finished_by_dropping,
    marked_none,
    moved_any,
)

CAP = 2
SCHEDULES = int(os.environ.get("SIM_SCHEDULES", "300"))
FIRST = int(os.environ.get("SIM_SEEDS", "0").partition("-")[0])


class PausedStore(PausingStore):
    """A memory store whose calls wait their turn and may fail."""

    def load(self, key: str) -> Record | None:
        with self.call("load"):
            return super().load(key)

    def create(self, record: Record) -> None:
        with self.call("create"):
            super().create(record)

    def save(self, record: Record, expected_version: int, *_: Any, **how: Any) -> None:
        with self.call("save"):
            super().save(record, expected_version, **how)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        with self.call("renew"):
            return super().renew(record, idle_expires_at)

    def replace(self, *what: Any, **how: Any) -> None:
        with self.call("replace"):
            super().replace(*what, **how)

    def delete(self, key: str, *what: Any) -> Deleted:
        with self.call("delete"):
            return super().delete(key, *what)


class Client:
    """A browser: its token, and those that it had before."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.token: str | None = None
        self.tokens: set[str] = set()


class Schedule:
    """Some clients of one user, and one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.clock = VirtualClock()
        self.clock.now = 1_700_000_000_000
        self.store = PausedStore(self.clock)
        self.app = Flask("users", static_folder=None)
        self.app.secret_key = "simulation"
        self.ext = Session(
            self.app,
            store=self.store,
            clock=self.clock,
            breaker_failures=0,
            seen_interval=5,
            max_per_user=CAP,
            max_policy=self.rng.choice(("oldest", "oldest", "refuse")),
        )
        interface = self.app.session_interface
        assert isinstance(interface, GSessionInterface)
        self.interface = interface
        self.environ = dict(self.app.test_request_context("/").request.environ)
        self.order = 0
        #: when the sign-in began that made a device
        self.born: dict[str, int] = {}
        #: when the last revocation of all that was acknowledged began, and was acknowledged
        self.revoked = (-1, -1)
        self.outcomes: Counter[str] = Counter()
        self.clients = [Client(name) for name in "abc"]
        for client in self.clients[:2]:
            self.serve(client, "sign in", self.sign_in)

    def tick(self) -> int:
        self.order += 1
        return self.order

    def serve(self, client: Client, name: str, work: Callable[[SessionData, int], None]) -> None:
        """One request with the token that the client has now."""
        began = self.tick()
        environ = dict(self.environ)
        if client.token is not None:
            signed = self.interface.tokens.signing(self.app).signer.sign(client.token)
            environ["HTTP_COOKIE"] = f"session={signed}"
        session = self.interface.open_session(self.app, self.app.request_class(environ))
        assert session is not None
        outcome = "unknown"
        try:
            try:
                self.judge(session, began)
                work(session, began)
            except Interrupted:  # which a view may catch, and go on
                end_request(lifecycle_of(session))
                self.answer(client, session)
                raise
            end_request(lifecycle_of(session))
            self.answer(client, session)
        except (StoreUnavailable, Interrupted):
            self.answer(client, session)
        except (SignInRefused, TooManySessions, SessionConflict):
            outcome = "refused"
            self.answer(client, session)
        else:
            outcome = "done"
        finally:
            self.outcomes[f"{name} {outcome}"] += 1

    def judge(self, session: SessionData, began: int) -> None:
        """A request may not get a session that was revoked before the request began."""
        owner, device = session.owner, session.device_id
        called, acknowledged = self.revoked
        if owner == "ada" and began > acknowledged and self.born[str(device)] < called:
            raise Violation("served after a revocation")

    def answer(self, client: Client, session: SessionData) -> None:
        life = lifecycle_of(session)
        task = current_task()
        if task is not None and task.pause("response") is Fault.LOST:
            return
        if life.cookie == "set" and life.entry is None and life.seen.token is not None:
            client.token = life.seen.token
            client.tokens.add(client.token)
        elif life.cookie == "delete":
            client.token = None

    # -- clients

    def sign_in(self, session: SessionData, began: int) -> None:
        session["n"] = began
        session.bind("ada")
        self.born.setdefault(str(session.device_id), began)

    def change_user(self, session: SessionData, began: int) -> None:
        session.bind("bob")

    def rotate(self, session: SessionData, began: int) -> None:
        session.rotate()

    def rotate_at_once(self, session: SessionData, began: int) -> None:
        session.rotate(grace=0)

    def write(self, session: SessionData, began: int) -> None:
        session["w"] = began

    def update(self, session: SessionData, began: int) -> None:
        session.update_atomic("hits", lambda hits: (hits or 0) + 1)

    def read(self, session: SessionData, began: int) -> None:
        dict(session)

    def log_out(self, session: SessionData, began: int) -> None:
        session.destroy()

    def clear(self, session: SessionData, began: int) -> None:
        session.clear()
        session["w"] = began

    def sign_in_again(self, session: SessionData, began: int) -> None:
        session.clear()
        self.sign_in(session, began)

    def unbind(self, session: SessionData, began: int) -> None:
        session.unbind()

    def use(self, client: Client) -> Callable[[], None]:
        names = ("sign_in", "sign_in", "rotate", "rotate_at_once", "write", "update", "read")
        more = ("log_out", "unbind", "change_user", "clear", "sign_in_again")
        chosen = [self.rng.choice((*names, *names, *more)) for _ in range(self.rng.randint(1, 3))]

        def run() -> None:
            for name in chosen:
                self.serve(client, name, getattr(self, name))

        return run

    def administer(self) -> None:
        with self.app.app_context():
            for _ in range(self.rng.randint(1, 2)):
                called = self.tick()
                try:
                    if self.rng.random() < 0.3:
                        devices = self.ext.users.devices("ada")
                        if devices:
                            self.ext.users.revoke("ada", self.rng.choice(devices).id)
                        continue
                    self.ext.users.revoke_all("ada")
                except (StoreUnavailable, Interrupted):
                    self.outcomes["revoke unknown"] += 1
                else:
                    self.revoked = called, self.tick()
                    self.outcomes["revoke done"] += 1

    # -- the run

    def play(self) -> None:
        self.clock.now += 6000  # touches are due
        tasks = [Task(client.name, self.use(client)) for client in self.clients]
        tasks.append(Task("a'", self.use(self.clients[0])))  # another tab
        if self.rng.random() < 0.8:
            tasks.append(Task("admin", self.administer))
        Scheduler(self.clock, lambda: [], lambda line: None).run(
            tasks, self.rng, fault_rate=self.rng.choice((0, 0, 0.02, 0.1))
        )
        self.check()

    def usable(self) -> dict[str, str]:
        """Devices that are served as ada with a token that some client has, and their keys."""
        found = {}
        for client in self.clients:
            for token in client.tokens:
                loaded = self.interface.repository.find(session_key(token))
                owner = None if loaded is None else loaded.body.owner
                if loaded is not None and owner is not None and owner.user_id == "ada":
                    found[owner.device_id] = loaded.record.key
                    if self.born[owner.device_id] < self.revoked[0]:
                        raise Violation("usable after a revocation")
                    self.listed(owner.device_id, loaded.record.key, owner.predecessor)
        return found

    def listed(self, device_id: str, key: str, predecessor: str | None) -> None:
        there = self.interface.repository.rosters.look("ada").roster.by_id(device_id)
        if there is None or there.key not in (key, predecessor):
            raise Violation("usable, and not listed")

    def check(self) -> None:
        if len(self.usable()) > CAP:
            raise Violation("more than allowed")
        self.clock.now += 6000
        for client in self.clients:
            self.serve(client, "write", self.write)
        if len(self.usable()) > CAP:
            raise Violation("more than allowed after a touch")
        with self.app.app_context():
            self.revoked = self.tick(), 0
            self.ext.users.revoke_all("ada")
            if self.usable() or self.ext.users.devices("ada"):
                raise Violation("not all were revoked")


def test_every_schedule_keeps_the_guarantees() -> None:
    seed, how, counts = search(Schedule, range(FIRST, FIRST + SCHEDULES))
    print(dict(counts))
    assert seed == -1, f"schedule {seed}: {how}"
    for what in ("sign_in done", "sign_in refused", "sign_in unknown", "revoke done", "Stale"):
        assert counts[what] > SCHEDULES // 100, what


BREAKS: dict[str, tuple[Any, str, Any]] = {
    "the epoch is ignored": (roster_entries, "enter", entered_any),
    "no entry": (storing, "enter_roster", entered_late),
    "no move": (roster_entries, "_enter_rotated", moved_any),
    "no mark": (roster, "mark_ending", marked_none),
    "no delete": (users, "finish", finished_by_dropping),
    "no victims": (roster_entries, "_finish", lambda *_: None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_step_is_found_out(name: str) -> None:
    owner, attribute, broken = BREAKS[name]
    with mock.patch.object(owner, attribute, broken):
        seed, how, _ = search(Schedule, range(3000))
    assert seed >= 0
    print(f"{name}: schedule {seed}: {how}")
