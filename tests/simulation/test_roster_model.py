"""The protocol of users and devices, in every interleaving; the whole run is

python -m tests.simulation.roster_model
"""

from __future__ import annotations

import os

import pytest

from tests.harness.marks import long
from tests.simulation.roster_model import BREAKS, NOTHING, run, scenarios

SHORT = "SIM_SCHEDULES" not in os.environ  # a long run was not asked for
LARGE = {"two sign-ins of one session", "rotation with grace, logout"}


@pytest.mark.parametrize("name", long(scenarios(NOTHING), LARGE))
def test_the_protocol_holds(name: str) -> None:
    explored = run(name, short=SHORT)
    assert explored.faults == {}
    assert explored.endings > 3


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_protocol_is_found_out(broken: str) -> None:
    meaning, name = BREAKS[broken]
    assert run(name, frozenset({broken})).faults, meaning
