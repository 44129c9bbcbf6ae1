"""The retry loop of every write that can lose a race against another writer.

Session changes go through ``write``. Records of other kinds do as well, by ``Repository.update``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..errors import Gone, GSessionError, KeyTaken, SessionConflict, Stale

S = TypeVar("S")
R = TypeVar("R")

ATTEMPTS = 25
BUDGETS = 5  # how long a write may keep losing races, in time budgets of a store call
_LONGEST_PAUSE = 0.05  # seconds
# For records that hundreds of requests may write at the same time:
_PATIENT_ATTEMPTS, _PATIENT_BUDGETS, _PATIENT_PAUSE = 1000, 20, 0.5


def tries(
    store_timeout: float,
    conflict: Callable[[], GSessionError] = SessionConflict,
    *,
    patient: bool = False,
) -> Iterator[int]:
    """Count lost races from 0, and pause at random after each. The pauses grow.

    Raises ``conflict()`` after too many attempts, or when they have taken too long. ``patient``
    allows more of both, for a record that many clients share.
    """
    end = 0.0  # of time.monotonic
    attempts, budgets, longest = ATTEMPTS, BUDGETS, _LONGEST_PAUSE
    if patient:
        attempts, budgets, longest = _PATIENT_ATTEMPTS, _PATIENT_BUDGETS, _PATIENT_PAUSE
    for losses in range(attempts):
        if losses:
            now = time.monotonic()
            if losses == 1:
                end = now + budgets * store_timeout
            elif now >= end:
                break
            time.sleep(random.uniform(0, min(longest, 0.002 * 2 ** min(losses, 30))))
        yield losses
    raise conflict()


def write(
    prepare: Callable[[], S | None],
    send: Callable[[S, int], R],
    tries: Callable[[], Iterator[int]],
) -> R | None:
    """Call ``prepare`` and ``send``, and repeat both after each lost race.

    ``prepare`` loads the stored state after a lost race, and returns the next step. It returns None
    if there is nothing to send, for example because it finds a version that it has sent before.
    ``send`` makes one atomic step in the store, and raises ``Stale``, ``Gone`` or ``KeyTaken`` if
    another writer was faster. It gets the number of lost races, which ``tries()`` counts.
    """
    losses, counted = 0, None
    while True:
        step = prepare()
        if step is None:
            return None
        try:
            return send(step, losses)
        except (Stale, Gone, KeyTaken):
            if counted is None:
                counted = tries()
                next(counted)  # the race that was just lost
            losses = next(counted)
