"""The metrics of an edge node, updated at the end of a request, at most once a second."""

from __future__ import annotations

import time
from contextlib import suppress

from ..errors import StoreUnavailable
from ..stores.parts import Edge
from .metrics_figures import Figures

_INTERVAL = 1.0  # seconds between two updates


class EdgeWatch:
    """Updates the figures about the changes that wait at the node for its centre."""

    def __init__(self, figures: Figures, edge: Edge, session: str) -> None:
        self._edge = edge
        self._cut_off = figures.edge_cut_off.labels(session)
        self._ends, self._changes = (
            figures.edge_queue.labels("ends"),
            figures.edge_queue.labels("changes"),
        )
        self._lag = figures.edge_lag.labels(session)
        self._dropped = figures.edge_dropped.labels(session)
        self._look_at = 0.0

    def observe(self, error: BaseException | None) -> None:
        """Called at the end of a request."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _INTERVAL
        self._cut_off.set(bool(self._edge.cut_off))
        with suppress(StoreUnavailable):
            figures = self._edge.figures()
            self._ends.set(figures.ends)
            self._changes.set(figures.changes)
            self._lag.set(figures.lag)
            self._dropped.set(figures.dropped)
