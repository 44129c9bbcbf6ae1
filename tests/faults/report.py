"""The counts as a table: on the terminal, and in Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.faults.modes import modes
from tests.faults.scenario import Outcome

HEAD = (
    "candidate",
    "mode",
    "fault",
    "strikes",
    "ok",
    "failed",
    "unknown",
    "500s",
    "lost/acked",
    "twice",
    "stale/reads",
    "torn",
    "risen/ended",
    "back/gone",
    "foreign/answers",
    "adrift",
    "worst s",
    "over",
    "recovered s",
    "verdict",
)
NAMES = {"ours": "Flask-GSession", "flask-session": "Flask-Session"}


def row(outcome: Outcome) -> tuple[str, ...]:
    """One scenario."""
    v = outcome.verdict
    return (
        NAMES[outcome.candidate],
        outcome.mode,
        outcome.fault,
        str(outcome.strikes),
        str(v.ok),
        str(v.failed),
        str(v.unknown),
        str(v.errors),
        f"{v.lost}/{v.acknowledged}",
        str(v.twice),
        f"{v.stale}/{v.reads}",
        str(v.torn),
        f"{v.resurrected}/{v.ended}",
        f"{v.reappeared}/{v.missing}",
        f"{v.foreign}/{v.answers}",
        str(v.adrift + v.unchecked),
        f"{v.worst:.2f}",
        str(v.over),
        "never" if v.recovery is None else f"{v.recovery:.1f}",
        verdict_of(outcome),
    )


def verdict_of(outcome: Outcome) -> str:
    """The promises in words: kept, excepted or broken."""
    if outcome.failures:
        return "BROKEN: " + ", ".join(outcome.failures)
    found = [*outcome.verdict.broken, *outcome.verdict.leaks]
    if not found:
        return "kept, though not promised" if outcome.stated else "kept"
    return ("stated: " if outcome.candidate == "ours" else "") + ", ".join(found)


def text(rows: Sequence[Sequence[str]]) -> str:
    """Columns in line, under the head."""
    table = [HEAD, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 3 or place == len(HEAD) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def total(outcomes: Iterable[Outcome]) -> str:
    """A few lines on the promises that were kept and broken."""
    lines = []
    for candidate, name in NAMES.items():
        for stated, which in ((False, "that promise"), (True, "that do not")):
            some = [o for o in outcomes if o.candidate == candidate and o.stated == stated]
            if not some:
                continue
            of = [o.verdict for o in some]
            lines.append(
                f"{name}, {len(some)} runs in modes {which}: "
                f"{sum(v.lost for v in of)} of {sum(v.acknowledged for v in of)} acknowledged "
                f"updates lost, {sum(v.twice for v in of)} applied twice, "
                f"{sum(v.resurrected for v in of)} of {sum(v.ended for v in of)} ended tokens "
                f"answered, {sum(v.foreign for v in of)} of {sum(v.answers for v in of)} answers "
                f"of another session, {sum(v.stale for v in of)} of {sum(v.reads for v in of)} "
                f"reads stale, {sum(v.over for v in of)} of "
                f"{sum(v.ok + v.failed + v.unknown for v in of)} requests over their time."
            )
    return "\n".join(lines)


def markdown(outcomes: Sequence[Outcome], seed: int, environment: dict[str, str]) -> str:
    """The page's part that the harness writes."""
    measured_on = ", ".join(f"{name} {value}" for name, value in environment.items())
    lines = [
        f"One run with seed {seed}. Measured on: {measured_on}.",
        "",
        *(f"- {line}" for line in total(outcomes).splitlines()),
        "",
    ]
    for mode in dict.fromkeys(outcome.mode for outcome in outcomes):
        lines += [
            f"### {mode}",
            "",
            f"Promised: {modes()[mode]().promise}.",
            "",
            _line(HEAD[:1] + HEAD[2:]),
            _line(["---"] * (len(HEAD) - 1)),
        ]
        for outcome in outcomes:
            if outcome.mode == mode:
                cells = row(outcome)
                lines.append(_line(cells[:1] + cells[2:]))
        lines.append("")
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
