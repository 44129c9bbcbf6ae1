"""The take-over protocol, in every interleaving; each deliberate break is caught.

With `SIM_SCHEDULES`, as in `make soak`, also with a crash in the largest scenario.
"""

from __future__ import annotations

import os

import pytest

from tests.simulation.importing import MODEL
from tests.simulation.sizes import by_size

#: The states and endings of each scenario: fewer would mean that something is not explored.
EXPLORED = {
    "three first requests": (12747, 1050),
    "two first requests, time": (954, 88),
    "two first requests, logout": (49588, 5466),
    "two logouts": (1301, 235),
    "first request, two logouts": (14150, 757),
    "two late requests, logout": (4320, 483),
    "rotation, late request, write": (3058, 194),
    "rotation, late request, logout": (2458, 174),
    "sign-in, late request, write": (766, 57),
    "sign-in in a first request": (4821, 247),
    "idle expiry, two late requests": (535, 80),
    "old worker, first request, logout": (5097, 698),
    "old worker, logout, time": (8974, 527),
    "user: two first requests, revoke all": (7847, 898),
    "user: first request, revoke all, time": (3318, 229),
    "old logout": (1013, 146),
    "old logout, watching": (2490, 386),
}
LARGEST, WITHOUT_CRASH = "two first requests, logout", (17060, 1006)
LIMITS = {
    "rotation, late request, write": {"late answer"},
    "sign-in, late request, write": {"late answer"},
    "sign-in in a first request": {"late answer"},
    "old worker, first request, logout": {"written back"},
    "old worker, logout, time": {"written back"},
    "user: first request, revoke all, time": {"written back"},
    "old logout": {"old logout"},
}


@pytest.mark.parametrize("name", by_size(EXPLORED))
def test_the_protocol_holds(name: str) -> None:
    large = name == LARGEST and "SIM_SCHEDULES" not in os.environ
    explored = MODEL.explore(name, crashes=0 if large else None)
    assert explored.faults == {}
    assert (explored.states, explored.endings) == (WITHOUT_CRASH if large else EXPLORED[name])
    assert set(explored.limits) == LIMITS.get(name, set())


@pytest.mark.parametrize("name", MODEL.breaks)
def test_a_break_is_caught(name: str) -> None:
    broken = MODEL.breaks[name]
    assert MODEL.explore(broken.scenario, frozenset({name})).faults, broken.meaning
