"""A cut-off edge: served and refused requests, and the results after it reconnects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask_login import LoginManager, UserMixin, login_user, logout_user

from flask_gsession.events import WriteDropped
from tests.edge.story import add, at, known
from tests.harness.apps import Site
from tests.harness.edges import EdgeSite, Network


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
def test_operations_that_need_the_centre_are_refused(edge: EdgeSite, what: str) -> None:
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
    for _ in range(3):  # the greeting, the claim, the session
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


def test_an_end_names_the_device(network: Network, edge: EdgeSite) -> None:
    """The centre has rotated the session without leaving a pointer."""
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
def test_a_session_that_the_centre_rotated_is_changed(network: Network, edge: EdgeSite) -> None:
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
def test_a_logout_of_a_session_without_a_copy_is_queued(network: Network, edge: EdgeSite) -> None:
    visitor = network.centre.visitor()
    visitor.run(add)
    edge.cut()
    at(edge, visitor).run(lambda session: session.destroy())
    assert at(edge, visitor).run(dict) == {}
    assert edge.settle().ends == 1
    assert visitor.run(dict) == {}


def test_a_session_that_expired_here_is_not_pushed(network: Network, edge: EdgeSite) -> None:
    edge.cut()
    visitor = edge.visitor()
    visitor.run(add)
    edge.clock.advance(3 * 3600)
    settled = edge.settle()
    assert (settled.changes, settled.dropped, settled.trouble) == (0, 0, "")
    assert (edge.edge.figures().changes, edge.edge.figures().dropped) == (0, 0)
    assert visitor.run(dict) == {}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_shorter_lifetime_is_settled(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    visitor.run(lambda session: session.set_lifetime(60))
    edge.settle()
    there = at(network.centre, visitor)
    assert there.run(dict) == {"n": 1}
    edge.clock.advance(120)
    assert there.run(dict) == {}
