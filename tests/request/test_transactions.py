"""Transactions: stored whole, on the state they saw, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import flask
import pytest

from flask_gsession import (
    LockMisused,
    SessionConflict,
    SessionEnded,
    StoreUnavailable,
    TransactionMisused,
    UnsupportedType,
    session_transaction,
)
from flask_gsession.repository.races import ATTEMPTS
from flask_gsession.request.rebasing import roll_back_values
from flask_gsession.request.state import NO_WISHES, NOTHING_SEEN, Block
from flask_gsession.request.tracking import TrackedValues
from flask_gsession.values.codec import Codec
from tests.harness.apps import Site


def test_the_block_is_stored_at_its_end(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(stock=3))
    tab = visitor.another_tab()

    def view(session: Any) -> Any:
        with session.transaction() as same:
            assert same is not None
            session["stock"] -= 1
            session["cart"] = ["mug"]
        return tab.run(dict)

    assert visitor.run(view) == {"stock": 2, "cart": ["mug"]}


def test_the_block_sees_the_stored_state(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(stock=3))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        assert session["stock"] == 3
        tab.run(lambda other: other.update(stock=1))
        with session.transaction():
            assert session["stock"] == 1
            session["stock"] = 0

    visitor.run(view)
    assert visitor.run(dict) == {"stock": 0}


def test_changes_made_before_are_stored_first(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        session["a"] = 2
        with session.transaction():
            assert tab.run(dict) == {"a": 2}
            session["b"] = 1

    visitor.run(view)
    assert visitor.run(dict) == {"a": 2, "b": 1}


def test_two_round_trips_after_the_load(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=1))
    with site.counted() as count:
        visitor.run(lambda session: session.transaction().run(lambda s: s.update(n=s["n"] + 1)))
    assert count.calls == ["load", "save"]


def test_the_block_conflicts_with_any_change_of_the_session(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(stock=3))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        def block() -> None:
            with session.transaction():
                tab.run(lambda other: other.update(other=1))
                session["stock"] = 2

        with pytest.raises(SessionConflict):
            block()
        assert dict(session) == {"stock": 3}

    visitor.run(view)
    assert visitor.run(dict) == {"stock": 3, "other": 1}


def test_a_conflict_that_nobody_catches_is_409(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(stock=3))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        with session.transaction():
            tab.run(lambda other: other.update(other=1))
            session["stock"] = 2

    assert visitor.ask(view).status_code == 409
    assert visitor.run(dict) == {"stock": 3, "other": 1}


def test_run_runs_again_on_a_fresh_state(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(stock=3))
    tab = visitor.another_tab()
    seen: list[int] = []

    def work(session: Any) -> str:
        seen.append(session["stock"])
        if len(seen) == 1:
            tab.run(lambda other: other.update(stock=1))
        session["stock"] -= 1
        return f"{session['stock']} left"

    assert visitor.run(lambda session: session.transaction().run(work)) == "0 left"
    assert seen == [3, 1]
    assert visitor.run(dict) == {"stock": 0}


def test_run_stops_after_some_attempts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=0))
    tab = visitor.another_tab()
    monkeypatch.setattr("flask_gsession.repository.races._LONGEST_PAUSE", 0)
    runs: list[int] = []

    def work(session: Any) -> None:
        runs.append(1)
        tab.run(lambda other: other.update(n=len(runs)))
        session["mine"] = 1

    assert visitor.ask(lambda session: session.transaction().run(work)).status_code == 409
    assert len(runs) == ATTEMPTS
    assert visitor.run(dict) == {"n": ATTEMPTS}


def test_a_block_that_raises_stores_nothing(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))

    def view(session: Any) -> None:
        session["before"] = 1

        def block() -> None:
            with session.transaction():
                session["cart"].append("bowl")
                session["half"] = 1 // 0

        with pytest.raises(ZeroDivisionError):
            block()
        assert session["cart"] == ["mug"]
        session["after"] = 1

    visitor.run(view)
    assert visitor.run(dict) == {"cart": ["mug"], "before": 1, "after": 1}


class LazyText:
    """As a text that is translated, into the visitor's language, when it is stored."""

    def __init__(self, translate: Callable[[], str]) -> None:
        self.__html__ = translate


def failing() -> str:
    raise LookupError("no translation")


def test_a_block_that_raises_is_left_whatever_its_values_do(site: Site) -> None:
    """Values are encoded to detect later changes, and that may call the application."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(language="de", text="", left=0))

    def view(session: Any) -> None:
        for block in session.transaction, session.lock:
            for translate in failing, lambda: str(session["language"]):
                with suppress(ZeroDivisionError), block():
                    session["text"] = LazyText(translate)
                    session["left"] = 1 // 0
                session["left"] += 1
                session.reload()
                session["text"] = LazyText(translate)
                session.reload()
        session["left"] = 4

    visitor.run(view)
    assert visitor.run(dict) == {"language": "de", "text": "", "left": 4}


def test_a_block_is_rolled_back_while_another_thread_looks() -> None:
    class Looking(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            block.note(f"beside {key}")
            return super().__contains__(key)

    values = TrackedValues(Codec(64))
    block = Block("transaction", NOTHING_SEEN, NO_WISHES, None)
    values["a"] = 1
    block.note("a")
    values.base = Looking(values.base)
    assert not roll_back_values(values, block)
    assert list(values) == ["a"]


def test_a_block_that_raises_keeps_earlier_values_of_a_new_session(site: Site) -> None:
    """A value that doesn't make a session isn't stored before a transaction, and isn't lost."""

    def view(session: Any) -> None:
        session.permanent = True
        session.set_lifetime(600)

        def block() -> None:
            with session.transaction():
                session.permanent = False
                session["half"] = 1 // 0

        with pytest.raises(ZeroDivisionError):
            block()
        session["after"] = 1

    visitor = site.visitor()
    visitor.run(view)
    assert visitor.run(dict) == {"_permanent": True, "after": 1}
    lifetime = visitor.run(lambda session: session.expires_at - session.created_at)
    assert 600 <= lifetime.total_seconds() <= 660


def test_a_new_session_that_is_emptied_again_is_ended(site: Site) -> None:
    def view(session: Any) -> None:
        session.clear()
        with session.transaction():
            session["a"] = 1
        del session["a"]

    visitor = site.visitor()
    visitor.run(view)
    assert visitor.run(lambda session: (session.new, dict(session))) == (True, {})
    assert not site.stored()


def test_a_refused_value_stores_nothing(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))

    def view(session: Any) -> None:
        def block() -> None:
            with session.transaction():
                session["a"] = 2
                session["b"] = object()

        with pytest.raises(UnsupportedType):
            block()

    visitor.run(view)
    assert visitor.run(dict) == {"a": 1}


def test_a_session_that_is_not_stored_yet(site: Site) -> None:
    visitor = site.visitor()

    def view(session: Any) -> None:
        with session.transaction():
            session["a"] = 1
        assert session.handle is not None

    visitor.run(view)
    assert visitor.cookie is not None
    assert visitor.run(dict) == {"a": 1}


def test_a_session_that_ends_during_the_block(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        assert session["a"] == 1
        tab.run(lambda other: other.destroy())
        with pytest.raises(SessionEnded), session.transaction():
            raise AssertionError("the block of an ended session ran")

    visitor.run(view)

    def work(session: Any) -> None:
        late.run(lambda other: other.destroy())
        session["a"] = 2

    visitor.run(lambda session: session.update(a=1))
    late = visitor.another_tab()
    assert visitor.ask(lambda session: session.transaction().run(work)).status_code == 409
    assert site.stored() == {}


@pytest.mark.parametrize(
    "act",
    [
        lambda session: session.transaction().__enter__(),
        lambda session: session.rotate(),
        lambda session: session.destroy(),
        lambda session: session.reload(),
        lambda session: session.update_atomic("b", lambda b: b),
        lambda session: session.take("b"),
        lambda session: session.lock().__enter__(),
    ],
    ids=["nested", "rotate", "destroy", "reload", "update_atomic", "take", "lock"],
)
def test_operations_that_cannot_be_undone_are_refused(act: Any, site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1, b=1))

    def view(session: Any) -> None:
        def block() -> None:
            with session.transaction():
                session["a"] = 2
                act(session)

        for run_again in (block, lambda: session.update_atomic("a", lambda _: act(session))):
            with pytest.raises((TransactionMisused, LockMisused)):
                run_again()
        session["after"] = 1

    visitor.run(view)
    assert visitor.run(dict) == {"a": 1, "b": 1, "after": 1}


def test_the_end_of_the_request_stores_no_half_of_a_transaction(site: Site) -> None:
    """Another thread is in the middle of a block: the save stores its own changes, or nothing."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    begun, saved = threading.Event(), threading.Event()

    def work() -> None:
        with flask.session.transaction():  # type: ignore[attr-defined]
            flask.session["a"] = 2
            begun.set()
            assert saved.wait(30)

    def view(session: Any) -> threading.Thread:
        session["before"] = True
        thread = threading.Thread(target=flask.copy_current_request_context(work))
        thread.start()
        assert begun.wait(30)
        return thread

    thread = visitor.run(view)
    assert visitor.run(dict) == {"a": 1, "before": True}
    saved.set()
    thread.join()
    assert visitor.run(dict) == {"a": 2, "before": True}


def test_a_lost_answer_is_not_written_again(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=1))

    def lost() -> None:
        raise StoreUnavailable("the answer was lost")

    def work(session: Any) -> None:
        session["n"] += 1

    site.store.after("save", lost)
    assert visitor.ask(lambda session: session.transaction().run(work)).status_code == 503
    assert visitor.run(dict) == {"n": 2}


def test_parallel_transactions_sell_each_piece_once(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(stock=20, sold=0))
    cookie = visitor.cookie
    answers: list[bool] = []

    def buy(session: Any) -> bool:
        if session["stock"] == 0:
            return False
        session["stock"] -= 1
        session["sold"] += 1
        return True

    def buyer() -> None:
        tab = site.visitor(cookie)
        for _ in range(8):
            answers.append(tab.run(lambda session: session.transaction().run(buy)))

    threads = [threading.Thread(target=buyer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 12 + [True] * 20
    assert visitor.run(dict) == {"stock": 0, "sold": 20}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["view", "async view"])
def test_the_decorator_runs_the_view_again(asynchronous: bool, site: Site) -> None:
    from flask import session

    runs: list[int] = []

    def count() -> str:
        runs.append(session["n"])
        if len(runs) == 1:
            tab.run(lambda other: other.update(n=10))
        session["n"] += 1
        return str(session["n"])

    if asynchronous:

        @site.app.get("/count")
        @session_transaction
        async def count_async() -> str:
            """The docstring of the view."""
            return count()

        view: Any = count_async
    else:

        @site.app.get("/count")
        @session_transaction
        def count_plainly() -> str:
            """The docstring of the view."""
            return count()

        view = count_plainly
    assert view.__doc__ == "The docstring of the view."
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=1))
    tab = visitor.another_tab()
    assert visitor.get("/count").get_data(as_text=True) == "11"
    assert runs == [1, 10]
    assert visitor.run(dict) == {"n": 11}
