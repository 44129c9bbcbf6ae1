"""How often, and for how long, a write that loses races is tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from ..errors import SessionConflict

ATTEMPTS = 25
BUDGETS = 5  # times the budget of a store call that a write may go on losing races
_LONGEST_PAUSE = 0.05  # seconds


def tries(store_timeout: float, lost: Callable[[], SessionConflict]) -> Iterator[int]:
    """Count lost races from 0, and wait a random while after each, the longer the more there were.

    Raises what ``lost`` returns after too many, or where they have taken too long.
    """
    end = 0.0  # of time.monotonic
    for losses in range(ATTEMPTS):
        if losses:
            now = time.monotonic()
            if losses == 1:
                end = now + BUDGETS * store_timeout
            elif now >= end:
                break
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.002 * 2**losses)))
        yield losses
    raise lost()
