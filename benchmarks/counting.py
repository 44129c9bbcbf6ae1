"""The cost of metrics for a store call: timing it, counting it, and counting its event."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flask import Flask

from benchmarks.measure import Effort, Spread, interleave, paired
from flask_gsession import Session
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.events import SessionSaved

LOAD, SAVE, EVENT = "a load", "a save", "the event of a save"
ONE, WORKERS = "one process", "several workers"


class Instant:
    """A store that does nothing."""

    def load(self, key: str) -> None: ...

    def save(self, *arguments: Any) -> None: ...

    create = renew = replace = delete = close = save


@dataclass(frozen=True)
class CountingCost:
    """The extra microseconds of one operation with metrics.

    ``mode``: whether figures are kept in the process, or in files, for one page of all workers.
    """

    operation: str
    mode: str
    us: Spread


def counting(effort: Effort) -> list[CountingCost]:
    """Times operations with and without metrics in turns, in a request; in both modes."""
    rows = _timed(effort, ONE)
    top = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:  # prometheus-client looks for it at its import
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.counting", json.dumps(asdict(effort))],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder, "PYTHONPATH": str(top)},
            cwd=top,
            stdout=subprocess.PIPE,
            check=True,
        )
    for row in json.loads(run.stdout):
        rows.append(CountingCost(row["operation"], row["mode"], Spread(**row["us"])))
    return rows


def _timed(effort: Effort, mode: str) -> list[CountingCost]:
    repositories = []
    for counted in (False, True):
        app = Flask(__name__)
        app.secret_key = "benchmark"
        ext = Session(app, store=Instant(), breaker_failures=0)
        if counted:
            SessionMetrics(app)
        repositories.append(app.extensions["gsession"][ext].repository)
    calls: dict[str, Callable[[], object]] = {}
    for name, repository in zip(("plain ", ""), repositories, strict=True):
        store, emit = repository.store, repository.events.emit
        calls[f"{name}{LOAD}"] = partial(store.load, "key")
        calls[f"{name}{SAVE}"] = partial(store.save, None, 1)
        calls[f"{name}{EVENT}"] = partial(emit, SessionSaved, "handle", 1000, 0)
    with app.test_request_context():
        figures = interleave(calls, effort)
    return [
        CountingCost(what, mode, Spread.of(paired(figures, what, minus=f"plain {what}")))
        for what in (LOAD, SAVE, EVENT)
    ]


def main(arguments: Sequence[str]) -> None:
    """Prints the rows of this process as JSON."""
    rows = _timed(Effort(**json.loads(arguments[0])), WORKERS)
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main(sys.argv[1:])
