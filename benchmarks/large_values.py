"""The cost of a large value for reads of other keys of its session. The promise: none."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

from flask import Flask, session

from benchmarks.backends.base import Backend
from benchmarks.measure import Effort, Spread, interleave, ratios
from benchmarks.visitor import Visitor

SMALL, LARGE = 1_000, 10_000_000
"""Bytes beside the key that is read."""


@dataclass(frozen=True)
class LargeCost:
    """A request that reads a small key, beside 10 MB and beside 1 KB, in microseconds."""

    store: str
    beside_small: Spread
    beside_large: Spread
    ratio: Spread


def large_values(
    backends: Mapping[str, Callable[[], Backend]], effort: Effort, size: int = LARGE
) -> list[LargeCost]:
    """Times the two in turns, on each store."""
    return [_timed(store, open_backend, effort, size) for store, open_backend in backends.items()]


def _timed(store: str, open_backend: Callable[[], Backend], effort: Effort, size: int) -> LargeCost:
    with closing(open_backend()) as backend:
        calls = {
            str(beside): _visitor(backend, beside).prepare("/read") for beside in (SMALL, size)
        }
        figures = interleave(calls, effort)
    small, large = figures.values()
    return LargeCost(store, Spread.of(small), Spread.of(large), Spread.of(ratios(large, small)))


def _visitor(backend: Backend, beside: int) -> Visitor:
    app = Flask("bench")
    app.secret_key = "a benchmark's secret key, of a sensible length"
    backend.ours(app)

    @app.get("/seed")
    def seed() -> str:
        session["small"] = "seeded"
        session["large"] = os.urandom(beside)
        return "ok"

    @app.get("/read")
    def read() -> str:
        return str(session["small"])

    @app.get("/check")
    def check() -> str:
        return str(len(session["large"]))

    visitor = Visitor(app)
    visitor.visit("/seed")
    if visitor.visit("/check") != str(beside):
        raise RuntimeError("what was written to the session cannot be read back")
    return visitor
