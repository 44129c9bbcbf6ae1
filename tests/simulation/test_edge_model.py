"""The protocol of edge nodes, in every interleaving."""

from __future__ import annotations

import os

import pytest

from tests.simulation.edge_model import BREAKS, NOTHING, run, scenarios

#: Programs that may crash, in each scenario; ``make soak`` allows two.
CRASHES = int(os.environ.get("EDGE_CRASHES", "0")) or None


@pytest.mark.parametrize("name", scenarios(NOTHING))
def test_nothing_is_lost_repeated_or_revived(name: str) -> None:
    explored = run(name, crashes=CRASHES)
    assert explored.faults == {}
    assert explored.states > 100


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_protocol_is_found_out(broken: str) -> None:
    meaning, name = BREAKS[broken]
    assert run(name, frozenset({broken})).faults, meaning
