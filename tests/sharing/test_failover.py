"""Two gRPC servers in front of a Redis with sentinels, whose primary dies under load."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from flask_gsession.errors import LogoutUnconfirmed
from tests.harness.apps import Site, Visitor, until
from tests.harness.servers import free_port
from tests.harness.sharing import ServeCommand
from tests.harness.topologies import HOST, RedisSentinels, TCPProxy

pytest_plugins = ["tests.harness.topologies"]

TOKEN = "a-token-of-the-services"
BOUND = 0.5  # seconds, of the near caches
BUDGET = 2.0  # seconds for a store call
LOAD = 1.5  # seconds of load before the primary dies, and after the failover
SESSIONS = 60  # that are logged out


class Service:
    """An application with a server of its own, and a way to another server."""

    def __init__(self, folder: Path, redis: str, prefix: str) -> None:
        self.port = free_port()
        folder.mkdir()
        grants = folder / "grants.toml"
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        grants.write_text(f"[service]\nstore = true\ntoken_sha256 = '{digest}'")
        settings = {
            "SESSION_STORE": redis,
            "SESSION_KEY_PREFIX": prefix,
            "SESSION_LOGOUT_REPLICAS": "2",
            "SESSION_STORE_TIMEOUT": str(BUDGET),
        }
        options = ("--grpc", f"{HOST}:{self.port}", "--grants", str(grants))
        self.server = ServeCommand(folder / "serve", settings, *options)
        self.proxy = TCPProxy(self.port)

    def open(self, stack: ExitStack) -> None:
        stack.enter_context(self.server)
        stack.enter_context(self.proxy)
        url = f"grpc://{TOKEN}@{HOST}:{self.proxy.port}"
        self.site = stack.enter_context(Site(url, "", time.time, timeout=BUDGET, near_cache=BOUND))

    @property
    def hits(self) -> int:
        near = self.site.app.extensions["gsession"][self.site.ext].repository.near
        return int(near.figures().hits)


@pytest.fixture
def sentinels(redis_sentinels: RedisSentinels) -> Iterator[RedisSentinels]:
    yield redis_sentinels
    redis_sentinels.start()


def confirm(primary: int) -> bool:
    """Whether both replicas have all that the primary acknowledged before."""
    options: Any = {"retry": Retry(NoBackoff(), 0), "single_connection_client": True}
    with suppress(RedisError), Redis(HOST, primary, **options) as client:
        client.set("barrier", 1)
        return bool(client.wait(2, 200) == 2)
    return False


class Load:
    """One visitor counts through one service, and looks through the other; others log out."""

    def __init__(self, services: list[Service], primary: int) -> None:
        self.services = services
        self.primary: int | None = primary  # until another one serves, which stays
        self.over = threading.Event()
        self.visitor = services[0].site.visitor()
        self.visitor.run(lambda session: session.update(history=[]))
        self.acknowledged: list[int] = []
        self.confirmed: list[tuple[int, float]] = []  # and when
        self.reads = self.failures = 0
        self.leaving = [self._signed_in() for _ in range(SESSIONS)]
        self.ended: list[tuple[Visitor, float]] = []
        self.unconfirmed = 0

    def _signed_in(self) -> Visitor:
        visitor = self.services[0].site.visitor()
        visitor.run(lambda session: session.update(user="17"))
        return visitor

    def elsewhere(self, visitor: Visitor) -> Visitor:
        return self.services[1].site.visitor(visitor.cookie)

    def write(self) -> None:
        number = 0
        while not self.over.is_set():
            number += 1

            def append(session: Any, number: int = number) -> None:
                session["history"] = [*session["history"], number]

            answer = self.visitor.ask(append)
            if answer.status_code != 200:
                self.failures += 1
                time.sleep(0.02)
                continue
            self.acknowledged.append(number)
            if self.primary is None or confirm(self.primary):
                self.confirmed.append((number, time.monotonic()))

    def read(self) -> None:
        visitor = self.elsewhere(self.visitor)
        while not self.over.is_set():
            began = time.monotonic()
            known = [number for number, at in self.confirmed if at < began - BOUND]
            found: list[int] = []
            if (
                visitor.ask(lambda session, f=found: f.extend(session["history"])).status_code
                != 200
            ):
                continue
            self.reads += 1
            assert set(known) <= {*found}, "older than the bound, or lost"

    def log_out(self) -> None:
        while not self.over.is_set() and self.leaving:
            visitor = self.leaving.pop()
            with suppress(LogoutUnconfirmed):
                if visitor.ask(lambda session: session.destroy()).status_code == 200:
                    self.ended.append((self.elsewhere(visitor), time.monotonic()))
                    continue
            self.unconfirmed += 1
            time.sleep(0.05)

    def look(self) -> None:
        """A session that ended is served nowhere, but within the bound of the near cache."""
        while not self.over.is_set():
            for visitor, at in list(self.ended):
                if time.monotonic() - at > BOUND:
                    check_ended(visitor)
            time.sleep(0.01)


def check_ended(visitor: Visitor) -> None:
    found: list[object] = []
    if visitor.ask(lambda session: found.append(session.get("user"))).status_code == 200:
        assert found == [None], "a session that ended is back"


@pytest.mark.long
def test_a_failover_behind_two_servers(
    sentinels: RedisSentinels, tmp_path: Path, store_prefix: str
) -> None:
    """No write that both replicas had is lost, no session that ended comes back, and what a service
    reads is never older than the bound; then one of the servers dies, too.
    """
    services = [Service(tmp_path / name, sentinels.url, store_prefix) for name in ("a", "b")]
    with ExitStack() as stack:
        for service in services:
            service.open(stack)
        load = Load(services, sentinels.primary().port)
        errors: list[BaseException] = []

        def guarded(run: Callable[[], None]) -> Callable[[], None]:
            def guard() -> None:
                try:
                    run()
                except BaseException as error:
                    errors.append(error)
                    load.over.set()

            return guard

        runs = (load.write, load.read, load.log_out, load.look)
        threads = [threading.Thread(target=guarded(run)) for run in runs]
        for thread in threads:
            thread.start()
        try:
            time.sleep(LOAD)
            until(lambda: services[1].hits > 0)
            dead = sentinels.kill_primary()
            sentinels.wait_for_failover(dead)
            load.primary = None
            before, hits = len(load.acknowledged), services[1].hits
            until(lambda: len(load.acknowledged) > before + 10 or errors)
            until(lambda: services[1].hits > hits or errors)
            sentinels.start()  # the old primary comes back as a replica
            services[0].server.kill()
            services[0].proxy.target = services[1].port
            before = len(load.acknowledged)
            until(lambda: len(load.acknowledged) > before + 10 or errors)
            time.sleep(LOAD)
        finally:
            load.over.set()
            for thread in threads:
                thread.join()
        assert not errors, errors
        stored = load.elsewhere(load.visitor).run(lambda session: session["history"])
        lost = set(load.acknowledged) - set(stored)
        confirmed = {number for number, _ in load.confirmed}
        print(
            f"{len(load.acknowledged)} writes, {len(confirmed)} confirmed, {len(lost)} lost, "
            f"{load.failures} refused; {load.reads} reads; {len(load.ended)} logouts, "
            f"{load.unconfirmed} unconfirmed"
        )
        assert len(stored) == len(set(stored))
        assert not lost & confirmed
        assert len(confirmed) > 3
        assert load.ended
        for visitor, _ in load.ended:
            check_ended(visitor)
