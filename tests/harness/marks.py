"""Marks for parameters of tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long(values: Iterable[Any], rare: Collection[Any]) -> list[Any]:
    """Only `make long` runs a test with one of the ``rare`` values."""
    values = list(values)
    assert all(value in values for value in rare), rare
    return [pytest.param(it, marks=pytest.mark.long) if it in rare else it for it in values]
