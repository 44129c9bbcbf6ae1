"""Ways to break Flask-GSession, to see that the harness finds out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flask_gsession.errors import Gone, Stale


def ignore_versions(repository: Any) -> None:
    """A save goes over whatever is there."""
    store = repository.store
    save = store.save

    def broken(record: Any, expected_version: int, *more: Any, **options: Any) -> None:
        there = store.load(record.key)
        save(record, expected_version if there is None else there.version, *more, **options)

    store.save = broken


def create_on_save(repository: Any) -> None:
    """A save creates a missing record."""
    store = repository.store
    save = store.save

    def broken(record: Any, *more: Any, **options: Any) -> None:
        try:
            save(record, *more, **options)
        except Gone:
            store.create(record)

    store.save = broken


def answer_from_memory(repository: Any) -> None:
    """Each worker caches its loads, and never learns of a logout elsewhere."""
    store = repository.store
    load = store.load
    cache: dict[str, tuple[float, Any]] = {}

    def broken(key: str) -> Any:
        then, record = cache.get(key, (0.0, None))
        if record is None or time.monotonic() - then > 0.2:
            fresh = load(key)
            record = fresh if fresh is not None else record
            cache[key] = (time.monotonic(), record)
        return record

    store.load = broken


def apply_twice(repository: Any) -> None:
    """Some saves are applied and called stale, so that they are done again."""
    store = repository.store
    save = store.save
    saves = 0

    def broken(record: Any, *more: Any, **options: Any) -> None:
        nonlocal saves
        save(record, *more, **options)
        saves += 1
        if saves % 10 == 0:
            raise Stale

    store.save = broken


def mix_up(repository: Any) -> None:
    """Some requests get the session that was asked for before."""
    find = repository.find
    last: Any = None
    looks = 0

    def broken(key: str, *more: Any) -> Any:
        nonlocal last, looks
        looks += 1
        if looks % 10 == 0 and last is not None:
            return last
        last = find(key, *more)
        return last

    repository.find = broken


def forget_rotation(repository: Any) -> None:
    """A rotation leaves the old session where it was."""
    store = repository.store
    replace = store.replace

    def broken(key: str, record: Any, expected_version: int, *more: Any, **options: Any) -> None:
        old = store.load(key)
        replace(key, record, expected_version, *more, **options)
        if old is not None:
            store.delete(key)
            store.create(record)
            store.create(old)

    store.replace = broken


def dawdle(repository: Any) -> None:
    """Some loads take their time."""
    store = repository.store
    load = store.load

    def broken(key: str) -> Any:
        if key[0] in "ABCDEF":
            time.sleep(4)
        return load(key)

    store.load = broken


BREAKS: dict[str, Callable[[Any], None]] = {
    "ignore versions": ignore_versions,
    "create on save": create_on_save,
    "answer from memory": answer_from_memory,
    "apply twice": apply_twice,
    "mix up": mix_up,
    "forget rotation": forget_rotation,
    "dawdle": dawdle,
}
