"""G8: a session that was stored under higher limits can be read, kept, made smaller and ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.apps import SiteMaker, Visitor

DEEP = {"items": [{"options": {"colour": ["red", "blue"]}}], "n": [1, 2, 3]}  # 5 levels
WIDE = {f"seen-{n}": ["page"] * 50 for n in range(40)}  # 40 keys, about 15 KB
LARGE = {"text": "x" * 3000, "rows": [["y" * 100] * 40, "z"]}

LOWERED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "depth": (DEEP, {}, {"max_depth": 2}),
    "depth, in places of their own": (DEEP, {"spill_bytes": 256}, {"max_depth": 2}),
    "keys": (WIDE, {}, {"max_keys": 20}),
    "bytes": (WIDE, {}, {"max_bytes": 1000}),
    "bytes, debugged": (WIDE, {}, {"max_bytes": 1000, "debug": True}),
    "all, debugged": (
        DEEP | WIDE, {}, {"max_depth": 2, "max_keys": 9, "max_bytes": 999, "debug": True}
    ),
    "large values": (LARGE, {"spill_bytes": 1000}, {"spill_bytes": 1000, "max_value_bytes": 500}),
    "of what was small": (LARGE, {}, {"spill_bytes": 300, "max_value_bytes": 500}),
    "all in the record": (LARGE, {"spill_bytes": 1000}, {"spill_bytes": None, "max_bytes": 300}),
}  # fmt: skip
lowered = pytest.mark.parametrize("what", LOWERED)


def before_and_after(make_site: SiteMaker, what: str) -> tuple[dict[str, Any], Visitor]:
    """The contents of a session, and its visitor after the limits were lowered."""
    values, at_first, later = LOWERED[what]
    old = make_site(**at_first)
    visitor = old.visitor()
    visitor.run(lambda session: session.update({"user": "ada", **values}))
    assert visitor.cookie is not None
    config = {"PROPAGATE_EXCEPTIONS": False}
    return {"user": "ada", **values}, make_site(store=old.store, config=config, **later).visitor(
        visitor.cookie
    )


@lowered
def test_read_values_are_not_checked(make_site: SiteMaker, what: str) -> None:
    values, visitor = before_and_after(make_site, what)

    def view(session: Any) -> dict[str, Any]:
        found = dict(session)
        assert not session.modified
        session.update(found)  # equal values are no change
        return found

    for _ in range(2):
        assert visitor.run(view) == values


@lowered
def test_changes_that_do_not_grow_are_saved(make_site: SiteMaker, what: str) -> None:
    values, visitor = before_and_after(make_site, what)
    steps: list[Callable[[Any], object]] = [
        lambda session: session.update(user="eve"),
        lambda session: session.rotate(),
        lambda session: session.set_lifetime(1000),
        lambda session: session.update_atomic("user", str.upper),
    ]
    for step in steps:
        visitor.run(step)
        assert visitor.run(lambda session: {**session, "user": "ada"}) == values


@lowered
def test_changes_that_shrink_the_session_are_saved(make_site: SiteMaker, what: str) -> None:
    values, visitor = before_and_after(make_site, what)
    for key in [key for key in values if key != "user"][:3]:
        visitor.run(lambda session, key=key: shorten(session[key]) if not isinstance(
            session[key], str) else session.update({key: session[key][1:]}))  # fmt: skip
        values[key] = visitor.run(lambda session, key=key: session[key])
        assert len(str(values[key])) < len(str(LOWERED[what][0][key]))
        visitor.run(lambda session, key=key: session.update_atomic(key, lambda value: value[:-1])
                    if isinstance(session[key], (str, list)) else None)  # fmt: skip
        visitor.run(lambda session, key=key: session.pop(key))
        del values[key]
        assert visitor.run(lambda session: session.keys()) == values.keys()
    visitor.run(lambda session: session.pop("user"))
    assert "user" not in visitor.run(dict)
    visitor.run(lambda session: session.destroy())
    assert visitor.run(dict) == {}


def shorten(value: Any) -> None:
    """Remove an item from deep inside."""
    while isinstance(value, dict):
        value = next(iter(value.values()))
    while isinstance(value[0], (dict, list)):
        value = value[0]
        while isinstance(value, dict):
            value = next(iter(value.values()))
    value.pop()


@lowered
def test_changes_that_grow_are_refused_and_change_nothing(make_site: SiteMaker, what: str) -> None:
    values, visitor = before_and_after(make_site, what)
    key = next(key for key in values if key != "user")
    grown: dict[str, Callable[[Any], object]] = {
        "depth": lambda session: session.update({key: [session[key]]}),
        "keys": lambda session: session.update(more=1),
        "bytes": lambda session: session.update(user="ada" * 20),
        "value": lambda session: session.update({key: [session[key], "more"]}),
    }
    for limit, grow in grown.items():
        concerns = limit in what or what.startswith("all, ") or (
            limit == "value" and ("large" in what or "small" in what))  # fmt: skip
        if concerns:
            assert visitor.ask(grow).status_code == 500, limit
            assert visitor.run(dict) == values


def test_a_session_that_shrinks_may_hold_new_keys(make_site: SiteMaker) -> None:
    values, visitor = before_and_after(make_site, "keys")

    def view(session: Any) -> None:
        session.clear()
        session.update(dict.fromkeys(map(str, range(len(values))), 0))

    visitor.run(view)
    assert len(visitor.run(dict)) == len(values)
    assert visitor.ask(lambda session: session.update(more=1)).status_code == 500


def test_a_merge_makes_no_value_longer(make_site: SiteMaker) -> None:
    old = make_site(merge_policies={"cart": "dict"})
    visitor = old.visitor()
    visitor.run(lambda session: session.update(cart={"a": [[1]], "b": [[2]], "c": [[3]]}))
    site = make_site(store=old.store, merge_policies={"cart": "dict"}, max_depth=2)
    visitor = site.visitor(visitor.cookie)
    other = visitor.another_tab()
    site.before_a_write(lambda: other.run(lambda session: session["cart"].pop("a") and None))
    visitor.run(lambda session: session["cart"].pop("b") and None)
    assert visitor.run(dict) == {"cart": {"c": [[3]]}}
