"""Parallel requests, faults and clocks in thousands of schedules, each of them repeatable.

`SIM_SCHEDULES` says how many (2,000), `SIM_SEEDS` the first seed, or the first and the last, as in
`SIM_SEEDS=5000-5999`. A schedule that goes wrong is printed, with the command that replays it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.harness.marks import long
from tests.simulation.__main__ import main
from tests.simulation.audit import OK, UNKNOWN, Done, Segment, Visit, check
from tests.simulation.model import Line, Violation
from tests.simulation.mutations import FURTHER, REQUIRED, Mutation
from tests.simulation.plan import ON_MAPPINGS, Op
from tests.simulation.world import Simulation

ROOT = Path(__file__).parents[2]
CHUNKS = 10
#: found after thousands of schedules
LATE = [it for it in (*REQUIRED, *FURTHER) if it.name in ("looked-at values forgotten",)]


def seeds() -> range:
    first, _, last = os.environ.get("SIM_SEEDS", "0").partition("-")
    if last:
        return range(int(first), int(last) + 1)
    return range(int(first), int(first) + int(os.environ.get("SIM_SCHEDULES", "2000")))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_schedule_keeps_the_guarantees(
    chunk: int, record_property: Callable[[str, object], None]
) -> None:
    with Simulation() as simulation:
        wrong = simulation.search(seeds()[chunk::CHUNKS])
    record_property("simulation", simulation.summary())
    print(simulation.summary())
    assert wrong is None, f"\n{wrong}"


@pytest.mark.parametrize(
    "mutation", long([*REQUIRED, *FURTHER], LATE), ids=lambda mutation: mutation.name
)
def test_broken_code_is_found(
    mutation: Mutation, record_property: Callable[[str, object], None]
) -> None:
    with Simulation() as simulation, mutation.apply():
        found = simulation.search(range(20_000), mutation.among)
    assert found is not None
    taken = found.plan.seed + 1
    record_property("schedules until found", taken)
    print(f"{mutation.name}: found by schedule {taken}: {found.violation}")
    assert "failed with" not in str(found.violation)  # a guarantee was broken, not a program


def test_schedules_meet_everything_that_can_happen() -> None:
    with Simulation() as simulation:
        plans = [simulation.run(seed).plan for seed in range(1200)]
    kinds = {op.kind for plan in plans for request in plan.requests for op in request.ops}
    assert kinds > ON_MAPPINGS.keys() | {"fleeting", "ttl", "take"}
    for what in (
        *("create", "load", "save", "renew", "replace", "delete", "sleep", "Stale", "Gone"),
        *("BEFORE", "AFTER", "STRUCK_AFTER", "DIES_AFTER", "CROSSED", "arrived late"),
    ):
        assert simulation.counts[what] > 20, what


def traces(hash_seed: str) -> str:
    """The traces of twenty schedules in a process of their own."""
    seeds = map(str, range(100, 120))
    command = [sys.executable, "-m", "tests.simulation", *seeds]
    environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, check=True, timeout=60, text=True
    )
    return run.stdout


def test_a_seed_is_a_schedule() -> None:
    first = traces("1")
    assert first.count("Nothing went wrong.") == 20
    assert first == traces("2")


def test_a_schedule_that_goes_wrong_is_shown_with_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with REQUIRED[0].apply():
        assert main(["--schedules", "1000"]) == 1
        printed = capsys.readouterr().out
        match = re.search(r"VIOLATION: .*\nAgain: python -m tests.simulation (\d+)$", printed, re.M)
        assert match is not None
        assert main([match[1]]) == 1
    replayed = capsys.readouterr().out
    assert replayed in printed
    assert main([match[1]]) == 0


# The audit, on histories written down by hand ----------------------------------------------------


class History:
    """Makes requests of one session, one after the other."""

    def __init__(self) -> None:
        self.line = Line("S1", "key", {}, 0, 0)
        self.visits: list[Visit] = []
        self._ticks = count()

    def request(
        self,
        *ops: tuple[str, Any, Any],
        token: str = "old",
        status: int | None = 200,
        found: bool = True,
        now: int = 0,
        browser: str = "A",
        dropped: bool = False,
    ) -> None:
        """A request; `ops` are kinds with arguments and results. Without `status`: no answer."""
        visit = Visit(f"{browser}{len(self.visits)}", browser, lambda: next(self._ticks), now)
        visit.token, visit.found, visit.told_dropped = token, found, dropped
        for number, (kind, argument, result) in enumerate(ops):
            at_once = kind in ("atomic", "destroy", "take")
            done = Done(Op(kind, f"{visit.name}.{number}", argument), Segment(self.line))
            done.at, done.result, done.on_live = visit.tick(), result, True
            done.began_at = done.ended_at = now
            done.outcome = (UNKNOWN if status is None else OK) if at_once else "pending"
            visit.done.append(done)
        if status is not None:
            visit.receive(status, now)
        self.visits.append(visit)

    def wrong(self, **values: Any) -> str:
        """The audit's objection, if the session holds these values in the end."""
        with pytest.raises(Violation) as caught:
            self.check(**values)
        return str(caught.value)

    def check(self, **values: Any) -> None:
        check(self.visits, [(self.line, values)])


@pytest.fixture
def history() -> Iterator[History]:
    return History()


def count_one(history: History, **how: Any) -> None:
    history.request(("count", None, None), **how)


def test_audit_counts_acknowledged_updates(history: History) -> None:
    for status in (200, 200, 503, None):
        count_one(history, status=status)
    count_one(history, dropped=True)
    for possible in (2, 3, 4, 5):
        history.check(hits=possible)
    assert "2 were acknowledged, 5 tried" in history.wrong(hits=1)
    assert "2 were acknowledged, 5 tried" in history.wrong(hits=6)


def test_audit_sees_a_lost_entry(history: History) -> None:
    history.request(("append", None, None), ("assign_own", None, None), ("add", None, None))
    history.request(("atomic", "log", None))
    complete = {"log": ["A0.0", "A1.0"], "A0.1": "A0.1", "tags": {"A0.2"}}
    history.check(**complete)
    for key, lost in (("log", ["A0.0", "A1.0"]), ("A0.1", ["A0.1"]), ("tags", ["A0.2"])):
        rest = {name: value for name, value in complete.items() if name != key}
        assert f"lost {lost}" in history.wrong(**rest)


def test_audit_sees_an_update_applied_twice(history: History) -> None:
    history.request(("append", None, None), status=None)
    history.check()
    history.check(log=["A0.0"])
    assert "twice ['A0.0']" in history.wrong(log=["A0.0", "A0.0"])
    assert "strange ['A9.0']" in history.wrong(log=["A9.0"])


def test_audit_sees_the_dead_served(history: History) -> None:
    history.request(("destroy", None, None))
    history.request(("read", None, {}), token="other")
    history.check()
    history.request(("read", None, {}))
    assert "logged out" in history.wrong()


def test_audit_sees_a_token_that_outlives_its_rotation(history: History) -> None:
    history.request(("rotate", None, None), now=1000)
    history.request(("read", None, {}), now=10_999)
    history.check()
    history.request(("read", None, {}), now=11_000)
    assert "rotated away" in history.wrong()


def test_audit_sees_a_token_that_outlives_a_login(history: History) -> None:
    history.request(("rotate", 0, None))
    history.request(("read", None, {}), found=False)
    history.check()
    history.request(("read", None, {}))
    assert "rotated away at once" in history.wrong()


def test_audit_sees_values_of_another_browser(history: History) -> None:
    history.request(("read", None, {"a": "A1.0", "log": ["A0.0"]}))
    history.check()
    history.request(("read", None, {"log": ["B0.0"]}))
    assert "another browser" in history.wrong()


def test_audit_sees_a_value_taken_twice(history: History) -> None:
    history.request(("take", "a", "A0.0"), ("take", "b", None))
    history.request(("take", "a", "A0.1"), ("take", "b", None))
    history.check()
    history.request(("take", "a", "A0.0"))
    assert "'A0.0' was taken 2 times" in history.wrong()


@pytest.mark.parametrize("kind", ["get", "take", "read"])
def test_audit_sees_expired_values(history: History, kind: str) -> None:
    history.request(("fleeting", ("a", 10), None), now=1000)
    history.request(("get", "a", "A0.0"), now=10_999)
    history.check()
    history.request((kind, "a", {"a": "A0.0"} if kind == "read" else "A0.0"), now=11_000)
    assert "had expired" in history.wrong()
