"""An edge compared with its parts: settling with direct saves, its reads with SQLite's.

python -m benchmarks.edge prints it. Needs a Redis, as the tests start one.
"""

from __future__ import annotations

import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from flask import Flask

from flask_gsession import Session
from flask_gsession.errors import StoreUnavailable
from flask_gsession.processes import process
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.edge import EdgeStore
from flask_gsession.stores.sqlite import SQLiteStore
from tests.harness.servers import redis_server

SESSIONS, CHANGES = 1000, 10_000
LEAST_RATE = 0.3  # of the same saves made directly
_READS, _ROUNDS = 2000, 15


class SettlingCost(NamedTuple):
    """Seconds for the same changes, and the memory in MiB that settling added at its peak."""

    changes: int
    sessions: int
    queued: float
    settled: float
    direct: float
    grown: float

    @property
    def rate(self) -> float:
        """The rate of settling, to direct saves."""
        return self.direct / self.settled


def settling(url: str, sessions: int, changes: int) -> SettlingCost:
    """Queue and settle ``changes``, and make the same directly."""
    with tempfile.TemporaryDirectory() as folder:
        options = StoreOptions(prefix=f"bench-edge-{secrets.token_hex(4)}:", edge_sync=0)
        edge = EdgeStore(Path(folder, "edge"), open_store(url, options)[0], options)
        here, there = _app(edge), _app(open_store(url, options)[0])
        handles = [_new(there) for _ in range(sessions)]
        for handle in handles:  # a copy of each
            edge.load(handle)
        edge.link.mark_cut(StoreUnavailable("a benchmark"))
        queued = _seconds(lambda: _change(here, handles, changes))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results: list[object] = []
        settled = _seconds(lambda: results.append(edge.settle()))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        direct = _seconds(lambda: _change(there, handles, changes))
        figures = edge.figures()
        assert figures.changes == 0, results
        assert _total(there, handles) == 2 * changes, results
        for app in (here, there):
            app[1].store(app[0]).close()
        return SettlingCost(changes, sessions, queued, settled, direct, grown)


def reading(url: str) -> tuple[float, float]:
    """Microseconds of a fresh read at an edge that is connected, and of a load from SQLite."""
    with tempfile.TemporaryDirectory() as folder:
        options = StoreOptions(prefix=f"bench-edge-{secrets.token_hex(4)}:", edge_sync=0)
        edge = EdgeStore(Path(folder, "edge"), open_store(url, options)[0], options)
        plain = SQLiteStore(Path(folder, "plain"), options)
        app = _app(edge)
        handle = _new(app)
        near = edge.near
        assert near is not None
        record = edge.load(handle)
        assert record is not None
        plain.create(record)
        end = time.monotonic() + 20
        while near.peek(handle) is None:
            near.load_near(handle)
            assert time.monotonic() < end, "the edge proves nothing"
            time.sleep(0.01)
        mine: list[float] = []
        theirs: list[float] = []
        for _ in range(_ROUNDS):
            mine.append(_seconds(lambda: _repeat(near.peek, handle)))
            theirs.append(_seconds(lambda: _repeat(plain.load, handle)))
        edge.close()
        plain.close()
        return median(mine) / _READS * 1e6, median(theirs) / _READS * 1e6


def _app(store: Store) -> tuple[Flask, Session]:
    app = Flask(__name__)
    app.secret_key = "a benchmark"
    ext = Session(app, store=store, merge_policies={"n": "counter"}, newcomers_per_minute=None)
    return app, ext


def _new(app: tuple[Flask, Session]) -> str:
    with app[0].test_request_context():
        session = app[1].session
        session["n"] = 0
        session["cart"] = {"mug": 1, "note": "x" * 200}
        app[0].session_interface.save_session(app[0], session, app[0].response_class())
        assert session.handle is not None
        return session.handle


def _change(app: tuple[Flask, Session], handles: list[str], changes: int) -> None:
    with app[0].app_context():
        for number in range(changes):
            with app[1].open(handles[number % len(handles)]) as session:
                session["n"] += 1


def _total(app: tuple[Flask, Session], handles: list[str]) -> int:
    with app[0].app_context():
        peeked = [app[1].peek(handle) for handle in handles]
        return sum(0 if values is None else values["n"] for values in peeked)


def _repeat(read: Callable[[str], object], handle: str) -> None:
    for _ in range(_READS):
        read(handle)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    """Print the ratios; 1 if one misses its target."""
    process.serves = True  # or each call outside a request opens the file again
    url = redis_server().url
    missed = False
    for sessions, changes in ((SESSIONS, CHANGES), (CHANGES, CHANGES)):
        cost = settling(url, sessions, changes)
        missed |= sessions == SESSIONS and cost.rate < LEAST_RATE
        print(
            f"{changes:,} queued changes of {sessions:,} sessions: settled in "
            f"{cost.settled:.2f} s, the same saves directly in {cost.direct:.2f} s, a rate of "
            f"{cost.rate:.2f} of theirs (target for {SESSIONS:,}: {LEAST_RATE}); queued in "
            f"{cost.queued:.2f} s; {cost.grown:.1f} MiB more at the peak"
        )
    mine, theirs = reading(url)
    missed |= mine > 1.25 * theirs
    print(
        f"a fresh read at a connected edge takes {mine:.1f} us, a load from SQLite "
        f"{theirs:.1f} us: {mine / theirs:.2f} of it (target: 1)"
    )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
