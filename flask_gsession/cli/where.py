"""``--where KEY=VALUE``: which sessions a command is about."""

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

_NOTHING = object()  # no value has it; JSON's null has None


class NotCompared(Exception):
    """The value is a large one, which would have to be fetched from elsewhere."""


class Condition(NamedTuple):
    """A key, or a path into its value, and the value that a session must have there."""

    path: str
    text: str
    value: object  # what the text is as JSON; ``_NOTHING`` where it is none

    def holds(self, value: object) -> bool:
        """Whether this is the value that was asked for."""
        if isinstance(value, str | UUID | Decimal | timedelta):
            is_text = str(value) == self.text
        elif isinstance(value, date | time):  # a datetime is a date
            is_text = value.isoformat() == self.text
        else:
            is_text = False
        return is_text or _same(value, self.value)


class Where(click.ParamType[Condition]):
    """The text of a condition, as it is typed."""

    name = "condition"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Condition:
        """The condition in ``value``."""
        path, equals, text = str(value).partition("=")
        if not path or not equals:
            self.fail("write KEY=VALUE, for example user=mira or prefs.theme=dark", param, ctx)
        try:
            return Condition(path, text, json.loads(text))
        except (ValueError, RecursionError):
            return Condition(path, text, _NOTHING)


def all_hold(repository: Repository, record: Record, conditions: tuple[Condition, ...]) -> bool:
    """Whether a session meets all conditions. Decodes the values that these name, and no other.

    Raises ``UnreadableRecord``, and ``NotCompared`` where all depends on a large value.
    """
    if not conditions:
        return True
    body = repository.read(record.key, record)
    if body is None:
        return False
    now, large = repository.now(), False
    decoded: dict[str, object] = {}
    for condition in conditions:
        met = unknown = False
        for name, rest in _ways(condition.path):
            raw = body.values.get(name)
            if raw is None or expired(raw, now):
                continue
            if refers(raw):
                unknown = True
                continue
            if name not in decoded:
                decoded[name] = repository.codec.decode(split(raw)[1])
            met = met or any(map(condition.holds, _inside(decoded[name], rest)))
        if not met and not unknown:
            return False
        large = large or not met
    if large:
        raise NotCompared
    return True


def _ways(path: str) -> Iterator[tuple[str, list[str]]]:
    """The keys that a path may mean, each with what leads on: names of keys may have dots."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length]), parts[length:]


def _inside(value: Any, path: list[str]) -> Iterator[object]:
    """What a path leads to inside of a value."""
    if not path:
        yield value
        return
    if isinstance(value, dict):
        for length in range(len(path), 0, -1):
            name = ".".join(path[:length])
            for key in (name, int(name)) if _is_index(name) else (name,):
                if key in value:
                    yield from _inside(value[key], path[length:])
    elif isinstance(value, list | tuple) and _is_index(path[0]) and int(path[0]) < len(value):
        yield from _inside(value[int(path[0])], path[1:])


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 19


def _same(value: Any, asked: Any) -> bool:
    """Whether a value is what JSON says: ``true`` is not 1, and a tuple is as good as a list."""
    if isinstance(value, list | tuple) and isinstance(asked, list):
        return len(value) == len(asked) and all(map(_same, value, asked))
    if isinstance(value, dict) and isinstance(asked, dict):
        return value.keys() == asked.keys() and all(_same(value[key], asked[key]) for key in value)
    if isinstance(value, bool) or isinstance(asked, bool):
        return value is asked
    return bool(value == asked)
