"""``--where KEY=VALUE``: conditions on the values of a session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import click

from ..repository.repository import Repository
from ..stores import Record
from ..values.marks import expired, split
from ..values.references import refers

_NO_JSON = object()  # not equal to any value; None would equal JSON's null


class NotCompared(Exception):
    """The value is a large value, which isn't loaded for a comparison."""


class Condition(NamedTuple):
    """A key, or a path into its value, and the required value."""

    path: str
    text: str
    value: object  # the text parsed as JSON, or ``_NO_JSON``

    def holds(self, value: object) -> bool:
        """Whether ``value`` is the required value."""
        if isinstance(value, str | UUID | Decimal | timedelta):
            is_text = str(value) == self.text
        elif isinstance(value, date | time):  # a datetime is a date
            is_text = value.isoformat() == self.text
        else:
            is_text = False
        return is_text or _same(value, self.value)


class Where(click.ParamType[Condition]):
    """Parses a condition."""

    name = "condition"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Condition:
        """Parse ``value``."""
        path, equals, text = str(value).partition("=")
        if not path or not equals:
            self.fail("write KEY=VALUE, for example user=mira or prefs.theme=dark", param, ctx)
        try:
            return Condition(path, text, json.loads(text))
        except (ValueError, RecursionError):
            return Condition(path, text, _NO_JSON)


def all_hold(repository: Repository, record: Record, conditions: tuple[Condition, ...]) -> bool:
    """Whether a session meets all conditions. Decodes only the values that they name.

    Raises ``UnreadableRecord``, and ``NotCompared`` if the result depends on a large value.
    """
    if not conditions:
        return True
    body = repository.records.read(record.key, record)
    if body is None:
        return False
    now, large = repository.now(), False
    decoded: dict[str, object] = {}
    for condition in conditions:
        met = unknown = False
        for name, rest in _splits(condition.path):
            raw = body.values.get(name)
            if raw is None or expired(raw, now):
                continue
            if refers(raw):
                unknown = True
                continue
            if name not in decoded:
                decoded[name] = repository.codec.decode(split(raw)[1])
            met = met or any(map(condition.holds, _follow(decoded[name], rest)))
        if not met and not unknown:
            return False
        large = large or not met
    if large:
        raise NotCompared
    return True


def _splits(path: str) -> Iterator[tuple[str, list[str]]]:
    """The ways to split a path into a key and the rest, since keys may contain dots."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length]), parts[length:]


def _follow(value: Any, path: list[str]) -> Iterator[object]:
    """The values inside ``value`` that a path may mean."""
    if not path:
        yield value
        return
    if isinstance(value, dict):
        for length in range(len(path), 0, -1):
            name = ".".join(path[:length])
            for key in (name, int(name)) if _is_index(name) else (name,):
                if key in value:
                    yield from _follow(value[key], path[length:])
    elif isinstance(value, list | tuple) and _is_index(path[0]) and int(path[0]) < len(value):
        yield from _follow(value[int(path[0])], path[1:])


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 19


def _same(value: Any, asked: Any) -> bool:
    """Whether a value equals the JSON: ``true`` is not 1, and a tuple equals a list."""
    if isinstance(value, list | tuple) and isinstance(asked, list):
        return len(value) == len(asked) and all(map(_same, value, asked))
    if isinstance(value, dict) and isinstance(asked, dict):
        return value.keys() == asked.keys() and all(_same(value[key], asked[key]) for key in value)
    if isinstance(value, bool) or isinstance(asked, bool):
        return value is asked
    return bool(value == asked)
