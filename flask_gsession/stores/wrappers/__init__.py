"""Stores around a store: circuit breaker, near cache, timer for metrics, trace of a session.

A wrapper is a store that holds another store, and forwards the calls that it doesn't change: see
``Wrapper``.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from ...events import Events
from ..base import Clock, Store
from .breaker import GuardedStore
from .near_cache import NearCache
from .tracing import Call, traced
from .wrapper import CallMaker, CallWrapper, Wrapper

__all__ = ["Breaker", "Call", "CallMaker", "CallWrapper", "Near", "Wrapper", "compose"]


class Breaker(NamedTuple):
    """The settings of a circuit breaker: see ``GuardedStore``."""

    failures: int
    pause: float
    timeout: float
    events: Events


class Near(NamedTuple):
    """The settings of a near cache: see ``NearCache``."""

    bound: float
    max_bytes: int
    clock: Clock


def compose(
    store: Store,
    *,
    breaker: Breaker | None = None,
    near: Near | None = None,
    timer: CallMaker | None = None,
    trace: list[Call] | None = None,
) -> Store:
    """``store`` with the requested wrappers, the first one innermost.

    ``timer`` runs and measures each call; ``trace`` gets a ``Call`` for each. Both also see calls
    that the breaker refuses. You can add further wrappers to the result.
    """
    if breaker is not None:
        store = GuardedStore(store, *breaker)
    if near is not None:
        store = NearCache(store, *near)
    if timer is not None:
        store = CallWrapper(store, timer)
    if trace is not None:
        store = CallWrapper(store, partial(traced, trace))
    return store
