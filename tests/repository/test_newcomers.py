"""A flood of requests without cookies gets sessions of less time; nobody is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from flask_gsession.repository.newcomers import Newcomers
from tests.harness.apps import Site, SiteMaker, Visitor


@pytest.fixture
def flooded(make_site: SiteMaker) -> Site:
    """Three sessions a minute have their idle timeout of two hours; three were created."""
    site = make_site(newcomers_per_minute=3)
    site.clock.advance(60 - site.clock() % 60)
    for _ in range(3):
        came(site)
    return site


def came(site: Site) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(n=1))
    return visitor


def left(visitor: Visitor) -> bool:
    """Whether the session is over."""
    return visitor.run(dict) == {}


def test_one_that_never_comes_back_ends_soon(flooded: Site) -> None:
    visitor = came(flooded)
    flooded.clock.advance(301)
    assert left(visitor)


def test_one_that_comes_back_has_its_full_time(flooded: Site) -> None:
    """Also where the request only reads, which moves the end as a renewal does."""
    reader, writer = came(flooded), came(flooded)
    flooded.clock.advance(1)
    with flooded.counted() as count:
        assert reader.run(dict) == {"n": 1}
    assert count.calls == ["load", "renew"]
    with flooded.counted() as count:
        writer.run(lambda session: session.update(m=1))
    assert count.calls == ["load", "save"]
    with flooded.counted() as count:
        assert reader.run(dict) == {"n": 1}
    assert count.calls == ["load"]
    flooded.clock.advance(7000)
    assert not left(reader)
    assert not left(writer)


def test_another_process_gives_the_time_as_well(flooded: Site, make_site: SiteMaker) -> None:
    visitor = came(flooded)
    other = make_site(store=flooded.store)
    guest = other.visitor(visitor.cookie)
    assert not left(guest)
    flooded.clock.advance(7000)
    assert not left(visitor)


def test_the_request_that_creates_gives_itself_no_more(flooded: Site) -> None:
    visitor = flooded.visitor()

    def twice(session: Any) -> None:
        with session.transaction():
            session["n"] = 1
        session["m"] = 2

    with flooded.counted() as count:
        visitor.run(twice)
    assert count.calls == ["create", "save"]
    flooded.clock.advance(301)
    assert left(visitor)


def test_a_sign_in_gets_the_full_time(flooded: Site) -> None:
    visitor = came(flooded)
    visitor.run(lambda session: session.rotate(grace=0))
    flooded.clock.advance(7000)
    assert not left(visitor)


def test_within_the_bound_nothing_changes(
    make_site: SiteMaker, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(newcomers_per_minute=3)
    site.clock.advance(60 - site.clock() % 60)
    visitors = []
    for _ in range(3):
        visitors += [came(site) for _ in range(3)]
        site.clock.advance(60)
    with site.counted() as count:
        assert visitors[-1].another_tab().run(dict) == {"n": 1}
    assert len(count.calls) <= 2  # a renewal, which is due
    site.clock.advance(6900)
    assert not any(map(left, visitors))
    assert caplog.text == ""


def test_none_turns_the_limit_off(make_site: SiteMaker) -> None:
    site = make_site(newcomers_per_minute=None)
    visitors = [came(site) for _ in range(10)]
    site.clock.advance(7000)
    assert not any(map(left, visitors))


def test_a_shorter_idle_timeout_stays(make_site: SiteMaker) -> None:
    site = make_site(newcomers_per_minute=1, idle_timeout=100, newcomer_timeout=1000)
    came(site)
    visitor = came(site)
    site.clock.advance(106)
    assert left(visitor)


def test_the_log_warns_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    newcomers = Newcomers(2, 300)
    with caplog.at_level(logging.WARNING):
        for minute in range(3):
            for number in range(9):
                newcomers.first_end(f"{minute}-{number}", minute * 60_000 + number, 10**9)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "More than 2 sessions were created within a minute in this process" in lines[0]


def test_a_flood_takes_no_memory() -> None:
    newcomers = Newcomers(1, 300)
    for number in range(5000):
        newcomers.first_end(str(number), 0, 10**9)
    assert len(newcomers.unseen) == 1000
    assert "4999" in newcomers.unseen
