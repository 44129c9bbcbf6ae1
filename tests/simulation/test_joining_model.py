"""How carts join, in every interleaving; each deliberate break is caught.

With `SIM_SCHEDULES`, as in `make soak`, with crashes in all scenarios.
"""

from __future__ import annotations

import os

import pytest

from tests.harness.marks import long
from tests.simulation.joining import MODEL

#: The states and endings of each scenario: fewer would mean that something is not explored.
EXPLORED = {
    "sign-in": (19, 10),
    "sign-in, another tab": (161, 38),
    "sign-in, item taken out": (161, 38),
    "sign-in, another device": (227, 60),
    "sign-in, rotation": (260, 50),
    "sign-in, logout": (136, 30),
    "sign-in, time": (38, 10),
    "double click": (1564, 290),
    "two devices with two carts": (1702, 286),
    "double click, time": (6314, 526),
    "double click, another tab": (32858, 4988),
    "double click, item taken out": (32858, 4988),
    "double click, another device": (16533, 1692),
    "double click, rotation": (10241, 590),
    "double click, logout": (13728, 1750),
    "two devices, another tab": (19382, 2087),
}
LARGE = list(EXPLORED)[9:]
#: Explored without crashes, unless a long run was asked for.
WITHOUT_CRASH = {"double click": (644, 78), "two devices with two carts": (676, 40)}
SHORT = "SIM_SCHEDULES" not in os.environ


@pytest.mark.parametrize("name", long(EXPLORED, LARGE))
def test_the_protocol_holds(name: str) -> None:
    short = SHORT and name in WITHOUT_CRASH
    explored = MODEL.explore(name, crashes=0 if short else None)
    assert explored.faults == {}
    assert (explored.states, explored.endings) == (WITHOUT_CRASH if short else EXPLORED)[name]


def test_every_scenario_has_its_numbers() -> None:
    assert set(EXPLORED) == set(MODEL.names())


@pytest.mark.parametrize("name", MODEL.breaks)
def test_a_break_is_caught(name: str) -> None:
    broken = MODEL.breaks[name]
    assert MODEL.explore(broken.scenario, frozenset({name})).faults, broken.meaning
