"""The store contract on every store, the servers real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import Clock
from flask_gsession.testing import HookedStore, StoreContract
from tests.apps import PATIENCE


class TestStores(StoreContract):
    """Each store as the settings open it."""

    @pytest.fixture(autouse=True)
    def _where(self, store_url: str, store_prefix: str) -> None:
        self.url, self.prefix = store_url, store_prefix

    def open(self, clock: Clock) -> Store:
        return open_store(self.url, StoreOptions(prefix=self.prefix, clock=clock))[0]


def with_pushes(connection: Any) -> None:
    """Have the server push a message into this connection whenever any key changes."""
    connection.on_connect()
    if connection.protocol == 3:
        connection.send_command("CLIENT", "TRACKING", "ON", "BCAST")
        assert connection.read_response() == "OK"


CLIENTS: dict[str, dict[str, Any]] = {
    "RESP2": {"protocol": 2},
    "RESP3": {"protocol": 3},
    "RESP3 with pushes": {"protocol": 3, "redis_connect_func": with_pushes},
}


class TestRedisClients(StoreContract):
    """Clients of the application's own, which give text for what they get."""

    @pytest.fixture(autouse=True, params=CLIENTS.values(), ids=CLIENTS)
    def _where(
        self, request: pytest.FixtureRequest, redis_url: str, store_prefix: str
    ) -> Iterator[None]:
        self.prefix = store_prefix
        with Redis.from_url(redis_url, decode_responses=True, **request.param) as self.client:
            yield
            pushed = "bcast" in str(self.client.client_trackinginfo())
            assert pushed is ("redis_connect_func" in request.param)

    def open(self, clock: Clock) -> Store:
        options = StoreOptions(prefix=self.prefix, clock=clock, timeout=PATIENCE)
        return open_store(self.client, options)[0]


class TestHookedStore(StoreContract):
    """The fault-injecting store keeps the contract while nothing is hooked."""

    def open(self, clock: Clock) -> Store:
        return HookedStore(open_store("memory://", StoreOptions(clock=clock))[0])
