"""G8: with encryption, write access to the store can't prolong or revive a session."""

from __future__ import annotations

from typing import Any

import pytest

from flask_gsession.errors import UnreadableRecord
from flask_gsession.events import SessionRefused
from flask_gsession.repository.debugging import debug_session
from flask_gsession.stores.base import Record
from flask_gsession.tokens import session_key
from tests.harness.apps import Site, SiteMaker
from tests.values.test_payload import SEALED, TIMES, a_body

YEAR = 365 * 86_400_000
KEYS = [b"k" * 32]


@pytest.fixture
def sealed(make_site: SiteMaker) -> Site:
    return make_site(encryption_keys=KEYS)


def plant(site: Site, record: Record) -> None:
    """Write a record as somebody with the store's password can: in its place, whatever is there."""
    store: Any = site.store.store
    store.delete(record.key)
    store.create(record)


def record_of(site: Site, key: str) -> Record:
    found = site.store.store.load(key)
    assert found is not None
    return found


@pytest.mark.parametrize("field", ["created_at", "absolute_expires_at"])
@pytest.mark.parametrize("by", [-1, 1, 1000])
def test_a_moved_time_is_refused(sealed: Site, field: str, by: int) -> None:
    visitor = sealed.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    right = record_of(sealed, session_key(visitor.token))
    plant(sealed, right._replace(**{field: getattr(right, field) + by}))
    assert visitor.another_tab().run(dict) == {}
    (refused,) = sealed.happened(SessionRefused)
    assert (refused.reason, refused.handle) == ("corrupt", right.key)
    plant(sealed, right)
    assert visitor.run(dict) == {"user": "ada"}


def test_an_expired_session_stays_expired(sealed: Site) -> None:
    visitor = sealed.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    record = record_of(sealed, session_key(visitor.token))
    sealed.clock.advance(YEAR / 1000)
    end = record.absolute_expires_at + 2 * YEAR
    plant(sealed, record._replace(idle_expires_at=end, absolute_expires_at=end))
    assert visitor.run(dict) == {}


def test_each_kind_of_write_keeps_the_times(sealed: Site) -> None:
    """A save, a rotation and the debug command encrypt again, and the results can be read."""
    visitor = sealed.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    born = record_of(sealed, session_key(visitor.token))
    sealed.clock.advance(100)
    visitor.run(lambda session: session.update(n=1))
    visitor.run(lambda session: session.rotate())
    key = session_key(visitor.token)
    repository = sealed.app.extensions["gsession"][sealed.ext].repository
    assert debug_session(repository, key, repository.now() + 1000)
    visitor.run(lambda session: session.update(large="x" * 100_000))
    now = record_of(sealed, key)
    assert (now.created_at, now.absolute_expires_at) == (
        born.created_at,
        born.absolute_expires_at,
    )
    assert visitor.run(dict) == {"user": "ada", "n": 1, "large": "x" * 100_000}


def test_the_grace_of_an_old_token_cannot_be_prolonged(sealed: Site) -> None:
    visitor = sealed.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    old = visitor.another_tab()
    visitor.run(lambda session: session.rotate(grace=10))
    pointer = record_of(sealed, session_key(old.token))
    assert pointer.successor is not None
    assert old.another_tab().run(dict) == {"user": "ada"}
    session = record_of(sealed, pointer.successor)
    for times in (
        {"idle_expires_at": pointer.absolute_expires_at},
        {"idle_expires_at": pointer.idle_expires_at - 1},
        {"created_at": pointer.created_at - 1},
        {"absolute_expires_at": pointer.absolute_expires_at + 1},
    ):
        plant(sealed, pointer._replace(**times))
        plant(sealed, session)  # a deletion follows the pointer
        assert old.another_tab().run(dict) == {}
        assert sealed.happened(SessionRefused)[-1].reason == "corrupt"


def test_forgeries_that_remain_possible_are_documented(sealed: Site) -> None:
    """An older version of the same record opens; so does one whose idle end alone was moved."""
    visitor = sealed.visitor()
    visitor.run(lambda session: session.update(user="ada", n=1))
    older = record_of(sealed, session_key(visitor.token))
    visitor.run(lambda session: session.update(n=2))
    plant(sealed, older._replace(idle_expires_at=older.absolute_expires_at))
    assert visitor.run(lambda session: session["n"]) == 1
    sealed.clock.advance(31 * 86_400)
    assert visitor.run(dict) == {}


@pytest.mark.parametrize("format", [2, 3])
def test_a_payload_of_before_the_times_were_sealed_is_refused(format: int) -> None:
    payload = bytes((format, 1)) + SEALED.pack("k" * 43, a_body({"a": 1}), *TIMES)[2:]
    with pytest.raises(UnreadableRecord, match="without its times") as refusal:
        SEALED.unpack("k" * 43, payload, *TIMES)
    assert refusal.value.reason == "corrupt"
