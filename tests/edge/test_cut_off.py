"""An edge that is cut off: what it serves, what it refuses, and what comes of it afterwards."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flask_login import LoginManager, UserMixin, login_user, logout_user
from msgspec.msgpack import encode

from flask_gsession.events import WriteDropped
from flask_gsession.reconciling import GREETING_KEY
from flask_gsession.stores.edge.copy import NodeUnavailable
from flask_gsession.stores.sqlite.file import SQLiteFile
from flask_gsession.testing import FakeClock
from flask_gsession.users.rosters import roster_key
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.edges import EdgeSite, Network

POLICIES = {"n": "counter", "cart": "dict", "token": "reject"}


@pytest.fixture
def network(make_site: SiteMaker, tmp_path: Path) -> Network:
    return Network(make_site, tmp_path, merge_policies=POLICIES)


@pytest.fixture
def edge(network: Network) -> Any:
    with network.edge() as edge:
        yield edge


def add(session: Any) -> None:
    session["n"] = session.get("n", 0) + 1


def at(site: Site, visitor: Visitor) -> Visitor:
    """The same browser at another site."""
    assert visitor.cookie is not None
    return site.visitor(visitor.cookie)


def known(edge: EdgeSite, **values: Any) -> Visitor:
    """A visitor with a session at the centre, of which the edge has a copy."""
    visitor = edge.visitor()
    visitor.run(lambda session: session.update(values or {"n": 1}))
    return visitor


def test_an_edge_serves_and_changes_its_copy_and_settles(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge, n=1, cart={"mug": 1})
    edge.cut()
    visitor.run(add)
    visitor.run(lambda session: session["cart"].update(pen=2))
    at(network.centre, visitor).run(add)
    at(network.centre, visitor).run(lambda session: session["cart"].update(mug=3))
    assert visitor.run(dict) == {"n": 2, "cart": {"mug": 1, "pen": 2}}
    settled = edge.settle()
    assert (settled.changes, settled.dropped, settled.trouble) == (1, 0, "")
    wanted = {"n": 3, "cart": {"mug": 3, "pen": 2}}
    assert at(network.centre, visitor).run(dict) == visitor.run(dict) == wanted
    assert edge.settle().changes == 0


def test_a_logout_is_obeyed_at_once_and_wins(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    tab = visitor.another_tab()
    edge.cut()
    tab.run(add)
    visitor.run(lambda session: session.destroy())
    there = at(network.centre, tab)
    assert tab.another_tab().run(dict) == {}
    there.run(add)
    assert edge.settle().ends == 1
    assert there.run(dict) == tab.run(dict) == {}


def test_an_end_at_the_centre_wins(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    at(network.centre, visitor).run(lambda session: session.destroy())
    assert visitor.run(dict) == {"n": 2}  # the edge can't know
    settled = edge.settle()
    assert (settled.changes, settled.dropped) == (0, 1)
    assert at(network.centre, visitor).run(dict) == visitor.run(dict) == {}
    (dropped,) = edge.happened(WriteDropped)
    assert dropped.reason == "edge: the session has ended"


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_copy_serves_until_it_is_too_old(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    edge.clock.advance(899)
    assert visitor.run(dict) == {"n": 1}
    edge.clock.advance(1)
    response = visitor.ask(dict)
    assert response.status_code == 503
    assert "no connection to its centre" in response.get_data(as_text=True)
    assert visitor.ask(add).status_code == 503
    edge.settle()
    assert visitor.run(dict) == {"n": 1}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_session_without_a_copy_is_not_mistaken_for_none(
    network: Network, edge: EdgeSite
) -> None:
    visitor = network.centre.visitor()
    visitor.run(add)
    edge.cut()
    there = at(edge, visitor)
    assert there.ask(dict).status_code == 503
    edge.settle()
    assert there.run(dict) == {"n": 1}


REFUSED: dict[str, Callable[[Any], object]] = {
    "take": lambda session: session.take("n"),
    "update_atomic": lambda session: session.update_atomic("plain", lambda value: 1),
    "lock": lambda session: session.lock().__enter__(),
    "transaction": lambda session: session.transaction().__enter__(),
    "rotate": lambda session: session.rotate(),
    "bind": lambda session: session.bind("ada"),
    "confirm": lambda session: session.confirm("password"),
    "reject": lambda session: session.update(token="x"),
}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_the_centre_is_refused(edge: EdgeSite, what: str) -> None:
    visitor = known(edge, n=1, token="t")
    edge.cut()
    response = visitor.ask(REFUSED[what])
    assert response.status_code == 503
    assert "no connection to its centre" in response.get_data(as_text=True)
    assert response.headers["Retry-After"] == "5"
    assert visitor.run(dict) == {"n": 1, "token": "t"}
    assert edge.settle().changes == 0


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_declared_key_may_be_updated(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    for _ in range(3):
        visitor.run(lambda session: session.update_atomic("n", lambda value: value + 1))
    at(network.centre, visitor).run(add)
    edge.settle()
    assert visitor.run(dict) == {"n": 5}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_session_is_created_while_cut_off(network: Network, edge: EdgeSite) -> None:
    edge.cut()
    visitor = edge.visitor()
    visitor.run(add)
    edge.clock.advance(1200)  # nobody else knows it: its age doesn't matter
    visitor.run(add)
    edge.settle()
    assert at(network.centre, visitor).run(dict) == visitor.run(dict) == {"n": 2}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_session_made_and_ended_here_never_existed(network: Network, edge: EdgeSite) -> None:
    edge.cut()
    visitor = edge.visitor()
    visitor.run(add)
    visitor.run(lambda session: session.destroy())
    settled = edge.settle()
    assert (settled.ends, settled.changes) == (0, 0)
    assert network.centre.sessions() == {}


def test_a_creation_whose_answer_was_lost_is_not_repeated(network: Network, edge: EdgeSite) -> None:
    edge.cut()
    visitor, other = edge.visitor(), edge.visitor()
    visitor.run(add)
    other.run(add)
    edge.back()

    def lose(operation: str) -> None:
        edge.wire.mute = operation == "create"

    edge.wire.hook = lose
    for _ in range(2):
        assert not edge.settle().reached
    edge.wire.hook = lambda operation: None
    other.run(add)
    at(network.centre, visitor).run(lambda session: session.destroy())
    settled = edge.settle()
    assert (settled.changes, settled.dropped) == (1, 1)
    assert visitor.run(dict) == {}
    assert at(network.centre, other).run(dict) == other.run(dict) == {"n": 2}


def test_a_repeat_is_exact_also_under_the_writes_of_others(
    network: Network, edge: EdgeSite
) -> None:
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    edge.back()

    def lose(operation: str) -> None:
        edge.wire.mute = operation == "save"

    edge.wire.hook = lose
    assert not edge.settle().reached
    edge.wire.hook = lambda operation: None
    visitor.run(add)  # of which the settled change must not know
    at(network.centre, visitor).run(add)
    assert edge.settle().changes == 2
    assert visitor.run(dict) == {"n": 4}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_save_whose_answer_is_lost_is_refused(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.wire.hook = lambda operation: setattr(edge.wire, "mute", operation == "save")
    assert visitor.ask(add).status_code == 503
    edge.wire.hook = lambda operation: None
    edge.settle()
    assert visitor.run(dict) == {"n": 2}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_other_workers_of_a_node_serve_what_it_has_queued(network: Network, edge: EdgeSite) -> None:
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


def test_an_end_names_the_device(network: Network, edge: EdgeSite) -> None:
    """The centre rotated the session without a trace meanwhile."""
    visitor = network.centre.visitor()
    visitor.run(lambda session: session.bind("ada"))
    there = at(edge, visitor)
    there.run(dict)
    edge.cut()
    visitor.run(lambda session: session.rotate(grace=0))
    there.run(lambda session: session.destroy())
    edge.settle()
    assert visitor.run(lambda session: session.owner) is None
    with network.centre.app.app_context():
        assert network.centre.ext.users.devices("ada") == []


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_bound_session_stays_in_use(network: Network, edge: EdgeSite) -> None:
    """Its roster can't be touched while the edge is cut off."""
    visitor = network.centre.visitor()
    visitor.run(lambda session: session.bind("ada"))
    there = at(edge, visitor)
    there.run(dict)
    edge.cut()
    edge.clock.advance(600)
    there.run(add)
    assert there.run(dict) == {"n": 1}
    edge.settle()
    there.run(add)
    assert visitor.run(dict) == {"n": 2}
    with network.centre.app.app_context():
        assert network.centre.ext.users.revoke_all("ada") == 1
    assert there.run(dict) == {}


class User(UserMixin):
    id = "ada"


def with_flask_login(site: Site) -> None:
    LoginManager(site.app).user_loader(lambda _: User())


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_flask_login_signs_out(network: Network, edge: EdgeSite) -> None:
    with_flask_login(network.centre)
    with_flask_login(edge)
    visitor = network.centre.visitor()
    visitor.run(lambda session: login_user(User()))
    there = at(edge, visitor)
    there.run(lambda session: session.update(n=1))
    edge.cut()
    assert edge.visitor().ask(lambda session: login_user(User())).status_code == 503
    there.run(lambda session: logout_user())
    assert there.run(lambda session: session.owner) is None
    edge.settle()
    assert visitor.run(lambda session: (session.owner, session["n"])) == (None, 1)
    with network.centre.app.app_context():
        assert network.centre.ext.users.devices("ada") == []


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_full_queue_refuses_and_keeps(network: Network) -> None:
    with network.edge(outbox=1) as edge:
        one, two = known(edge), known(edge)
        edge.cut()
        one.run(add)
        assert two.ask(add).status_code == 503
        assert edge.visitor().ask(add).status_code == 503
        one.run(add)  # it is in the queue already
        two.run(lambda session: session.destroy())  # always accepted
        settled = edge.settle()
        assert (settled.ends, settled.changes) == (1, 1)
        assert at(network.centre, one).run(dict) == {"n": 3}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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
        assert "other keys" in settled.trouble
        assert other.edge.figures().changes == 1
        assert visitor.run(dict) == {"n": 1}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_centre_of_another_version_is_refused(network: Network, edge: EdgeSite) -> None:
    interface = network.centre.app.extensions["gsession"][network.centre.ext]
    repository = interface.repository
    content = encode((2, 99))
    end = repository.now() + 3600_000
    repository.store.create(repository.draft_other(GREETING_KEY, content, end))
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    settled = edge.settle()
    assert settled.changes == 0
    assert "another version" in settled.trouble
    assert visitor.run(dict) == {"n": 2}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_centre_that_fails_for_a_moment_cuts_the_link(edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.wire.cut = True
    assert visitor.run(dict) == {"n": 1}
    assert edge.edge.cut_off == "the centre can't be reached: the wire is cut"
    asked = len(edge.wire.calls)
    edge.back()
    visitor.run(add)
    assert len(edge.wire.calls) == asked
    edge.settle()
    assert edge.edge.cut_off == ""


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_session_that_was_rotated_meanwhile_is_changed(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    there = at(network.centre, visitor)
    there.run(lambda session: session.rotate(grace=60))
    there.run(add)
    assert edge.settle().changes == 1
    edge.cut()
    for browser in (visitor, at(edge, there)):
        assert browser.run(dict) == {"n": 3}
    edge.settle()
    assert there.run(dict) == visitor.run(dict) == {"n": 3}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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


def rows(edge: EdgeSite) -> int:
    with closing(sqlite3.connect(edge.edge.copy.file.path)) as db:
        (count,) = db.execute("SELECT count(*) FROM gsession_edge").fetchone()
        return int(count)


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_clock_that_is_set_back_extends_nothing(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    edge.clock.advance(-3600)
    assert visitor.ask(dict).status_code == 503
    edge.clock.advance(3600)
    assert visitor.run(dict) == {"n": 1}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
@pytest.mark.parametrize("ends", [False, True])
def test_a_load_on_its_way_overwrites_nothing(network: Network, edge: EdgeSite, ends: bool) -> None:
    """Another worker of the node is cut off, and changes or ends the session meanwhile."""
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


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
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
        patch.setattr(edge.edge.copy, "sending", full)
        settled = edge.settle()
        assert (settled.trouble, settled.reached) == ("the disk is full", True)
    assert edge.edge.cut_off == ""
    assert edge.settle().changes == 1


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_logout_of_a_session_without_a_copy_is_queued(network: Network, edge: EdgeSite) -> None:
    visitor = network.centre.visitor()
    visitor.run(add)
    edge.cut()
    at(edge, visitor).run(lambda session: session.destroy())
    assert at(edge, visitor).run(dict) == {}
    assert edge.settle().ends == 1
    assert visitor.run(dict) == {}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_restored_file_uses_no_number_again(network: Network, edge: EdgeSite) -> None:
    visitor, path = known(edge), edge.edge.copy.file.path
    edge.edge.copy.file.close()
    backup = path.read_bytes()
    for _ in range(2):
        edge.cut()
        visitor.run(add)
        assert edge.settle().changes == 1
        edge.clock.advance(1)
        edge.edge.copy.file.close()
        path.write_bytes(backup)
    assert visitor.run(dict) == at(network.centre, visitor).run(dict) == {"n": 3}
