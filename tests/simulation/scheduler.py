"""Runs requests as greenlets, one at a time, and decides at every pause which one continues or
fails.

Time only passes when the scheduler moves the clock. A sleep is a pause like any other.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from random import Random
from unittest import mock

from greenlet import getcurrent, greenlet


class Killed(BaseException):
    """The process of a request died. No `Exception`: nothing may catch it."""


class Interrupted(Exception):
    """Raised by a signal anywhere in a request, as by a worker's timeout."""


class Fault(Enum):
    """A fault at a pause."""

    NONE = "none"
    BEFORE = "unavailable, nothing done"
    AFTER = "unavailable, done: the answer is lost"
    DIES_BEFORE = "the process dies, nothing done"
    DIES_AFTER = "the process dies, done"
    STRUCK_BEFORE = "interrupted, nothing done"
    STRUCK_AFTER = "interrupted, done"
    LATE = "unavailable, on its way"
    STRUCK_LATE = "interrupted, on its way"
    CROSSED = "the answer to another request"
    LOST = "the response is lost"


_NONE = (Fault.NONE,)
_DIES = (Fault.DIES_BEFORE,)
_WRITE = (
    Fault.BEFORE,
    Fault.BEFORE,
    Fault.AFTER,
    Fault.AFTER,
    Fault.AFTER,
    Fault.STRUCK_BEFORE,
    Fault.STRUCK_AFTER,
    Fault.STRUCK_AFTER,
    Fault.DIES_BEFORE,
    Fault.DIES_AFTER,
)
_SENT = (*_WRITE, Fault.LATE, Fault.STRUCK_LATE, Fault.STRUCK_LATE)

#: Possible faults, by the call that the request waits for.
_POSSIBLE = {
    "start": _NONE,
    "sleep": (*_NONE, *_NONE, *_DIES, Fault.STRUCK_BEFORE),
    "think": (*_NONE, *_NONE, *_DIES),
    "load": (
        Fault.BEFORE,
        Fault.BEFORE,
        Fault.CROSSED,
        Fault.CROSSED,
        Fault.STRUCK_BEFORE,
        Fault.DIES_BEFORE,
    ),
    "create": _SENT,
    "save": _SENT,
    "renew": _WRITE,
    "replace": _SENT,
    "delete": _WRITE,
    "response": (Fault.LOST, Fault.DIES_BEFORE),
}


def _struck(possible: tuple[Fault, ...]) -> tuple[Fault, ...]:
    """The interrupts among these."""
    strikes = (Fault.STRUCK_BEFORE, Fault.STRUCK_AFTER, Fault.STRUCK_LATE)
    return tuple(fault for fault in possible if fault in strikes) or _NONE


class Task(greenlet):
    """One running request. It runs until it pauses; the scheduler says how it goes on."""

    def __init__(self, name: str, run: Callable[[], object]) -> None:
        def go(fault: Fault) -> None:
            with contextlib.suppress(Killed):
                run()

        super().__init__(go)
        self.gr_context = contextvars.copy_context()
        self.name = name
        self.waits_for = "start"
        self.killed = False
        self.given_up = False
        self.struck = False

    def pause(self, waits_for: str) -> Fault:
        """Let others go first. Raises `Killed` where the process dies here."""
        if self.killed:
            raise Killed
        self.waits_for = waits_for
        assert self.parent is not None
        fault: Fault = self.parent.switch()
        if fault is Fault.DIES_BEFORE:
            self.killed = True
            raise Killed
        if fault is Fault.STRUCK_BEFORE:
            self.struck = True
            raise Interrupted
        return fault

    def end(self) -> None:
        """Unwind a request that will not go on."""
        self.killed = self.given_up = True
        if self:  # one that has started
            self.throw(Killed)


class VirtualClock:
    """The time of a simulation; it only moves when it is turned."""

    def __init__(self) -> None:
        self.now = 0  # milliseconds

    def __call__(self) -> float:
        return (self.now + 0.5) / 1000  # half a millisecond keeps rounding away


class Scheduler:
    """Picks the next request, its fault and the time from one random generator.

    `moments` gives the points in time (milliseconds) that are of interest, such as expiries.
    `deliver` lets a write arrive that is still on its way to the store, or not yet.
    """

    def __init__(
        self,
        clock: VirtualClock,
        moments: Callable[[], list[int]],
        trace: Callable[[str], None],
        deliver: Callable[[Random], None] = lambda rng: None,
    ) -> None:
        self._clock = clock
        self._moments = moments
        self._deliver = deliver
        self._trace = trace
        #: how often a request went on from each kind of pause
        self.steps: Counter[str] = Counter()

    def run(
        self,
        tasks: Iterable[Task],
        rng: Random,
        *,
        fault_rate: float = 0,
        clock_rate: float = 0,
        stay: float = 0,
        strikes: bool = False,
        together: bool = False,
    ) -> None:
        """Run all tasks to their ends. Raises a task's error, and ends the others."""
        waiting = list(tasks)
        last: Task | None = None
        try:
            while waiting:
                if clock_rate and rng.random() < clock_rate:
                    self._turn_clock(rng)
                self._deliver(rng)
                choice = waiting
                if together:
                    behind = [task for task in waiting if task.waits_for in ("start", "load")]
                    choice, together = behind or waiting, bool(behind)
                if last in choice and rng.random() < stay:
                    task = last
                else:
                    task = choice[int(rng.random() * len(choice))]
                assert task is not None
                fault = Fault.NONE
                if fault_rate and rng.random() < fault_rate:
                    possible = _POSSIBLE[task.waits_for]
                    fault = rng.choice(_struck(possible) if strikes else possible)
                    if fault is not Fault.NONE:
                        self._trace(f"{task.name:4} !! {fault.value} ({task.waits_for})")
                self.steps[task.waits_for] += 1
                task.switch(fault)
                if task.dead:
                    waiting.remove(task)
                last = task
        finally:
            for task in waiting:
                task.end()

    def _turn_clock(self, rng: Random) -> None:
        seconds = rng.choice((1, 1, 3, 9, 10, 11, 30, 95, 111, None, None, None, None))
        if seconds is not None:
            self._clock.now += seconds * 1000
        else:
            ahead = [moment for moment in self._moments() if moment - 1 > self._clock.now]
            if not ahead:
                return
            self._clock.now = rng.choice(ahead) - rng.choice((0, 1))
        self._trace(f"     == {self._clock.now / 1000:.3f} s")


def current_task() -> Task | None:
    """The simulated request that runs now; None outside of any."""
    task = getcurrent()
    return task if isinstance(task, Task) else None


@contextlib.contextmanager
def simulated_surroundings() -> Iterator[None]:
    """Inside simulated requests, sleeping is a pause, and chance repeats itself.

    Other threads and greenlets notice nothing.
    """
    real_sleep, real_uniform, real_bits = time.sleep, random.uniform, secrets.randbits
    numbers = itertools.count(1)

    def sleep(seconds: float) -> None:
        task = current_task()
        if task is None:
            real_sleep(seconds)
        else:
            task.pause("sleep")

    def uniform(low: float, high: float) -> float:
        return high if current_task() else real_uniform(low, high)

    def randbits(count: int) -> int:
        return next(numbers) if current_task() else real_bits(count)

    with (
        mock.patch.object(time, "sleep", sleep),
        mock.patch.object(random, "uniform", uniform),
        mock.patch.object(secrets, "randbits", randbits),
    ):
        yield
