"""The simulation by hand; see the package."""

from __future__ import annotations

import argparse
import sys
import time

from .mutations import FURTHER, REQUIRED
from .world import Simulation


def main(arguments: list[str] | None = None) -> int:
    """Run the requested schedules. Returns 1 if a guarantee was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, help="schedules to run and to show")
    parser.add_argument("--schedules", type=int, metavar="N", help="run N schedules")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="from this seed on")
    parser.add_argument("--mutations", action="store_true", help="break the code, and see it found")
    options = parser.parse_args(arguments)
    if options.mutations:
        return _mutations()
    with Simulation() as simulation:
        if options.seeds:
            outcomes = [simulation.run(seed, tracing=True) for seed in options.seeds]
            for outcome in outcomes:
                print(outcome)
            return any(outcome.violation is not None for outcome in outcomes)
        count = 10_000 if options.schedules is None else options.schedules
        begun = time.perf_counter()
        outcome = simulation.search(range(options.first, options.first + count))
        print(f"{simulation.summary()}, in {time.perf_counter() - begun:.1f} s")
        if outcome is not None:
            print(outcome)
        return outcome is not None


def _mutations() -> int:
    missed = 0
    for mutation in (*REQUIRED, *FURTHER):
        with Simulation() as simulation, mutation.apply():
            outcome = simulation.search(range(20_000), mutation.among)
        if outcome is None:
            missed += 1
            print(f"{mutation.name:32} not found in 20,000 schedules")
        else:
            taken = outcome.plan.seed + 1
            print(f"{mutation.name:32} found by schedule {taken:5}: {outcome.violation}")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
