"""Edges of a Redis and a MongoDB, whose TCP connections are cut in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.live import hints
from flask_gsession.testing import FakeClock
from tests.edge.story import POLICIES, add, at
from tests.harness.apps import SiteMaker, Visitor, until
from tests.harness.edges import EdgeSite, Network
from tests.harness.marks import long
from tests.harness.sharing import store_servers
from tests.harness.topologies import TCPProxy

STORES = long(["redis", "mongodb"], ["mongodb"])
PHOTO = b"x" * 100_000
TIMEOUT = 1.0  # seconds; a MongoDB that is down takes that long


class Lines:
    """Edges of one centre, each behind a line of its own."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._stack = ExitStack()
        self.lines: dict[EdgeSite, TCPProxy] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def edge(self, name: str, ahead: float = 0, **how: Any) -> EdgeSite:
        """Another node, whose clock is so many seconds ahead."""
        centre = self.network.centre
        line = self._stack.enter_context(TCPProxy(urlsplit(centre.url).port or 0))
        clock = FakeClock(centre.clock() + ahead)
        remote = line.through(centre.url)
        edge = self.network.edge(name, remote=remote, clock=clock, timeout=TIMEOUT, **how)
        self._stack.enter_context(edge)
        self.lines[edge] = line
        return edge

    def cut(self, edge: EdgeSite, how: str = "refuse") -> None:
        getattr(self.lines[edge], how)()

    def mend(self, edge: EdgeSite) -> None:
        """Mend the line, and settle."""
        self.lines[edge].forward()
        until(lambda: settled(edge))

    def wait(self, seconds: float) -> None:
        for site in (self.network.centre, *self.lines):
            site.clock.advance(seconds)


def settled(edge: EdgeSite) -> bool:
    edge.edge.settle()
    figures = edge.edge.figures()
    return not (edge.edge.cut_off or figures.ends or figures.changes)


def insist(visitor: Visitor, action: Callable[[Any], Any]) -> None:
    """The write by which a process learns of a cut gets a 503."""
    if visitor.ask(action).status_code != 200:
        visitor.run(action)


@pytest.fixture
def lines(make_site: SiteMaker, tmp_path: Path) -> Iterator[Lines]:
    with Lines(Network(make_site, tmp_path, merge_policies=POLICIES)) as lines:
        yield lines


@pytest.mark.parametrize("store_url", STORES, indirect=True)
@pytest.mark.parametrize("first", long(["a", "b"], ["b"]))
def test_two_nodes_and_the_centre_write_and_end_the_same_sessions(lines: Lines, first: str) -> None:
    """Their clocks differ by six minutes. A logout anywhere wins, in whatever order they return."""
    centre = lines.network.centre
    a, b = lines.edge("a", ahead=180), lines.edge("b", ahead=-180)
    kept, out, revoked = (centre.visitor() for _ in range(3))
    for visitor in (kept, out, revoked):
        visitor.run(add)
    kept.run(lambda session: session.update(photo=PHOTO))
    revoked.run(lambda session: session.bind("ada"))
    here = {site: [at(site, visitor) for visitor in (kept, out, revoked)] for site in (a, b)}
    for visitors in here.values():
        for visitor in visitors:
            visitor.run(add)
    for edge in (a, b):
        lines.cut(edge)
    for visitors in here.values():
        for visitor in visitors:
            insist(visitor, add)
    made = a.visitor()
    made.run(add)
    here[a][1].run(lambda session: session.destroy())
    with centre.app.app_context():
        assert centre.ext.users.revoke_all("ada") == 1
    lines.wait(700)
    kept.run(add)
    out.run(add)
    for seen, visitors in zip((3, 4), here.values(), strict=True):
        assert visitors[0].run(lambda session: session["n"]) == seen
        visitors[0].run(add)
        assert visitors[2].run(lambda session: session["n"]) == seen  # it can't know
    assert here[a][1].run(dict) == {}
    assert here[b][1].run(lambda session: session["n"]) == 4  # nor can the other node
    for edge in (a, b) if first == "a" else (b, a):
        lines.mend(edge)
    for site in (centre, a, b):
        assert at(site, kept).run(lambda session: session["n"]) == 8
        assert at(site, made).run(lambda session: session["n"]) == 1
        assert site.visitor(out.cookie).run(dict) == site.visitor(revoked.cookie).run(dict) == {}
    assert a.edge.figures().dropped == 1
    assert b.edge.figures().dropped == 1 + (first == "a")
    lines.wait(6000)  # past the first end of the large value: its session was used since
    assert kept.run(lambda session: len(session["photo"])) == len(PHOTO)


@pytest.mark.parametrize("store_url", STORES, indirect=True)
@pytest.mark.parametrize("ahead", long([0, 240, -240], [0, -240]))
def test_lifetimes_pass_at_a_node_that_is_cut_off(
    make_site: SiteMaker, tmp_path: Path, ahead: float
) -> None:
    """Its clock judges: one that is behind serves that much longer. A session that was used only
    at the node has expired at the centre."""
    network = Network(make_site, tmp_path, idle_timeout=1200, absolute_timeout=3600)
    with Lines(network) as lines:
        edge = lines.edge("a", ahead, offline_for=7200)
        used, idle = (network.centre.visitor() for _ in range(2))
        for visitor in (used, idle):
            visitor.run(add)
            at(edge, visitor).run(dict)
        lines.cut(edge)
        insist(at(edge, used), add)
        for _ in range(3):
            lines.wait(1000)
            at(edge, used).run(add)
        assert at(edge, idle).run(dict) == {}
        lines.wait(599 - ahead)
        assert at(edge, used).run(dict) == {"n": 5}
        lines.wait(1)
        assert at(edge, used).run(dict) == {}
        lines.mend(edge)
        assert edge.edge.figures().dropped == 1
        assert used.run(dict) == {}


@pytest.mark.long
@pytest.mark.parametrize("store_url", ["redis", "mongodb"], indirect=True)
def test_a_session_expires_at_the_centre_while_it_is_used_at_a_node(
    store_url: str, store_prefix: str, tmp_path: Path
) -> None:
    """In real time, so that the server removes it."""
    with (
        SiteMaker(store_url, store_prefix, time.time) as make,
        Lines(Network(make, tmp_path, idle_timeout=3)) as lines,
    ):
        centre = lines.network.centre
        line = TCPProxy(urlsplit(store_url).port or 0)
        with line, lines.network.edge(remote=line.through(store_url), timeout=TIMEOUT) as edge:
            visitor = edge.visitor()
            visitor.run(add)
            line.refuse()
            insist(visitor, add)
            end = time.monotonic() + 4
            while time.monotonic() < end:
                visitor.run(add)
                time.sleep(0.2)
            assert at(centre, visitor).run(dict) == {}
            line.forward()
            until(lambda: settled(edge))
            assert edge.edge.figures().dropped == 1
            assert visitor.run(dict) == {}


@pytest.mark.long
@pytest.mark.parametrize("store_url", ["redis", "mongodb"], indirect=True)
@pytest.mark.parametrize("how", ["blackhole", "lose_reply"])
def test_writes_without_an_answer_arrive_late(lines: Lines, how: str) -> None:
    """A write that was refused, and an end that was obeyed, reach the centre after the cut."""
    edge = lines.edge("a")
    centre = lines.network.centre
    written, ended, bound = (edge.visitor() for _ in range(3))
    for visitor in (written, ended, bound):
        visitor.run(add)
    bound.run(lambda session: session.bind("ada"))
    sites = [at(centre, visitor) for visitor in (written, ended, bound)]
    handle = written.run(lambda session: session.handle)

    def write() -> None:
        with edge.app.app_context(), edge.ext.open(handle) as session:
            add(session)
            lines.cut(edge, how)

    with pytest.raises(StoreUnavailable):
        write()
    written.run(add)
    for visitor in (ended, bound):
        visitor.run(lambda session: session.destroy())
    lines.mend(edge)
    # The refused write may have been carried out, once.
    assert sites[0].run(lambda session: session["n"]) in (2, 3)
    assert [site.run(dict) for site in sites[1:]] == [{}, {}]
    assert edge.edge.figures().dropped == 0


@pytest.mark.long
@pytest.mark.parametrize("store_url", ["redis", "mongodb"], indirect=True)
def test_live_updates_catch_up_after_a_cut(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "POLL", 0.1)
    edge, centre = lines.edge("a"), lines.network.centre
    visitor = centre.visitor()
    visitor.run(lambda session: session.bind("ada"))
    visitor.run(add)
    there = at(edge, visitor)
    handle = there.run(lambda session: session.handle)
    with edge.app.app_context():
        edge.ext.live.hints().heartbeat = 600
        watch = edge.ext.live.watch(handle)
    state = watch.state
    for browser in (visitor, there):
        browser.run(add)
        until(lambda state=state: watch.state != state)
        state = watch.state
    lines.cut(edge)
    insist(there, add)
    visitor.run(add)
    assert not watch.closed
    lines.mend(edge)
    until(lambda: watch.state != state)
    assert there.run(dict) == {"n": 5}
    visitor.run(lambda session: session.destroy())
    until(lambda: watch.state.session is None)
    edge.ext.close(edge.app)


@pytest.mark.long
@pytest.mark.parametrize("store_url", ["redis"], indirect=True)
@pytest.mark.parametrize("how", ["refuse", "blackhole"])
def test_fresh_reads_over_grpc_stop_at_a_cut_and_come_back(network: Network, how: str) -> None:
    with store_servers() as serve:
        url = serve(network.centre.store)
        with (
            TCPProxy(int(url.rpartition(":")[2])) as line,
            network.edge(remote=f"grpc://127.0.0.1:{line.port}", timeout=TIMEOUT) as edge,
        ):
            visitor = edge.visitor()
            visitor.run(add)
            there = at(network.centre, visitor)
            handle = visitor.run(lambda session: session.handle)
            near = edge.edge.near
            assert near is not None

            def is_fresh() -> bool:
                return near.peek(handle) is not None or near.load_near(handle) is None

            until(is_fresh)
            calls = len(edge.wire.calls)
            assert visitor.run(dict) == {"n": 1}
            assert len(edge.wire.calls) == calls
            there.run(add)
            until(lambda: visitor.run(dict) == {"n": 2})
            getattr(line, how)()
            there.run(add)
            until(lambda: near.peek(handle) is None)
            insist(visitor, add)
            assert visitor.run(dict) == {"n": 3}  # it doesn't know of the centre's
            line.forward()
            until(lambda: settled(edge))
            assert visitor.run(dict) == there.run(dict) == {"n": 4}
            until(is_fresh)
