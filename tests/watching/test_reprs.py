"""No session value, token or payload stands in the ``repr`` of an object of ours.

Error trackers, debuggers and failing assertions show local variables by their ``repr``.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import msgspec
import pytest

import flask_gsession
from flask_gsession.config import Settings
from flask_gsession.testing import a_record
from tests.harness.apps import Site

SECRET = "diagnosis: plague"
WORDS = ("diagnosis", "plague")


def classes_of_ours() -> Iterator[type]:
    for found in pkgutil.walk_packages(flask_gsession.__path__, "flask_gsession."):
        module = importlib.import_module(found.name)
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                yield kind


def fields_of(kind: Any) -> dict[str, str]:
    """The fields of a struct, a named tuple or a dataclass, and their annotations."""
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        names = kind._fields
    elif issubclass(kind, msgspec.Struct):
        names = kind.__struct_fields__
    elif is_dataclass(kind):
        names = tuple(field.name for field in fields(kind))
    else:
        return {}
    noted: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        noted |= getattr(base, "__annotations__", {})
    return {name: str(noted[name]) for name in names}


def optional_in(kind: Any) -> set[str]:
    """The fields of a struct that have a default."""
    if not issubclass(kind, msgspec.Struct):
        return set()
    return {field.name for field in msgspec.structs.fields(kind) if not field.required}


def filling(annotation: str) -> Any:
    """Something of this type that holds a secret, if it can."""
    if "bytes" in annotation:
        return {"key": SECRET.encode()} if "dict" in annotation else SECRET.encode()
    if annotation == "Record":
        return a_record(lambda: 0.0, payload=SECRET.encode())
    if annotation in ("Any", "object"):
        return SECRET
    return None


# Their bytes are names of keys, cursors and numbers of servers.
OTHERS = {
    ("flask_gsession.stores.redis.scans", "Node"),
    ("flask_gsession.stores.redis.scans", "_Found"),
    ("flask_gsession.stores.redis.servers", "Servers"),
    ("flask_gsession.contrib.ratelimit_counting", "Limits"),
}
KINDS = [
    kind
    for kind in classes_of_ours()
    if fields_of(kind) and kind is not Settings and (kind.__module__, kind.__name__) not in OTHERS
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_no_repr_shows_contents(kind: Any) -> None:
    filled = {
        name: SECRET if name == "token" else filling(annotation)
        for name, annotation in fields_of(kind).items()
    }
    if any(value is not None for value in filled.values()):
        optional = optional_in(kind)
        shown = kind(**{k: v for k, v in filled.items() if v is not None or k not in optional})
        assert not any(word in repr(shown) + str(shown) for word in WORDS)
        if hasattr(shown, "__rich_repr__"):
            assert SECRET not in str(list(shown.__rich_repr__()))


def test_the_classes_that_hold_values_are_among_them() -> None:
    names = {kind.__name__ for kind in KINDS}
    assert {"Body", "Change", "Record", "Reference", "Loaded", "_Found", "Checked"} <= names


def test_no_object_of_a_request_shows_a_value(site: Site) -> None:
    """Whatever is alive while a session is read, changed and saved."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(note=SECRET, large=[SECRET] * 3000))
    shown: dict[str, str] = {}

    def look() -> None:
        for alive in gc.get_objects():
            kind = type(alive)
            if str(kind.__module__).startswith("flask_gsession"):
                shown[f"{kind.__module__}.{kind.__qualname__}"] = repr(alive)

    def view(session: Any) -> None:
        session["more"] = [session["note"], session["large"]]
        look()

    site.store.before("save", look)
    visitor.run(view)
    assert {
        "flask_gsession.values.merge.Change",
        "flask_gsession.stores.base.Record",
    } <= shown.keys()
    told = [name for name, text in shown.items() if any(word in text for word in WORDS)]
    assert told == []
    assert not [name for name, text in shown.items() if visitor.token in text]
