"""The protocol of the journal in a Redis Cluster, in every interleaving and with crashes."""

from __future__ import annotations

import pytest

from tests.simulation.journal_model import BREAKS, NOTHING, run, scenarios


@pytest.mark.parametrize("name", scenarios(NOTHING))
def test_no_end_is_lost(name: str) -> None:
    explored = run(name)
    assert explored.faults == {}
    assert explored.endings


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_protocol_is_found_out(broken: str) -> None:
    meaning, name = BREAKS[broken]
    assert run(name, frozenset({broken})).faults, meaning
