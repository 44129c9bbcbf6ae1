"""G3: no lost update. Parallel requests of one session, each interleaving written down."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import flask
import pytest
from flask import Response

from flask_gsession import MISSING, SessionConflict, SessionEnded
from flask_gsession.errors import GSessionError, Stale
from flask_gsession.events import SessionDestroyed, SessionSaved, WriteDropped
from flask_gsession.stores.base import new_version
from tests.harness.apps import Site, SiteMaker, Visitor, at_once

Change = Callable[[Any], object]


def visitor_with(site: Site, **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values))
    return visitor


def race(site: Site, visitor: Visitor, mine: Change, theirs: Change) -> dict[str, Any]:
    """The values stored after two requests that both loaded the same state; mine is saved last."""
    other = visitor.another_tab()
    interleaved = []
    site.before_a_write(lambda: interleaved.append(other.run(theirs)))
    visitor.run(mine)
    assert interleaved
    after: dict[str, Any] = visitor.run(dict)
    assert other.run(dict) == after
    return after


def race_inside(visitor: Visitor, mine: Change, theirs: Change) -> dict[str, Any]:
    """The same, theirs being a whole request in the middle of the view of mine."""
    other = visitor.another_tab()
    visitor.run(lambda session: (dict(session), other.run(theirs), mine(session)))
    after: dict[str, Any] = visitor.run(dict)
    return after


def set_key(key: str, value: object) -> Change:
    return lambda session: session.update({key: value})


def append(key: str, value: object) -> Change:
    return lambda session: session[key].append(value)


DELETED = "no such key"

# My change, which is saved last, theirs, and the result.
RACES: dict[str, tuple[Change, Change, dict[str, Any]]] = {
    "different keys": (set_key("a", 1), set_key("b", 2), {"a": 1, "b": 2}),
    "new keys": (set_key("new", 1), set_key("newer", 2), {"new": 1, "newer": 2}),
    "same key: the later wins": (set_key("a", 1), set_key("a", 2), {"a": 1}),
    "same new key": (set_key("new", 1), set_key("new", 2), {"new": 1}),
    "same change": (set_key("a", 1), set_key("a", 1), {"a": 1}),
    "delete beside a change elsewhere": (
        lambda session: session.pop("a"),
        set_key("b", 2),
        {"a": DELETED, "b": 2},
    ),
    "change elsewhere beside a delete": (
        set_key("b", 2),
        lambda session: session.pop("a"),
        {"a": DELETED, "b": 2},
    ),
    "delete beside a change of it: the later wins": (
        lambda session: session.pop("a"),
        set_key("a", 2),
        {"a": DELETED},
    ),
    "change beside its delete: the later wins": (
        set_key("a", 1),
        lambda session: session.pop("a"),
        {"a": 1},
    ),
    "both delete": (
        lambda session: session.pop("a"),
        lambda session: session.pop("a"),
        {"a": DELETED},
    ),
    "clear beside a new key": (
        lambda session: session.clear(),
        set_key("new", 2),
        {"a": DELETED, "b": DELETED, "list": DELETED, "deep": DELETED, "new": 2},
    ),
    "clear beside a change: the later wins": (
        lambda session: (session.clear(), session.update(fresh=1)),
        set_key("a", 2),
        {"a": DELETED, "b": DELETED, "list": DELETED, "deep": DELETED, "fresh": 1},
    ),
    "clear and set beside a new key": (
        lambda session: (session.clear(), session.update(fresh=1)),
        set_key("new", 2),
        {"a": DELETED, "b": DELETED, "list": DELETED, "deep": DELETED, "fresh": 1, "new": 2},
    ),
    "nested change beside another key": (
        append("list", "mine"),
        set_key("a", 2),
        {"a": 2, "list": ["first", "mine"]},
    ),
    "nested changes of two keys": (
        lambda session: session["deep"]["one"].append(1),
        append("list", "theirs"),
        {"deep": {"one": [1], "two": {"x": 0}}, "list": ["first", "theirs"]},
    ),
    "a look and a write beside a nested change": (
        lambda session: (session["list"], session.update(a=1)),
        append("list", "theirs"),
        {"a": 1, "list": ["first", "theirs"]},
    ),
    "an equal value assigned is no change": (
        lambda session: session.update(list=["first"], a=1),
        append("list", "theirs"),
        {"a": 1, "list": ["first", "theirs"]},
    ),
    "a write beside permanent": (
        set_key("a", 1),
        lambda session: setattr(session, "permanent", True),
        {"a": 1, "_permanent": True},
    ),
    "a write beside a lifetime": (
        lambda session: session.set_lifetime(60),
        set_key("a", 1),
        {"a": 1},
    ),
}


def test_both_requests_count(site: Site) -> None:
    for name, (mine, theirs, expected) in RACES.items():
        start: dict[str, Any] = {
            "a": 0, "b": 0, "list": ["first"], "deep": {"one": [], "two": {"x": 0}}
        }  # fmt: skip
        wanted = {key: value for key, value in (start | expected).items() if value is not DELETED}
        assert race(site, visitor_with(site, **start), mine, theirs) == wanted, name
        if "clear beside" in name or "beside a lifetime" in name:
            continue  # there is nothing to clear, or to collide with, once theirs is seen
        assert race_inside(visitor_with(site, **start), mine, theirs) == wanted, name
    assert not site.happened(WriteDropped)


def test_a_look_puts_nothing_back(site: Site) -> None:
    visitor = visitor_with(site, items=["first"], n=0)
    look = lambda session: (session["items"], session["n"])  # noqa: E731
    assert race_inside(visitor, look, append("items", "theirs")) == {
        "items": ["first", "theirs"],
        "n": 0,
    }


@pytest.mark.parametrize("way", ["clear", "pop"])
def test_emptying_ends_the_session_only_if_nothing_was_added(site: Site, way: str) -> None:
    fill = set_key("cart", ["mug"])
    empty: Any = (lambda s: s.clear()) if way == "clear" else (lambda s: s.pop("a"))
    assert race(site, visitor_with(site, a=0), empty, fill) == {"cart": ["mug"]}
    assert not site.happened(WriteDropped)
    assert race_inside(visitor_with(site, a=0), fill, empty) == {}  # too late: it has ended
    assert len(site.happened(WriteDropped)) == 1


@pytest.mark.parametrize("way", ["clear", "pop", "take", "update_atomic and del"])
def test_an_emptied_session_ends_with_its_token(site: Site, way: str) -> None:
    ways: dict[str, Any] = {
        "clear": lambda s: s.clear(),
        "pop": lambda s: s.pop("a"),
        "take": lambda s: s.take("a"),
        "update_atomic and del": lambda s: (s.update_atomic("a", lambda a: a + 1), s.pop("a")),
    }
    visitor = visitor_with(site, a=0)
    visitor.run(ways[way])
    assert visitor.cookie is None
    assert not site.stored()
    assert len(site.happened(SessionDestroyed)) == 1


def test_three_requests_at_three_points(site: Site) -> None:
    visitor = visitor_with(site, a=0, b=0, c=0, d=0)
    second, third = visitor.another_tab(), visitor.another_tab()
    site.before_each(
        "save",
        lambda: second.run(set_key("b", 2)),
        lambda: third.run(set_key("c", 3)),
        lambda: second.run(set_key("d", 4)),
    )
    visitor.run(set_key("a", 1))
    assert visitor.run(dict) == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert site.happened(SessionSaved)[-1].conflicts == 3


def test_a_race_between_reloading_and_saving_again(site: Site) -> None:
    """The second loser of a race must not restore the values that it reloaded."""
    visitor = visitor_with(site, a=0, n=0)
    other = visitor.another_tab()
    count = lambda session: session.update(n=session["n"] + 1)  # noqa: E731
    site.before_each("save", *[lambda: other.run(count)] * 4)
    visitor.run(set_key("a", 1))
    assert visitor.run(dict) == {"a": 1, "n": 4}


def test_a_lifetime_is_not_lost_either(site: Site) -> None:
    set_lifetime = lambda session: session.set_lifetime(50)  # noqa: E731
    for mine, theirs in ((set_key("a", 1), set_lifetime), (set_lifetime, set_key("a", 1))):
        visitor = visitor_with(site, a=0)
        assert race(site, visitor, mine, theirs) == {"a": 1}
        site.clock.advance(60)
        assert visitor.run(dict) == {}


def test_two_open_sessions_in_one_thread(site: Site) -> None:
    visitor = visitor_with(site, a=0, b=0)
    one, two = visitor.another_tab(), visitor.another_tab()
    with one.session_transaction() as first, two.session_transaction() as second:
        first["a"] = first["a"] + 1
        second["b"] = second["b"] + 2
    assert visitor.run(dict) == {"a": 1, "b": 2}


def test_a_session_transaction_that_conflicts_raises(make_site: SiteMaker) -> None:
    visitor = visitor_with(make_site(conflict="reject"), a=0)
    other = visitor.another_tab()
    with pytest.raises(SessionConflict), visitor.session_transaction() as session:  # noqa: PT012
        session["a"] = 1
        other.run(set_key("a", 2))
    assert visitor.run(dict) == {"a": 2}


# Policies ------------------------------------------------------------------------------------


def keep_longest(base: Any, theirs: Any, mine: Any) -> Any:
    return max((theirs, mine), key=len)


def test_a_key_merges_by_its_policy(make_site: SiteMaker) -> None:
    site = make_site(
        merge_policies={
            "hits": "counter", "seen": "set", "prefs": "dict", "log": "append",
            "name": keep_longest, "plain": "last",
        },
        conflict="reject",
    )  # fmt: skip
    for mine, theirs, expected in (
        (set_key("hits", 11), set_key("hits", 15), {"hits": 16}),
        (set_key("hits", 9), set_key("hits", 8), {"hits": 7}),
        (set_key("hits", 11), lambda session: session.pop("hits"), {"hits": 1}),
        (
            lambda session: session["seen"].add("c"),
            lambda session: session["seen"].add("d"),
            {"seen": {"a", "b", "c", "d"}},
        ),
        (
            lambda session: session["seen"].remove("a"),
            lambda session: session["seen"].add("d"),
            {"seen": {"b", "d"}},
        ),
        (
            lambda session: session["prefs"].update(size="L"),
            lambda session: session["prefs"].update(color="red"),
            {"prefs": {"size": "L", "color": "red", "old": 1}},
        ),
        (
            lambda session: session["prefs"].pop("old"),
            lambda session: session["prefs"].update(color="red"),
            {"prefs": {"size": "M", "color": "red"}},
        ),
        (append("log", "mine"), append("log", "theirs"), {"log": ["start", "theirs", "mine"]}),
        (set_key("name", "mine!"), set_key("name", "theirs"), {"name": "theirs"}),
        (set_key("name", "mine is it"), set_key("name", "theirs"), {"name": "mine is it"}),
        (set_key("plain", 1), set_key("plain", 2), {"plain": 1}),
    ):
        start = {
            "hits": 10, "seen": {"a", "b"}, "prefs": {"size": "M", "old": 1}, "log": ["start"],
            "name": "", "plain": 0,
        }  # fmt: skip
        assert race(site, visitor_with(site, **start), mine, theirs) == start | expected


def test_a_policy_also_merges_keys_that_are_new_to_both(make_site: SiteMaker) -> None:
    policies = {"hits": "counter", "seen": "set", "prefs": "dict", "log": "append"}
    site = make_site(merge_policies=policies, conflict="reject")
    assert race(
        site,
        visitor_with(site, other=0),
        lambda session: session.update(hits=1, seen={1}, prefs={"a": 1}, log=[1]),
        lambda session: session.update(hits=2, seen={2}, prefs={"b": 2}, log=[2]),
    ) == {"other": 0, "hits": 3, "seen": {1, 2}, "prefs": {"a": 1, "b": 2}, "log": [2, 1]}


def test_a_policy_function_gets_base_theirs_and_mine(make_site: SiteMaker) -> None:
    told: list[Any] = []

    def policy(base: Any, theirs: Any, mine: Any) -> Any:
        told.append((base, theirs, mine))
        return "merged"

    site = make_site(merge_policies={"key": policy, "new": policy})
    after = race(site, visitor_with(site, key=[0]), append("key", 1), append("key", 2))
    assert after == {"key": "merged"}
    race(site, visitor_with(site, other=0), set_key("new", 1), set_key("new", 2))
    start = visitor_with(site, key=0, other=0)
    race(site, start, set_key("key", 1), lambda session: session.pop("key"))
    assert told == [([0], [0, 2], [0, 1]), (MISSING, 2, 1), (0, MISSING, 1)]


def test_the_request_continues_with_the_merged_values(make_site: SiteMaker) -> None:
    site = make_site(merge_policies={"hits": "counter"})
    visitor = visitor_with(site, hits=0, atomic=0)
    other = visitor.another_tab()

    def view(session: Any) -> object:
        session["hits"] += 1
        other.run(set_key("hits", 10))
        session.update_atomic("hits", lambda hits: hits)  # stores the pending change
        return session["hits"]

    assert visitor.run(view) == 11
    assert visitor.run(dict) == {"hits": 11, "atomic": 0}


# Conflicts -----------------------------------------------------------------------------------


def lose_race(site: Site, visitor: Visitor, mine: Change, theirs: Change) -> Any:
    other = visitor.another_tab()
    site.before_each("save", lambda: other.run(theirs))
    return visitor.ask(mine)


def test_reject_answers_409_and_stores_nothing_of_the_request(make_site: SiteMaker) -> None:
    site = make_site(merge_policies={"stock": "reject"})
    for mine, theirs, expected in (
        (set_key("stock", 4), set_key("stock", 3), {"stock": 3, "a": 0}),
        (set_key("stock", 3), lambda session: session.pop("stock"), {"a": 0}),
        (lambda session: session.pop("stock"), set_key("stock", 3), {"stock": 3, "a": 0}),
        (
            lambda session: session.update(a=1, stock=4),
            set_key("stock", 3),
            {"stock": 3, "a": 0},
        ),
        # Two that take the last piece do the same, and yet one of them must hear of it.
        (set_key("stock", 4), set_key("stock", 4), {"stock": 4, "a": 0}),
    ):
        visitor = visitor_with(site, stock=5, a=0)
        response = lose_race(site, visitor, mine, theirs)
        assert response.status_code == 409
        assert "Set-Cookie" not in response.headers
        assert visitor.run(dict) == expected


def test_reject_allows_changes_of_other_keys(make_site: SiteMaker) -> None:
    site = make_site(conflict="reject")
    visitor = visitor_with(site, a=0, b=0)
    assert race(site, visitor, set_key("a", 1), set_key("b", 2)) == {"a": 1, "b": 2}
    look = lambda session: session["a"]  # noqa: E731
    assert race_inside(visitor, look, set_key("a", 6)) == {"a": 6, "b": 2}


def test_append_rejects_other_changes(make_site: SiteMaker) -> None:
    site = make_site(merge_policies={"log": "append"})
    visitor = visitor_with(site, log=[1, 2])
    response = lose_race(site, visitor, lambda session: session["log"].pop(0), append("log", 3))
    assert response.status_code == 409
    assert visitor.run(dict) == {"log": [1, 2, 3]}


@pytest.mark.parametrize("registered", [409, SessionConflict, GSessionError])
def test_a_conflict_goes_through_the_error_handlers_of_the_app(
    make_site: SiteMaker, registered: Any
) -> None:
    site = make_site(conflict="reject")
    seen: list[Exception] = []

    @site.app.errorhandler(registered)
    def conflict(error: SessionConflict) -> Response:
        seen.append(error)
        return Response("somebody was faster", 409, {"X-Page": "ours"})

    visitor = visitor_with(site, a=0)
    response = lose_race(site, visitor, set_key("a", 1), set_key("a", 2))
    assert (response.status_code, response.text) == (409, "somebody was faster")
    assert response.headers["X-Page"] == "ours"
    assert isinstance(seen[0], SessionConflict)
    assert visitor.run(dict) == {"a": 2}


def test_too_many_lost_races_are_a_conflict(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the view and at its end. The others' writes stay."""
    monkeypatch.setattr("flask_gsession.repository.races._LONGEST_PAUSE", 0.001)

    @site.app.errorhandler(SessionConflict)
    def conflict(error: SessionConflict) -> tuple[str, int]:
        return "somebody was faster", 409

    visitor = visitor_with(site, a=0, n=0)

    def be_faster() -> None:
        store = site.store.store
        record = store.load(handle)
        assert record is not None
        store.save(record._replace(version=new_version()), record.version)

    handle = visitor.run(lambda session: session.handle)
    for mine in (set_key("a", 1), lambda session: session.update_atomic("n", lambda n: n + 1)):
        site.before_each("save", *[be_faster] * 100)
        response = visitor.ask(mine)
        assert (response.status_code, response.text) == (409, "somebody was faster")
        site.store._hooks.clear()
        assert visitor.run(dict) == {"a": 0, "n": 0}
    visitor.run(set_key("a", 1))
    assert visitor.run(dict) == {"a": 1, "n": 0}


# Read-modify-write of one key ------------------------------------------------------------------


def test_update_atomic_sees_changes_of_others(site: Site) -> None:
    visitor = visitor_with(site, n=1, other=0, list=[])
    other = visitor.another_tab()

    def view(session: Any) -> tuple[Any, ...]:
        assert session["n"] == 1
        other.run(lambda session: session.update(n=100, list=["theirs"]))
        first = session.update_atomic("n", lambda n: n + 1)
        second = session.update_atomic("list", lambda items: [*items, "mine"])
        third = session.update_atomic("new", lambda n: n + 1, 41)
        return first, second, third, session["n"], session["list"], session["new"]

    expected = (101, ["theirs", "mine"], 42)
    assert visitor.run(view) == expected * 2
    assert visitor.run(dict) == {"n": 101, "other": 0, "list": ["theirs", "mine"], "new": 42}


def test_update_atomic_runs_again_until_it_lands(site: Site) -> None:
    visitor = visitor_with(site, n=0)
    other = visitor.another_tab()
    step = lambda session: session.update_atomic("n", lambda n: n + 1)  # noqa: E731
    site.before_each("save", *[lambda: other.run(step)] * 3)
    assert visitor.run(step) == 4
    assert visitor.run(dict) == {"n": 4}


def test_update_atomic_is_stored_at_once_and_the_rest_with_the_response(site: Site) -> None:
    visitor = visitor_with(site, n=0, a=0)
    other = visitor.another_tab()

    def view(session: Any) -> object:
        session["a"] = 1
        session.update_atomic("n", lambda n: n + 1)
        return other.run(dict)

    assert visitor.run(view) == {"n": 1, "a": 0}
    assert visitor.run(dict) == {"n": 1, "a": 1}


def test_update_atomic_builds_on_the_pending_change_of_its_key(site: Site) -> None:
    visitor = visitor_with(site, n=0, items=[])

    def view(session: Any) -> None:
        session["n"] = 10
        session.update_atomic("n", lambda n: n + 1)
        session["items"].append("a")
        session.update_atomic("items", lambda items: [*items, "b"])
        session["items"].append("c")
        session["n"] += 1

    visitor.run(view)
    assert visitor.run(dict) == {"n": 12, "items": ["a", "b", "c"]}


def test_update_atomic_that_fails_changes_nothing(site: Site) -> None:
    visitor = visitor_with(site, n=[0], a=0)

    def fail(value: Any) -> Any:
        value.append(1)
        raise ZeroDivisionError

    def view(session: Any) -> None:
        session["a"] = 1
        for function, error in ((fail, ZeroDivisionError), (lambda n: object(), TypeError)):
            with pytest.raises(error):
                session.update_atomic("n", function)
        assert session["n"] == [0]

    visitor.run(view)
    assert visitor.run(dict) == {"n": [0], "a": 1}


def test_update_atomic_in_a_session_that_is_not_stored_yet(site: Site) -> None:
    visitor = site.visitor()
    steps = lambda session: [  # noqa: E731
        session.update_atomic("n", lambda n: n + 1, 0) for _ in range(3)
    ]
    assert visitor.run(steps) == [1, 2, 3]
    assert visitor.run(dict) == {"n": 3}


def test_update_atomic_never_shares_its_default(site: Site) -> None:
    default: list[int] = []

    def grow(value: list[int]) -> list[int]:
        value.append(1)
        return value

    for visitor in (site.visitor(), visitor_with(site, a=0)):
        visitor.run(lambda session: session.update_atomic("items", grow, default))
        visitor.run(lambda session: session["items"].append(2))
        assert visitor.run(lambda session: session["items"]) == [1, 2]
    assert default == []


def test_update_atomic_of_an_ended_session_is_409(site: Site) -> None:

    @site.app.errorhandler(SessionEnded)
    def ended(error: SessionEnded) -> tuple[str, int]:
        return "log in again", 409

    visitor = visitor_with(site, n=0)
    other = visitor.another_tab()

    def view(session: Any) -> None:
        assert session["n"] == 0
        other.run(lambda session: session.destroy())
        session.update_atomic("n", lambda n: n + 1)

    response = visitor.ask(view)
    assert (response.status_code, response.text) == (409, "log in again")
    assert not site.stored()


# Many at once --------------------------------------------------------------------------------

THREADS = 8


def test_update_atomic_from_many_threads_is_exact(site: Site) -> None:
    visitor = visitor_with(site, n=0)
    tabs = [visitor.another_tab() for _ in range(THREADS)]

    def work(tab: Visitor) -> None:
        for _ in range(3):
            tab.run(lambda session: session.update_atomic("n", lambda n: n + 1))

    at_once(*[lambda tab=tab: work(tab) for tab in tabs])
    assert visitor.run(dict) == {"n": 3 * THREADS}


def test_update_atomic_from_the_threads_of_one_request_is_exact(site: Site) -> None:
    visitor = visitor_with(site, n=0)

    def view(session: Any) -> None:
        def add(n: int) -> int:
            if not other.ident:
                other.start()
                other.join(0.1)  # it has to wait
            return n + 1

        work = flask.copy_current_request_context(lambda: flask.session.update_atomic("n", add))
        other = threading.Thread(target=work)
        session.update_atomic("n", add)
        other.join()

    visitor.run(view)
    assert visitor.run(dict) == {"n": 2}


def test_a_many_way_race_loses_nothing(make_site: SiteMaker) -> None:
    site = make_site(merge_policies={"hits": "counter", "seen": "set", "log": "append"})
    visitor = visitor_with(site, hits=0, seen=set(), log=[])
    tabs = [visitor.another_tab() for _ in range(THREADS)]

    def take(session: Any, number: int, step: int) -> None:
        session[f"own {number}"] = step
        session["hits"] += 1
        session["seen"].add((number, step))
        session["log"].append((number, step))

    def work(number: int, tab: Visitor) -> None:
        tab.run(lambda session: take(session, number, 0))
        tab.run(lambda session: take(session, number, 1))

    at_once(*[lambda number=number, tab=tab: work(number, tab) for number, tab in enumerate(tabs)])
    after = visitor.run(dict)
    everything = {(number, step) for number in range(THREADS) for step in range(2)}
    assert after["hits"] == len(everything)
    assert after["seen"] == everything
    assert sorted(after["log"]) == sorted(everything)
    assert [after[f"own {number}"] for number in range(THREADS)] == [1] * THREADS


def test_a_store_that_cries_stale_without_reason_is_asked_again(site: Site) -> None:
    visitor = visitor_with(site, a=0)

    def cry() -> None:
        raise Stale

    site.before_each("save", cry)
    visitor.run(set_key("a", 1))
    assert visitor.run(dict) == {"a": 1}
