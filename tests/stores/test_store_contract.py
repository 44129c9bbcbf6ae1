"""The store contract on every store, the servers real ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis

from flask_gsession.contrib.metrics import Timer
from flask_gsession.contrib.metrics_figures import Figures
from flask_gsession.events import Events
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import VERBS, Clock, Record
from flask_gsession.stores.parts import Parts, parts_of
from flask_gsession.stores.wrappers import Breaker, CallMaker, Near, Wrapper, compose
from flask_gsession.testing import HookedStore, StoreContract
from tests.harness.apps import PATIENCE


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
    """The application's own clients, which decode answers to text."""

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


# Wrappers ---------------------------------------------------------------------------------------


def a_breaker() -> Breaker:
    return Breaker(failures=3, pause=1, timeout=PATIENCE, events=Events())


def a_timer() -> CallMaker:
    figures = Figures(CollectorRegistry())
    return Timer(figures, SimpleNamespace(answered=bool, is_up=True, pid=os.getpid())).call


class PassingOn:
    """A wrapper that is no `Store`: it passes on whatever it is asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


WRAPPERS: dict[str, Callable[[Store], Any]] = {
    "wrapper": Wrapper,
    "passing on": PassingOn,
    "breaker": lambda store: compose(store, breaker=a_breaker()),
    "timer": lambda store: compose(store, timer=a_timer()),
    "trace": lambda store: compose(store, trace=[]),
    "hooks": HookedStore,
}


class WrapperContract(StoreContract):
    """One wrapper around one store."""

    wrapper: str
    url: str
    prefix: str

    def open(self, clock: Clock) -> Store:
        options = StoreOptions(prefix=self.prefix, clock=clock)
        store: Store = WRAPPERS[self.wrapper](open_store(self.url, options)[0])
        return store


@pytest.mark.contract
@pytest.mark.parametrize("wrapper", WRAPPERS)
class TestWrappersOfAMemoryStore(WrapperContract):
    @pytest.fixture(autouse=True)
    def _what(self, wrapper: str) -> None:
        self.wrapper, self.url, self.prefix = wrapper, "memory://", ""


@pytest.mark.contract
@pytest.mark.parametrize("wrapper", WRAPPERS)
class TestWrappersOfEachStore(WrapperContract):
    @pytest.fixture(autouse=True)
    def _what(self, wrapper: str, store_url: str, store_prefix: str) -> None:
        self.wrapper, self.url, self.prefix = wrapper, store_url, store_prefix


class ReadsNear(Wrapper):
    """Loads from the near cache of its store, as the first read of a request does."""

    def load(self, key: str) -> Record | None:
        assert self.near is not None
        return self.near.peek(key) or self.near.load_near(key)


class TestNearCache(StoreContract):
    """Around each store that can prove freshness."""

    @pytest.fixture(autouse=True)
    def _where(self, redis_url: str, store_prefix: str) -> None:
        self.url, self.prefix = redis_url, store_prefix

    def open(self, clock: Clock) -> Store:
        store = open_store(self.url, StoreOptions(prefix=self.prefix, clock=clock))[0]
        near = Near(bound=PATIENCE, max_bytes=1_000_000, clock=clock)
        return ReadsNear(compose(store, breaker=a_breaker(), near=near, timer=a_timer(), trace=[]))


class TestStackedWrappers(StoreContract):
    """All of them, as in an application with metrics whose session is being debugged."""

    @pytest.fixture(autouse=True)
    def _where(self, store_url: str, store_prefix: str) -> None:
        self.url, self.prefix = store_url, store_prefix

    def open(self, clock: Clock) -> Store:
        store = open_store(self.url, StoreOptions(prefix=self.prefix, clock=clock))[0]
        return compose(store, breaker=a_breaker(), timer=a_timer(), trace=[])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("url", ["memory://", "sqlite:///x", "redis://x", "mongodb://x/y"])
def test_a_wrapper_has_the_parts_of_its_store(wrapper: str, url: str) -> None:
    store = open_store(url, StoreOptions())[0]
    wrapped = parts_of(WRAPPERS[wrapper](store))
    for name, part in parts_of(store)._asdict().items():
        assert (getattr(wrapped, name) is None) == (part is None), name


class SevenVerbs:
    """A store of somebody else's: no `Store`, and no parts."""

    def __init__(self, store: Store) -> None:
        for name in VERBS:
            setattr(self, name, getattr(store, name))


@pytest.mark.parametrize("wrapper", ["none", "breaker"])
class TestSevenVerbs(StoreContract):
    @pytest.fixture(autouse=True)
    def _what(self, wrapper: str) -> None:
        self.wrapper = wrapper

    def open(self, clock: Clock) -> Store:
        store: Any = SevenVerbs(open_store("memory://", StoreOptions(clock=clock))[0])
        wrapped: Store = WRAPPERS[self.wrapper](store) if self.wrapper in WRAPPERS else store
        assert parts_of(wrapped) == (None,) * len(Parts._fields)
        return wrapped


def test_a_contract_whose_open_forgets_to_return_the_store_says_so() -> None:
    class TestForgotten(StoreContract):
        def open(self, clock: Clock) -> Store:
            return None  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"open\(\) of TestForgotten must return the store"):
        TestForgotten().test_is_a_store()
