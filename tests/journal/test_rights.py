"""The journal on MongoDB with a user of minimal rights, and the doctor's findings about missing
ones.

docs/how-to/mongodb.md grants these rights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from pymongo import MongoClient

from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.parts import parts_of
from flask_gsession.testing import FakeClock, a_record
from tests.harness.apps import Site
from tests.harness.marks import long
from tests.harness.topologies import MongoAuthTLS

pytest_plugins = ["tests.harness.topologies"]

RIGHTS = ["find", "insert", "update", "remove", "createIndex"]
# Rights on the journal, further ones on sessions, the missing right, and the status of a write.
LACKING: list[tuple[list[str], list[str], str, int]] = [
    ([], ["collMod"], "find, insert, remove, update on gsession_journal", 200),
    (["find", "insert"], ["collMod"], "remove, update on gsession_journal", 200),
    (RIGHTS, [], "collMod on gsession", 503),
]


@pytest.fixture
def server(mongo_auth_tls: MongoAuthTLS) -> Iterator[MongoAuthTLS]:
    """A server on which sessions without a journal were written before."""
    url = mongo_auth_tls.url_of("admin")
    with MongoClient[dict[str, Any]](url) as client:
        client.drop_database(mongo_auth_tls.DATABASE)
        with closing(open_store(url, StoreOptions("before:"))[0]) as store:
            store.create(a_record(FakeClock()))
        yield mongo_auth_tls
        client.drop_database(mongo_auth_tls.DATABASE)


def problems(site: Site) -> dict[str, str]:
    """The errors that the doctor finds in the store, by their check."""
    checks = parts_of(site.ext.store(site.app)).checks
    assert checks is not None
    return {each.check: each.found for each in checks.check() if each.severity == "error"}


def put(session: Any) -> None:
    session["cart"] = []


def test_the_published_rights_suffice(
    server: MongoAuthTLS, store_prefix: str, clock: FakeClock
) -> None:
    url = server.url_of_rights(RIGHTS, "gsession", "gsession_journal", gsession=["collMod"])
    with Site(url, store_prefix, clock, journal=True, idle_timeout=60) as site:
        visitors = [site.visitor() for _ in range(2)]
        for visitor in visitors:
            visitor.run(put)
            visitor.run(lambda session: session.bind("ada"))
        visitors[0].run(lambda session: session.destroy())
        clock.advance(120)
        with site.app.app_context():
            kinds = []
            for event in site.ext.journal("siem"):
                kinds.append(event.kind)
                event.ack()
        assert sorted(kinds) == sorted(2 * ["created", "rotated", "bound"] + ["ended", "expired"])
        assert not problems(site).keys() & {"journal permissions", "expiry index"}


@pytest.mark.parametrize("lacking", long(LACKING, LACKING[:2]))
def test_the_doctor_names_missing_rights(
    lacking: tuple[list[str], list[str], str, int],
    server: MongoAuthTLS,
    store_prefix: str,
    clock: FakeClock,
) -> None:
    journal, sessions, missing, status = lacking
    url = server.url_of_rights(RIGHTS, "gsession", gsession=sessions, gsession_journal=journal)
    with Site(url, store_prefix, clock, journal=True) as site:
        assert site.visitor().ask(put).status_code == status
        assert problems(site)["journal permissions"] == f"this user lacks {missing}"
