"""Chooses the scenarios of a model that only `make long` explores."""

from __future__ import annotations

from collections.abc import Mapping

from tests.harness.marks import long

MOST = 3000  # states


def by_size(explored: Mapping[str, tuple[int, int]]) -> list[object]:
    """The names of scenarios, the large ones marked as long."""
    return long(explored, {name for name, (states, _) in explored.items() if states > MOST})
