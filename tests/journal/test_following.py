"""``flask gsession events --follow`` as a process, and a consumer after a failover."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.journal.consuming import Consumer, JournalEvent
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site
from tests.harness.console import ROOT
from tests.harness.marks import long
from tests.harness.servers import RedisServer

COMMAND = """
import sys
from flask_gsession.cli import gsession
from flask_gsession.journal.consuming import Consumer
from tests.harness.console import Console

Consumer.__init__.__kwdefaults__["poll"] = 0.01
url, prefix = sys.argv[1:3]
del sys.argv[1:3]
with Console(url, key_prefix=prefix, journal=True).app.app_context():
    gsession()
"""


def started(url: str, prefix: str, *words: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, url, prefix, "events", "--consumer", "siem", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    how.setdefault("stdout", subprocess.PIPE)
    return subprocess.Popen(
        [*command, *words],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **how,
    )  # fmt: skip


def put(session: Any) -> None:
    session["cart"] = ["mug"]


def acknowledged(site: Site) -> int | None:
    journal = site.ext.store(site.app).journal
    assert journal is not None
    return journal.acknowledged("siem")


@pytest.mark.parametrize("ending", long([signal.SIGTERM, signal.SIGINT], [signal.SIGINT]))
def test_follow_survives_the_store_and_ends_well(ending: signal.Signals, store_prefix: str) -> None:
    with (
        RedisServer("--appendonly", "yes", "--appendfsync", "always") as server,
        Site(server.url, store_prefix, time.time, journal=True) as site,
        started(server.url, store_prefix, "--follow") as process,
    ):
        assert process.stdout is not None
        printed = []
        for _ in range(2):
            site.visitor().run(put)
            printed.append(json.loads(process.stdout.readline()))
            server.kill()
            server.start()
        process.send_signal(ending)
        assert process.wait(60) == 0, process.stderr
        assert [event["kind"] for event in printed] == ["created", "created"]
        assert acknowledged(site) == printed[-1]["number"]


def test_events_that_could_not_be_printed_are_not_acknowledged(
    sqlite_url: str, store_prefix: str
) -> None:
    with Site(sqlite_url, store_prefix, time.time, journal=True) as site:
        site.visitor().run(put)
        first = site.ext.store(site.app).journal.figures().first  # type: ignore[union-attr]
        reader, writer = os.pipe()
        os.close(reader)
        with started(sqlite_url, store_prefix, stdout=writer) as process:
            os.close(writer)
            assert process.wait(60) == 1
        assert acknowledged(site) == first - 1


@pytest.fixture
def followed(store_prefix: str) -> Iterator[tuple[Any, Consumer]]:
    """A journal in memory with five entries, and a consumer that follows it."""
    clock = FakeClock()
    with Site("memory://", store_prefix, clock, journal=True) as site:
        store = site.app.extensions["gsession"][site.ext].repository.journaling
        journal = store.journal
        journal.append([b'{"at":1,"kind":"ended","id":"%d"}' % number for number in range(5)])
        yield journal, Consumer(store, clock, "siem", follow=True, poll=0)


def ids(events: list[JournalEvent]) -> list[str]:
    return [event.id for event in events]


@pytest.mark.parametrize("after", ["nothing", "others", "more"])
def test_events_that_took_the_place_of_lost_ones_are_read(
    followed: tuple[Any, Consumer], after: str
) -> None:
    """A failover loses the last entries, which a consumer has read, and their acknowledgement."""
    journal, consumer = followed
    batches = consumer.batches()
    events = next(batches)
    assert ids(events) == ["0", "1", "2", "3", "4"]
    events[2].ack()
    journal._entries.pop()
    journal._last -= 1
    new = {"nothing": [], "others": ["5"], "more": ["5", "6"]}[after]
    if not new:
        consumer.stop()
        assert ids(consumer._look()) == ["3"]
    else:
        journal.append([b'{"at":1,"kind":"ended","id":"%s"}' % name.encode() for name in new])
        assert ids(next(batches)) == ["3", *new]


def test_events_removed_while_they_are_read_are_a_gap(
    followed: tuple[Any, Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, consumer = followed
    whole = journal.read(0, 5)
    pruned = whole._replace(entries=[*whole.entries[:2], *whole.entries[4:]])
    monkeypatch.setattr(journal, "read", lambda after, limit: pruned)
    _, before, gap, after = next(consumer.batches())
    assert (gap.kind, gap.missed, gap.number) == ("gap", 2, after.number - 1)
    assert before.number + 3 == after.number


@pytest.mark.parametrize("at", [-(10**18), 10**18, 10**400])
def test_an_impossible_time_blocks_no_consumer(followed: tuple[Any, Consumer], at: int) -> None:
    journal, consumer = followed
    journal.append([b'{"at":%d,"kind":"expired","id":"odd"}' % at])
    *_, odd = next(consumer.batches())
    assert odd.time.timestamp() == 0


def test_an_acknowledgement_in_an_outage_is_repeated(
    followed: tuple[Any, Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, consumer = followed
    batches = consumer.batches()
    events = next(batches)

    def fails(*_: object) -> None:
        raise StoreUnavailable("a test")

    with monkeypatch.context() as outage:
        outage.setattr(journal, "acknowledge", fails)
        events[3].ack()
        events[1].ack()
    journal.append([b'{"at":1,"kind":"ended","id":"5"}'])
    assert ids(next(batches)) == ["5"]
    assert journal.acknowledged("siem") == events[3].number


def test_a_consumer_ends_after_the_current_event(followed: tuple[Any, Consumer]) -> None:
    _, consumer = followed
    for number, _ in enumerate(consumer):
        if number == 2:
            consumer.stop()
    assert number == 2
