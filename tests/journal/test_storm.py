"""Processes and servers are killed while sessions live and end: the journal knows each end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.apps import Site
from tests.harness.marks import long
from tests.harness.servers import MongoServer, RedisServer, with_database
from tests.harness.topologies import RedisCluster
from tests.journal.storm import SETTINGS, sweeper_of

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
_ENDS = ("ended", "expired")
_QUICK, _LONG = 1.0, 40.0  # seconds


@dataclass
class Place:
    """A store, and functions that kill and restart its server, if it has one."""

    url: str
    strike: Callable[[], None] | None = None
    settle: Callable[[], object] = bool  # waits until all servers are well
    pause: float = 1.5  # seconds between two strikes, at most
    #: a rotation may be missing if a process was killed: see docs/how-to/journal.md
    in_steps: bool = False


def revived(server: Any) -> None:
    server.kill()
    server.start()


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Place]:
    if kind == "sqlite":
        yield Place(f"sqlite:///{folder}/sessions.sqlite3")
    elif kind == "mongodb":
        with MongoServer() as mongo:
            yield Place(with_database(mongo.url, "storm"), lambda: revived(mongo), pause=8)
    elif kind == "cluster":
        with RedisCluster(*DURABLE) as cluster:
            chance = random.Random(1)

            def strike() -> None:
                revived(cluster.primary(chance.randrange(cluster.SLOTS)))

            yield Place(cluster.url, strike, pause=10, settle=cluster.start, in_steps=True)
    else:
        with RedisServer(*DURABLE) as redis:
            yield Place(redis.url, lambda: revived(redis))


_LONG_ONES = ["sqlite", "redis", "cluster", "mongodb"]


@pytest.mark.parametrize("kind", long(["quick", *_LONG_ONES], _LONG_ONES))
def test_each_end_is_entered_whoever_is_killed(
    kind: str, store_prefix: str, tmp_path: Path
) -> None:
    seconds = _QUICK if kind == "quick" else _LONG
    with opened(kind, tmp_path) as place:
        strikes = storm(place, store_prefix, tmp_path, seconds)
        place.settle()
        found = Found(tmp_path)
        with Site(place.url, store_prefix, lambda: time.time() + 3600, **SETTINGS) as site:
            found.read(site)
        check(found, place.in_steps)
        print(f"{kind}: {len(found.ended)} sessions, {strikes} kills of a server, {found.killed}")


def storm(place: Place, prefix: str, folder: Path, seconds: float) -> int:
    """Let the storm rage; how often a server was killed."""
    command = [sys.executable, "-m", "tests.journal.storm", place.url, prefix, str(folder)]
    seed = random.randrange(2**32)
    strikes = 0
    with (folder / "killed").open("wb") as out, (folder / "errors").open("wb") as errors:
        driver = subprocess.Popen([*command, str(seconds), str(seed)], stdout=out, stderr=errors)
        try:
            while driver.poll() is None:
                time.sleep(random.uniform(0.1, place.pause))
                if place.strike is not None and driver.poll() is None:
                    place.strike()
                    strikes += 1
        finally:
            driver.kill()
            driver.wait()
    assert driver.returncode == 0, (folder / "errors").read_text()[-3000:]
    return strikes


class Found:
    """The visitors' answers, the consumer's events, and the journal itself."""

    def __init__(self, folder: Path) -> None:
        self.ledger = _lines(folder / "ledger")
        self.consumed = _lines(folder / "events")
        self.killed = json.loads((folder / "killed").read_text())

    def read(self, site: Site) -> None:
        """After all sessions have expired."""
        sweeper = sweeper_of(site)
        while sweeper.run():
            pass
        with site.app.app_context():
            self.events = once([event.as_dict() for event in site.ext.journal("auditor")])
            self.consumed += [event.as_dict() for event in site.ext.journal("siem")]
        self.due = sweeper._store.journal.figures().due
        self.ended: dict[str, list[Any]] = defaultdict(list)
        self.rotated: dict[str, Any] = {}
        for event in self.events:
            if event["kind"] in _ENDS:
                self.ended[event["handle"]].append(event)
            elif event["kind"] == "rotated":
                self.rotated[event["previous"]] = event


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def once(events: list[Any]) -> list[Any]:
    """The first of each."""
    found: dict[str, Any] = {}
    for event in events:
        found.setdefault(event["id"], event)
    return list(found.values())


def check(found: Found, in_steps: bool) -> None:
    assert found.due == 0
    lived = {line["new"] for line in found.ledger if line.get("new")}
    lived |= {event["handle"] for event in found.events}
    assert lived
    unsure = unanswered_rotations(found.ledger) if in_steps else set()
    for handle in lived:
        ends, rotated = found.ended.get(handle, []), found.rotated.get(handle)
        assert len(ends) <= 1, ends  # another one would have another id
        assert bool(ends) != bool(rotated) or handle in unsure, (handle, ends, rotated)
    check_kinds(found)
    check_order(found.events)
    # The consumer, which was killed as well, got each event, in the same order.
    assert [event["id"] for event in once(found.consumed)] == [e["id"] for e in found.events]


def unanswered_rotations(ledger: list[Any]) -> set[str]:
    """Sessions whose rotation was begun, while nobody got the new token."""
    tried = {e["handle"] for e in ledger if e.get("trying") in ("bind", "rotate")}
    return tried - {e["handle"] for e in ledger if "done" in e} - {None}


def check_kinds(found: Found) -> None:
    """The journal has each confirmed logout, and an expiry for every other session."""
    left = {e["handle"]: e["at"] for e in found.ledger if e.get("done") == "leave"}
    tried = {e["handle"] for e in found.ledger if e.get("trying") == "leave"}
    for handle, (end,) in found.ended.items():
        if end["kind"] == "expired":
            at = left.get(handle)
            assert at is None or end["time"] <= _text(at), end
        elif end.get("reason") == "logged out":
            assert handle in tried, end


def check_order(events: list[Any]) -> None:
    """Created, then rotated and bound, then ended: nothing follows on the end of a handle."""
    place = {event["id"]: number for number, event in enumerate(events)}
    first: dict[str, int] = {}
    last_of: dict[str, int] = {}
    for event in events:
        number, handle = place[event["id"]], event["handle"]
        first.setdefault(handle, number)
        assert handle not in last_of, (event, events[last_of[handle]])
        if event["kind"] in _ENDS:
            last_of[handle] = number
        if event["kind"] == "rotated":
            assert event["previous"] not in last_of, event
            last_of[event["previous"]] = number
            assert first[handle] == number, event


def _text(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at + 1))
