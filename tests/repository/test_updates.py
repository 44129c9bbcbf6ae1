"""``Repository.update``: records that several writers change share the loop of the sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flask_gsession import SessionConflict, StoreUnavailable
from flask_gsession.errors import Stale
from flask_gsession.repository.repository import Loaded, Repository, Update
from flask_gsession.stores.base import Record, new_version
from flask_gsession.values.payload import Body
from tests.harness.apps import Site

KEY = "list-of-entries".ljust(43, "_")
Edit = Callable[[Loaded | None], Update[int]]


def repository_of(site: Site) -> Repository:
    repository: Any = site.app.extensions["gsession"][site.ext].repository
    assert isinstance(repository, Repository)
    return repository


def entries(site: Site) -> list[str]:
    loaded = repository_of(site).find(KEY)
    return [] if loaded is None else list(loaded.body.values)


def adding(repository: Repository, entry: str, *, again: bool = False) -> Edit:
    """Add an entry; the result is how many there were. ``again``: even if it is there already."""

    def edit(loaded: Loaded | None) -> Update[int]:
        values = {} if loaded is None else loaded.body.values
        if entry in values and not again:
            return Update(len(values))
        name = f"{entry}-again" if entry in values else entry
        body = Body({**values, name: b"\x01"})
        if loaded is not None:
            return Update(len(values), repository.records.draft_next(loaded.record, body))
        return Update(0, repository.records.draft_imported(KEY, body, None, None))

    return edit


def test_a_record_is_created_then_replaced(site: Site) -> None:
    repository = repository_of(site)
    assert [repository.update(KEY, adding(repository, name)) for name in "abb"] == [0, 1, 2]
    assert entries(site) == ["a", "b"]


def test_writes_that_come_first_stay(site: Site) -> None:
    repository = repository_of(site)

    def other(name: str) -> Callable[[], object]:
        return lambda: repository.update(KEY, adding(repository, name))

    site.before_each("create", other("first"))
    assert repository.update(KEY, adding(repository, "second")) == 1
    site.before_each("save", other("third"), other("fourth"))
    assert repository.update(KEY, adding(repository, "fifth")) == 4
    assert entries(site) == ["first", "second", "third", "fourth", "fifth"]


def test_a_record_that_ends_before_the_save_is_created_again(site: Site) -> None:
    repository = repository_of(site)
    repository.update(KEY, adding(repository, "old"))
    site.before_each("save", lambda: site.store.delete(KEY))
    assert repository.update(KEY, adding(repository, "new")) == 0
    assert entries(site) == ["new"]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_an_update_of_unknown_outcome_can_be_called_again(
    site: Site, exists: bool, stored: bool
) -> None:
    repository = repository_of(site)
    if exists:
        repository.update(KEY, adding(repository, "a"))

    def outage() -> None:
        raise StoreUnavailable("injected")

    operation = "save" if exists else "create"
    (site.store.after if stored else site.store.before)(operation, outage)
    edit, tried = adding(repository, "b", again=True), dict[int, int]()
    with pytest.raises(StoreUnavailable):
        repository.update(KEY, edit, tried=tried)
    assert repository.update(KEY, edit, tried=tried) == exists
    assert entries(site) == (["a", "b"] if exists else ["b"])


def test_a_write_that_reports_a_lost_race_after_it_was_stored(site: Site) -> None:
    """As a repeat by a driver does whose first answer came late."""
    repository = repository_of(site)
    repository.update(KEY, adding(repository, "a"))

    def stale() -> None:
        raise Stale

    site.store.after("save", stale)
    assert repository.update(KEY, adding(repository, "b", again=True)) == 1
    assert entries(site) == ["a", "b"]


def test_an_edit_may_refuse_or_store_nothing(site: Site) -> None:
    repository = repository_of(site)

    def refuse(_: Loaded | None) -> Update[int]:
        raise KeyError("refused")

    with pytest.raises(KeyError, match="refused"):
        repository.update(KEY, refuse)
    assert repository.update(KEY, lambda _: Update(7)) == 7
    assert entries(site) == []


def test_too_many_lost_races(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_gsession.repository.races.ATTEMPTS", 3)
    repository = repository_of(site)
    repository.update(KEY, adding(repository, "a"))

    def touch() -> None:
        record: Record | None = repository.store.load(KEY)
        assert record is not None
        repository.store.save(record._replace(version=new_version()), record.version)

    site.before_each("save", touch, touch, touch)
    with pytest.raises(SessionConflict):
        repository.update(KEY, adding(repository, "b"))
    assert entries(site) == ["a"]
