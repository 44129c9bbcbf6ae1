"""The store contract on every store, the servers real ones."""

from __future__ import annotations

import pytest

from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import Clock
from flask_gsession.testing import HookedStore, StoreContract


class TestStores(StoreContract):
    """Each store as the settings open it."""

    @pytest.fixture(autouse=True)
    def _where(self, store_url: str, store_prefix: str) -> None:
        self.url, self.prefix = store_url, store_prefix

    def open(self, clock: Clock) -> Store:
        return open_store(self.url, StoreOptions(prefix=self.prefix, clock=clock))[0]


class TestHookedStore(StoreContract):
    """The fault-injecting store keeps the contract while nothing is hooked."""

    def open(self, clock: Clock) -> Store:
        return HookedStore(open_store("memory://", StoreOptions(clock=clock))[0])
