"""A visitor's cart joins the user's at the sign-in, exactly once, on each store.

The real code, stopped before and after every call of the store. The model in
``tests/simulation/joining.py`` explores more interleavings of fewer lines of code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from itertools import count
from threading import Thread
from typing import Any

import pytest
from marshmallow import fields
from marshmallow.validate import Length

from flask_gsession import StoreUnavailable
from flask_gsession.repository import user_values
from flask_gsession.repository.large_values import names_of
from flask_gsession.repository.repository import Repository
from flask_gsession.request import joining, storing
from flask_gsession.typed import SessionKey
from flask_gsession.users import joins
from flask_gsession.values.payload import CLOSED, Join
from tests.harness.apps import Site, SiteMaker, Visitor

from .test_devices import signed_in
from .test_every_step import Killed, at_call

NUMBERS = count()
Cart = dict[str, int]


def totals(base: Any, theirs: Any, mine: Any) -> Cart:
    """Each side's changes of a quantity count."""
    before, there, wanted = (side or {} for side in (base, theirs, mine))
    found = {
        sku: there.get(sku, 0) + wanted.get(sku, 0) - before.get(sku, 0)
        for sku in {**there, **wanted, **before}
    }
    return {sku: pieces for sku, pieces in found.items() if pieces > 0}


CART: SessionKey[Any] = SessionKey(
    "cart",
    fields.Dict(fields.Str(), fields.Raw()),
    default={},
    merge=totals,
    scope="user",
    at_login="merge",
)


class Case:
    """A visitor with a cart, about to sign in as ada, and another device of ada."""

    def __init__(self, site: Site) -> None:
        self.ada = f"ada {next(NUMBERS)}"
        self.site = site
        self.visitor, self.device = self.site.visitor(), self.site.visitor()
        self.expected = {"u": 1, "a": 1}
        self.device.run(lambda session: (session.bind(self.ada), CART.set({"u": 1})))
        self.visitor.run(lambda session: CART.set({"a": 1}))
        self.cookie = self.visitor.cookie
        self.second: Visitor | None = None

    def sign_in(self) -> None:
        self.visitor.run(lambda session: session.bind(self.ada))

    def change(self, visitor: Visitor, sku: str, pieces: int) -> None:
        """Put something into the cart, or take it out, if it is still this visitor's session."""

        def view(session: Any) -> bool:
            there = CART.get()
            if there:
                CART.set(totals({}, there, {sku: pieces}))
            return bool(there)

        if visitor.run(view):
            self.expected = totals({}, self.expected, {sku: pieces})

    def add(self) -> None:
        self.change(self.tab(), "x", 1)

    def take_out(self) -> None:
        self.change(self.tab(), "a", -1)

    def elsewhere(self) -> None:
        self.change(self.device, "v", 1)

    def rotate(self) -> None:
        tab = self.tab()
        if tab.run(lambda session: (session.rotate(), session.new)[1]) is False:
            self.cookie = tab.cookie

    def click_again(self) -> None:
        self.second = self.tab()
        self.second.run(lambda session: session.bind(self.ada))

    def tab(self) -> Visitor:
        return self.site.visitor(self.cookie)

    def of_ada(self) -> Any:
        return self.device.run(lambda session: CART.get())

    def joins(self) -> tuple[Join, ...]:
        repository = self.site.app.extensions["gsession"][self.site.ext].repository
        found = repository.find(user_values.values_key(self.ada))
        return () if found is None else found.body.joins  # type: ignore[no-any-return]

    def check(self, *, acknowledged: bool) -> None:
        if not acknowledged:
            again = self.tab()
            again.run(lambda session: session.bind(self.ada))
            self.visitor = again
        elif self.tab().run(dict):  # the old token of a session that was rotated, and goes on
            self.change(self.tab(), "y", 1)
            self.click_again()
        elif self.second is not None:  # one of both clicks was answered with a token
            if self.visitor.run(lambda session: session.owner) is None:
                self.visitor = self.second
        else:
            assert all(join.revision == CLOSED and not join.values for join in self.joins())
        assert self.of_ada() == self.expected
        assert self.visitor.run(lambda session: CART.get()) == self.expected
        assert "cart" not in self.visitor.run(dict), "it has left the session"


BESIDE: list[Callable[[Case], None]] = [
    Case.add, Case.take_out, Case.elsewhere, Case.rotate, Case.click_again,
]  # fmt: skip


def run_beside(case: Any, step: Callable[[Any], Any]) -> None:
    thread = Thread(target=step, args=(case,))  # outside the request that is under way
    thread.start()
    thread.join()


def die() -> None:
    raise Killed


def calls_of(site: Site) -> int:
    case = Case(site)
    with at_call(case.site, 0, "before", lambda: None) as calls:
        case.sign_in()
    case.check(acknowledged=True)
    assert len(calls) == 4 + 4, "four more than without a cart"
    return len(calls)


def each_step(site: Site, steps: list[Callable[[Case], None]]) -> None:
    """At each call of a sign-in: something beside it, and then perhaps the death of the process."""
    last = calls_of(site)
    for step in steps:
        for number in range(1, last + 1):
            case = Case(site)
            with at_call(case.site, number, "before", lambda: run_beside(case, step)):  # noqa: B023
                case.sign_in()
            case.check(acknowledged=True)


def each_death(site: Site, steps: list[Callable[[Case], None]]) -> None:
    for step in steps:
        for number in range(1, calls_of(site) + 1):
            for when in ("before", "after"):
                case = Case(site)
                with at_call(case.site, number, when, die), pytest.raises(Killed):
                    case.sign_in()
                step(case)
                case.check(acknowledged=False)


@pytest.fixture
def memory(store_prefix: str, clock: Any) -> Iterator[Site]:
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield make()


def test_nothing_beside_a_sign_in_is_lost_or_counted_twice(memory: Site) -> None:
    each_step(memory, BESIDE)


def test_nothing_is_lost_or_counted_twice_after_a_death(memory: Site) -> None:
    each_death(memory, [lambda case: None, *BESIDE[:-1]])


@pytest.mark.parametrize("store_url", ["sqlite", "redis", "mongodb"], indirect=True)
def test_the_same_on_each_store(site: Site) -> None:
    each_step(site, [Case.take_out])
    each_death(site, [Case.add])


# Broken on purpose -------------------------------------------------------------------------------


def joined_late(life: Any, body: Any, changes: Any, old: Any) -> Any:
    known = old is not None and body.owner is not None and body.joins
    return body.joins[0].keys if known else ()


def forgotten(body: Any, join: Any, mine: Any, end: int, combine: Any, now: int) -> Any:
    after = _joined(body, join, mine, end, combine, now)
    return None if after is None else joins.with_joins(after, after.values, (), now)


def known_once(body: Any, join: Any, *rest: Any) -> Any:
    known = any(each.id == join.id for each in body.joins)
    return None if known else _joined(body, join, *rest)


def always_new(known: Any, keys: Any, old: Any) -> Any:
    return joins.next_join((), (*keys, *(known[0].keys if known else ())))


def any_version(self: Any, key: str, edit: Any, **_: Any) -> Any:
    """The user's record is stored over the changes of another device."""
    result, record = edit(self.find(key))
    if record is not None:
        there = self.store.load(key)
        if there is None:
            self.store.create(record)
        else:
            self.store.save(record, there.version)
    return result


_joined = joins.joined
BREAKS: dict[str, tuple[Any, str, Any, Callable[..., None], Callable[[Case], None]]] = {
    "rotated first": (storing, "join_user", joined_late, each_death, Case.add),
    "nothing is remembered": (user_values, "joined", forgotten, each_death, Case.add),
    "joined only once": (user_values, "joined", known_once, each_step, Case.add),
    "the id changes": (joining, "next_join", always_new, each_death, Case.add),
    "not closed": (storing, "close_join", lambda life: None, each_step, Case.add),
    "any version": (Repository, "update", any_version, each_step, Case.elsewhere),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_step_is_found_out(
    memory: Site, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, broken, explored, step = BREAKS[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        explored(memory, [step])


# Around it ---------------------------------------------------------------------------------------


def test_each_key_has_its_way_at_the_sign_in(site: Site) -> None:
    options = ("keep", "replace", "discard", "merge")
    keys = {
        way: SessionKey(way, fields.Raw(allow_none=True), scope="user", at_login=way, default=None)
        for way in options
    }

    def fill(value: Any) -> Callable[[Any], None]:
        return lambda session: [key.set(value) for key in keys.values()]

    def values(visitor: Visitor) -> Any:
        return visitor.run(lambda session: {way: key.get() for way, key in keys.items()})

    first, second, third = (site.visitor() for _ in range(3))
    first.run(fill({"n": {"a": [1]}}))
    first.run(lambda session: session.bind("ada"))
    theirs = {"n": {"a": [1]}}
    assert values(first) == {"keep": theirs, "replace": theirs, "discard": None, "merge": theirs}
    second.run(fill({"n": {"a": [2], "b": 3}}))
    second.run(lambda session: session.bind("ada"))
    mine, both = {"n": {"a": [2], "b": 3}}, {"n": {"a": [1, 2], "b": 3}}
    expected = {"keep": theirs, "replace": mine, "discard": None, "merge": both}
    assert values(second) == expected
    assert values(third)["merge"] is None
    third.run(lambda session: session.bind("ada"))
    assert values(third) == expected, "nothing joins"


def test_a_request_that_fills_the_cart_and_signs_in(site: Site) -> None:
    visitor, newcomer = site.visitor(), site.visitor()
    visitor.run(lambda session: CART.set({"a": 1}))

    def view(session: Any) -> Any:
        CART.set(totals({}, CART.get(), {"a": 1, "b": 1}))
        session.bind("ada")
        return CART.get()

    assert visitor.run(view) == {"a": 2, "b": 1}, "seen in the same request"
    assert visitor.run(lambda session: CART.get()) == {"a": 2, "b": 1}
    assert newcomer.run(view) == {"a": 3, "b": 2}, "without a session before"
    assert visitor.run(lambda session: CART.get()) == {"a": 3, "b": 2}
    assert (visitor.run(dict), newcomer.run(dict)) == ({}, {})
    visitor.run(lambda session: session.unbind())
    visitor.run(lambda session: CART.set({"c": 1}))
    assert visitor.run(dict) == {"cart": {"c": 1}}, "a visitor's again"
    visitor.run(lambda session: session.bind("ada"))
    assert visitor.run(lambda session: CART.get()) == {"a": 3, "b": 2, "c": 1}


def test_a_refused_sign_in_loses_nothing(make_site: SiteMaker) -> None:
    case = Case(make_site(max_per_user=1, max_policy="refuse"))
    assert case.visitor.ask(lambda session: session.bind(case.ada)).status_code == 409
    assert case.visitor.run(dict) == {"cart": {"a": 1}}
    assert case.of_ada() == {"u": 1}

    def revoke(session: Any) -> None:
        session.bind(case.ada)
        case.site.store.before("replace", lambda: run_beside(case, revoke_all))

    def revoke_all(case: Case) -> None:
        with case.site.app.app_context():
            case.site.ext.users.revoke_all(case.ada)

    case.device.run(lambda session: session.destroy())
    assert case.visitor.ask(revoke).status_code == 401
    case.device = signed_in(case.site, case.ada)
    assert case.of_ada() == {"u": 1, "a": 1}, "with the user, since the session has ended"


def test_values_that_cannot_join_stay_in_the_session(make_site: SiteMaker) -> None:
    site = make_site(max_bytes=1500, spill_bytes=None)
    cart = SessionKey(
        "list", fields.List(fields.Str(), validate=Length(max=3)), default=[],
        scope="user", at_login="merge",
    )  # fmt: skip
    first, visitor = signed_in(site), site.visitor()
    first.run(lambda session: cart.set(["a", "b"]))
    visitor.run(lambda session: cart.set(["c", "d"]))
    visitor.run(lambda session: session.bind("ada"))
    assert visitor.run(lambda session: (dict(session), cart.get())) == (
        {"list": ["c", "d"]}, ["a", "b"],
    )  # fmt: skip
    first.run(lambda session: cart.set(["a"]))
    site.clock.advance(301)  # a touch is due
    visitor.run(dict)
    assert visitor.run(lambda session: (dict(session), cart.get())) == ({}, ["a", "c", "d"])
    first.run(lambda session: session.shared.update(big="x" * 1400))
    visitor = site.visitor()
    visitor.run(lambda session: cart.set(["y" * 200]))
    visitor.run(lambda session: session.bind("ada"))
    assert visitor.run(lambda session: session.owner) == "ada", "beyond the limit"
    assert visitor.run(dict) == {"list": ["y" * 200]}


def test_large_values_join(site: Site) -> None:
    album = SessionKey("album", fields.Dict(fields.Str(), fields.Raw()), scope="user",
                       at_login="merge", default={})  # fmt: skip
    first, visitor = signed_in(site), site.visitor()
    one, two, three = bytes(20_000), b"2" * 20_000, b"3" * 20_000
    first.run(lambda session: album.set({"1": one}))
    visitor.run(lambda session: album.set({"2": two}))
    site.store.before("replace", die)
    with pytest.raises(Killed):
        visitor.run(lambda session: session.bind("ada"))
    first.run(lambda session: album.set({**album.get(), "1": b"1" * 20_000}))
    site.clock.advance(120)  # joins that are no longer needed are removed
    visitor.run(lambda session: album.set({**album.get(), "3": three}))
    visitor.run(lambda session: session.bind("ada"))
    site.clock.advance(120)  # joins that are no longer needed are removed
    one = b"1" * 20_000
    assert first.run(lambda session: album.get()) == {"1": one, "2": two, "3": three}
    site.store.before("replace", die)
    visitor = site.visitor()
    visitor.run(lambda session: album.set({"4": three}))
    with pytest.raises(Killed):
        visitor.run(lambda session: session.bind("ada"))
    found = site.app.extensions["gsession"][site.ext].repository.find(user_values.values_key("ada"))
    names = names_of(found.body)
    assert len(names & site.inside.blobs().keys()) == 2, "the value, and what has joined"
    with site.app.app_context():
        site.ext.users.forget("ada")
    assert not names & site.inside.blobs().keys()


def test_a_worker_that_has_not_used_the_key_yet(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(make_site())
    other = make_site(store=case.site.store)
    visitor = other.visitor(case.visitor.cookie)
    monkeypatch.setattr(joins, "DECLARED", {"cart": {CART, copy(CART)}})  # another application's
    visitor.run(lambda session: session.bind(case.ada))
    assert visitor.run(dict) == {"cart": {"a": 1}}, "stays in the session"
    monkeypatch.setattr(joins, "DECLARED", {"cart": {CART}})
    other.clock.advance(301)  # a touch is due
    visitor.run(dict)
    assert (case.of_ada(), visitor.run(dict)) == (case.expected, {})


def test_an_outage_of_the_join_is_one_of_the_sign_in(site: Site) -> None:
    case = Case(site)

    def down() -> None:
        raise StoreUnavailable("down")

    case.site.store.before("save", down)
    assert case.visitor.ask(lambda session: session.bind(case.ada)).status_code == 503
    case.check(acknowledged=False)


def test_only_a_session_with_such_values_costs_more(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    cart_calls = ["load", "load", "replace", "create"]
    with site.counted() as counted:
        visitor.run(lambda session: session.bind("ada"))
    assert list(counted.calls) == cart_calls
    assert visitor.run(lambda session: CART.get()) == {}
    with site.counted() as counted:
        site.visitor().run(lambda session: session.bind("bob"))
    assert list(counted.calls) == ["load", "create", "create"]


def test_a_cart_from_before_the_key_was_declared_joins(site: Site) -> None:
    visitor, bound, third = site.visitor(), signed_in(site, "bob"), site.visitor()
    visitor.run(lambda session: session.update(cart={"a": 1}))
    third.run(lambda session: session.update(cart={"c": 1}))
    bound.run(lambda session: session.update(cart={"b": 1}))
    site.store.before("replace", die)
    with pytest.raises(Killed):
        visitor.run(lambda session: (CART.get(), session.bind("ada")))
    tab = visitor.another_tab()
    tab.run(lambda session: session.rotate())
    tab.run(lambda session: CART.set({**CART.get(), "x": 1}))
    tab.run(lambda session: session.bind("ada"))
    assert tab.run(lambda session: (CART.get(), dict(session))) == ({"a": 1, "x": 1}, {})
    more = third.another_tab()

    def early(session: Any) -> Any:
        session.bind("eve")
        adds = lambda: more.run(lambda _: CART.set({**CART.get(), "y": 1}))  # noqa: E731
        site.store.before("replace", lambda: run_beside(third, lambda _: adds()))
        return CART.get()

    assert third.run(early) == {"c": 1}
    assert third.run(lambda session: CART.get()) == {"c": 1, "y": 1}
    site.clock.advance(301)  # a touch is due
    bound.run(lambda session: CART.get())
    assert bound.run(lambda session: (CART.get(), dict(session))) == ({"b": 1}, {})


def test_joins_are_forgotten_in_time(site: Site) -> None:
    case = Case(site)
    case.sign_in()
    (join,) = case.joins()
    week = 31 * 86_400
    assert join.ends_at == int((case.site.clock() + week + 3600) * 1000)
    case.site.clock.advance(week + 3601)
    case.device = signed_in(case.site, case.ada)
    case.elsewhere()
    assert case.joins() == ()
