"""The command line: ``python -m benchmarks`` from the top of the repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from benchmarks.backends.base import Backend
from benchmarks.environment import environment
from benchmarks.journal import journal_costs
from benchmarks.large_values import large_values
from benchmarks.matrix import run_matrix
from benchmarks.measure import Effort
from benchmarks.payloads import SIZES
from benchmarks.report import Results, markdown
from benchmarks.targets import judge

STORES = ("redis", "mongodb", "sqlite")
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"

FULL = Effort(rounds=21, batch_seconds=0.02, counted_requests=50)
QUICK = Effort(rounds=5, batch_seconds=0.005, counted_requests=10)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    results = measure(
        stores=options.stores,
        sizes=options.sizes,
        effort=QUICK if options.quick else FULL,
        sessions=500 if options.quick else 10_000,
        many=10_000 if options.quick else 1_000_000,
        with_growth=options.million,
        say=partial(print, file=sys.stderr, flush=True),
    )
    for section in results.sections():
        print(section.as_text())
    # A quick run is too rough to be published by accident.
    directory = options.out or (None if options.quick else DOCS)
    if directory is not None:
        write(results, directory)
    missed = not all(target.met for target in results.targets)
    return 1 if options.check and missed else 0


def measure(
    *,
    stores: Sequence[str],
    sizes: Sequence[str],
    effort: Effort,
    sessions: int,
    many: int,
    with_growth: bool,
    say: Callable[[str], None],
) -> Results:
    """Does the whole run.

    `sessions` is how many are created to weigh one; `many` how many must not slow Redis down.
    """
    backends = {store: _opener(store) for store in stores}
    found = environment()
    for open_backend in backends.values():
        with closing(open_backend()) as backend:
            found |= backend.versions()
    results = Results(effort, found, run_matrix(backends, sizes, effort, say))
    say("large values")
    results.large = large_values(backends, effort)
    say("journal")
    results.journal = journal_costs(backends, effort)
    if "redis" in backends:
        _measure_on_redis(results, sessions, many if with_growth else None, say)
    results.targets = judge(
        results.cells,
        results.own_cpu,
        results.weights,
        results.growth,
        results.typed,
        results.counting,
        results.large,
        results.sharing,
        results.near,
        results.users,
        results.journal,
    )
    return results


def _measure_on_redis(
    results: Results, sessions: int, many: int | None, say: Callable[[str], None]
) -> None:
    from benchmarks import footprint
    from benchmarks.counting import counting
    from benchmarks.footprint import FEW
    from benchmarks.near_cache import near_cache
    from benchmarks.own_cpu import own_cpu
    from benchmarks.sharing import sharing
    from benchmarks.typed_keys import typed_keys
    from benchmarks.users import users

    url = _redis_url()
    say("own time")
    results.own_cpu = own_cpu(results.effort)
    say("typed keys")
    results.typed = typed_keys(results.effort)
    say("metrics")
    results.counting = counting(results.effort)
    say("sharing")
    results.sharing = sharing(url, results.effort)
    say("near cache")
    sizes = list(dict.fromkeys(cell.size for cell in results.cells))
    results.near = near_cache(url, sizes, results.effort)
    say("users")
    results.users = users(url, results.effort, many=many or FEW)
    say(f"memory of {sessions:,} sessions")
    results.weights = footprint.weights(url, sessions)
    if many is not None:
        say(f"growth to {many:,} sessions")
        results.growth = footprint.growth(url, results.effort, many=many)


def write(results: Results, directory: Path) -> None:
    """Writes the data, the tables and the chart into `directory`."""
    from benchmarks.chart import draw

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(results.as_json())
    (directory / "table.md").write_text(markdown(results))
    draw(results.cells, directory / "overhead.svg")


def _opener(store: str) -> Callable[[], Backend]:
    """Return a function that opens a fresh store. Starts only the requested drivers and servers."""
    if store == "redis":
        from benchmarks.backends.on_redis import RedisBackend

        return partial(RedisBackend, _redis_url())
    if store == "mongodb":
        from benchmarks.backends.on_mongodb import MongoBackend
        from tests.harness.servers import mongo_server

        return partial(MongoBackend, mongo_server().url)
    from benchmarks.backends.on_sqlite import SqliteBackend

    return SqliteBackend


def _redis_url() -> str:
    from tests.harness.servers import redis_server

    return redis_server().url


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times Flask-GSession side by side with Flask-Session, Flask's cookie session, "
        "no session, and the bare drivers.",
    )
    parser.add_argument("--quick", action="store_true", help="a rough run of under a minute")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES, help="only these")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="only these")
    parser.add_argument(
        "--million",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time Redis with 1,000 and with 1,000,000 sessions",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where results.json, table.md and overhead.svg go (docs/benchmarks; --quick: nowhere)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
