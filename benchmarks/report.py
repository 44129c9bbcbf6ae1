"""The figures as text: tables on the terminal and in Markdown, and the data as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.candidates import CANDIDATES, OURS
from benchmarks.counting import CountingCost
from benchmarks.footprint import Growth, Weight
from benchmarks.journal import JournalCost
from benchmarks.large_values import LargeCost
from benchmarks.matrix import Cell
from benchmarks.measure import Effort, Spread
from benchmarks.near_cache import NearCost
from benchmarks.own_cpu import OwnCpu
from benchmarks.sharing import SharingCost
from benchmarks.targets import Target
from benchmarks.typed_keys import TypedCost
from benchmarks.users import UserCost

FORMAT = 1


@dataclass
class Results:
    """All results of one run."""

    effort: Effort
    environment: dict[str, str]
    cells: list[Cell]
    own_cpu: list[OwnCpu] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    typed: list[TypedCost] = field(default_factory=list)
    counting: list[CountingCost] = field(default_factory=list)
    large: list[LargeCost] = field(default_factory=list)
    sharing: list[SharingCost] = field(default_factory=list)
    near: list[NearCost] = field(default_factory=list)
    users: list[UserCost] = field(default_factory=list)
    journal: list[JournalCost] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def as_json(self) -> str:
        """The data, with figures rounded to their precision."""
        return json.dumps(_rounded({"format": FORMAT, **asdict(self)}), indent=1) + "\n"

    def sections(self) -> list[Section]:
        """The data as titled tables."""
        return [
            *_matrix_sections(self.cells),
            *_overview_sections(self.cells),
            *_own_cpu_sections(self.own_cpu),
            *_typed_sections(self.typed),
            *_counting_sections(self.counting),
            *_large_sections(self.large),
            *_sharing_sections(self.sharing),
            *_near_sections(self.near),
            *_user_sections(self.users),
            *_journal_sections(self.journal),
            *_weight_sections(self.weights),
            *_growth_sections(self.growth),
            *_target_sections(self.targets),
        ]


@dataclass(frozen=True)
class Section:
    """A table with a title and a note below it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def as_text(self) -> str:
        """Columns in line, numbers to the right."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = [self.title, "=" * len(self.title)]
        for row in (self.head, *self.rows):
            first = row[0].ljust(widths[0])
            rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join((first, *rest)))
        if self.note:
            lines.append(self.note)
        return "\n".join(lines) + "\n"

    def as_markdown(self) -> str:
        """The same as a Markdown table under a heading."""
        align = ["---", *["--:"] * (len(self.head) - 1)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in (self.head, align, *self.rows))
        note = f"\n{self.note}\n" if self.note else ""
        return f"## {self.title}\n\n{table}\n{note}"


def markdown(results: Results) -> str:
    """The tables: summaries first, then every figure."""
    sections = results.sections()
    summary = [section for section in sections if not _is_detail(section)]
    details = [section for section in sections if _is_detail(section)]
    measured_on = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    head = f"One run of {results.effort.rounds} rounds. Measured on: {measured_on}.\n"
    tables = (section.as_markdown() for section in (*reversed(summary), *details))
    return "\n".join((head, *tables))


def _is_detail(section: Section) -> bool:
    return section.head is _MATRIX_HEAD


_MATRIX_HEAD = (
    "payload, candidate",
    "us/request",
    "us added",
    "trips",
    "bytes in",
    "bytes out",
    "x Flask-Session",
    "x bare driver",
)


_NOTES = {
    "redis": "Trips are commands sent per request; the server counts the bytes.",
    "mongodb": "Trips are commands sent per request; the server counts the bytes. "
    "All write with w:majority.",
    "sqlite": "Trips are statements per request. Each extension has its own defaults: "
    "Flask-Session's rollback journal is flushed to the disk at each commit; our write-ahead log "
    "isn't flushed for a save.",
}


def _matrix_sections(cells: Iterable[Cell]) -> Iterable[Section]:
    by_table: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        by_table.setdefault((cell.store, cell.view), []).append(cell)
    order = {name: place for place, name in enumerate(CANDIDATES)}
    for (store, view), table in by_table.items():
        sizes = list(dict.fromkeys(cell.size for cell in table))
        table.sort(key=lambda cell: (sizes.index(cell.size), order[cell.candidate]))
        yield Section(
            f"{store}: {view}",
            _MATRIX_HEAD,
            [_matrix_row(cell) for cell in table],
            f"Median [quartiles]. {_NOTES[store]}",
        )


def _overview_sections(cells: Iterable[Cell]) -> Iterable[Section]:
    """Our overhead as a ratio, payloads side by side."""
    ours = [cell for cell in cells if cell.candidate == OURS]
    sizes = list(dict.fromkeys(cell.size for cell in ours))
    for title, ratio in (
        ("Overhead of Flask-GSession relative to Flask-Session", "to_flask_session"),
        ("Overhead of Flask-GSession relative to the bare driver", "to_floor"),
    ):
        rows: dict[str, list[str]] = {}
        for cell in ours:
            rows.setdefault(f"{cell.store}, {cell.view}", []).append(
                _spread(getattr(cell, ratio), 2) or "-"
            )
        if rows:
            yield Section(
                title,
                ("store, view", *sizes),
                [(name, *figures) for name, figures in rows.items()],
                "Overhead is the extra time of a request, compared with the same request without "
                "a session. "
                "Median [quartiles] of the ratios of single rounds.",
            )


def _matrix_row(cell: Cell) -> list[str]:
    traffic = cell.traffic
    return [
        f"{cell.size}, {cell.candidate}",
        _spread(cell.us),
        _spread(cell.overhead),
        "" if traffic is None else f"{traffic.round_trips:.2f}",
        "" if traffic is None or traffic.received is None else f"{traffic.received:,.0f}",
        "" if traffic is None or traffic.sent is None else f"{traffic.sent:,.0f}",
        _spread(cell.to_flask_session, 3),
        _spread(cell.to_floor),
    ]


def _own_cpu_sections(rows: Sequence[OwnCpu]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Own time",
            ("1 KB session", "us"),
            [(f"{row.where}, {row.view}, {row.around}", _spread(row.us)) for row in rows],
            "The time that a session takes without the driver's calls. The memory store has no "
            "driver. On Redis, we subtract the time that redis-py takes for the same commands, on "
            'connections that answer at once. "The session alone" opens the session, uses it in '
            "the view and saves it, in a loop. In a whole request the same work takes longer, "
            "because Flask's own code evicts ours from the processor's caches each time.",
        )


def _typed_sections(rows: Sequence[TypedCost]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Typed keys",
            ("five fields", "us added", "to marshmallow's own time"),
            [
                (row.operation, _spread(row.us), f"{_spread(row.ratio)} of {row.per}")
                for row in rows
            ],
            "The time that a typed key adds to a plain one, and its ratio to marshmallow's own "
            "time for the same value.",
        )


def _counting_sections(rows: Sequence[CountingCost]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Metrics",
            ("operation", "figures for", "us added"),
            [(row.operation, row.mode, _spread(row.us)) for row in rows],
            "The time that the Prometheus metrics add to each operation. Several workers share "
            "their figures through files, so any worker's page shows the totals.",
        )


def _large_sections(rows: Sequence[LargeCost]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Large values",
            ("reading another key", "us beside 1 KB", "us beside 10 MB", "ratio"),
            [
                (
                    row.store,
                    _spread(row.beside_small),
                    _spread(row.beside_large),
                    _spread(row.ratio),
                )
                for row in rows
            ],
            "The time of a whole request that reads a small key, in a session that also holds 1 "
            "KB or 10 MB.",
        )


def _sharing_sections(rows: Sequence[SharingCost]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Sharing",
            ("operation", "us", "beside", "us", "ratio"),
            [
                (
                    row.operation,
                    _spread(row.us),
                    row.beside,
                    _spread(row.us_beside),
                    _spread(row.ratio),
                )
                for row in rows
            ],
            "The bare call carries the same bytes, to a server in the same process as ours. The "
            "times of a verify and a read are without the time of a view that gives the same "
            "answer without a session.",
        )


def _near_sections(rows: Sequence[NearCost]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Near cache",
            ("session", "read, us", "beside", "us", "ratio"),
            [
                (
                    row.size,
                    _spread(row.us),
                    row.beside,
                    _spread(row.us_beside),
                    _spread(row.ratio),
                )
                for row in rows
            ],
            "The time that a read adds to a view without a session. A read from the near cache "
            "costs no round trip.",
        )


def _user_sections(rows: Sequence[UserCost]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Users",
            ("operation", "beside", "figure", "unit", "at most"),
            [
                (
                    row.what,
                    row.beside,
                    _spread(row.figure, 2),
                    row.unit,
                    "" if row.limit is None else f"{row.limit:.3g}",
                )
                for row in rows
            ],
            "Sessions that are bound to a user: on Redis, except that the read and the write use "
            'the memory store. For comparison, "a list in the store" reads, edits and writes back '
            "a list at each sign-in.",
        )


def _journal_sections(rows: Sequence[JournalCost]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Journal",
            ("request", "us, off", "us, on", "ratio", "trips, off", "trips, on"),
            [
                (
                    f"{row.store}, {row.verb}",
                    _spread(row.off),
                    _spread(row.on),
                    _spread(row.ratio, 2),
                    *(f"{trips:.2f}" if trips else "" for trips in (row.trips_off, row.trips_on)),
                )
                for row in rows
            ],
            "The time of a whole request that creates, saves or ends a session, with "
            "SESSION_JOURNAL off and on.",
        )


def _weight_sections(rows: Sequence[Weight]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Redis memory",
            ("200-byte session", "MEMORY USAGE", "used_memory per session"),
            [(row.candidate, f"{row.key_bytes:.0f}", f"{row.used_memory:.0f}") for row in rows],
        )


def _growth_sections(rows: Sequence[Growth]) -> Iterable[Section]:
    if rows:
        yield Section(
            "Growth",
            ("200-byte session", "us added"),
            [
                (f"{row.store}, {row.view}, {row.sessions:,} sessions", _spread(row.overhead))
                for row in rows
            ],
        )


def _target_sections(targets: Sequence[Target]) -> Iterable[Section]:
    if targets:
        yield Section(
            "Targets",
            ("target", "at most", "worst", "worst at", "medians by payload", "met"),
            [
                (
                    target.what,
                    f"{target.limit:.3g} {target.unit}",
                    _spread(target.measured, 3 if target.unit == "x" else 1),
                    target.at,
                    " / ".join(f"{median:.2f}" for median in target.medians.values()),
                    "met" if target.met else "NOT MET",
                )
                for target in targets
            ],
            f"{sum(target.met for target in targets)} of {len(targets)} met. A ratio is met if "
            "its median is within the limit for every payload, and for writes in both views that "
            "write.",
        )


def _spread(figure: Spread | None, digits: int | None = None) -> str:
    if figure is None:
        return ""
    if digits is None:
        digits = 2 if abs(figure.median) < 10 else 0
    low, high = f"{figure.q1:,.{digits}f}", f"{figure.q3:,.{digits}f}"
    if low == high:
        return f"{figure.median:,.{digits}f}"
    return f"{figure.median:,.{digits}f} [{low} {high}]"


def _rounded(data: Any) -> Any:
    if isinstance(data, float):
        return round(data, 3)
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_rounded(value) for value in data]
    return data
