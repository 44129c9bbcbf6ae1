"""Starts the trace of a session that is debugged."""

from __future__ import annotations

import time

from ..stores.wrappers import Call
from ..watching.tracing import Trace, traced
from .lifecycle import Lifecycle


def start_trace(life: Lifecycle, trace: Trace) -> None:
    """Record in ``trace`` what this request does from now on."""
    life.trace = trace
    life.repository = traced(life.repository, trace)


def trace_if_debugged(life: Lifecycle, operation: str, began: float, until: int) -> None:
    """Start a trace if this session is still debugged, beginning with this store operation."""
    if until <= life.repository.now():
        return
    if life.trace is None:
        start_trace(life, Trace(one_session=True))
        assert life.trace is not None
        life.trace.calls.append(Call(operation, time.perf_counter() - began, None))
