"""Following the pointers of rotations to a session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from flask_gsession.errors import UnreadableRecord
from flask_gsession.repository.repository import Repository
from flask_gsession.stores.base import MAX_POINTERS, Record
from flask_gsession.values.payload import Body
from tests.harness.apps import Site, SiteMaker


@pytest.fixture
def site(store_prefix: str, clock: Any) -> Iterator[Site]:
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield make()


def chain(repository: Repository, pointers: int) -> list[Record]:
    """A session behind this many pointers, the first one first."""
    records = [repository.records.draft_new(Body({}))[1]]
    for _ in range(pointers):
        before = repository.records.draft_new(Body({}))[1]
        records.insert(0, repository.records.draft_pointer(before, records[0], 60))
    return records


@pytest.mark.parametrize("pointers", [0, 1, 3, MAX_POINTERS - 1])
def test_a_session_is_found_behind_its_pointers(site: Site, pointers: int) -> None:
    repository = site.app.extensions["gsession"][site.ext].repository
    records = chain(repository, pointers)
    stored = {record.key: record for record in records}
    loaded = repository.find(records[0].key, load=stored.get)
    assert loaded is not None
    assert loaded.record == records[-1]
    for record in records[:: 1 + pointers // 3]:  # a gap, or an expired one, ends the search
        gap = {**stored, record.key: record._replace(idle_expires_at=record.created_at)}
        assert repository.find(records[0].key, load=gap.get) is None
        del gap[record.key]
        assert repository.find(records[0].key, load=gap.get) is None


def test_a_chain_that_is_too_long_or_circular_is_refused(site: Site) -> None:
    repository = site.app.extensions["gsession"][site.ext].repository
    long = chain(repository, MAX_POINTERS)[:-1]
    circle = chain(repository, 3)
    circle[-1] = repository.records.draft_pointer(circle[-1], circle[1], 60)
    for records in (long, circle):
        stored = {record.key: record for record in records}
        load = mock.Mock(side_effect=stored.get)
        with pytest.raises(UnreadableRecord, match="too many pointers"):
            repository.find(records[0].key, load=load)
        assert load.call_count == len(records), "each is loaded once"


def test_a_token_whose_successor_has_ended_is_reported_with_the_reason(site: Site) -> None:
    repository = site.app.extensions["gsession"][site.ext].repository
    first, second = chain(repository, 1)
    repository.refusals = refusals = mock.Mock()
    assert repository.find(first.key, True, {first.key: first}.get) is None
    ended = second._replace(idle_expires_at=second.created_at)
    assert repository.find(first.key, True, {first.key: first, ended.key: ended}.get) is None
    assert repository.find(first.key, False, {first.key: first}.get) is None
    assert [call.args for call in refusals.note.mock_calls] == [
        ("unknown", first.key, "the session was rotated, and has ended since"),
        ("expired", first.key, "it wasn't used within its idle timeout"),
    ]
