"""Which scenarios of a model `make test` explores, and which only `make long` does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import pytest

MOST = 3000  # states


def by_size(explored: Mapping[str, tuple[int, int]]) -> list[object]:
    """The names of scenarios, the large ones marked as long."""
    return long(explored, {name for name, (states, _) in explored.items() if states > MOST})


def long(names: Iterable[str], large: Collection[str]) -> list[object]:
    """The names, these marked as long."""
    marked = [pytest.param(name, marks=pytest.mark.long) for name in names if name in large]
    assert len(marked) == len(large), large
    return [*(name for name in names if name not in large), *marked]
