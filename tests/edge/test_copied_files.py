"""Files of a node that were copied, restored from a backup, or written by an earlier version."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from flask_gsession.stores.edge.claim import key_of
from flask_gsession.stores.edge.rows import TABLES
from flask_gsession.stores.sqlite.layout import AddedColumn
from tests.edge.story import add, at, known
from tests.harness.edges import EdgeSite, Network

#: The code is the same on every store.
pytestmark = pytest.mark.parametrize("store_url", ["memory"], indirect=True)


@contextmanager
def file_of(edge: EdgeSite) -> Iterator[Path]:
    """The node's file, while nobody has it open."""
    edge.edge.copy.file.close()
    yield edge.edge.copy.file.path
    edge.edge.copy.file.close()


def test_a_file_from_a_backup_settles_no_change_again(
    network: Network, edge: EdgeSite, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even one of a session that has ended since, which the centre doesn't remember."""
    visitor, ended, made = known(edge), known(edge), edge.visitor()
    edge.cut()
    for each in (visitor, made):
        each.run(add)
    ended.run(lambda session: session.destroy())
    with file_of(edge) as path:
        backup = path.read_bytes()
    assert edge.settle().changes == 2
    at(network.centre, made).run(lambda session: session.destroy())
    with file_of(edge) as path:
        path.write_bytes(backup)
    for ends in (1, 0):  # an end may be repeated
        settled = edge.settle()
        assert (settled.ends, settled.changes) == (ends, 0)
        assert "was restored from a backup" in settled.trouble
    assert caplog.text.count("was restored from a backup") == 1
    assert edge.edge.figures().changes == 2
    assert at(network.centre, visitor).run(dict) == {"n": 2}
    assert at(network.centre, made).run(dict) == {}


def test_a_file_from_a_backup_that_missed_nothing_is_accepted(edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    for number in range(2, 5):
        with file_of(edge) as path:
            path.write_bytes(path.read_bytes())
        assert edge.settle().trouble == ""
        edge.cut()
        assert visitor.run(dict) == {"n": number}
        visitor.run(add)


def test_the_first_of_two_nodes_with_copies_of_a_file_settles(
    network: Network, edge: EdgeSite
) -> None:
    """Also if a settler of the other one was stopped before the centre heard of it."""
    visitor, stranger = known(edge), known(edge)
    with file_of(edge) as path:
        shutil.copy(path, path.with_name("b.sqlite3"))
    creations = 0

    def stop(operation: str) -> None:
        nonlocal creations
        creations += operation == "create"
        other.wire.cut = operation == "create" and creations > 1  # not the greeting

    with network.edge("b") as other:
        for node, each in ((edge, visitor), (other, at(other, stranger))):
            node.cut()
            each.run(add)
        other.back()
        other.wire.hook = stop
        for _ in range(3):
            settled = other.edge.settle()
            assert settled is not None
            assert not settled.reached
        other.wire.hook = lambda operation: None
        assert edge.settle().changes == 1
        assert "is a copy" in other.settle().trouble
        edge.cut()
        visitor.run(add)
        assert edge.settle().trouble == ""
    assert at(network.centre, visitor).run(dict) == {"n": 3}
    assert at(network.centre, stranger).run(dict) == {"n": 1}


@pytest.mark.parametrize("loss", ["the last one", "all", "damaged"])
def test_a_centre_that_lost_records_is_served(loss: str, network: Network, edge: EdgeSite) -> None:
    """As after a failover."""
    visitor, centre = known(edge), network.centre.store
    key = key_of(edge.edge.figures().node, network.centre.prefix)
    heard = []
    for _ in range(3):
        edge.cut()
        visitor.run(add)
        settled = edge.settle()
        assert (settled.changes, settled.trouble) == (1, "")
        heard.append(centre.load(key))
    centre.delete(key)
    if loss == "the last one":
        centre.create(heard[1])
    elif loss == "damaged":
        centre.create(heard[2]._replace(payload=b"damaged"))
    edge.cut()
    visitor.run(add)
    assert edge.settle().trouble == ""
    assert at(network.centre, visitor).run(dict) == {"n": 5}


def test_a_file_that_lacks_columns_gets_them(network: Network, edge: EdgeSite) -> None:
    visitor = known(edge)
    edge.cut()
    visitor.run(add)
    with file_of(edge) as path, closing(sqlite3.connect(path)) as db:
        for each in TABLES:
            if isinstance(each, AddedColumn):
                db.execute(f"ALTER TABLE {each.table} DROP COLUMN {each.name}")
    visitor.run(add)
    assert edge.settle().trouble == ""
    assert at(network.centre, visitor).run(dict) == {"n": 3}
