"""First requests with a Flask cookie, in every interleaving; each deliberate break is caught."""

from __future__ import annotations

import pytest

from tests.simulation.cookie_model import MODEL

#: The states and endings of each scenario: fewer would mean that something is not explored.
EXPLORED = {
    "slow read, write": (568, 113),
    "slow read, visit": (824, 165),
    "slow read, visit, later": (173, 12),
    "slow write, read, time": (1184, 105),
    "reads, logout": (652, 131),
    "write, logout": (338, 51),
    "two logouts, read": (3343, 200),
    "two visitors": (1044, 172),
    "two visitors, logout": (247, 38),
}


def test_the_protocol_holds() -> None:
    for name in MODEL.names():
        explored = MODEL.explore(name)
        assert explored.faults == {}, name
        assert (explored.states, explored.endings) == EXPLORED[name], name
        assert set(explored.limits) == (set() if "visitors" in name else {"late answer"}), name


@pytest.mark.parametrize("name", MODEL.breaks)
def test_a_break_is_caught(name: str) -> None:
    broken = MODEL.breaks[name]
    assert MODEL.explore(broken.scenario, frozenset({name})).faults, broken.meaning
