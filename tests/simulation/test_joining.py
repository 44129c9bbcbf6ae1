"""Carts that join in the deterministic simulation: the real code, interleaved at every store call.

Two browsers, one of them with a second tab, put items into a visitor's cart, take some out, and
sign in as one user, while answers are lost, processes die, and signals interrupt requests anywhere.
Each item is put in once, so the user's cart shows what was lost or counted twice.

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
from flask_gsession.interface import GSessionInterface
from flask_gsession.repository import user_values
from flask_gsession.repository.repository import Repository
from flask_gsession.request import storing
from flask_gsession.request.saving import end_request
from flask_gsession.request.session import SessionData, lifecycle_of
from tests.simulation.scheduler import (
    Fault,
    Interrupted,
    Scheduler,
    Task,
    VirtualClock,
    current_task,
)
from tests.users.test_joining import CART, any_version, forgotten, joined_late, known_once, totals

from .pausing import Violation, search
from .test_users import Client, PausedStore

SCHEDULES = int(os.environ.get("SIM_SCHEDULES", "60"))
FIRST = int(os.environ.get("SIM_SEEDS", "0").partition("-")[0])


class Schedule:
    """Some browsers of one user, and one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.clock = VirtualClock()
        self.clock.now = 1_700_000_000_000
        self.store = PausedStore(self.clock)
        self.app = Flask("carts", static_folder=None)
        self.app.secret_key = "simulation"
        Session(self.app, store=self.store, clock=self.clock, breaker_failures=0)
        interface = self.app.session_interface
        assert isinstance(interface, GSessionInterface)
        self.interface = interface
        self.environ = dict(self.app.test_request_context("/").request.environ)
        self.outcomes: Counter[str] = Counter()
        self.items = 0
        self.there: set[str] = set()  # acknowledged
        self.taken: set[str] = set()
        self.gone: set[str] = set()  # taken out, and acknowledged
        self.perhaps: set[str] = set()
        self.clients = [Client(name) for name in "ab"]
        self.device = Client("device")
        for client in (*self.clients, self.device):
            self.serve(client, self.put_in)
        self.serve(self.device, self.sign_in)

    def serve(self, client: Client, work: Callable[[SessionData], set[str]]) -> None:
        """One request with the token that the browser has now."""
        environ = dict(self.environ)
        if client.token is not None:
            signed = self.interface.tokens.signing(self.app).signer.sign(client.token)
            environ["HTTP_COOKIE"] = f"session={signed}"
        session = self.interface.open_session(self.app, self.app.request_class(environ))
        assert session is not None
        outcome, changed = "unknown", set[str]()
        try:
            changed = work(session)
            self.perhaps |= changed
            if work == self.take_out:
                self.taken |= changed  # perhaps before it was acknowledged
            end_request(lifecycle_of(session))
            if self.answer(client, session) and not lifecycle_of(session).ended:
                outcome = "done"
        except (StoreUnavailable, Interrupted):
            self.answer(client, session)
        except SessionConflict:
            outcome = "refused"
            self.answer(client, session)
        if outcome == "done":
            self.perhaps -= changed
            if work != self.take_out:
                self.there |= changed
            else:
                self.gone |= changed
        self.outcomes[f"{work.__name__} {outcome}"] += 1

    def answer(self, client: Client, session: SessionData) -> bool:
        life = lifecycle_of(session)
        task = current_task()
        if task is not None and task.pause("response") is Fault.LOST:
            return False
        if life.cookie == "set" and life.entry is None and life.seen.token is not None:
            client.token = life.seen.token
        elif life.cookie == "delete":
            client.token = None
        return True

    # -- browsers

    def put_in(self, session: SessionData) -> set[str]:
        if session.handle is None and self.items >= len(self.clients) + 1:
            return set()  # its token is dead, and another answer may replace a new one
        self.items += 1
        item, cart = f"i{self.items}", CART.of(session)
        cart.set({**cart.get(), item: 1})
        return {item}

    def take_out(self, session: SessionData) -> set[str]:
        cart = CART.of(session)
        items = cart.get()
        if not items:
            return set()
        item = self.rng.choice(sorted(items))
        cart.set(totals({item: items[item]}, items, {}))
        return {item}

    def sign_in(self, session: SessionData) -> set[str]:
        session.bind("ada")
        return set()

    def put_in_and_sign_in(self, session: SessionData) -> set[str]:
        changed = self.put_in(session)
        self.sign_in(session)
        return changed

    def use(self, client: Client) -> Callable[[], None]:
        works = (self.put_in, self.take_out, self.sign_in, self.sign_in, self.put_in_and_sign_in)
        chosen = [self.rng.choice(works) for _ in range(self.rng.randint(1, 3))]

        def run() -> None:
            for work in chosen:
                self.serve(client, work)

        return run

    # -- the run

    def play(self) -> None:
        clients = [*self.clients, self.clients[0], self.device]
        tasks = [Task(f"{client.name}{n}", self.use(client)) for n, client in enumerate(clients)]
        Scheduler(self.clock, lambda: [], lambda line: None).run(
            tasks, self.rng, fault_rate=self.rng.choice((0, 0, 0.02, 0.1))
        )
        for client in (*self.clients, self.device):
            self.serve(client, self.sign_in)
        key = user_values.values_key("ada")
        found = self.interface.repository.find(key)
        codec = self.interface.repository.codec
        cart = {} if found is None else codec.decode(found.body.values["cart"])
        if any(pieces != 1 for pieces in cart.values()):
            raise Violation("an item was counted twice")
        if self.there - self.taken - cart.keys():
            raise Violation("an item was lost")
        known = self.there | self.perhaps | self.taken
        if cart.keys() - known or cart.keys() & self.gone:
            raise Violation("an item is back")


def test_every_schedule_keeps_the_items() -> None:
    seed, how, counts = search(Schedule, range(FIRST, FIRST + SCHEDULES))
    print(dict(counts))
    assert seed == -1, f"schedule {seed}: {how}"
    for what in ("sign_in done", "sign_in unknown", "put_in done", "take_out done", "Stale"):
        assert counts[what] > SCHEDULES // 100, what


BREAKS: dict[str, tuple[Any, str, Any]] = {
    "rotated first": (storing, "join_user", joined_late),
    "nothing is remembered": (user_values, "joined", forgotten),
    "joined only once": (user_values, "joined", known_once),
    "any version": (Repository, "update", any_version),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_step_is_found_out(name: str) -> None:
    owner, attribute, broken = BREAKS[name]
    with mock.patch.object(owner, attribute, broken):
        seed, how, _ = search(Schedule, range(3000))
    assert seed >= 0
    print(f"{name}: schedule {seed}: {how}")
