"""Trouble at an edge: full queues and disks, clocks, keys, and several workers."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.msgpack import encode

from flask_gsession.events import WriteDropped
from flask_gsession.reconciling import GREETING_KEY
from flask_gsession.stores.edge.node_file import NodeUnavailable
from flask_gsession.stores.edge.node_time import NodeTime
from flask_gsession.stores.sqlite.file import SQLiteFile
from flask_gsession.testing import FakeClock
from flask_gsession.users.rosters import roster_key
from tests.edge.story import add, at, known
from tests.faults.inject import small_disk
from tests.harness.apps import until
from tests.harness.edges import EdgeSite, Network

TOP = Path(__file__).parents[2]


def test_other_workers_of_a_node_serve_its_queued_changes(network: Network, edge: EdgeSite) -> None:
    """They reach the centre, which doesn't know of it yet."""
    changed, ended = known(edge), known(edge)
    with network.edge("a") as other:
        there = at(other, ended)
        assert there.run(dict) == {"n": 1}
        edge.cut()
        changed.run(add)
        ended.run(lambda session: session.destroy())
        assert at(other, changed).run(dict) == {"n": 2}
        assert there.run(dict) == {}
        at(other, changed).run(add)
        assert at(network.centre, changed).run(dict) == {"n": 1}
        settled = other.settle()
        assert (settled.ends, settled.changes) == (1, 1)
    assert at(network.centre, changed).run(dict) == {"n": 3}


#: The code is the same on every store.
pytestmark = pytest.mark.parametrize("store_url", ["memory"], indirect=True)


def test_a_full_queue_refuses_and_keeps(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    with network.edge(outbox=1) as edge:
        one, two = known(edge), known(edge)
        edge.cut()
        one.run(add)
        caplog.clear()
        assert two.ask(add).status_code == 503
        assert ": the outbox is full: 1 sessions with changes wait for the centre" in caplog.text
        assert edge.visitor().ask(add).status_code == 503
        one.run(add)  # it is in the queue already
        two.run(lambda session: session.destroy())  # always accepted
        settled = edge.settle()
        assert (settled.ends, settled.changes) == (1, 1)
        assert at(network.centre, one).run(dict) == {"n": 3}


def test_a_centre_with_other_keys_is_refused(network: Network) -> None:
    with (
        network.edge("a", settings={"encryption_keys": ["a" * 43]}) as one,
        network.edge("b", settings={"encryption_keys": ["b" * 43]}) as other,
    ):
        one.cut()
        one.visitor().run(add)
        assert one.settle().trouble == ""
        other.cut()
        visitor = other.visitor()
        visitor.run(add)
        settled = other.settle()
        assert settled.changes == 0
        assert "use other keys" in settled.trouble
        assert other.edge.figures().changes == 1
        assert visitor.run(dict) == {"n": 1}
        network.centre.clock.advance(86_400)  # since one with the former keys settled
        assert other.settle().trouble == ""


def test_a_centre_of_another_version_is_refused(network: Network, edge: EdgeSite) -> None:
    interface = network.centre.app.extensions["gsession"][network.centre.ext]
    repository = interface.repository
    content = encode((2, 99))
    end = repository.now() + 3600_000
    repository.store.create(repository.other_records.draft(GREETING_KEY, content, end))
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    settled = edge.settle()
    assert settled.changes == 0
    assert "another version" in settled.trouble
    assert visitor.run(dict) == {"n": 2}


def test_a_job_without_a_thread_comes_back(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.edge._worker.interval = 30
    handle = visitor.run(lambda session: session.handle)
    edge.edge._worker.stop()
    edge.cut()
    with edge.app.app_context(), edge.ext.open(handle) as session:
        add(session)
    edge.back()
    edge.edge.link.try_soon()
    with edge.app.app_context():
        peeked = edge.ext.peek(handle)
        assert peeked is not None
        assert peeked["n"] == 2
    assert edge.edge.cut_off == ""
    assert at(network.centre, visitor).run(dict) == {"n": 2}


def test_clocks_may_differ_by_minutes(network: Network) -> None:
    ahead = FakeClock(network.centre.clock() + 300)
    behind = FakeClock(network.centre.clock() - 300)
    with network.edge("a", clock=ahead) as one, network.edge("b", clock=behind) as two:
        visitor = known(one)
        assert at(two, visitor).run(dict) == {"n": 1}
        one.cut()
        two.cut()
        visitor.run(add)
        at(two, visitor).run(add)
        assert one.settle().changes == two.settle().changes == 1
        assert at(network.centre, visitor).run(dict) == {"n": 3}
        one.cut()
        at(two, visitor).run(lambda session: session.destroy())
        visitor.run(add)
        assert one.settle().dropped == 1
        assert visitor.run(dict) == at(two, visitor).run(dict) == {}


def test_copies_that_nobody_needs_go(network: Network, edge: EdgeSite) -> None:
    visitors = [network.centre.visitor() for _ in range(20)]
    for visitor in visitors:
        visitor.run(add)
        at(edge, visitor).run(dict)
    edge.clock.advance(901)
    for visitor in visitors[:10]:
        at(edge, visitor).run(dict)
    ended = [network.centre.visitor() for _ in range(12)]
    for visitor in ended:
        visitor.run(add)
        at(edge, visitor).run(lambda session: session.destroy())
    assert rows(edge) == 10 + 12
    edge.clock.advance(32 * 86400)
    for visitor in [network.centre.visitor() for _ in range(22)]:
        visitor.run(add)
        at(edge, visitor).run(dict)
    assert rows(edge) == 22


def test_old_rows_go_two_at_a_time_but_never_a_waiting_change(
    network: Network, edge: EdgeSite
) -> None:
    changed, ended, *_ = [known(edge) for _ in range(5)]
    edge.cut()
    changed.run(add)
    ended.run(lambda session: session.destroy())
    made = edge.visitor()
    made.run(add)
    row = edge.edge.copy.get(made.run(lambda session: session.handle))
    assert row is not None
    edge.edge.waiting.sending(row)  # it may have arrived
    edge.clock.advance(33 * 86400)  # also the end that waits is of no use any more
    counts = []
    for _ in range(4):
        edge.visitor().run(add)
        counts.append(rows(edge))
    assert counts == [5, 4, 5, 6]
    edge.clock.advance(3 * 3600)  # nobody else has ever known the four new ones
    for _ in range(3):
        edge.visitor().run(add)
        counts.append(rows(edge))
    assert counts[4:] == [5, 4, 5]
    assert edge.settle() == (1, 3, 2, "", True)
    assert len(edge.happened(WriteDropped)) == 2


def rows(edge: EdgeSite) -> int:
    with closing(sqlite3.connect(edge.edge.copy.file.path)) as db:
        (count,) = db.execute("SELECT count(*) FROM gsession_edge").fetchone()
        return int(count)


def test_a_full_disk_refuses_and_keeps(
    network: Network, edge: EdgeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor, other = known(edge), known(edge)
    edge.cut()
    visitor.run(add)
    prepare = SQLiteFile._prepare

    def full(file: SQLiteFile, db: sqlite3.Connection) -> None:
        prepare(file, db)
        db.execute("PRAGMA max_page_count = 1")

    edge.edge.copy.file.close()
    with monkeypatch.context() as patch:
        patch.setattr(SQLiteFile, "_prepare", full)
        response = other.ask(lambda session: session.update(large="x" * 100_000))
        assert response.status_code == 503
        assert visitor.run(dict) == {"n": 2}
        edge.edge.copy.file.close()
    edge.settle()
    assert at(network.centre, visitor).run(dict) == {"n": 2}


@pytest.mark.parametrize("operation", ["withdrawn", "rotated"])
@pytest.mark.parametrize("grace", [0, 60])
def test_a_disk_that_is_full_at_a_rotation_loses_no_session(
    network: Network,
    edge: EdgeSite,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    grace: int,
) -> None:
    visitor = known(edge)
    former = at(edge, visitor)

    def full(*_: object) -> None:
        raise NodeUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(edge.edge.copy, operation, full)
        response = visitor.ask(lambda session: session.rotate(grace=grace))
    assert response.status_code == (503 if operation == "withdrawn" else 200)
    assert visitor.run(dict) == at(network.centre, visitor).run(dict) == {"n": 1}
    edge.cut()
    assert visitor.run(dict) == {"n": 1}
    if operation == "rotated":
        assert former.ask(dict).status_code == 503  # no copy is served under the old token


@pytest.mark.parametrize("grace", [0, 60])
def test_a_change_during_a_rotation_is_merged_or_reported(
    network: Network, edge: EdgeSite, grace: int
) -> None:
    """One worker asks the centre for a new token, one reads the session, one is cut off."""
    visitor = known(edge)
    with network.edge("a") as reader, network.edge("a") as writer:
        there = at(writer, visitor)
        assert there.run(dict) == {"n": 1}

        def meanwhile(operation: str) -> None:
            if operation == "replace":
                assert at(reader, former).run(dict) == {"n": 1}
                writer.cut()
                there.run(add)

        former = at(edge, visitor)
        edge.wire.hook = meanwhile
        visitor.run(lambda session: session.rotate(grace=grace))
        settled = writer.settle()
        assert (settled.changes, settled.dropped) == ((1, 0) if grace else (0, 1))
        assert visitor.run(dict) == {"n": 2 if grace else 1}
        assert former.run(dict) == ({"n": 2} if grace else {})


def test_a_refused_rotation_leaves_the_copy(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.wire.mute = True  # so that its outcome isn't known
    assert visitor.ask(lambda session: session.rotate(grace=0)).status_code == 503
    assert edge.edge.cut_off
    assert visitor.run(dict) == {"n": 1}


class Machine:
    """A machine with a clock that somebody sets, and its processes with an edge each."""

    def __init__(self, network: Network) -> None:
        self.network, self.clock = network, network.centre.clock
        self.up = FakeClock(1000)

    def process(self, boot: str = "first") -> EdgeSite:
        edge = self.network.edge("a")
        edge.edge.copy.time = time = NodeTime(edge.edge.copy.file, self.clock, self.up)
        time._boot = boot
        return edge

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.up.advance(seconds)


def test_a_clock_that_is_set_back_extends_nothing(network: Network) -> None:
    """It doesn't end the service early either, even in a process that starts afterwards."""
    machine = Machine(network)
    with machine.process() as edge:
        visitor = known(edge)
        edge.cut()
        machine.wait(600)
        machine.clock.advance(-3600)
        with machine.process() as younger:
            younger.cut()
            for at_work in (visitor, at(younger, visitor)):
                assert at_work.run(dict) == {"n": 1}
            machine.wait(299)
            for at_work in (visitor, at(younger, visitor)):
                assert at_work.run(dict) == {"n": 1}
            machine.wait(1)
            for at_work in (visitor, at(younger, visitor)):
                assert at_work.ask(dict).status_code == 503


def test_a_process_that_missed_a_clock_jump_learns_of_it(network: Network) -> None:
    machine = Machine(network)
    with machine.process() as edge, machine.process() as idle:
        there = at(idle, known(idle))
        machine.clock.advance(3600)
        visitor = known(edge)
        machine.clock.advance(-3600)
        there = at(idle, visitor)
        idle.cut()
        assert there.ask(dict).status_code == 503  # it seems to come from the future
        assert there.run(dict) == {"n": 1}
    with machine.process("second boot") as edge:
        edge.cut()
        assert at(edge, visitor).ask(dict).status_code == 503
        machine.clock.advance(3600)
        assert at(edge, visitor).run(dict) == {"n": 1}


@pytest.mark.parametrize("ends", [False, True])
def test_a_load_on_its_way_overwrites_nothing(network: Network, edge: EdgeSite, ends: bool) -> None:
    """During the load, another worker of the node is cut off, and changes or ends the session."""
    visitor = known(edge)
    edge.clock.advance(60)
    with network.edge("a") as other:
        there = at(other, visitor)

        def meanwhile(operation: str) -> None:
            edge.wire.after = lambda operation: None
            other.cut()
            there.run(lambda session: session.destroy() if ends else add(session))

        edge.wire.after = meanwhile
        assert visitor.run(dict) == {"n": 1}
        edge.cut()
        assert visitor.run(dict) == ({} if ends else {"n": 2})
        edge.settle()
        assert at(network.centre, visitor).run(dict) == ({} if ends else {"n": 2})


@pytest.mark.parametrize("operation", ["load", "save"])
def test_an_end_that_was_seen_is_not_forgotten(
    network: Network, edge: EdgeSite, operation: str
) -> None:
    visitor = known(edge)
    there, here = at(network.centre, visitor), [at(edge, visitor) for _ in range(2)]

    def end(name: str) -> None:
        if name == operation:
            edge.wire.hook = lambda name: None
            there.run(lambda session: session.destroy())

    edge.clock.advance(60)  # so that a read asks the centre
    edge.wire.hook = end
    here[0].ask(dict if operation == "load" else add)
    edge.cut()
    assert here[1].ask(dict).status_code == 503


def test_a_logout_under_the_former_token_ends_the_copy(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    former = at(edge, visitor)
    visitor.run(lambda session: session.rotate(grace=60))
    edge.cut()
    former.run(lambda session: session.destroy())
    assert visitor.run(dict) == {}
    edge.settle()
    assert at(network.centre, visitor).run(dict) == {}


def test_two_applications_may_share_a_file(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    network.centre.prefix = "another:"
    network.settings = {**network.settings, "key_prefix": "another:"}
    with network.edge("b", file="a") as other:
        stranger = known(other)
        other.cut()
        stranger.run(add)
        assert other.settle() == (0, 1, 0, "", True)
        assert other.edge.figures().changes == 0
        assert edge.edge.figures().changes == 1
    assert edge.settle() == (0, 1, 0, "", True)
    assert visitor.run(dict) == {"n": 2}


def test_a_damaged_file_is_refused_and_reported(
    network: Network, edge: EdgeSite, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = known(edge)
    path = edge.edge.copy.file.path
    edge.edge.copy.file.close()
    with open(path, "r+b") as file:
        file.write(b"damaged " * 1000)
    for action in (dict, add, lambda session: session.destroy()):
        assert visitor.ask(action).status_code == 503
    assert at(network.centre, visitor).run(dict) == {"n": 1}
    edge.edge._worker.interval = 0.01
    assert visitor.ask(dict).status_code == 503  # starts the thread
    until(lambda: "will try again" in caplog.text)
    assert "the node's file: file is not a database" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


def test_one_session_in_trouble_keeps_no_other_waiting(network: Network, edge: EdgeSite) -> None:
    """A roster that is damaged, and a merge policy that refuses."""
    bound, changed = network.centre.visitor(), known(edge, n=1, cart={})
    bound.run(lambda session: session.bind("ada"))
    there = at(edge, bound)
    there.run(dict)
    edge.cut()
    there.run(lambda session: session.destroy())
    changed.run(add)
    changed.run(lambda session: session.update(cart={"mug": 1}))
    at(network.centre, changed).run(lambda session: session.update(cart=["no dict"]))
    key = roster_key("ada")
    far = network.centre.store
    record = far.load(key)
    assert record is not None
    far.save(record._replace(version=1, payload=b"damaged"), record.version)
    settled = edge.settle()
    assert (settled.ends, settled.changes, settled.reached) == (0, 1, True)
    assert "can't be read" in settled.trouble
    assert edge.edge.cut_off == ""
    assert changed.run(dict) == {"n": 2, "cart": ["no dict"]}
    assert [event.reason for event in edge.happened(WriteDropped)] == [
        "edge: the merge policy of 'cart' refused it"
    ]
    assert bound.run(lambda session: session.owner) is None


def test_a_full_disk_does_not_look_like_a_cut(
    network: Network, edge: EdgeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    edge.back()

    def full(*_: object, **__: object) -> None:
        raise NodeUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(edge.edge.waiting, "sending", full)
        settled = edge.settle()
        assert (settled.trouble, settled.reached) == ("the disk is full", True)
    assert edge.edge.cut_off == ""
    assert edge.settle().changes == 1


def test_the_centre_gets_ends_although_the_file_cannot_be_written(
    network: Network, edge: EdgeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, changed = known(edge), known(edge)
    there = at(network.centre, ended)
    edge.cut()
    ended.run(lambda session: session.destroy())
    changed.run(add)
    edge.back()

    def full(*_: object, **__: object) -> None:
        raise NodeUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        for name in ("lease", "end_delivered", "release", "sending"):
            patch.setattr(edge.edge.waiting, name, full)
        settled = edge.edge.settle()
        assert settled is not None
        assert (settled.changes, settled.trouble, settled.reached) == (0, "the disk is full", True)
        assert edge.edge.cut_off == ""
        assert there.run(dict) == {}
    assert edge.settle()[:2] == (1, 1)


@pytest.mark.long
def test_a_disk_that_is_really_full(network: Network, tmp_path: Path) -> None:
    """In a process of its own, which sees a small tmpfs in that folder, if that is allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = [*small_disk(folder), sys.executable, "-m", "tests.edge.full_disk", str(folder)]
    run = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "changes accepted" in run.stdout
