"""Values that expire by themselves, and values that are handed out once, on every store.

The changes of two requests to a key that expires, and the result. "late" is after its end.

======================================  ====================================================
A sets with a ttl, B sets without       the later write's value with its expiry, or without
both change a mergeable value, A's ttl  merged, with the expiry that A set
A changes inside it, B sets a new ttl   A's value (the later write), without a new expiry of A's
expires between load and look           absent from then on
expires between load and save           a change inside it is void; what B stored stays
A sets it again, late                   stored; not a conflict with what expired
A deletes it, late; B has set it again  B's stays
A takes, B takes                        one gets it
A takes, B sets                         A gets one of the two; B's stays if it came later
======================================  ====================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from flask_gsession.errors import SessionEnded, StoreUnavailable, TransactionMisused
from flask_gsession.events import SessionDestroyed
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor, at_once


def with_code(site: Site, ttl: float = 60, **others: Any) -> Visitor:
    """A visitor whose session holds a code that expires."""
    visitor = site.visitor()

    def fill(session: Any) -> None:
        session.update(others)
        session.set("code", "4711-secret", ttl=ttl)

    visitor.run(fill)
    return visitor


def looks(session: Any) -> dict[str, Any]:
    """Every way to look for the code."""
    return {
        "in": "code" in session,
        "get": session.get("code"),
        "copy": session.copy().get("code"),
        "iter": "code" in list(session),
        "keys": "code" in set(session.keys()),
        "reversed": "code" in list(reversed(session)),
        "len": len(session),
        "items": dict(session.items()).get("code"),
        "pop": session.pop("code", None),
    }


def looks_and_puts_back(session: Any) -> dict[str, Any]:
    """The result of ``looks``, which must not change anything."""
    found = looks(session)
    session.reload()
    return found


THERE = dict.fromkeys(["get", "copy", "items", "pop"], "4711-secret") | {
    "in": True,
    "iter": True,
    "keys": True,
    "reversed": True,
    "len": 2,
}
AWAY = dict.fromkeys(["get", "copy", "items", "pop"]) | {
    "in": False,
    "iter": False,
    "keys": False,
    "reversed": False,
    "len": 1,
}


# Expiry --------------------------------------------------------------------------------------


def test_a_value_expires_by_itself(site: Site, clock: FakeClock) -> None:
    visitor = with_code(site, user="ada")
    assert visitor.run(lambda session: session.ttl("code")) == 60
    clock.advance(59.999)
    assert visitor.another_tab().run(looks_and_puts_back) == THERE
    assert visitor.run(lambda session: session.ttl("code")) == pytest.approx(0.001)


def test_an_expired_value_is_absent_to_every_method(site: Site, clock: FakeClock) -> None:
    visitor = with_code(site, user="ada")
    clock.advance(60)
    assert visitor.run(looks) == AWAY

    def look_for_it(session: Any) -> None:
        for look in (session.__getitem__, session.ttl, session.take, session.__delitem__):
            with pytest.raises(KeyError):
                look("code")

    visitor.run(look_for_it)


def test_the_next_write_removes_an_expired_value_from_the_store(
    site: Site, clock: FakeClock
) -> None:
    visitor = with_code(site, user="ada")

    def is_stored() -> bool:
        return any(b"4711-secret" in raw for raw in site.stored().values())

    assert is_stored()
    clock.advance(60)
    visitor.run(looks)
    assert is_stored()  # a read writes nothing
    visitor.run(lambda session: session.update(n=1))
    assert not is_stored()
    assert visitor.run(dict) == {"user": "ada", "n": 1}


def test_an_atomic_update_of_another_key_drops_it_too(site: Site, clock: FakeClock) -> None:
    visitor = with_code(site, user="ada")
    clock.advance(60)
    visitor.run(lambda session: session.update_atomic("n", lambda n: n + 1, 0))
    assert not any(b"4711-secret" in raw for raw in site.stored().values())


def test_a_value_expires_while_a_request_runs(site: Site, clock: FakeClock) -> None:
    visitor = with_code(site, user="ada")

    def late(session: Any) -> tuple[Any, ...]:
        before = session["code"]
        clock.advance(60)
        return before, session.get("code"), looks(session) == AWAY

    assert visitor.run(late) == ("4711-secret", None, True)


def test_a_value_that_expires_before_it_is_saved_is_never_stored(
    site: Site, clock: FakeClock
) -> None:
    def set_and_wait(session: Any) -> None:
        session.set("code", "4711-secret", ttl=1)
        clock.advance(1)

    site.visitor().run(set_and_wait)
    assert site.stored() == {}
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada", code="plain"))
    visitor.run(set_and_wait)
    assert visitor.run(dict) == {"user": "ada"}


def test_a_session_whose_values_all_expired_stays_empty(site: Site, clock: FakeClock) -> None:
    visitor = with_code(site)
    clock.advance(60)
    cookie = visitor.cookie
    assert visitor.run(lambda session: (dict(session), session.new)) == ({}, False)
    visitor.run(lambda session: session.update(n=1))
    assert (visitor.run(dict), visitor.cookie) == ({"n": 1}, cookie)
    assert site.happened(SessionDestroyed) == []


def test_clearing_a_session_of_expired_values_ends_it(site: Site, clock: FakeClock) -> None:
    visitor = with_code(site)
    clock.advance(60)
    visitor.run(lambda session: session.clear())
    assert (visitor.cookie, len(site.happened(SessionDestroyed))) == (None, 1)


@pytest.mark.parametrize(
    ("ttl", "left"),
    [(90, 90), (0.5, 0.5), (1e-9, 0.001), (timedelta(hours=1), 3600), (316224000, 316224000)],
    ids=["seconds", "half", "least", "timedelta", "longest"],
)
def test_times_that_a_key_can_have(site: Site, ttl: Any, left: float) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.set("code", 1, ttl=ttl))
    assert visitor.run(lambda session: session.ttl("code")) == left


BAD = [0, -1, 0.0, -0.0, math.nan, math.inf, 316224001, timedelta(0), timedelta(-1), True, "60", []]


@pytest.mark.parametrize("ttl", BAD, ids=map(repr, BAD))
def test_times_that_a_key_cannot_have(site: Site, ttl: Any) -> None:
    visitor = with_code(site)

    def wrong(session: Any) -> None:
        with pytest.raises(ValueError, match=r"^ttl (is|must be) "):
            session.set("code", "other", ttl=ttl)

    visitor.run(wrong)
    assert visitor.run(lambda session: (session["code"], session.ttl("code"))) == (
        "4711-secret",
        60,
    )


def test_a_time_beyond_the_session_ends_with_the_session(
    make_site: SiteMaker, clock: FakeClock
) -> None:
    site = make_site(idle_timeout=100, renew_interval=0)
    visitor = with_code(site, ttl=1000)
    clock.advance(99)
    assert visitor.run(lambda session: session.ttl("code")) == 901
    clock.advance(100)
    assert visitor.run(lambda session: (dict(session), session.new)) == ({}, True)


def test_which_writes_remove_an_expiry(site: Site) -> None:
    def make(session: Any) -> None:
        for key in ("assigned", "updated", "set", "nested", "atomic", "counted", "longer"):
            session.set(key, [1], ttl=60)
        session.set("counted", 1, ttl=60)

    def change(session: Any) -> None:
        session["assigned"] = [1]
        session.update(updated=[2])
        session.set("set", [2])
        session["nested"].append(2)
        session.update_atomic("atomic", lambda value: [*value, 2])
        session["counted"] += 1  # which is an assignment
        session.set("longer", [1], ttl=90)

    def ttls(session: Any) -> dict[str, Any]:
        return {key: session.ttl(key) for key in sorted(session)}

    ends = {"assigned": None, "atomic": 60, "counted": None, "longer": 90, "nested": 60}
    ends |= {"set": None, "updated": None}
    visitor = site.visitor()
    visitor.run(make)
    assert visitor.run(lambda session: (change(session), ttls(session))[1]) == ends
    assert visitor.run(ttls) == ends
    assert visitor.run(lambda session: session["nested"]) == [1, 2]
    visitor = site.visitor()  # the same, in one request that creates the session
    assert visitor.run(lambda session: (make(session), change(session), ttls(session))[2]) == ends
    assert visitor.run(ttls) == ends


def test_an_expiry_survives_rotation_reload_and_transactions(site: Site, clock: FakeClock) -> None:
    visitor = with_code(site)
    visitor.run(lambda session: session.rotate(grace=0))
    visitor.run(lambda session: (session.reload(), session.update(n=1)))

    def in_a_transaction(session: Any) -> None:
        with session.transaction():
            session["n"] = session["code"]
            session.set("other", 1, ttl=30)

    visitor.run(in_a_transaction)
    ends = visitor.run(lambda session: [session.ttl(key) for key in ("code", "n", "other")])
    assert ends == [60, None, 30]

    def rolled_back(session: Any) -> None:
        with suppress(ZeroDivisionError), session.transaction():
            session.set("code", 1, ttl=5)
            raise ZeroDivisionError
        assert (session["code"], session.ttl("code")) == ("4711-secret", 60)

    visitor.run(rolled_back)
    clock.advance(30)
    assert visitor.run(lambda session: session.ttl("code")) == 30
    assert visitor.run(lambda session: "other" in session) is False


def test_reading_costs_no_write(site: Site) -> None:
    visitor = with_code(site, items=[1])
    with site.counted() as count:
        visitor.run(lambda session: (dict(session), session.ttl("code")))
    assert count.calls == ["load"]


# Parallel requests ---------------------------------------------------------------------------


def test_an_expiry_belongs_to_the_write_that_set_it(site: Site) -> None:
    visitor = with_code(site)
    other = visitor.another_tab()

    def plain(session: Any) -> None:
        session["code"] = "mine"
        other.run(lambda session: session.set("code", "theirs", ttl=30))

    visitor.run(plain)
    assert visitor.run(lambda session: (session["code"], session.ttl("code"))) == ("mine", None)

    def with_ttl(session: Any) -> None:
        session.set("code", "mine", ttl=30)
        other.run(lambda session: session.update(code="theirs"))

    visitor.run(with_ttl)
    assert visitor.run(lambda session: (session["code"], session.ttl("code"))) == ("mine", 30)


def test_changes_of_other_keys_leave_an_expiry(site: Site) -> None:
    visitor = with_code(site)
    other = visitor.another_tab()

    def unrelated(session: Any) -> None:
        session["n"] = session.get("code")
        other.run(lambda session: session.set("code", "theirs", ttl=30))

    visitor.run(unrelated)
    assert visitor.run(lambda session: (session["code"], session.ttl("code"))) == ("theirs", 30)


def test_a_session_without_expiries_learns_of_them_in_a_merge(site: Site, clock: FakeClock) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=1))
    other = visitor.another_tab()

    def meet(session: Any) -> tuple[Any, ...]:
        session.update_atomic("n", lambda n: n + 1)
        other.run(lambda session: session.set("code", "theirs", ttl=30))
        session.update_atomic("n", lambda n: n + 1)
        there = session["code"], session.ttl("code")
        clock.advance(30)
        return (*there, "code" in session)

    assert visitor.run(meet) == ("theirs", 30, False)
    assert visitor.run(dict) == {"n": 3}


def test_a_merged_value_has_the_expiry_that_was_set(make_site: SiteMaker) -> None:
    site = make_site(merge_policies={"tags": "set"})

    def both(mine: Callable[[Any], object], theirs: Callable[[Any], object]) -> tuple[Any, Any]:
        visitor = site.visitor()
        visitor.run(lambda session: (session.update(other=1), session.set("tags", {"a"}, ttl=60)))
        other = visitor.another_tab()
        visitor.run(lambda session: (mine(session), other.run(theirs)))
        return visitor.run(lambda session: (session["tags"], session.ttl("tags")))

    def add(tag: str) -> Callable[[Any], object]:
        return lambda session: session["tags"].add(tag)

    def put(tag: str, ttl: float | None) -> Callable[[Any], object]:
        return lambda session: session.set("tags", {"a", tag}, ttl=ttl)

    merged = {"a", "b", "c"}
    assert both(add("b"), add("c")) == (merged, 60)
    assert both(add("b"), put("c", 30)) == (merged, 30)
    assert both(put("b", 30), add("c")) == (merged, 30)
    assert both(put("b", 30), put("c", 90)) == (merged, 30)
    assert both(put("b", None), put("c", 90)) == (merged, None)
    assert both(add("b"), put("c", None)) == (merged, None)
    assert both(add("b"), lambda session: session.remove("tags")) == ({"b"}, 60)


def test_a_change_inside_a_value_that_expires_meanwhile_is_void(
    site: Site, clock: FakeClock
) -> None:
    def run(theirs: Callable[[Any], object]) -> Any:
        visitor = site.visitor()
        visitor.run(lambda session: (session.set("list", [1], ttl=60), session.update(n=1)))
        other = visitor.another_tab()

        def change(session: Any) -> None:
            session["list"].append(2)
            clock.advance(60)
            other.run(theirs)

        visitor.run(change)
        return visitor.run(dict)

    assert run(len) == {"n": 1}
    assert run(lambda session: session.update(list="theirs")) == {"n": 1, "list": "theirs"}
    assert run(lambda session: session.update(n=2)) == {"n": 2}


@pytest.mark.parametrize("policy", ["last", "reject"])
def test_an_expired_value_causes_no_conflict(
    make_site: SiteMaker, clock: FakeClock, policy: str
) -> None:
    site = make_site(conflict=policy)
    visitor = with_code(site, n=1)
    other = visitor.another_tab()

    def set_again(session: Any) -> None:
        session["code"] = session["code"] + "!"
        clock.advance(60)
        other.run(lambda session: session.update(n=2))  # which drops the old code

    visitor.run(set_again)
    assert visitor.run(dict) == {"code": "4711-secret!", "n": 2}


def test_a_late_deletion_leaves_a_newer_value(site: Site, clock: FakeClock) -> None:
    visitor = with_code(site)
    other = visitor.another_tab()

    def delete(session: Any) -> None:
        del session["code"]
        clock.advance(60)
        other.run(lambda session: session.update(code="second"))

    visitor.run(delete)
    assert visitor.run(dict) == {"code": "second"}


# Handed out once -----------------------------------------------------------------------------


def test_a_value_is_taken_once(site: Site) -> None:
    visitor = with_code(site, user="ada")
    with site.counted() as count:
        assert visitor.run(lambda session: (session.take("code"), session.get("code"))) == (
            "4711-secret",
            None,
        )
    assert count.calls == ["load", "save"]
    assert visitor.run(lambda session: session.take("code", "none")) == "none"
    assert visitor.run(dict) == {"user": "ada"}


def test_a_taken_value_is_gone_although_the_request_fails(site: Site) -> None:
    visitor = with_code(site, user="ada")

    def fail(session: Any) -> None:
        session["user"] = object()
        session.take("code")

    site.app.config["PROPAGATE_EXCEPTIONS"] = False
    assert visitor.ask(fail).status_code == 500
    assert visitor.run(dict) == {"user": "ada"}


def test_one_of_two_parallel_takes_gets_the_value(site: Site) -> None:
    visitor = with_code(site, user="ada")
    other = visitor.another_tab()
    got = []

    def take(session: Any) -> None:
        session["code"]  # so that the request holds it
        got.append(other.run(lambda session: session.take("code")))
        got.append(session.take("code", None))
        got.append(session.get("code"))

    visitor.run(take)
    assert got == ["4711-secret", None, None]


def test_one_of_many_parallel_takes_gets_the_value(site: Site) -> None:
    visitor = with_code(site, user="ada")
    got: list[Any] = []
    tabs = [visitor.another_tab() for _ in range(6)]

    def take(tab: Visitor) -> None:
        got.append(tab.run(lambda session: session.take("code", None)))

    at_once(*(lambda tab=tab: take(tab) for tab in tabs))
    assert sorted(got, key=str) == ["4711-secret", None, None, None, None, None]


def test_a_take_beside_a_set(site: Site) -> None:
    visitor = with_code(site, user="ada")
    other = visitor.another_tab()

    def set_first(session: Any) -> Any:
        session["user"]
        other.run(lambda session: session.set("code", "new", ttl=30))
        return session.take("code")

    assert visitor.run(set_first) == "new"
    assert "code" not in visitor.run(dict)

    def set_later(session: Any) -> None:
        session["code"] = "later"
        assert other.run(lambda session: session.take("code", None)) is None

    visitor.run(set_later)
    assert visitor.run(dict) == {"user": "ada", "code": "later"}


def test_a_request_can_take_its_own_unsaved_changes(site: Site) -> None:
    def own(session: Any) -> tuple[Any, ...]:
        session["code"] = "mine"
        taken = session.take("code")
        session["code"] = "again"
        del session["code"]
        return taken, session.take("code", None), "code" in session

    assert site.visitor().run(own) == ("mine", None, False)
    visitor = with_code(site, user="ada")
    assert visitor.run(own) == ("mine", None, False)
    assert visitor.run(dict) == {"user": "ada"}


def test_a_taken_value_can_be_set_again(site: Site) -> None:
    visitor = with_code(site)

    def turn(session: Any) -> None:
        session.set("code", session.take("code") + "!", ttl=30)

    visitor.run(turn)
    assert visitor.run(lambda session: (session["code"], session.ttl("code"))) == (
        "4711-secret!",
        30,
    )


def test_other_changes_stay_pending(site: Site) -> None:
    visitor = with_code(site, user="ada")

    def take(session: Any) -> Any:
        session["user"] = "eve"
        session.take("code")
        return visitor.another_tab().run(dict)

    assert visitor.run(take) == {"user": "ada"}
    assert visitor.run(dict) == {"user": "eve"}


def test_nothing_is_taken_in_a_transaction(site: Site) -> None:
    def misuse(session: Any) -> None:
        with session.transaction(), pytest.raises(TransactionMisused):
            session.take("code")

    visitor = with_code(site)
    visitor.run(misuse)
    assert visitor.run(dict) == {"code": "4711-secret"}


def test_a_value_that_may_have_been_taken_is_not_returned(site: Site) -> None:
    visitor = with_code(site)

    def fail() -> None:
        raise StoreUnavailable("by the test")

    site.store.after("save", fail)

    def take(session: Any) -> None:
        with pytest.raises(StoreUnavailable):
            session.take("code")

    visitor.ask(take)
    assert visitor.another_tab().run(lambda session: session.take("code", None)) is None


def test_nothing_is_taken_from_a_session_that_ended(site: Site) -> None:
    visitor = with_code(site)
    other = visitor.another_tab()

    def take(session: Any) -> None:
        session["code"]
        other.run(lambda session: session.destroy())
        for _ in range(2):
            with pytest.raises(SessionEnded):
                session.take("code", None)
            session["code"] = "of a session that has ended"

    visitor.run(take)
