"""The command line: ``python -m tests.faults`` from the top of the repository."""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.environment import environment
from tests.faults import report
from tests.faults.broken import BREAKS
from tests.faults.inject import FAULTS, Fault
from tests.faults.modes import Mode, modes
from tests.faults.scenario import Candidate, Outcome, run

THEIRS = ("redis-always", "mongodb-one")  # the modes in which Flask-Session runs beside ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and prints; 1 if a promise was broken."""
    options = _parser().parse_args(arguments)
    plan = [step for step in steps() if all(word in _name(*step) for word in options.only)]
    if options.only_any:
        plan = [step for step in plan if any(word in _name(*step) for word in options.only_any)]
    if options.list:
        for step in plan:
            print(f"{_name(*step):45} {step[2].what}")
        return 0
    if not plan:
        print("nothing is called that; see --list", file=sys.stderr)
        return 2
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}, {len(plan)} runs", file=sys.stderr, flush=True)
    outcomes: list[Outcome] = []
    found = environment()
    failed = _run(plan, seed, options, outcomes, found)
    print(report.text([report.row(outcome) for outcome in outcomes]))
    print()
    print(report.total(outcomes))
    print(f"seed {seed}")
    if options.write is not None:
        options.write.write_text(report.markdown(outcomes, seed, found))
    broken = [outcome for outcome in outcomes if outcome.failures]
    for outcome in broken:
        print(f"\nBROKEN: {outcome.candidate} {outcome.mode} {outcome.fault}")
        for line in (*outcome.failures, *outcome.verdict.examples):
            print(f"  {line}")
    for name in failed:
        print(f"\nNOT RUN: {name}")
    return 1 if broken or failed else 0


def steps() -> Iterator[tuple[Candidate, str, Fault]]:
    """Every scenario: a mode's one after the other, Flask-Session's beside ours."""
    for mode in modes():
        for fault in FAULTS:
            if mode in fault.modes:
                yield "ours", mode, fault
                if mode in THEIRS and not fault.ours_only:
                    yield "flask-session", mode, fault


def _run(
    plan: Sequence[tuple[Candidate, str, Fault]],
    seed: int,
    options: argparse.Namespace,
    outcomes: list[Outcome],
    found: dict[str, str],
) -> list[str]:
    """Add each one's outcome and its machine. Returns the names of those that could not run."""
    failed = []
    mode: Mode | None = None
    try:
        for number, (candidate, name, fault) in enumerate(plan, 1):
            if mode is None or mode.name != name:
                if mode is not None:
                    mode.stop()
                mode = modes()[name]()
            began = time.monotonic()
            try:
                outcome = run(
                    fault,
                    mode,
                    seed=seed,
                    seconds=options.seconds,
                    candidate=candidate,
                    broken=options.broken if candidate == "ours" else None,
                )
            except Exception:  # the others shall be run all the same
                traceback.print_exc()
                failed.append(_name(candidate, name, fault))
                mode.stop()
                mode = None
                continue
            print(
                f"{number}/{len(plan)} {_name(candidate, name, fault)}: "
                f"{report.verdict_of(outcome)} ({time.monotonic() - began:.0f} s)",
                *outcome.notes,
                file=sys.stderr,
                flush=True,
            )
            outcomes.append(outcome)
            found |= mode.versions()
    finally:
        if mode is not None:
            mode.stop()
    return failed


def _name(candidate: Candidate, mode: str, fault: Fault) -> str:
    return f"{candidate} {mode} {fault.name}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Strikes real servers with faults under load, and checks what became of the "
        "sessions. The exit status is 1 if something was lost that was promised.",
    )
    parser.add_argument("--seed", type=int, help="of what clients and faults do (any)")
    parser.add_argument(
        "--only", nargs="+", default=[], help="runs whose name has all these words in it"
    )
    parser.add_argument(
        "--only-any", nargs="+", default=[], help="runs whose name has any of these in it"
    )
    parser.add_argument("--list", action="store_true", help="say what would be run")
    parser.add_argument("--seconds", type=float, default=6.0, help="that a fault lasts (6)")
    parser.add_argument("--broken", choices=BREAKS, help="break ours on purpose, to see it found")
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
