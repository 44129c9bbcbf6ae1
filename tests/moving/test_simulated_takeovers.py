"""The real code in thousands of schedules with crashes and lost answers; broken code is found.

`SIM_TAKEOVERS` says how many schedules (2,000).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from flask_gsession.config import Settings
from flask_gsession.moving import mark, takeover
from flask_gsession.moving.takeover import NOTHING, Takeover
from flask_gsession.repository.other_records import OtherRecords
from tests.simulation.takeovers import World, current_visit

SCHEDULES = int(os.environ.get("SIM_TAKEOVERS", "2000"))


@pytest.mark.parametrize("chunk", range(4))
def test_every_schedule_keeps_the_guarantees(chunk: int) -> None:
    with World() as world:
        found = world.search(range(chunk, SCHEDULES, 4))
    assert found is None, f"seed {found[0]}: {found[1]}\n{found[2].visits}\n{found[2].trace}"


@contextmanager
def no_mark() -> Iterator[None]:
    """Nothing remembers the import."""
    with mock.patch.object(takeover, "read_mark", return_value=None), keeps_its_own():
        yield


@contextmanager
def mark_before_old() -> Iterator[None]:
    """The mark is loaded first."""

    def find(self: Any, repository: Any, source: Any, name: str, cookie: str) -> Any:
        key = mark.mark_key(source.label, name)
        there = mark.read_mark(repository, repository.store.load(key))
        return takeover.Finding(name, key, source.load(name, cookie), there)

    with mock.patch.object(Takeover, "find", find):
        yield


@contextmanager
def keeps_its_own() -> Iterator[None]:
    """A loser goes on with its own session."""

    def draft(self: Any, key: str, content: bytes, end: int) -> Any:
        return real(self, key[:36] + os.urandom(3).hex() + "_", content, end)

    real = OtherRecords.draft
    with mock.patch.object(OtherRecords, "draft", draft):
        yield


@contextmanager
def old_record_stays() -> Iterator[None]:
    """A logout leaves the old record."""
    with mock.patch.object(Takeover, "end_old", return_value=None):
        yield


@contextmanager
def mark_without_an_end() -> Iterator[None]:
    with mock.patch.object(Settings, "marks_end", return_value=10**13):
        yield


@contextmanager
def logout_forgets_the_old_cookie() -> Iterator[None]:
    """A logout with only the old cookie ends nothing."""
    real = Takeover.take_over

    def take_over(self: Any, repository: Any, request: Any) -> Any:
        return NOTHING if current_visit() == "logout" else real(self, repository, request)

    with mock.patch.object(Takeover, "take_over", take_over):
        yield


@contextmanager
def only_the_winner_gets_a_token() -> Iterator[None]:
    """A request that finds a mark answers without a token."""
    with mock.patch.object(takeover, "token_for", return_value=None):
        yield


@contextmanager
def watches_nothing() -> Iterator[None]:
    with mock.patch.object(Takeover, "has_ended", return_value=False):
        yield


#: Where to begin: the schedules that find them come soon after that.
BREAKS: list[tuple[Callable[[], Any], int]] = [
    (no_mark, 0),
    (mark_before_old, 3200),
    (keeps_its_own, 0),
    (old_record_stays, 0),
    (mark_without_an_end, 0),
    (logout_forgets_the_old_cookie, 0),
    (only_the_winner_gets_a_token, 0),
    (watches_nothing, 250),
]


@pytest.mark.parametrize(
    ("broken", "first"), BREAKS, ids=lambda given: getattr(given, "__name__", "")
)
def test_broken_code_is_found(broken: Callable[[], Any], first: int) -> None:
    with World() as world, broken():
        found = world.search(range(first, first + 20_000))
    assert found is not None
    print(f"{broken.__name__}: schedule {found[0]}: {found[1]}")
