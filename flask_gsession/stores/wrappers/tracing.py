"""Each call of a store, timed and noted for the debug dump of one session."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

from ..support import count_round_trips


class Call(NamedTuple):
    """One call of the store; ``trips`` is None if the store doesn't count round trips."""

    operation: str
    seconds: float
    trips: int | None
    result: str = "ok"


def traced(calls: list[Call], operation: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call, time it, and add it to ``calls``."""
    result = "ok"
    start = perf_counter()
    with count_round_trips() as trips:
        try:
            answer = method(*arguments)
            if answer is None and operation == "load":
                result = "nothing"
            return answer
        except BaseException as error:
            result = type(error).__name__
            raise
        finally:
            calls.append(Call(operation, perf_counter() - start, trips.count, result))
