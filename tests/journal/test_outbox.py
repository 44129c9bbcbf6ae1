"""On MongoDB, the entries wait in the session's document until they are moved."""

import pytest

from flask_gsession.stores.mongodb.journal import MongoDBJournal
from flask_gsession.testing import FakeClock, a_pointer, a_record
from flask_gsession.testing.contract.journals import entries_of
from tests.journal.test_killed import opened


@pytest.mark.parametrize("ends", [False, True])
def test_an_entry_that_comes_while_others_move_repeats_none(
    ends: bool,
    emptied_mongodb_url: str,
    store_prefix: str,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = opened(emptied_mongodb_url, store_prefix, clock)
    journal = store.journal
    assert isinstance(journal, MongoDBJournal)
    journal.begin(1000)
    record, new = a_record(clock), a_record(clock)
    journal.create(record, [b"created"])
    add = journal._add

    def between(*arguments: object) -> None:
        monkeypatch.undo()
        add(*arguments)
        if ends:
            journal.end(record.key, record.version, [b"last"])
        else:
            pointer = a_pointer(record, new)
            journal.replace(record.key, new, record.version, pointer, [b"last"])

    monkeypatch.setattr(journal, "_add", between)
    assert entries_of(journal) == [b"created"]
    assert entries_of(journal) == [b"created", b"last"]
    assert entries_of(journal) == [b"created", b"last"]
