"""The real code, interrupted before and after every call of the store.

At each step of an operation, either another operation runs from its start to its end, or the
process dies. The model explores more interleavings of fewer lines of code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from threading import Thread
from typing import Any

import pytest
from flask_login import LoginManager, UserMixin

from flask_gsession.request import roster_entries, storing
from flask_gsession.stores.base import VERBS
from flask_gsession.tokens import session_key
from flask_gsession.users import roster, users
from flask_gsession.users.roster import EMPTY, Entered, Since, drop, enter
from flask_gsession.users.rosters import Rosters
from flask_gsession.values.payload import Owner
from tests.harness.apps import Site, SiteMaker, Visitor

from .test_devices import ids

CAP = 3
NUMBERS = count()


class Killed(BaseException):
    """The process died."""


class Case:
    """A site with two sessions of ada, one of nobody and one from before this version."""

    def __init__(self, make_site: SiteMaker, policy: str = "oldest") -> None:
        self.ada = f"ada {next(NUMBERS)}"
        self.site = site = make_site(max_per_user=CAP, max_policy=policy)
        LoginManager(site.app).user_loader(lambda name: UserMixin())
        before = make_site(store=site.store)
        self.first, self.second, self.visitor, self.other = (site.visitor() for _ in range(4))
        self.first.run(lambda session: session.bind(self.ada))
        self.second.run(lambda session: session.bind(self.ada))
        self.visitor.run(lambda session: session.update(cart=1))
        self.other.run(lambda session: session.bind("bob"))
        old = before.visitor()
        old.run(lambda session: session.update(_user_id=self.ada, cart=1))
        assert old.cookie is not None
        self.old = site.visitor(old.cookie)
        self.tab = self.first.another_tab()
        site.clock.advance(301)  # a touch is due

    def all(self) -> list[Visitor]:
        return [self.first, self.second, self.visitor, self.other, self.old, self.tab]

    def usable(self) -> set[str]:
        """The devices that visitors use as ada. A request would touch sessions and end revoked
        ones.
        """
        return {
            owner.device_id
            for visitor in self.all()
            if visitor.cookie is not None
            and (owner := self.owner_of(session_key(visitor.token))) is not None
            and owner.user_id == self.ada
        }

    def owner_of(self, key: str) -> Owner | None:
        found = self.site.app.extensions["gsession"][self.site.ext].repository.find(key)
        return None if found is None else found.body.owner

    def listed(self) -> set[str]:
        return set(ids(self.site, self.ada))

    # -- operations

    def sign_in(self) -> None:
        self.visitor.ask(lambda session: session.bind(self.ada))

    def sign_in_elsewhere(self) -> None:
        visitor = self.site.visitor()
        self.visitor = visitor
        visitor.ask(lambda session: session.bind(self.ada))

    def sign_in_again(self) -> None:
        self.first.ask(lambda session: session.bind(self.ada))

    def change_user(self) -> None:
        self.first.ask(lambda session: session.bind("eve"))

    def change_user_and_revoke(self) -> None:
        def change(session: Any) -> None:
            session.bind("eve")
            self.site.ext.users.revoke_all(self.ada)

        self.first.ask(change)

    def become(self) -> None:
        self.other.ask(lambda session: session.bind(self.ada))

    def rotate(self) -> None:
        self.first.ask(lambda session: session.rotate())

    def rotate_at_once(self) -> None:
        self.first.ask(lambda session: session.rotate(grace=0))

    def write(self) -> None:
        self.first.ask(lambda session: session.update(a=1))

    def write_in_a_tab(self) -> None:
        self.tab.ask(lambda session: session.update(b=1))

    def read(self) -> None:
        self.second.ask(dict)

    def use_old(self) -> None:
        self.old.ask(dict)

    def log_out(self) -> None:
        self.first.ask(lambda session: session.destroy())

    def log_out_in_a_tab(self) -> None:
        self.tab.ask(lambda session: session.destroy())

    def empty(self) -> None:
        self.first.ask(lambda session: session.clear())

    def unbind(self) -> None:
        self.first.ask(lambda session: session.unbind())

    def revoke_one(self) -> None:
        with self.site.app.app_context():
            devices = ids(self.site, self.ada)
            if devices:
                self.site.ext.users.revoke(self.ada, devices[0])

    def revoke_others(self) -> None:
        self.first.ask(lambda session: session.owner and self.site.ext.users.revoke_others())

    def revoke_all(self) -> None:
        with self.site.app.app_context():
            self.site.ext.users.revoke_all(self.ada)

    # -- invariants

    def check(self, *, crashed: bool = False, touching: bool = True) -> None:
        if not crashed:
            assert self.usable() <= self.listed(), "all that can be used is listed"
            with self.site.app.app_context():
                for device in self.site.ext.users.devices(self.ada):
                    owner = self.owner_of(device.handle)
                    assert owner is not None, "all that is listed is there"
                    assert owner.device_id == device.id
        assert len(self.usable()) <= CAP
        if touching:
            self.site.clock.advance(301)
            for visitor in self.all():
                visitor.ask(lambda session: session.update(c=1))
            assert self.usable() <= self.listed(), "all that can be used is listed, after a touch"
            assert len(self.usable()) <= CAP
        self.revoke_all()
        assert self.usable() == self.listed() == set()


OPERATIONS: dict[str, Callable[[Case], None]] = {
    name: function
    for name, function in vars(Case).items()
    if callable(function)
    and name not in ("__init__", "all", "usable", "owner_of", "listed", "check")
}


@contextmanager
def at_call(site: Site, number: int, when: str, step: Callable[[], object]) -> Iterator[list[str]]:
    """Run ``step`` once before or after the call with this number. Returns all calls."""
    calls: list[str] = []
    busy = False

    def hook(verb: str, at: str) -> Callable[[], None]:
        def run() -> None:
            nonlocal busy
            arm(verb, at)
            if busy:
                return
            if at == "before":
                calls.append(verb)
            if at == when and len(calls) == number:
                busy = True
                try:
                    step()
                finally:
                    busy = False

        return run

    def arm(verb: str, at: str) -> None:
        getattr(site.store, at)(verb, hook(verb, at))

    for verb in VERBS[:-1]:
        for at in ("before", "after"):
            arm(verb, at)
    try:
        yield calls
    finally:
        site.store._hooks.clear()


def steps_of(make_site: SiteMaker, operation: str) -> int:
    case = Case(make_site)
    with at_call(case.site, 0, "before", lambda: None) as calls:
        OPERATIONS[operation](case)
    assert calls, operation
    return len(calls)


@pytest.fixture
def memory(store_prefix: str, clock: Any) -> Iterator[SiteMaker]:
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield make


def beside(make: SiteMaker, operation: str, other: str, number: int, policy: str) -> None:
    case = Case(make, policy)
    ended: list[str] = []

    def run() -> None:
        OPERATIONS[other](case)
        ended.append(other)

    def step() -> None:
        thread = Thread(target=run)  # outside the request that is under way
        thread.start()
        thread.join()

    with at_call(case.site, number, "before", step):
        OPERATIONS[operation](case)
    assert ended
    if other == "revoke_all":
        assert case.usable() == set(), "revoked, although it ran beside"
    case.check(touching=number % 2 == 0)


#: Those that run beside each other on the memory store, unless a long run was asked for.
BESIDE = [
    *("sign_in_elsewhere", "rotate_at_once", "log_out_in_a_tab", "revoke_others", "revoke_all"),
]
#: Those that run on each store.
ON_STORES = ["sign_in", "rotate", "write"]
LONG = "SIM_SCHEDULES" in os.environ
SIGN_INS = {"sign_in", "sign_in_elsewhere", "become", "use_old"}


def each_beside(make: SiteMaker, operation: str, other: str) -> None:
    policies = ["oldest", "refuse"] if operation in SIGN_INS and other in SIGN_INS else ["oldest"]
    for number in range(1, steps_of(make, operation) + 1):
        for policy in policies:
            beside(make, operation, other, number, policy)


def die() -> None:
    raise Killed


def each_death(make: SiteMaker, operation: str) -> None:
    for number in range(1, steps_of(make, operation) + 1):
        for when in ("before", "after"):
            case = Case(make)
            with at_call(case.site, number, when, die), pytest.raises(Killed):
                OPERATIONS[operation](case)
            case.check(crashed=True, touching=when == "after")


@pytest.mark.parametrize("other", OPERATIONS if LONG else BESIDE)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_operation_at_each_step_of_another(
    memory: SiteMaker, operation: str, other: str
) -> None:
    each_beside(memory, operation, other)


@pytest.mark.parametrize("operation", OPERATIONS if LONG else ON_STORES)
@pytest.mark.parametrize("store_url", ["sqlite", "redis", "mongodb"], indirect=True)
def test_revoking_all_at_each_step_on_each_store(make_site: SiteMaker, operation: str) -> None:
    each_beside(make_site, operation, "revoke_all")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_death_at_each_step(memory: SiteMaker, operation: str) -> None:
    each_death(memory, operation)


# Broken on purpose -------------------------------------------------------------------------------


def entered_any(roster: Any, device: Any, since: Any, cap: int, policy: Any) -> Any:
    return enter(roster, device, Since(roster.epoch), cap, policy)


def moved_any(life: Any, owner: Any, key: str, before: Any) -> Any:
    return Entered(EMPTY)


def entered_late(life: Any) -> bool:
    life.entry = None
    return True


def marked_none(roster: Any, device_ids: Any) -> Any:
    return roster


def finished_by_dropping(repository: Any, user_id: str, ending: Any, *_: Any) -> None:
    keys = {device.key for device in ending}
    repository.rosters.change(user_id, lambda roster: (drop(roster, keys), None))


def entered_anyway(life: Any, binding: Any, key: str, until: int) -> Any:
    return _enter(life, binding, key, until)._replace(refused="")


def checked_only(life: Any, binding: Any, key: str, until: int) -> Any:
    """The cap is counted by the look, and the entry takes whoever comes."""
    life.repository.rosters.limit = 1000
    try:
        return _enter(life, binding, key, until)
    finally:
        life.repository.rosters.limit = CAP


_enter = roster_entries._enter
#: The broken function, its replacement, and an operation with a parallel one.
BREAKS: dict[str, tuple[Any, str, Any, str, str]] = {
    "the epoch is ignored": (roster_entries, "enter", entered_any, "sign_in", "revoke_all"),
    "no entry": (storing, "enter_roster", entered_late, "sign_in_elsewhere", "revoke_all"),
    "no move": (roster_entries, "_enter_rotated", moved_any, "rotate_at_once", "sign_in_elsewhere"),
    "no mark": (roster, "mark_ending", marked_none, "rotate_at_once", "revoke_all"),
    "no delete": (users, "finish", finished_by_dropping, "read", "revoke_all"),
    "no victims": (roster_entries, "_finish", lambda *_: None, "sign_in", "sign_in_elsewhere"),
    "refusals are ignored": (roster_entries, "_enter", entered_anyway, "sign_in", "revoke_all"),
    "nobody leaves": (Rosters, "leave", lambda *_: None, "log_out", "read"),
    "no cap": (roster_entries, "_enter", checked_only, "sign_in", "sign_in_elsewhere"),
    "an old one enters": (roster, "is_revoked_since", lambda *_: False, "use_old", "revoke_all"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_step_is_found_out(
    memory: SiteMaker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, broken, operation, other = BREAKS[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        each_beside(memory, operation, other)
