"""The cost of the journal: requests that create, save or end a session, with it on and off."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from flask import Flask, session

from benchmarks.backends.base import Backend
from benchmarks.measure import Effort, Spread, interleave, paired, ratios
from benchmarks.visitor import Visitor

CREATE, SAVE, LOGOUT = "create", "save", "logout"
LIMITS = {CREATE: 1.5, SAVE: 1.25, LOGOUT: 2.5}  # of the same request with the journal off


@dataclass(frozen=True)
class JournalCost:
    """A request's microseconds and round trips, with the journal off and on."""

    store: str
    verb: str
    off: Spread
    on: Spread
    ratio: Spread
    trips_off: float
    trips_on: float


def journal_costs(
    backends: Mapping[str, Callable[[], Backend]], effort: Effort
) -> list[JournalCost]:
    """Each store with its journal on and off, in turns."""
    return [cost for name, opener in backends.items() for cost in _costs(name, opener, effort)]


def _costs(store: str, opener: Callable[[], Backend], effort: Effort) -> Iterator[JournalCost]:
    with closing(opener()) as off, closing(opener()) as on:
        sides = {"off": (off, _calls(off, journal=False)), "on": (on, _calls(on, journal=True))}
        calls = {
            f"{verb} {side}": call
            for side, (_, verbs) in sides.items()
            for verb, call in verbs.items()
        }
        for verb in LIMITS:
            found: list[float] = []
            while not found:  # in a short run on a busy machine, every pair may be dropped
                figures = interleave({n: calls[n] for n in _needed(verb)}, effort)
                times = [_alone(verb, figures, side) for side in sides]
                found = ratios(times[1], times[0])
            trips = [
                sum(
                    sign * backend.traffic(verbs[name], effort.counted_requests).round_trips
                    for name, sign in _PARTS[verb].items()
                )
                for backend, verbs in sides.values()
            ]
            spreads = [Spread.of(each) for each in times]
            yield JournalCost(store, verb, *spreads, Spread.of(found), *trips)


# A logout needs a session, whose creation doesn't count.
_PARTS = {CREATE: {CREATE: 1}, SAVE: {SAVE: 1}, LOGOUT: {LOGOUT: 1, CREATE: -1}}


def _needed(verb: str) -> list[str]:
    return [f"{name} {side}" for name in _PARTS[verb] for side in ("off", "on")]


def _alone(verb: str, figures: dict[str, list[float]], side: str) -> list[float]:
    if verb == LOGOUT:
        return paired(figures, f"{verb} {side}", minus=f"{CREATE} {side}")
    return figures[f"{verb} {side}"]


def _calls(backend: Backend, *, journal: bool) -> dict[str, Callable[[], object]]:
    app = Flask("bench")
    app.secret_key = "a benchmark's secret key, of a sensible length"
    app.config["SESSION_JOURNAL"] = journal
    backend.ours(app)

    @app.get("/write")
    def write() -> str:
        session["number"] = secrets.randbits(30)
        return "ok"

    @app.get("/out")
    def out() -> str:
        session.destroy()  # type: ignore[attr-defined]  # Flask's type
        return "ok"

    def create() -> None:
        Visitor(app).visit("/write")

    def logout() -> None:
        visitor = Visitor(app)
        visitor.visit("/write")
        visitor.visit("/out")

    visitor = Visitor(app)
    visitor.visit("/write")
    return {CREATE: create, SAVE: visitor.prepare("/write"), LOGOUT: logout}
