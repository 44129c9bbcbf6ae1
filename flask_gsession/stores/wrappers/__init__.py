"""Stores around a store: the circuit breaker, the timer of the metrics, the trace of a session.

A wrapper is a store, holds a store, and passes on what it does not change: see ``Wrapper``.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from ...events import Events
from ..base import Store
from .breaker import GuardedStore
from .tracing import Call, traced
from .wrapper import CallMaker, CallWrapper, Wrapper

__all__ = ["Breaker", "Call", "CallMaker", "CallWrapper", "Wrapper", "compose"]


class Breaker(NamedTuple):
    """The settings of a circuit breaker: see ``GuardedStore``."""

    failures: int
    pause: float
    timeout: float
    events: Events


def compose(
    store: Store,
    *,
    breaker: Breaker | None = None,
    timer: CallMaker | None = None,
    trace: list[Call] | None = None,
) -> Store:
    """``store`` with the wrappers that are asked for, the first one innermost.

    ``timer`` makes each call and measures it. ``trace`` gets a ``Call`` for each. They also see
    what the breaker refuses. Each may be added later, around what was composed before.
    """
    if breaker is not None:
        store = GuardedStore(store, *breaker)
    if timer is not None:
        store = CallWrapper(store, timer)
    if trace is not None:
        store = CallWrapper(store, partial(traced, trace))
    return store
