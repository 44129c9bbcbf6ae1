"""The store contract on an edge that reaches its centre, over each store and over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import Clock
from flask_gsession.stores.edge import EdgeStore
from flask_gsession.testing import StoreContract
from tests.harness.sharing import store_servers


class EdgeContract(StoreContract):
    folder: Path
    url: str
    prefix: str

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def around(self, centre: Store, options: StoreOptions) -> Store:
        return EdgeStore(self.folder / "edge.sqlite3", centre, options)


@pytest.mark.contract
class TestEdgesOfEachStore(EdgeContract):
    @pytest.fixture(autouse=True)
    def _where(self, store_url: str, store_prefix: str) -> None:
        self.url, self.prefix = store_url, store_prefix

    def open(self, clock: Clock) -> Store:
        options = StoreOptions(prefix=self.prefix, clock=clock)
        return self.around(open_store(self.url, options)[0], options)


@pytest.mark.contract
class TestEdgesOfARemoteStore(EdgeContract):
    @pytest.fixture(autouse=True)
    def _servers(self, redis_url: str, store_prefix: str) -> Iterator[None]:
        self.url, self.prefix = redis_url, store_prefix
        with store_servers() as self.serve:
            yield

    def open(self, clock: Clock) -> Store:
        options = StoreOptions(prefix=self.prefix, clock=clock)
        far = open_store(self.url, options)[0]
        return self.around(open_store(self.serve(far), StoreOptions(clock=clock))[0], options)
