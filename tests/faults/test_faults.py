"""The fault harness: its checker on made-up histories, and short runs on real servers.

`make faults` is the whole of it, with more faults, more stores and more time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from flask import Flask

from flask_gsession import Session
from flask_gsession.stores.wrappers.wrapper import innermost

pytest.importorskip("flask_session", reason="the fault harness needs the extra 'bench'")

from tests.faults import __main__ as command
from tests.faults import cleaning, report
from tests.faults.app import slots_in_use
from tests.faults.broken import BREAKS
from tests.faults.history import Kind, Operation, Outcome, Verdict, check, value_of
from tests.faults.inject import FAULTS, Fault
from tests.faults.modes import Mode, modes
from tests.faults.scenario import Outcome as Ran
from tests.faults.scenario import run
from tests.harness.marks import long

GRACE = 2.0
BUDGET = 3.0


# The checker, on histories made up -------------------------------------------------------------


class Story:
    """A history of one session, in order: each operation takes a second, then a second passes."""

    def __init__(self, owner: str = "alice") -> None:
        self.owner = owner
        self.operations: list[Operation] = []
        self._time = count(0, 2)
        self.did("login")

    def did(self, kind: Kind, outcome: Outcome = "ok", token: int = 0, **more: Any) -> Operation:
        """Something that was answered, from this session unless `seen` says otherwise."""
        start = float(next(self._time))
        status = more.pop("status", 200 if outcome == "ok" else 503)
        seen = more.pop("seen", {"owner": self.owner} if status == 200 else None)
        operation = Operation(
            self.owner, kind, token, start, start + 1, outcome, status, seen, **more
        )
        self.operations.append(operation)
        return operation

    def saw(self, *keys: str, n: int = 0, b: int = 0, a: int | None = None, token: int = 0) -> None:
        """A read of everything."""
        values = {key: value_of(self.owner, key) for key in keys}
        numbers = {"n": n, "b": b, "a": -b if a is None else a}
        self.did("read", token=token, seen={"owner": self.owner, "keys": values, **numbers})

    def found_nothing(self, token: int = 0) -> None:
        """A read that found no session."""
        self.did("read", "failed", token, status=401)

    @property
    def verdict(self) -> Verdict:
        return check(self.operations, budget=BUDGET, grace=GRACE)


def test_a_good_history_is_good() -> None:
    story = Story()
    story.did("count")
    story.did("put", key="k1")
    story.did("move")
    story.did("rotate")
    story.saw("k1", n=1, b=1)  # the old token, within the grace
    story.saw("k1", n=1, b=1, token=1)
    story.found_nothing()
    story.did("logout", token=1, seen={"owner": "alice", "keys": {}, "n": 1, "a": -1, "b": 1})
    story.operations[-1].seen = None  # of a store that doesn't say
    story.found_nothing(token=1)
    verdict = story.verdict
    assert verdict.broken == []
    assert (verdict.ok, verdict.failed, verdict.unknown) == (8, 2, 0)
    assert (verdict.acknowledged, verdict.ended, verdict.answers, verdict.over) == (4, 2, 7, 0)


def test_writes_of_unknown_outcome_may_be_stored_or_not() -> None:
    for n, keys in ((1, ()), (2, ("k1",))):
        story = Story()
        story.did("count")
        story.did("count", "unknown")
        story.did("put", "unknown", key="k1")
        story.saw(*keys, n=n)
        assert story.verdict.broken == []


def test_a_counter_that_went_back() -> None:
    story = Story()
    story.did("count")
    story.did("count")
    story.saw(n=1)
    assert (story.verdict.lost, story.verdict.stale) == (1, 1)
    story.saw(n=2)  # it was there after all
    assert (story.verdict.lost, story.verdict.stale) == (0, 1)


@pytest.mark.parametrize("outcome", ["ok", "unknown", "failed"])
def test_a_counter_that_counted_too_much(outcome: Outcome) -> None:
    story = Story()
    story.did("count", outcome)
    story.saw(n=2 - (outcome == "failed"))
    assert story.verdict.broken == ["1 updates applied twice"]


def test_a_transaction_done_twice_or_by_half() -> None:
    story = Story()
    story.did("move")
    story.saw(b=2)
    assert story.verdict.twice == 1
    story = Story()
    story.did("move")
    story.saw(b=1, a=0)
    assert story.verdict.broken == ["1 torn transactions"]


def test_a_lock_that_let_two_in() -> None:
    story = Story()
    story.did("lock")
    story.did("lock", status=503, outcome="unknown")
    story.did("lock")
    seen = {"owner": "alice", "keys": {}, "n": 0, "a": 0, "b": 0}
    story.did("read", seen={**seen, "l": 1})
    assert story.verdict.lost == 1
    story.did("read", seen={**seen, "l": 3})
    assert story.verdict.lost == 0


def test_a_key_that_is_not_there() -> None:
    story = Story()
    story.did("put", key="k1")
    story.did("put", key="k2")
    story.saw("k2")
    assert story.verdict.lost == 1


def test_a_session_that_is_not_there() -> None:
    story = Story()
    story.did("count")
    story.did("put", key="k1")
    story.found_nothing()
    assert story.verdict.broken == ["3 lost updates"]
    assert story.verdict.acknowledged == 3


def test_a_session_whose_token_got_lost() -> None:
    story = Story()
    story.did("count")
    story.did("rotate", "unknown")
    story.found_nothing()
    assert story.verdict.broken == []
    assert story.verdict.adrift == 1


def test_a_session_that_could_not_be_asked_for() -> None:
    story = Story()
    story.did("read", "failed")
    assert (story.verdict.unchecked, story.verdict.lost) == (1, 0)


@pytest.mark.parametrize("kind", ["read", "put", "count"])
def test_an_answer_after_the_logout(kind: Kind) -> None:
    story = Story()
    story.did("logout")
    story.did(kind)
    assert story.verdict.broken == ["1 resurrected sessions"]


def test_a_logout_that_is_unknown_promises_nothing() -> None:
    story = Story()
    story.did("logout", "unknown")
    story.saw()
    assert story.verdict.broken == []


def test_a_read_in_parallel_with_the_logout_may_be_answered() -> None:
    story = Story()
    beside = story.did("read")
    logout = story.did("logout")
    beside.start, beside.end = logout.start + 0.5, logout.end + 0.5
    assert story.verdict.broken == []


def test_an_old_token_beyond_the_grace() -> None:
    story = Story()
    story.did("rotate")
    story.saw()
    assert story.verdict.broken == []
    story.saw()
    assert story.verdict.broken == ["1 resurrected sessions"]


def test_a_session_that_was_not_there_and_is_again() -> None:
    story = Story()
    story.found_nothing()
    story.saw()
    assert story.verdict.broken == ["1 sessions gone and there again"]


def test_an_answer_of_another_session() -> None:
    story = Story()
    story.did("count", seen={"owner": "bob"})
    story.did("read", seen={"owner": "alice", "keys": {"k1": "bob k1"}, "n": 1, "a": 0, "b": 0})
    assert story.verdict.foreign == 2


def test_a_request_that_took_too_long() -> None:
    story = Story()
    operation = story.did("read")
    operation.end = operation.start + 4
    assert (story.verdict.over, story.verdict.worst) == (1, 4)
    operation.kind = "lock"
    assert check(story.operations, budget=BUDGET, grace=GRACE, patience=1.0).over == 0
    operation.kind = "read"
    operation.seconds = 0.5  # and 3.5 in the queue before the worker
    assert story.verdict.over == 0


# The report ------------------------------------------------------------------------------------


def a_run(verdict: Verdict, **more: Any) -> Ran:
    verdict.recovery = more.pop("recovery", 0.1)
    candidate, stated = more.pop("candidate", "ours"), more.pop("stated", False)
    logouts_hold = more.pop("logouts_hold", False)
    return Ran(candidate, "redis-always", "kill", stated, logouts_hold, verdict, 1)


def test_a_promise_is_broken_or_there_was_none() -> None:
    lost = Verdict(lost=2, acknowledged=10)
    assert a_run(lost).failures == ["2 lost updates"]
    assert a_run(lost, stated=True).failures == []
    assert report.verdict_of(a_run(lost, stated=True)) == "stated: 2 lost updates"
    assert a_run(lost, candidate="flask-session").failures == []


def test_logouts_may_be_promised_where_nothing_else_is() -> None:
    undone = Verdict(lost=2, resurrected=1)
    assert a_run(undone, stated=True).failures == []
    assert a_run(undone, stated=True, logouts_hold=True).failures == ["1 resurrected sessions"]


@pytest.mark.parametrize(
    "verdict", [Verdict(foreign=1), Verdict(forever=1), Verdict(leaks=["9 threads, 3 before"])]
)
def test_some_things_are_never_right(verdict: Verdict) -> None:
    assert a_run(verdict, stated=True).failures


def test_no_recovery_is_never_right() -> None:
    assert a_run(Verdict(), stated=True, recovery=None).failures == ["no recovery"]


def test_far_over_the_time_is_never_right() -> None:
    assert a_run(Verdict(worst=2 * BUDGET, over=3), stated=True).failures == []
    assert a_run(Verdict(worst=2 * BUDGET + 0.1)).failures == ["a request took 6.1 s"]


def test_the_tables_have_every_run() -> None:
    runs = [
        a_run(Verdict(ok=7, lost=2, acknowledged=9)),
        a_run(Verdict(), candidate="flask-session"),
    ]
    text = report.text([report.row(each) for each in runs])
    assert "2/9" in text
    assert "BROKEN: 2 lost updates" in text
    page = report.markdown(runs, 5, {"Redis": "7"})
    assert "seed 5" in page
    assert page.count("\n| Flask-") == 2
    assert "2 of 9 acknowledged updates lost" in page


def test_every_run_has_a_name_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line[:45] for line in lines}) == len(lines) > 50
    assert command.main(["--list", "--only", "mongodb-set", "failover"]) == 0
    assert "ours mongodb-set failover" in capsys.readouterr().out
    assert command.main(["--only", "no such thing"]) == 2


def test_every_fault_occurs_somewhere() -> None:
    assert {name for fault in FAULTS for name in fault.modes} == set(modes())
    assert all(set(fault.stated) <= set(fault.modes) for fault in FAULTS)


def test_connections_in_use_are_counted(redis_url: str, mongodb_url: str) -> None:
    for url in (redis_url, mongodb_url):
        app = Flask(__name__)
        app.secret_key = "k" * 32
        store: Any = Session(app, store=url).store(app)
        assert store.load("A" * 43) is None
        assert slots_in_use(store) == 0, url
        if url == redis_url:
            pool = innermost(store).commands.pool  # type: ignore[attr-defined]  # a RedisStore
            slot = pool.take(time.monotonic() + 10)
            assert slots_in_use(store) == 1
            pool.give(slot)


# Short runs -------------------------------------------------------------------------------------

SHORT = [
    ("sqlite", "locked"),
    pytest.param("sqlite", "worker", marks=pytest.mark.long),
    ("redis-always", "kill"),
    pytest.param("redis-always", "stop-1", marks=pytest.mark.long),
    pytest.param("redis-always", "interrupt", marks=pytest.mark.long),
    pytest.param("redis-always", "lose", marks=pytest.mark.long),
    pytest.param("mongodb-one", "kill", marks=pytest.mark.long),
    ("mongodb-one", "lose"),
]


@pytest.fixture(scope="module")
def mode(request: pytest.FixtureRequest) -> Iterator[Mode]:
    """A store of the kind that the test is parametrized with."""
    made = modes()[request.param]()
    yield made
    made.stop()


def fault_of(name: str) -> Fault:
    """The fault of that name, in an application of two workers."""
    return replace(next(fault for fault in FAULTS if fault.name == name), workers=2)


@pytest.mark.parametrize(("mode", "fault"), SHORT, indirect=["mode"])
def test_nothing_is_lost(mode: Mode, fault: str) -> None:
    for seconds in (0.8, 4.0, 20.0):  # where little happens in the time, it takes more
        outcome = run(fault_of(fault), mode, seed=7, seconds=seconds, warm=0.3)
        verdict = outcome.verdict
        assert outcome.failures == [], verdict
        assert not outcome.stated
        struck = outcome.strikes or verdict.errors
        if struck and verdict.ok > 50 and verdict.acknowledged > 20 and verdict.ended:
            return
    raise AssertionError(f"too little happened: {verdict}")


def test_many_sessions_are_cleaned_up_in_small_steps() -> None:
    """`python -m tests.faults.cleaning` does it with a million, on a free machine."""
    figures = cleaning.measure(20_000)
    assert cleaning.problems(figures, 20_000, longest_step=10_000) == []
    assert "scan" in figures.commands
    assert "it said KEYS" in cleaning.problems(figures._replace(commands={"keys"}), 20_000)


CAUGHT = {
    "ignore versions": "lost updates",
    "create on save": "resurrected sessions",
    "answer from memory": "resurrected sessions",
}


@pytest.mark.parametrize("mode", ["sqlite"], indirect=True)
@pytest.mark.parametrize("broken", long(CAUGHT, {"create on save", "answer from memory"}))
def test_a_broken_store_is_found_out(mode: Mode, broken: str) -> None:
    assert broken in BREAKS
    for seconds in (0.8, 4.0, 20.0):
        outcome = run(
            fault_of("none"), mode, seed=7, seconds=seconds, warm=0.4, grace=0.5, broken=broken
        )
        if any(CAUGHT[broken] in failure for failure in outcome.failures):
            return
    raise AssertionError(f"it was not found out: {outcome.verdict}")
