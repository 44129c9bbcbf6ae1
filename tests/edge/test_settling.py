"""Settling that is interrupted: by a second cut, a kill, or another settler."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.edge.story import add, at, check, go_through
from tests.harness.edges import EdgeSite, Network
from tests.harness.sharing import store_servers

#: Every so many steps a process is killed; ``make soak`` does so at each.
STRIDE = os.environ.get("EDGE_STRIDE", "29")
TOP = Path(__file__).parents[2]


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
def test_a_second_cut_at_each_step_harms_nothing(network: Network, answered: bool) -> None:
    for number in count(1):
        with network.edge(str(number)) as edge:
            cookies = go_through(edge, network.centre)
            edge.back()
            left, struck, creations = number, "", 0

            def cut(operation: str, edge: EdgeSite = edge) -> None:
                nonlocal left, struck, creations
                left -= 1
                creations += operation == "create" and left >= 0
                struck = struck if left else operation
                edge.wire.cut = edge.wire.cut or not left
                edge.wire.mute = edge.wire.cut

            if answered:
                edge.wire.after = cut
            else:
                edge.wire.hook = cut
            settled = edge.edge.settle()
            assert settled is not None
            assert settled.reached is (left > 0)
            edge.wire.after = edge.wire.hook = lambda operation: None
            network.centre.visitor(cookies["changed"]).run(add)
            settled = edge.settle()
            assert settled.trouble == ""
            # The first one is the claim. The node can't know of the session.
            given_up = struck == "create" and creations == 2 and not answered
            assert edge.edge.figures().dropped == 1 + given_up
            if given_up:
                assert network.centre.visitor(cookies.pop("made")).run(dict) == {}
            check(network.centre, cookies, changed=1)
            check(edge, cookies, changed=1)
            if left > 0:
                break


def test_a_killed_settler_is_replaced(redis_url: str, store_prefix: str, tmp_path: Path) -> None:
    """At each step, with another writer before the one that takes over."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.edge.killed", redis_url, store_prefix, str(tmp_path), STRIDE],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 60


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_one_process_settles_at_a_time(network: Network) -> None:
    with network.edge("a") as edge, network.edge("a") as other:
        visitor = edge.visitor()
        visitor.run(add)
        edge.cut()
        visitor.run(add)
        edge.back()
        results: list[Any] = []
        edge.wire.hook = lambda operation: (
            results.append(other.edge.settle()) if operation == "save" else None
        )
        edge.edge.settle()
        assert results == [None]
        assert at(network.centre, visitor).run(dict) == {"n": 2}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_two_settlers_at_once_do_no_harm(network: Network) -> None:
    """The lease of the first one is over, as of a process that was stopped for a while."""
    with network.edge("a") as edge, network.edge("a") as other:
        cookies = go_through(edge, network.centre)
        edge.back()
        for operation in ("save", "create", "delete"):

            def overtake(name: str, operation: str = operation) -> None:
                if name == operation:
                    edge.wire.hook = lambda name: None
                    edge.clock.advance(11)
                    other.edge.settle()

            edge.wire.hook = overtake
            edge.edge.settle()
        edge.settle()
        check(network.centre, cookies)
        check(edge, cookies)


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
@pytest.mark.parametrize("logs_out", [False, True])
def test_a_settler_that_was_stopped_creates_nothing_that_ended(
    network: Network, logs_out: bool
) -> None:
    with network.edge("a") as edge, network.edge("a") as other:
        edge.cut()
        visitor = edge.visitor()
        visitor.run(add)
        there, handle = at(other, visitor), visitor.run(lambda session: session.handle)

        def overtake(name: str) -> None:
            row = edge.edge.copy.get(handle)
            if name == "create" and row is not None and row.sent is not None:
                edge.wire.hook = lambda name: None
                edge.clock.advance(11)
                assert other.settle().dropped == 1
                assert there.run(dict) == {}
                if logs_out:
                    there.run(lambda session: session.destroy())

        edge.back()
        edge.wire.hook = overtake
        assert edge.settle().changes == 0
        assert edge.edge.figures().dropped == 1
        assert at(network.centre, visitor).run(dict) == {}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_creation_that_arrives_after_it_was_dropped_is_ended(network: Network) -> None:
    """Its settler was stopped, and is killed before it can look again."""
    with network.edge("a") as edge, network.edge("a") as other:
        edge.cut()
        visitor = edge.visitor()
        visitor.run(add)
        row = edge.edge.copy.get(visitor.run(lambda session: session.handle))
        assert row is not None
        edge.edge.waiting.sending(row)

        def arrive(operation: str) -> None:
            assert row is not None
            if operation == "load" and other.wire.calls.count("create") == 2:  # of other records
                other.wire.after = lambda operation: None
                network.centre.store.create(row.record)

        other.wire.after = arrive
        settled = other.settle()
        assert (settled.ends, settled.dropped) == (1, 1)
        assert at(network.centre, visitor).run(dict) == {}


def test_writes_continue_while_the_edge_settles(network: Network) -> None:
    """Two workers of a node, and the centre, all write to the same sessions."""
    with network.edge("a") as edge, network.edge("a") as other:
        visitors = [edge.visitor() for _ in range(3)]
        for visitor in visitors:
            visitor.run(add)
        edge.cut()
        for visitor in visitors:
            visitor.run(add)
        edge.back()
        written = 0
        hook = edge.wire.hook

        def write(operation: str) -> None:
            nonlocal written
            if operation in ("load", "save") and written < 12:
                edge.wire.hook = hook
                written += 1
                visitor = visitors[written % 3]
                for site in (other, network.centre):
                    at(site, visitor).run(add)
                edge.wire.hook = write

        edge.wire.hook = write
        edge.settle()
        edge.wire.hook = hook
        edge.settle()
        edge.settle()
        total = sum(at(network.centre, visitor).run(dict)["n"] for visitor in visitors)
        assert total == 6 + 2 * written
        assert edge.edge.figures().changes == 0


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_the_thread_comes_back_and_settles(network: Network) -> None:
    with network.edge("a") as edge:
        visitor = edge.visitor()
        visitor.run(add)
        edge.edge._worker.interval = 0.05
        edge.cut()
        visitor.run(add)
        edge.back()
        settled = threading.Event()
        edge.wire.after = lambda operation: settled.set() if operation == "save" else None
        assert settled.wait(20)
        assert at(network.centre, visitor).run(dict) == {"n": 2}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_centre_over_grpc(network: Network) -> None:
    with store_servers() as serve, network.edge(remote=serve(network.centre.store)) as edge:
        cookies = go_through(edge, network.centre)
        assert edge.settle().trouble == ""
        check(network.centre, cookies)
        check(edge, cookies)
