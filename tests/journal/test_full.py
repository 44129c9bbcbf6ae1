"""A full Redis: operations that free memory still work, with a journal and without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from flask_gsession.testing import FakeClock
from tests.harness.apps import Site
from tests.harness.marks import long
from tests.harness.servers import RedisServer
from tests.harness.topologies import RedisCluster

pytest_plugins = ["tests.harness.topologies"]


@pytest.fixture(params=long(["redis", "cluster"], ["cluster"]))
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[int]]]:
    """The URL of a store, and the ports of its servers."""
    if request.param == "cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        ports = [node.port for node in cluster.nodes]
        yield cluster.url, ports
        limit(ports, 0)
    else:
        with RedisServer() as server:
            yield server.url, [server.port]


def limit(ports: list[int], size: int) -> None:
    """Make the servers refuse writes that need memory if they hold more than so many bytes."""
    for port in ports:
        with Redis(port=port) as client:
            client.config_set("maxmemory", size)


def put(session: Any) -> None:
    session["cart"] = []


def test_sessions_end_and_expire(
    servers: tuple[str, list[int]], store_prefix: str, clock: FakeClock
) -> None:
    url, ports = servers
    with Site(url, store_prefix, clock, journal=True, idle_timeout=60) as site:
        leaving, staying = site.visitor(), site.visitor()
        for visitor in (leaving, staying):
            visitor.run(put)
        limit(ports, 1)
        assert site.visitor().ask(put).status_code == 503
        leaving.run(lambda session: session.destroy())
        clock.advance(120)
        with site.app.app_context():
            events = list(site.ext.journal("siem"))
        assert [event.kind for event in events] == ["created", "created", "ended", "expired"]
        events[-1].ack()
        figures = site.ext.store(site.app).journal.figures()  # type: ignore[union-attr]
        assert (figures.due, figures.consumers) == (0, {"siem": events[-1].number})
