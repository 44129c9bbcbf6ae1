"""The project's targets, each compared with this run's figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from benchmarks.candidates import FLOOR, OURS, THEIRS
from benchmarks.counting import EVENT, CountingCost
from benchmarks.footprint import Growth, Weight
from benchmarks.journal import LIMITS as JOURNAL_LIMITS
from benchmarks.journal import JournalCost
from benchmarks.large_values import LargeCost
from benchmarks.matrix import Cell
from benchmarks.measure import Spread
from benchmarks.near_cache import LIMITS as NEAR_LIMITS
from benchmarks.near_cache import NearCost
from benchmarks.own_cpu import OwnCpu
from benchmarks.sharing import LIMITS, SharingCost
from benchmarks.typed_keys import AGAIN, GET, SET, TypedCost
from benchmarks.users import UserCost

READS = ("read",)
WRITES = ("write", "counter")


@dataclass(frozen=True)
class Target:
    """One promise. `measured` is the worst figure in its scope, `at` says where that was.

    `medians` has the figure of each payload, where the promise is about several.
    """

    what: str
    unit: str
    limit: float
    measured: Spread
    at: str
    met: bool
    medians: dict[str, float] = field(default_factory=dict)


def judge(
    cells: Sequence[Cell],
    own_cpu: Sequence[OwnCpu],
    weights: Sequence[Weight],
    growth: Sequence[Growth],
    typed: Sequence[TypedCost] = (),
    counting: Sequence[CountingCost] = (),
    large: Sequence[LargeCost] = (),
    shared: Sequence[SharingCost] = (),
    near: Sequence[NearCost] = (),
    users: Sequence[UserCost] = (),
    journal: Sequence[JournalCost] = (),
) -> list[Target]:
    """Returns the targets whose figures were measured in this run.

    A ratio is met when its median is within the limit at every payload.
    """
    ours = [cell for cell in cells if cell.candidate == OURS]
    found = [
        *_untouched(cells),
        *_ratio(ours, "redis", READS, "Flask-Session's", 0.4),
        *_ratio(ours, "redis", WRITES, "Flask-Session's", 0.8),
        *_ratio(ours, "redis", READS, "Flask-Session's", 0.3, size="200 KB"),
        *_ratio(ours, "mongodb", READS, "Flask-Session's", 0.5),
        *_ratio(ours, "mongodb", WRITES, "Flask-Session's", 1.0),
        *_ratio(ours, "sqlite", READS, "Flask-Session's", 0.1),
        *_ratio(ours, "sqlite", WRITES, "Flask-Session's", 0.1),
    ]
    for store in ("redis", "mongodb", "sqlite"):
        found += _ratio(ours, store, READS, "the bare driver's", 1.4)
        found += _ratio(ours, store, WRITES, "the bare driver's", 1.5)
    for own in own_cpu:
        limit = {"read": 20.0, "write": 40.0}[own.view]
        met = own.us.median < limit
        what = f"own time of a {own.view}, {own.where}, {own.around}"
        found.append(Target(what, "us", limit, own.us, "1 KB", met))
    return [
        *found,
        *_round_trips(ours),
        *_memory(weights),
        *_growth(growth),
        *_typed(typed),
        *_counting(counting),
        *_large(large),
        *_shared(shared),
        *_near(near),
        *_users(users),
        *_journal(journal),
    ]


def _typed(rows: Iterable[TypedCost]) -> Iterable[Target]:
    # "Nothing" for a value that was checked is not measurable: a tenth of a check.
    limits = {GET: 2.0, AGAIN: 0.1, SET: 1.0}
    for row in rows:
        limit = limits[row.operation]
        what = f"typed {row.operation}, to marshmallow's {row.per}"
        met = row.ratio.median <= limit
        yield Target(what, "x", limit, row.ratio, "five fields", met)


def _large(rows: Iterable[LargeCost]) -> Iterable[Target]:
    for row in rows:
        what = f"reading another key beside 10 MB on {row.store}, to beside 1 KB"
        yield Target(what, "x", 1.2, row.ratio, "10 MB", row.ratio.median <= 1.2)


def _shared(rows: Iterable[SharingCost]) -> Iterable[Target]:
    for row in rows:
        limit = LIMITS[row.operation]
        met = row.ratio.median <= limit
        yield Target(f"{row.operation}, to {row.beside}", "x", limit, row.ratio, "1 KB", met)


def _near(rows: Sequence[NearCost]) -> Iterable[Target]:
    for beside, limit in NEAR_LIMITS.items():
        medians = {row.size: row.ratio.median for row in rows if row.beside == beside}
        if medians:
            worst = max((row for row in rows if row.beside == beside), key=_median)
            met = worst.ratio.median <= limit
            what = f"a read from the near cache, to {beside}"
            yield Target(what, "x", limit, worst.ratio, worst.size, met, medians)


def _users(rows: Iterable[UserCost]) -> Iterable[Target]:
    for row in rows:
        if row.limit is not None:
            met = row.figure.median <= row.limit
            yield Target(row.what, row.unit, row.limit, row.figure, row.beside, met)


def _journal(rows: Iterable[JournalCost]) -> Iterable[Target]:
    for row in rows:
        limit = JOURNAL_LIMITS[row.verb]
        what = f"{row.verb} on {row.store} with the journal, to the same without"
        yield Target(what, "x", limit, row.ratio, "any size", row.ratio.median <= limit)


def _median(row: NearCost) -> float:
    return row.ratio.median


def _counting(rows: Iterable[CountingCost]) -> Iterable[Target]:
    for row in rows:
        if row.operation != EVENT:
            what = f"metrics of {row.operation}, {row.mode}"
            yield Target(what, "us", 5.0, row.us, "a store call", row.us.median < 5.0)


def _ratio(
    ours: Iterable[Cell],
    store: str,
    views: Sequence[str],
    whose: str,
    limit: float,
    size: str | None = None,
) -> Iterable[Target]:
    """The worst ratio of overheads among the cells in scope."""
    to = "to_floor" if "bare" in whose else "to_flask_session"
    scope: list[tuple[Spread, Cell]] = [
        (getattr(cell, to), cell)
        for cell in ours
        if cell.store == store
        and cell.view in views
        and size in (None, cell.size)
        and getattr(cell, to) is not None
    ]
    if not scope:
        return
    worst, cell = max(scope, key=lambda pair: pair[0].median)
    medians: dict[str, float] = {}
    for spread, each in scope:
        medians[each.size] = max(spread.median, medians.get(each.size, spread.median))
    what = f"{views[0]} on {store}, of {whose}" + (f", {size}" if size else "")
    met = worst.median <= limit
    yield Target(what, "x", limit, worst, f"{cell.view}, {cell.size}", met, medians)


def _untouched(cells: Sequence[Cell]) -> Iterable[Target]:
    """The noise: the sessionless app compared with itself, timed in the same rounds.

    Nothing reads the session, so the payload doesn't matter: the payloads' results are averaged, or
    the unluckiest of several short measurements would judge.
    """
    ours, noise = (
        _average(
            cell.overhead
            for cell in cells
            if (cell.store, cell.view, cell.candidate) == ("redis", "untouched", candidate)
        )
        for candidate in (OURS, FLOOR)
    )
    if ours is not None and noise is not None:
        what = "untouched on redis, within noise"
        yield Target(what, "us", noise.q3, ours, "any size", _overlap(ours, noise))


def _average(spreads: Iterable[Spread]) -> Spread | None:
    found = list(spreads)
    if not found:
        return None
    return Spread(
        *(fmean(getattr(each, name) for each in found) for name in ("median", "q1", "q3"))
    )


def _round_trips(ours: Iterable[Cell]) -> Iterable[Target]:
    """For each view, the payload that is furthest from its target."""
    expected = {"untouched": 0.0, "read": 1.0, "write": 2.0, "counter": 2.0}
    by_view: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for cell in ours:
        if cell.store in ("redis", "mongodb") and cell.traffic is not None:
            row = (cell.traffic.round_trips, cell.size)
            by_view.setdefault((cell.store, cell.view), []).append(row)
    for (store, view), rows in by_view.items():
        limit = expected[view]
        trips, size = max(rows, key=lambda row: abs(row[0] - limit))
        spread = Spread(trips, trips, trips)
        # A renewal may fall into the count: once a minute a read costs one more.
        met = abs(trips - limit) <= 0.02
        yield Target(f"round trips of {view} on {store}", "trips", limit, spread, size, met)


def _memory(weights: Sequence[Weight]) -> Iterable[Target]:
    used = {weight.candidate: weight.used_memory for weight in weights}
    if used:
        ratio = used[OURS] / used[THEIRS]
        spread = Spread(ratio, ratio, ratio)
        what = "Redis memory per session, of Flask-Session's"
        yield Target(what, "x", 1.15, spread, "200 B", ratio <= 1.15)


def _growth(growth: Sequence[Growth]) -> Iterable[Target]:
    by_view: dict[str, list[Growth]] = {}
    for row in growth:
        by_view.setdefault(row.view, []).append(row)
    for view, rows in by_view.items():
        few, many = sorted(rows, key=lambda row: row.sessions)
        yield Target(
            f"{view} on {few.store} with many sessions, within noise of few",
            "us",
            few.overhead.q3,
            many.overhead,
            f"{many.sessions:,} sessions",
            met=_overlap(many.overhead, few.overhead),
        )


def _overlap(mine: Spread, reference: Spread) -> bool:
    """Whether the middle halves meet, or mine lies below."""
    return mine.q1 <= reference.q3
