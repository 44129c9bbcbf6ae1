"""A crash or a lost answer at each call of a first request, on every store; then life goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.moving.cachelib_cache import CacheFiles
from tests.harness.apps import Site, SiteMaker, Visitor

from .old import OldFiles, visit

#: The calls of a first request that writes, and of a logout: (store, operation, which of them).
FIRST = [
    ("old", "load", 0),
    ("new", "load", 0),
    ("new", "create", 0),
    ("new", "create", 1),
    ("new", "save", 0),
]
LOGOUT = [*FIRST[:4], ("old", "delete", 0), ("new", "delete", 0)]


class Crash(BaseException):
    """The process dies. Not an `Exception`: nothing may catch it."""


def outage() -> None:
    raise StoreUnavailable("simulated")


def crash() -> None:
    raise Crash


@pytest.fixture
def old(tmp_path: Path) -> OldFiles:
    return OldFiles(tmp_path / "old")


@pytest.fixture
def site(make_site: SiteMaker, old: OldFiles) -> Site:
    return make_site(config=old.config)


@pytest.fixture
def strike(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let one call fail: `strike((store, operation, which), when, how)`."""

    def strike(call: tuple[str, str, int], when: str, how: Callable[[], None]) -> None:
        store, operation, which = call
        if store == "new":
            hook = site.store.before if when == "before" else site.store.after
            for _ in range(which):
                hook(operation, lambda: None)
            hook(operation, how)
            return
        real = getattr(CacheFiles, operation)
        left = [how]

        def called(self: CacheFiles, name: str) -> Any:
            if not left:
                return real(self, name)
            fail = left.pop()
            if when == "after":
                real(self, name)
            return fail()

        monkeypatch.setattr(CacheFiles, operation, called)

    yield strike
    site.store._hooks.clear()


def attempt(visitor: Visitor, view: Callable[[Any], Any], how: Callable[[], None]) -> int:
    """The status of a request; 0 if its process died."""
    try:
        return visitor.ask(view).status_code
    except Crash:
        assert how is crash
        return 0


@pytest.mark.parametrize("how", [outage, crash])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", FIRST, ids=lambda call: f"{call[0]}-{call[1]}{call[2]}")
def test_a_first_request(
    site: Site,
    old: OldFiles,
    strike: Callable[..., None],
    call: tuple[str, str, int],
    when: str,
    how: Callable[[], None],
) -> None:
    sid = old.add(cart=["mug"])
    visitor = visit(site, sid)
    strike(call, when, how)
    status = attempt(visitor, lambda session: session.update(seen=1), how)
    assert status == (503 if how is outage else 0)
    site.store._hooks.clear()
    again, beside = visit(site, sid), visit(site, sid)
    assert again.run(lambda session: session["cart"]) == ["mug"]
    handles = {each.run(lambda session: session.handle) for each in (again, beside, visitor)}
    assert len(handles) == 1
    again.run(lambda session: session.destroy())
    assert not old.has(sid)
    for each in (beside, visitor, visit(site, sid)):
        assert each.run(dict) == {}
    old.add(sid, cart=["written back"])
    assert visit(site, sid).run(dict) == {}


@pytest.mark.parametrize("how", [outage, crash])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", LOGOUT, ids=lambda call: f"{call[0]}-{call[1]}{call[2]}")
def test_a_logout_by_the_old_cookie(
    site: Site,
    old: OldFiles,
    strike: Callable[..., None],
    call: tuple[str, str, int],
    when: str,
    how: Callable[[], None],
) -> None:
    """It isn't acknowledged, and the next one ends everything."""
    sid = old.add(_user_id="7")
    visitor = visit(site, sid)
    strike(call, when, how)
    status = attempt(visitor, lambda session: session.destroy(), how)
    assert status == (503 if how is outage else 0)
    site.store._hooks.clear()
    assert visitor.get_cookie("session") is not None
    visitor.run(lambda session: session.destroy())
    assert not old.has(sid)
    assert visit(site, sid).run(dict) == {}
    old.add(sid, _user_id="7")
    assert visit(site, sid).run(dict) == {}


@pytest.mark.parametrize("steps", range(1, 4))
def test_two_imports_at_once(site: Site, old: OldFiles, steps: int) -> None:
    """A whole first request runs within another one, before one of its calls."""
    sid = old.add(cart=1)
    first, second = visit(site, sid), visit(site, sid)
    handles: list[str] = []

    def other() -> None:
        handles.append(second.run(lambda session: session.handle))

    operation, which = [("load", 0), ("create", 0), ("create", 1)][steps - 1]
    site.before_each(operation, *[lambda: None] * which, other)
    handles.append(first.run(lambda session: session.handle))
    assert len(handles) == 2
    assert len(set(handles)) == 1
    assert first.cookie == second.cookie
    assert first.run(lambda session: session.handle) == handles[0]


@pytest.mark.parametrize("steps", range(1, 5))
def test_a_logout_beside_an_import(site: Site, old: OldFiles, steps: int) -> None:
    """It runs within a first request, before one of its calls, and ends the new session."""
    sid = old.add(_user_id="7")
    first, leaving = visit(site, sid), visit(site, sid)

    def logout() -> None:
        leaving.run(lambda session: session.destroy())

    operation, which = [("load", 0), ("create", 0), ("create", 1), ("save", 0)][steps - 1]
    site.before_each(operation, *[lambda: None] * which, logout)
    first.ask(lambda session: session.update(seen=1) if session else None)
    assert not old.has(sid)
    old.add(sid, _user_id="7")
    for visitor in (first, visit(site, sid)):
        assert "_user_id" not in visitor.run(dict)
