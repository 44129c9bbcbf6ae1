"""Every combination of store, payload, view and candidate, timed and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from benchmarks.backends.base import Backend, Traffic
from benchmarks.candidates import FLOOR, NONE, OURS, THEIRS, seeded_visitors
from benchmarks.measure import Effort, Spread, interleave, paired, ratios
from benchmarks.payloads import SIZES
from benchmarks.views import VIEWS

ON_STORE = (THEIRS, OURS, FLOOR)


@dataclass(frozen=True)
class Cell:
    """One candidate serving one view at one payload on one store.

    `us` is microseconds per request, `overhead` the part that the view without a session does not
    need. The ratios compare overheads and are taken round by round.
    """

    store: str
    view: str
    size: str
    candidate: str
    us: Spread
    overhead: Spread
    traffic: Traffic | None
    to_flask_session: Spread | None
    to_floor: Spread | None


def run_matrix(
    backends: Mapping[str, Callable[[], Backend]],
    sizes: Sequence[str],
    effort: Effort,
    say: Callable[[str], None],
) -> list[Cell]:
    """Measures all candidates on all backends. `say` receives a line of progress per payload."""
    cells: list[Cell] = []
    for store, open_backend in backends.items():
        for size in sizes:
            say(f"{store}, {size}")
            with closing(open_backend()) as backend:
                cells += _one_payload(backend, store, size, effort)
    return cells


def _one_payload(backend: Backend, store: str, size: str, effort: Effort) -> Iterable[Cell]:
    visitors = seeded_visitors(backend, SIZES[size])
    for view in VIEWS:
        calls = {name: visitor.prepare(f"/{view}") for name, visitor in visitors.items()}
        figures = interleave(calls, effort)
        overheads = {name: paired(figures, name, minus=NONE) for name in figures}
        for name in figures:
            yield Cell(
                store,
                view,
                size,
                name,
                us=Spread.of(figures[name]),
                overhead=Spread.of(overheads[name]),
                traffic=(
                    backend.traffic(calls[name], effort.counted_requests)
                    if name in ON_STORE
                    else None
                ),
                to_flask_session=_ratio(overheads, name, THEIRS),
                # An untouched session costs the bare driver nothing: there is no ratio to that.
                to_floor=_ratio(overheads, name, FLOOR) if view != "untouched" else None,
            )


def _ratio(overheads: Mapping[str, Sequence[float]], name: str, other: str) -> Spread | None:
    if name in (NONE, other):
        return None
    found = ratios(overheads[name], overheads[other])
    return Spread.of(found) if found else None
