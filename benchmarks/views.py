"""The four views every candidate is timed on.

The same functions serve all candidates, on ``flask.session`` or, for the candidate without
sessions, on a plain dict. So two candidates differ only in the session.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from itertools import count
from typing import Any

from flask import Flask

from benchmarks.payloads import content

VIEWS = ("untouched", "read", "write", "counter")

SMALL = "small"
COUNT = "count"


def add_views(app: Flask, values: MutableMapping[str, Any]) -> None:
    """Registers the timed views, and ``/seed/<size>`` which fills the session."""
    fresh = count()

    @app.get("/seed/<int:size>")
    def seed(size: int) -> str:
        values.update(content(size))
        values[SMALL] = "seeded"
        values[COUNT] = 0
        return "ok"

    @app.get("/untouched")
    def untouched() -> str:
        return "ok"

    @app.get("/read")
    def read() -> str:
        return str(values[SMALL])

    @app.get("/write")
    def write() -> str:
        # A value never written before: a store that skips unchanged values must not win by it.
        values[SMALL] = written = f"value {next(fresh)}"
        return written

    @app.get("/counter")
    def counter() -> str:
        values[COUNT] += 1
        return str(values[COUNT])
