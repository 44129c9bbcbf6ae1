"""Checks the arguments of rate limits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import ParamSpec, TypeVar

from limits import RateLimitItem, parse_many

from ..errors import SettingError

_ALLOWED = 'allowed: a limit such as "100/minute", or several: "10/second; 1000/day"'
METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])

P = ParamSpec("P")
T = TypeVar("T")


def called(value: T | Callable[[], T]) -> T:
    return value() if callable(value) else value


def checked_function(name: str, given: Callable[P, T] | None) -> Callable[P, T] | None:
    if given is not None and not callable(given):
        raise SettingError(f"{name} is {given!r}; allowed: a function")
    return given


def parsed(limit: object) -> list[RateLimitItem]:
    if not isinstance(limit, str):
        raise SettingError(f"The rate limit is {limit!r}; {_ALLOWED}")
    return _parsed_text(limit)


@lru_cache
def _parsed_text(limit: str) -> list[RateLimitItem]:
    try:
        items = parse_many(limit)
    except ValueError:
        items = []
    if not items or not all(item.amount and item.get_expiry() for item in items):
        raise SettingError(f"The rate limit is {limit!r}; {_ALLOWED}")
    return items


def checked_cost(cost: object) -> int:
    if type(cost) is not int or cost < 0:
        raise SettingError(f"The cost of a request is {cost!r}; allowed: a whole number, from 0")
    return cost


def checked_methods(methods: Collection[str]) -> frozenset[str]:
    named = frozenset(methods)
    if isinstance(methods, str) or not named <= METHODS:
        raise SettingError(
            f"methods is {methods!r}; allowed: a list of {', '.join(sorted(METHODS))}"
        )
    return named | {"HEAD"} if "GET" in named else named
