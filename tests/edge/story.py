"""Changes at an edge while it is cut off, and the state that must result in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.harness.apps import Site, Visitor
from tests.harness.edges import EdgeSite

POLICIES = {"n": "counter", "cart": "dict", "token": "reject"}


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


def go_through(edge: EdgeSite, centre: Site) -> dict[str, str]:
    """Change, create and end sessions while the edge is cut off. Returns their cookies by kind.

    The edge can't be reached before, and is left cut off.
    """
    visitors = {name: edge.visitor() for name in ("changed", "ended", "bound", "over")}
    for name, visitor in visitors.items():
        if name == "bound":
            visitor.run(lambda session: session.bind("ada"))
        visitor.run(add)
    edge.cut()
    visitors["made"] = edge.visitor()
    for name in ("changed", "changed", "made", "made", "over"):
        visitors[name].run(add)
    cookies = {name: str(visitor.cookie) for name, visitor in visitors.items()}
    for name in ("ended", "bound"):
        visitors[name].run(lambda session: session.destroy())
    rotated = centre.visitor(cookies["bound"])
    rotated.run(lambda session: session.rotate(grace=0))
    cookies["rotated"] = str(rotated.cookie)
    centre.visitor(cookies["over"]).run(lambda session: session.destroy())
    return cookies


def check(site: Site, cookies: Mapping[str, str], **also: int) -> None:
    """Everything is settled. ``also``: how often others have changed a session."""
    found = {name: site.visitor(cookie).run(dict) for name, cookie in cookies.items()}
    wanted = {
        "changed": {"n": 3 + also.get("changed", 0)},
        "made": {"n": 2},
        "ended": {},
        "bound": {},
        "rotated": {},
        "over": {},
    }
    assert found == {name: wanted[name] for name in found}
