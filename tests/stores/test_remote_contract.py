"""The store contract through gRPC, in front of every store, and with wrappers on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import Clock
from flask_gsession.stores.parts import parts_of
from flask_gsession.stores.wrappers import compose
from flask_gsession.testing import HookedStore, StoreContract
from tests.harness.sharing import store_servers
from tests.stores.test_store_contract import WRAPPERS, SevenVerbs, a_breaker, a_timer


class RemoteContract(StoreContract):
    """A store behind a server in this process."""

    url: str
    prefix: str
    serve: Callable[[Store], str]

    @pytest.fixture(autouse=True)
    def _servers(self) -> Iterator[None]:
        self.opened: list[Store] = []
        with store_servers() as self.serve:
            yield
            for store in self.opened:
                store.close()

    def open(self, clock: Clock) -> Store:
        far = open_store(self.url, StoreOptions(prefix=self.prefix, clock=clock))[0]
        return self.reach(far, clock)

    def reach(self, far: Store, clock: Clock, more: str = "") -> Store:
        store = open_store(self.serve(far) + more, StoreOptions(clock=clock))[0]
        self.opened += [store, far]
        return store


class TestARemoteStore(RemoteContract):
    url, prefix = "memory://", ""


@pytest.mark.contract
class TestRemoteStores(RemoteContract):
    @pytest.fixture(autouse=True)
    def _where(self, store_url: str, store_prefix: str) -> None:
        self.url, self.prefix = store_url, store_prefix


@pytest.mark.contract
class TestStackedWrappersAroundAndBehindARemoteStore(RemoteContract):
    url, prefix = "memory://", ""

    def open(self, clock: Clock) -> Store:
        far = compose(
            open_store(self.url, StoreOptions(clock=clock))[0], breaker=a_breaker(), trace=[]
        )
        store = self.reach(far, clock)
        return compose(store, breaker=a_breaker(), timer=a_timer(), trace=[])


@pytest.mark.contract
class TestAServerBehindAServer(RemoteContract):
    url, prefix = "memory://", ""

    def open(self, clock: Clock) -> Store:
        far = open_store(self.url, StoreOptions(clock=clock))[0]
        return self.reach(self.reach(far, clock), clock)


class TestSevenVerbsBehindAServer(RemoteContract):
    def open(self, clock: Clock) -> Store:
        far = SevenVerbs(open_store("memory://", StoreOptions(clock=clock))[0])
        store = self.reach(far, clock, "?without=leases,blobs,scans,upkeep,counts,checks,changes")  # type: ignore[arg-type]  # it has the verbs
        assert not any(parts_of(store))
        return store


@pytest.mark.contract
@pytest.mark.parametrize("wrapper", WRAPPERS)
class TestWrappersOfARemoteStore(RemoteContract):
    @pytest.fixture(autouse=True)
    def _what(self, wrapper: str, store_url: str, store_prefix: str) -> None:
        self.wrapper, self.url, self.prefix = wrapper, store_url, store_prefix

    def open(self, clock: Clock) -> Store:
        store: Store = WRAPPERS[self.wrapper](super().open(clock))
        return store


def test_hooks_find_every_verb_behind_a_server() -> None:
    """A store of somebody else's making is served too, by its verbs and parts alone."""
    with store_servers() as serve:
        far = HookedStore(open_store("memory://", StoreOptions())[0])
        store = open_store(serve(far), StoreOptions())[0]
        names = [name for name, part in parts_of(store)._asdict().items() if part is not None]
        assert names == ["leases", "blobs", "scans", "upkeep", "counts", "checks", "changes"]
        assert store.checks is not None
        assert store.checks.check() == []
        store.close()
