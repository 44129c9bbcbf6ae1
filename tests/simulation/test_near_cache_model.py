"""The protocol of the near cache, in every interleaving."""

from __future__ import annotations

import pytest

from tests.harness.marks import long
from tests.simulation.near_cache_model import BREAKS, NOTHING, run, scenarios

LARGE = {"load, write", "slot moves", "cut", "two servers"}
LATE = {"move: mark", "no mark", "move: kept", "feed first"}  # found after many states


@pytest.mark.parametrize("name", long(scenarios(NOTHING), LARGE))
def test_served_records_are_never_older_than_the_bound(name: str) -> None:
    explored = run(name)
    assert explored.faults == {}
    assert explored.states > 300


@pytest.mark.parametrize("broken", long(BREAKS, LATE))
def test_a_broken_protocol_is_found_out(broken: str) -> None:
    meaning, name = BREAKS[broken]
    assert run(name, frozenset({broken})).faults, meaning
