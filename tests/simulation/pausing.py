"""A memory store whose calls wait their turn and may fail, and the search for a bad schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flask_gsession import StoreUnavailable
from flask_gsession.errors import Gone, LeaseLost, Stale
from flask_gsession.stores import StoreOptions
from flask_gsession.stores.memory import MemoryStore

from .scheduler import (
    Fault,
    Interrupted,
    Killed,
    VirtualClock,
    current_task,
    simulated_surroundings,
)


class Violation(BaseException):
    """A guarantee was broken."""


class PausingStore(MemoryStore):
    """Subclasses put each call into ``with self.call(kind)``."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(StoreOptions(clock=clock))
        self.counts: Counter[str] = Counter()

    @contextmanager
    def call(self, kind: str) -> Iterator[None]:
        task = current_task()
        fault = task.pause(kind) if task else Fault.NONE
        if fault in (Fault.BEFORE, Fault.CROSSED):
            raise StoreUnavailable("simulated: nothing done")
        try:
            yield
        except (Stale, Gone, LeaseLost) as error:
            self.counts[type(error).__name__] += 1
            raise
        if fault is Fault.AFTER:
            raise StoreUnavailable("simulated: the answer is lost")
        if fault is Fault.STRUCK_AFTER:
            raise Interrupted
        if fault is Fault.DIES_AFTER:
            assert task is not None
            task.killed = True
            raise Killed


def search(schedule: Callable[[int], Any], seeds: range) -> tuple[int, str, Counter[str]]:
    """The first seed that violates a guarantee (-1: none), how, and the number of each event."""
    counts: Counter[str] = Counter()
    with simulated_surroundings():
        for seed in seeds:
            played = schedule(seed)
            try:
                played.play()
            except Violation as violation:
                return seed, str(violation), counts
            counts += played.outcomes + played.store.counts
    return -1, "", counts
