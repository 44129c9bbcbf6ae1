"""How things are timed: interleaved rounds, fair garbage collection, medians with quartiles."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The median of a list of figures, and the quartiles it lies between."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        if len(figures) == 1:
            return cls(figures[0], figures[0], figures[0])
        q1, median, q3 = quantiles(figures, n=4, method="inclusive")
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Effort:
    """How long to measure. Rounds are how often each candidate takes its turn."""

    rounds: int
    batch_seconds: float
    counted_requests: int

    @property
    def as_data(self) -> dict[str, float]:
        return {
            "rounds": self.rounds,
            "batch_seconds": self.batch_seconds,
            "counted_requests": self.counted_requests,
        }


def interleave(calls: Mapping[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Times each call in turns, A B C A B C, so that drift of the machine hits all alike.

    A turn is a batch long enough to be timed well. Which candidate opens a round rotates, so
    that none always runs in the wake of the same neighbour. Returns microseconds per call,
    one figure per round.
    """
    names = list(calls)
    figures: dict[str, list[float]] = {name: [] for name in names}
    with settled_heap():
        batch = {name: _batch_size(call, effort.batch_seconds) for name, call in calls.items()}
        for turn in range(effort.rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                figures[name].append(time_batch(calls[name], batch[name]))
    return figures


def time_batch(call: Call, times: int) -> float:
    """Returns microseconds per call over one batch.

    The collector runs before the batch and stays on during it: everybody starts clean and pays
    for the garbage they make themselves, as in production.
    """
    gc.collect()
    repeat = range(times)
    begin = perf_counter()
    for _ in repeat:
        call()
    return (perf_counter() - begin) / times * 1e6


@contextmanager
def settled_heap() -> Iterator[None]:
    """Freezes the live objects, so that the garbage collector doesn't walk them again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def paired(figures: Mapping[str, Sequence[float]], name: str, minus: str) -> list[float]:
    """The cost of `name` minus the cost of `minus`, round by round."""
    return [mine - base for mine, base in zip(figures[name], figures[minus], strict=True)]


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round; a round in which the divisor drowned in noise is left out."""
    return [a / b for a, b in zip(mine, theirs, strict=True) if b > 0]


def _batch_size(call: Call, seconds: float) -> int:
    """Warms `call` up and returns how many of it fill `seconds`; for none, the least at once."""
    if not seconds:
        return 3
    for _ in range(5):
        call()
    once = min(time_batch(call, 5) for _ in range(3)) / 1e6
    return max(3, min(1_000, round(seconds / once)))
