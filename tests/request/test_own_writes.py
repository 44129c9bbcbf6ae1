"""A request recognises each write that it sent, whatever struck before the answer was noted."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from flask_gsession import SessionConflict
from flask_gsession.errors import Gone, Stale
from flask_gsession.events import SessionSaved
from flask_gsession.request.following import catch_up, resolve_attempts
from flask_gsession.request.session import lifecycle_of
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.interleaving import strike_at
from tests.users.test_devices import ids

GRACE = 60  # seconds
POLICIES = {"clicks": "counter", "history": "append", "tags": "set"}


class TooLong(Exception):
    """As the handler of a signal raises that bounds the time of a view."""


class Killed(BaseException):
    """As gevent's Timeout, or the SystemExit of a worker."""


def click(session: Any) -> None:
    session["clicks"] += 1
    session["history"].append("mug")
    session["tags"].add("new")


ONCE = {"clicks": 1, "history": ["mug"], "tags": {"new"}}


def a_visitor(site: Site) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(clicks=0, history=[], tags=set()))
    return visitor


def strike(kind: type[BaseException]) -> Callable[[], None]:
    def raise_it() -> None:
        raise kind

    return raise_it


def on_its_way(
    site: Site, session: Any, verb: str = "save", kind: type[BaseException] = TooLong
) -> Callable[[], None]:
    """Interrupt a transaction with its command on its way. Returns a function to deliver it."""
    life = lifecycle_of(session)
    before, known = life.seen.record, life.attempts.keys()
    site.store.before(verb, strike(kind))
    with pytest.raises(kind):
        transaction(session)
    (version,) = life.attempts.keys() - known
    attempt, store = life.attempts[version], site.store.store

    def arrive() -> None:
        with suppress(Gone, Stale):
            if before is None:
                store.create(attempt.record)
            elif verb == "save":
                store.save(attempt.record, before.version)
            else:
                grace = attempt.wishes.rotation or 0
                records = life.repository.records
                pointer = records.draft_pointer(before, attempt.record, grace) if grace else None
                store.replace(before.key, attempt.record, before.version, pointer)

    return arrive


def transaction(session: Any) -> None:
    with session.transaction():
        session["step"] = 1


def lock(session: Any) -> None:
    with session.lock():
        session["step"] = 1


def update(session: Any) -> None:
    session.update_atomic("clicks", lambda clicks: clicks)  # its pending change goes first


STORES_FIRST: dict[str, Callable[[Any], None]] = {
    "transaction": transaction,
    "lock": lock,
    "update_atomic": update,
    "take": lambda session: session.take("clicks"),
}


@pytest.fixture
def clicks(make_site: SiteMaker) -> Site:
    site = make_site(merge_policies=POLICIES)
    site.app.config["PROPAGATE_EXCEPTIONS"] = False
    return site


@pytest.mark.parametrize("way", ["transaction", "lock", "update_atomic"])
@pytest.mark.parametrize("kind", [TooLong, Killed])
def test_a_write_that_was_struck_counts_once(
    clicks: Site, way: str, kind: type[BaseException]
) -> None:
    """The exception comes when the store has written and the session does not know it yet."""

    def view(session: Any) -> None:
        click(session)
        clicks.store.after("save", strike(kind))
        with pytest.raises(kind):
            STORES_FIRST[way](session)

    visitor = a_visitor(clicks)
    visitor.run(view)
    stored = visitor.run(dict)
    stored.pop("step", None)
    assert stored == ONCE


def test_an_interrupted_write_counts_once_beside_an_error_page(clicks: Site) -> None:
    def view(session: Any) -> None:
        click(session)
        clicks.store.after("save", strike(TooLong))
        transaction(session)

    visitor = a_visitor(clicks)
    assert visitor.ask(view).status_code == 500
    assert visitor.run(dict) == ONCE


AFTER_A_STRIKE: dict[str, tuple[Callable[..., Any], str, Callable[[Any], object]]] = {
    "changed": (catch_up, "save", transaction),
    "created": (resolve_attempts, "create", transaction),
    "reloaded": (catch_up, "save", lambda session: session.reload()),
}


@pytest.mark.parametrize("way", AFTER_A_STRIKE)
def test_a_second_strike_makes_a_write_count_once(clicks: Site, way: str) -> None:
    """It comes while the request finds out whether the first write was stored: at each step."""
    function, verb, act = AFTER_A_STRIKE[way]
    for step in count():

        def view(session: Any, step: int = step) -> bool:
            session.update(ONCE) if verb == "create" else click(session)
            clicks.store.after(verb, strike(TooLong))
            with pytest.raises(TooLong):
                transaction(session)
            with strike_at(function, step, Killed) as struck, suppress(Killed):
                act(session)
            return bool(struck)

        visitor = clicks.visitor() if verb == "create" else a_visitor(clicks)
        was_struck = visitor.run(view)
        stored = visitor.run(dict)
        stored.pop("step", None)
        assert stored == ONCE, step
        if not was_struck:
            break
    assert step > 10


def test_a_write_that_never_came_is_made_up_for(clicks: Site) -> None:
    def view(session: Any) -> None:
        click(session)
        clicks.store.before("save", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)

    visitor = a_visitor(clicks)
    visitor.run(view)
    assert visitor.run(dict) == ONCE


def test_changes_after_an_interrupt_are_added(clicks: Site) -> None:
    def view(session: Any) -> None:
        click(session)
        clicks.store.after("save", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        session["clicks"] += 10
        session["history"].append("pen")

    visitor = a_visitor(clicks)
    visitor.run(view)
    assert visitor.run(dict) == {"clicks": 11, "history": ["mug", "pen"], "tags": {"new"}}


def test_another_request_on_top_makes_it_a_conflict(clicks: Site) -> None:
    """Nobody knows then whether the first write is below: a count could count twice."""
    visitor = a_visitor(clicks)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        click(session)
        clicks.store.after("save", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        tab.run(lambda session: session.update(theirs=1))

    assert visitor.ask(view).status_code == 409
    assert visitor.run(dict) == {**ONCE, "theirs": 1}


def test_a_conflict_that_the_view_catches_makes_it_no_safer_to_repeat(clicks: Site) -> None:
    visitor = a_visitor(clicks)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        click(session)
        clicks.store.after("save", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        tab.run(lambda session: session.update(theirs=1))
        with pytest.raises(SessionConflict):
            transaction(session)

    assert visitor.ask(view).status_code == 409
    assert visitor.run(dict) == {**ONCE, "theirs": 1}


def test_a_later_request_causes_no_conflict_after_a_rotation(clicks: Site) -> None:
    """Nobody else creates the new key, so the rotation happened, below later changes."""
    visitor = a_visitor(clicks)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        click(session)
        session.rotate(grace=60)
        clicks.store.after("replace", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        tab.run(lambda session: session.update(theirs=1))

    visitor.run(view)
    assert visitor.cookie != tab.cookie
    assert visitor.run(dict) == {**ONCE, "theirs": 1}


def test_a_lifetime_set_after_an_interrupt_is_not_forgotten(clicks: Site) -> None:
    def view(session: Any) -> None:
        session["a"] = 1
        clicks.store.after("create", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        session.set_lifetime(50)

    visitor = clicks.visitor()
    visitor.run(view)
    assert visitor.run(lambda session: (session["a"], session._life.lifetime)) == (1, 50_000)


def test_another_key_that_was_stored_shows_that_the_struck_write_was_not(clicks: Site) -> None:
    visitor = a_visitor(clicks)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        click(session)
        clicks.store.before("save", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        session.update_atomic("other", lambda _: 1)
        tab.run(lambda session: session.update(theirs=1))

    visitor.run(view)
    assert visitor.run(dict) == {**ONCE, "theirs": 1, "other": 1}


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_session_that_was_emptied_takes_an_update(site: Site, key: str) -> None:
    """This request itself ended it, so the update begins another session."""

    def view(session: Any) -> None:
        session.clear()
        assert session.update_atomic(key, lambda count: count + 1, 0) == 1
        assert session.take("b" if key == "a" else "a", None) is None

    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=5, b=5))
    visitor.run(view)
    assert visitor.run(dict) == {key: 1}


def test_a_later_request_causes_no_conflict_if_the_later_wins(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=0))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        session["a"] = 1
        site.store.after("save", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        tab.run(lambda session: session.update(theirs=1))

    visitor.run(view)
    assert visitor.run(dict) == {"a": 1, "theirs": 1}


def test_a_session_created_by_an_interrupted_write_stays(clicks: Site) -> None:
    def view(session: Any) -> None:
        session.update(clicks=1)
        clicks.store.after("create", strike(TooLong))
        with pytest.raises(TooLong), session.transaction():
            session["step"] = 1
        session["clicks"] += 1

    visitor = clicks.visitor()
    visitor.run(view)
    stored = visitor.run(dict)
    stored.pop("step", None)
    assert stored == {"clicks": 2}
    assert len(clicks.stored()) == 1


@pytest.mark.parametrize("grace", [0, 60])
def test_a_rotation_that_was_struck_is_followed(clicks: Site, grace: int) -> None:
    def view(session: Any) -> None:
        click(session)
        session.rotate(grace=grace)
        clicks.store.after("replace", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        session["after"] = True

    visitor = a_visitor(clicks)
    old = visitor.another_tab()
    visitor.run(view)
    assert visitor.cookie != old.cookie
    assert visitor.run(dict) == {**ONCE, "after": True}
    assert old.run(dict) == ({} if grace == 0 else {**ONCE, "after": True})


@pytest.mark.parametrize("grace", [0, 60])
def test_a_logout_after_a_rotation_that_was_struck(clicks: Site, grace: int) -> None:
    def view(session: Any) -> None:
        session.rotate(grace=grace)
        clicks.store.after("replace", strike(TooLong))
        with pytest.raises(TooLong):
            transaction(session)
        session.destroy()

    visitor = a_visitor(clicks)
    visitor.run(view)
    assert visitor.cookie is None
    assert not clicks.stored()


def test_a_receiver_that_writes_undoes_nothing(site: Site) -> None:
    """Events are emitted after the change that they report."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(tickets=0))
    counting = [True]

    def view(session: Any) -> int:
        def saved(event: SessionSaved) -> None:
            if counting and counting.pop():
                session.update_atomic("saves", lambda saves: saves + 1, 0)

        site.ext.on(SessionSaved, saved)
        number: int = session.update_atomic("tickets", lambda tickets: tickets + 1)
        return number

    assert visitor.run(view) == 1
    assert visitor.run(dict) == {"tickets": 1, "saves": 1}


# A command that was interrupted, and is still on its way when its request goes on ----------------


@pytest.mark.parametrize("kind", [TooLong, Killed])
@pytest.mark.parametrize("way", ["the response", *STORES_FIRST])
def test_a_write_that_arrives_late_counts_once(
    clicks: Site, way: str, kind: type[BaseException]
) -> None:
    def view(session: Any) -> None:
        click(session)
        arrive = on_its_way(clicks, session, kind=kind)
        clicks.store.before("save", arrive)
        if way != "the response":
            STORES_FIRST[way](session)

    visitor = a_visitor(clicks)
    visitor.run(view)
    stored = visitor.run(dict)
    stored.pop("step", None)
    assert stored == {key: ONCE[key] for key in ONCE if way != "take" or key != "clicks"}


def test_a_write_that_arrives_after_the_next_one_is_refused(clicks: Site) -> None:
    late: list[Callable[[], None]] = []

    def view(session: Any) -> None:
        click(session)
        late.append(on_its_way(clicks, session))

    visitor = a_visitor(clicks)
    visitor.run(view)
    late[0]()
    assert visitor.run(dict) == ONCE


def test_two_writes_that_arrive_late_count_once(clicks: Site) -> None:
    def view(session: Any) -> None:
        click(session)
        first = on_its_way(clicks, session)
        session["clicks"] += 10
        second = on_its_way(clicks, session)
        clicks.store.before("save", first)
        clicks.store.after("load", second)

    visitor = a_visitor(clicks)
    visitor.run(view)
    assert visitor.run(dict) == {**ONCE, "clicks": 11}


def test_a_write_that_may_be_below_the_one_of_another_request_is_a_conflict(clicks: Site) -> None:
    visitor = a_visitor(clicks)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        click(session)
        arrive = on_its_way(clicks, session)

        def both() -> None:
            arrive()
            tab.run(lambda session: session.update(theirs=1))

        clicks.store.before("save", both)

    assert visitor.ask(view).status_code == 409
    assert visitor.run(dict) == {**ONCE, "theirs": 1}


def test_a_write_that_arrives_after_a_reload_is_merged_as_one_of_another(clicks: Site) -> None:
    def view(session: Any) -> None:
        click(session)
        arrive = on_its_way(clicks, session)
        session.reload()
        assert session["clicks"] == 0
        session["clicks"] += 10
        session["history"].append("pen")
        clicks.store.before("save", arrive)

    visitor = a_visitor(clicks)
    visitor.run(view)
    stored = visitor.run(dict)
    stored.pop("step", None)
    assert stored == {"clicks": 11, "history": ["mug", "pen"], "tags": {"new"}}


@pytest.mark.parametrize("grace", [0, GRACE])
@pytest.mark.parametrize("when", ["at the next rotation", "before the next load"])
def test_a_rotation_that_arrives_late_is_followed(clicks: Site, grace: int, when: str) -> None:
    def view(session: Any) -> None:
        click(session)
        session.rotate(grace=grace)
        arrive = on_its_way(clicks, session, "replace")
        if when == "at the next rotation":
            clicks.store.before("replace", arrive)
        else:
            clicks.store.before("load", arrive)
        session["after"] = True

    visitor = a_visitor(clicks)
    old = visitor.another_tab()
    visitor.run(view)
    assert visitor.cookie != old.cookie
    assert visitor.run(dict) == {**ONCE, "after": True}
    assert len(clicks.sessions()) <= 2


def test_a_sign_in_that_arrives_late_is_entered_in_the_roster(clicks: Site) -> None:
    """The next write loses to it, and then there is nothing left to write."""

    def view(session: Any) -> None:
        session.bind("ada")
        arrive = on_its_way(clicks, session, "replace")
        clicks.store.before("replace", arrive)

    visitor = a_visitor(clicks)
    old = visitor.another_tab()
    visitor.run(view)
    assert visitor.cookie != old.cookie
    assert len(ids(clicks, "ada")) == 1
    assert visitor.run(lambda session: session.owner) == "ada"
    assert old.run(dict) == {}


def test_a_session_that_is_created_late_is_nobody_s(clicks: Site) -> None:
    late: list[Callable[[], None]] = []

    def view(session: Any) -> None:
        session.update(clicks=1)
        late.append(on_its_way(clicks, session, "create"))

    visitor = clicks.visitor()
    visitor.run(view)
    late[0]()
    assert visitor.run(dict) == {"clicks": 1}
    visitor.run(lambda session: session.destroy())
    assert visitor.cookie is None


def test_a_session_created_before_the_next_read_stays(clicks: Site) -> None:
    def view(session: Any) -> None:
        session.update(clicks=1)
        arrive = on_its_way(clicks, session, "create")
        on_its_way(clicks, session, "create")
        arrive()
        session["clicks"] += 1

    visitor = clicks.visitor()
    visitor.run(view)
    stored = visitor.run(dict)
    stored.pop("step", None)
    assert stored == {"clicks": 2}
    assert len(clicks.sessions()) == 1


def test_a_rotation_of_which_only_the_first_step_was_done_revives_nothing(
    mongodb_url: str, store_prefix: str, clock: FakeClock
) -> None:
    """MongoDB has the new record before it counts."""
    with SiteMaker(mongodb_url, store_prefix, clock) as make_site:
        site = make_site(merge_policies=POLICIES)
        visitor = a_visitor(site)
        tab = visitor.another_tab()

        def view(session: Any) -> None:
            session.rotate(grace=0)
            on_its_way(site, session, "replace")
            (attempt,) = lifecycle_of(session).attempts.values()
            site.store.store.create(attempt.record)
            tab.run(lambda session: session.destroy())
            session["after"] = True

        visitor.run(view)
        assert visitor.run(dict) == {}
        assert not site.sessions()


def test_a_signal_may_raise_an_error_of_the_store(clicks: Site) -> None:
    """An exception says nothing of the outcome, whatever its class, if a signal raised it."""

    def raise_it(*_: object) -> None:
        raise SessionConflict

    def view(session: Any) -> None:
        click(session)
        clicks.store.after("save", lambda: signal.raise_signal(signal.SIGUSR1))
        with pytest.raises(SessionConflict):
            transaction(session)

    visitor = a_visitor(clicks)
    before = signal.signal(signal.SIGUSR1, raise_it)
    try:
        visitor.run(view)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert visitor.run(dict) == ONCE


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_real_signals_count_once(make_site: SiteMaker) -> None:
    """A timer strikes somewhere in the save, a hundred times: each click counts once, or is lost
    with the exception that the view saw."""
    site = make_site(merge_policies=POLICIES)
    visitor = a_visitor(site)

    def raise_it(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, raise_it)
    lost = 0
    try:
        for number in range(100):

            def view(session: Any, number: int = number) -> bool:
                session["clicks"] += 1
                session["history"].append(number)
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + number % 25 * 4e-5)
                try:
                    transaction(session)
                except TooLong:
                    return True
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                return False

            try:
                lost += visitor.ask(view).status_code == 503  # an outage, as the visitor sees
            except TooLong:  # it came between the lines that stop the timer
                lost += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    stored = visitor.run(dict)
    assert stored["clicks"] == len(stored["history"]) == len(set(stored["history"]))
    assert stored["clicks"] >= 100 - lost
