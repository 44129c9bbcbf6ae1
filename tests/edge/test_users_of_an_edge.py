"""Users and their devices: revocations, sign-ins and logouts on both sides of a cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flask_gsession.errors import CutOff
from flask_gsession.events import WriteDropped
from tests.edge.story import add, at
from tests.harness.apps import Site, Visitor
from tests.harness.edges import EdgeSite, Network

STORES = ("memory", "sqlite", "redis", "mongodb")


def signed_in(site: Site, user: str = "ada", **how: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.bind(user, **how))
    return visitor


def devices(site: Site, user: str = "ada") -> list[str | None]:
    """The labels of the user's devices, the last seen first."""
    with site.app.app_context():
        return [device.label for device in site.ext.users.devices(user)]


def revoked(site: Site, how: str, visitor: Visitor) -> None:
    """End the session of ``visitor`` from another one of its user, or by an administrator."""
    users = site.ext.users
    (device,) = visitor.run(lambda session: [d.id for d in users.devices("ada") if d.current])
    if how == "others":
        signed_in(site, label="other").run(lambda session: users.revoke_others(reason="password"))
        return
    with site.app.app_context():
        if how == "all":
            users.revoke_all("ada")
        else:
            users.revoke("ada", device, by="admin")


@pytest.mark.parametrize(
    ("store_url", "how"),
    [*((store, "all") for store in STORES), ("memory", "others"), ("memory", "one")],
    indirect=["store_url"],
)
def test_a_revocation_at_the_centre_wins(network: Network, edge: EdgeSite, how: str) -> None:
    """It also wins over changes at the edge, which are reported as lost."""
    changed, read = (signed_in(network.centre, label=label) for label in ("changed", "read"))
    here = [at(edge, visitor) for visitor in (changed, read)]
    for visitor in here:
        visitor.run(add)
    edge.cut()
    here[0].run(add)
    revoked(network.centre, how, changed)
    assert [visitor.run(dict) for visitor in here] == [{"n": 2}, {"n": 1}]
    settled = edge.settle()
    assert (settled.changes, settled.dropped, settled.trouble) == (0, 1, "")
    assert [event.reason for event in edge.happened(WriteDropped)] == [
        "edge: the session has ended"
    ]
    spared = how == "one"
    assert [visitor.run(dict) for visitor in (*here, changed, read)] == [
        {},
        {"n": 1} if spared else {},
    ] * 2
    assert devices(network.centre) == {"all": [], "others": ["other"], "one": ["read"]}[how]


#: The code is the same on every store.
memory = pytest.mark.parametrize("store_url", ["memory"], indirect=True)


@memory
def test_an_edge_ends_no_sign_in_of_another_user(network: Network, edge: EdgeSite) -> None:
    """Another person has signed in with this browser at the centre."""
    visitor = signed_in(network.centre)
    there = at(edge, visitor)
    there.run(add)
    edge.cut()
    visitor.run(lambda session: session.bind("bob"))
    there.run(lambda session: session.destroy())
    assert there.run(dict) == {}
    assert edge.settle().ends == 1
    assert visitor.run(lambda session: session.owner) == "bob"
    assert (devices(network.centre), devices(network.centre, "bob")) == ([], [None])


@memory
def test_a_cap_ends_the_oldest_device_and_its_changes(network: Network) -> None:
    with network.edge(settings={"max_per_user": 1}) as edge:
        visitor = signed_in(edge, label="old")
        edge.cut()
        visitor.run(add)
        network.settings["max_per_user"] = 1
        with network.edge("b", settings={"max_per_user": 1}) as other:
            newer = signed_in(other, label="new")
        assert edge.settle().dropped == 1
        assert visitor.run(dict) == {}
        assert newer.run(lambda session: session.owner) == "ada"
    assert devices(network.centre) == ["new"]


@memory
@pytest.mark.parametrize("grace", [0, 60])
@pytest.mark.parametrize("changed", [False, True])
def test_a_logout_ends_a_session_that_was_rotated_and_labelled_again(
    network: Network, edge: EdgeSite, grace: int, changed: bool
) -> None:
    """By its device, which keeps its id, whatever is changed about it at the centre."""
    visitor = signed_in(network.centre, label="laptop")
    there, old = at(edge, visitor), at(network.centre, visitor)
    there.run(add)
    edge.cut()
    if changed:
        there.run(add)
    visitor.run(lambda session: session.rotate(grace=grace))
    visitor.run(lambda session: session.bind("ada", label="tablet"))
    visitor.run(add)
    there.run(lambda session: session.destroy())
    settled = edge.settle()
    assert (settled.ends, settled.changes, settled.trouble) == (1, 0, "")
    for browser in (visitor, old, there):
        assert browser.run(lambda session: (session.owner, dict(session))) == (None, {})
    assert devices(network.centre) == []


@memory
@pytest.mark.parametrize("first", ["ends", "changes"])
@pytest.mark.parametrize("bound", [False, True])
def test_an_end_at_one_edge_beats_a_change_at_another(
    network: Network, first: str, bound: bool
) -> None:
    visitor = signed_in(network.centre) if bound else network.centre.visitor()
    visitor.run(add)
    with network.edge("a") as ends, network.edge("b") as changes:
        here, there = at(ends, visitor), at(changes, visitor)
        for browser in (here, there):
            browser.run(add)
        for edge in (ends, changes):
            edge.cut()
        here.run(add)
        there.run(add)
        here.run(lambda session: session.destroy())
        assert (here.run(dict), there.run(dict), visitor.run(dict)) == ({}, {"n": 4}, {"n": 3})
        order = [ends, changes] if first == "ends" else [changes, ends]
        assert order[0].settle().trouble == order[1].settle().trouble == ""
        for browser in (here, there, visitor, at(network.centre, here if here.cookie else there)):
            assert browser.run(dict) == {}
        assert changes.edge.figures().dropped == (first == "ends")


@memory
def test_users_are_the_centres_alone(network: Network, edge: EdgeSite) -> None:
    """Lists, revocations and values of users need the centre, and say so; unbinding doesn't."""
    visitor = signed_in(network.centre)
    there = at(edge, visitor)
    there.run(lambda session: session.shared.update(theme="dark"))
    there.run(add)
    edge.cut()
    users = edge.ext.users
    refused: list[Callable[[Any], object]] = [
        lambda session: users.devices("ada"),
        lambda session: users.revoke_all("ada"),
        lambda session: users.revoke_others(),
        lambda session: users.forget("ada"),
        lambda session: session.shared["theme"],
        lambda session: session.shared.update(theme="light"),
    ]
    for action in refused:
        response = there.ask(action)
        assert response.status_code == 503
        assert "no connection to its centre" in response.get_data(as_text=True)
    with edge.app.app_context():
        with pytest.raises(CutOff), edge.ext.open_user("ada") as values:
            values["theme"] = "light"
        with pytest.raises(CutOff):
            users.revoke_all("ada")
    assert there.run(lambda session: (session.owner, session["n"])) == ("ada", 1)
    there.run(lambda session: session.unbind())
    assert edge.settle().changes == 1
    assert visitor.run(lambda session: (session.owner, dict(session))) == (None, {"n": 1})
    assert devices(network.centre) == []
