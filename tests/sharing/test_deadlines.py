"""A caller's deadline bounds the server's own store calls, on every store."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from flask_gsession.errors import Stale, StoreUnavailable
from flask_gsession.sharing.store_service import StoreService
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.base import new_version
from flask_gsession.stores.support import deadline, ending_by, time_left
from flask_gsession.testing import HookedStore, a_record
from tests.harness.apps import PATIENCE, within
from tests.harness.sharing import serving
from tests.harness.topologies import TCPProxy

BUDGET = 0.4  # seconds of the caller; the far store's is PATIENCE
BOUND = 5 * BUDGET  # on a busy machine
TRIES = 25  # there, a caller may also notice its own deadline before it gets the server's answer


@contextmanager
def hanging(name: str, url: str, proxy: TCPProxy | None) -> Iterator[None]:
    """The store takes requests and doesn't answer them."""
    if proxy is not None:
        with proxy.blackhole():
            yield
        return
    with closing(sqlite3.connect(urlsplit(url).path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("name", ["redis", "mongodb", "sqlite"])
def test_the_far_store_ends_before_its_caller(
    name: str, request: pytest.FixtureRequest, store_prefix: str
) -> None:
    """So the caller gets the reason, and no thread of the server waits for nobody."""
    url = request.getfixturevalue(f"{name}_url")
    with ExitStack() as stack:
        proxy = None
        if name != "sqlite":
            proxy = stack.enter_context(TCPProxy(urlsplit(url).port or 0))
        through = url if proxy is None else proxy.through(url)
        far = open_store(through, StoreOptions(store_prefix, timeout=PATIENCE))[0]
        stack.callback(far.close)
        address = stack.enter_context(serving(StoreService(far), threads=1))
        store = open_store(f"grpc://{address}", StoreOptions(timeout=PATIENCE))[0]
        stack.callback(store.close)
        record = a_record(time.time)
        store.create(record)
        hurried: Any = open_store(f"grpc://{address}", StoreOptions(timeout=BUDGET))[0]
        stack.callback(hurried.close)
        with hanging(name, url, proxy):
            changed = record._replace(version=new_version())
            reasons = []
            for _ in range(2):  # the only thread is free again

                def fail() -> None:
                    with pytest.raises(StoreUnavailable) as caught:
                        hurried.save(changed, record.version)
                    reasons.append(str(caught.value))

                for _ in range(TRIES):
                    within(BOUND, fail)
                    hurried.channel._unsettled.clear()  # of no interest here
                    if f"Save: {name}: " in reasons[-1]:
                        break
                assert f"Save: {name}: " in reasons[-1]
        # Nobody inherits the short time: sqlite keeps it on its connections.
        # A write that the network held back may arrive at last, after this load or before it.
        for _ in range(2):
            record = changed if store.load(record.key) == changed else record
            with suppress(Stale):
                store.save(record._replace(version=new_version()), record.version)
                break
        else:
            pytest.fail("the record changed twice")


def test_a_chain_of_servers_passes_the_deadline_on(store_prefix: str) -> None:
    release = threading.Event()
    far = HookedStore(open_store("memory://", StoreOptions())[0])

    def hang() -> None:
        far.before("load", hang)
        release.wait(PATIENCE)

    far.before("load", hang)
    with serving(StoreService(far)) as last:
        between = open_store(f"grpc://{last}", StoreOptions(timeout=PATIENCE))[0]
        with serving(StoreService(between), threads=1) as first:
            store = open_store(f"grpc://{first}", StoreOptions(timeout=BUDGET))[0]

            def fail() -> str:
                with pytest.raises(StoreUnavailable, match="DEADLINE") as caught:
                    store.load("x" * 43)
                return str(caught.value)

            errors = [within(BOUND, fail) for _ in range(3)]  # the only thread is free again
            while len(errors) < TRIES and not any(first in e and last in e for e in errors):
                errors.append(within(BOUND, fail))
            assert any(first in error and last in error for error in errors), errors
            release.set()
            store.close()
        between.close()


def test_the_shorter_time_counts() -> None:
    assert time_left(5.0) == 5.0
    with ending_by(time.monotonic() + 1000.0):
        assert 500.0 < time_left(5000.0) <= 1000.0
        assert time_left(0.1) == 0.1
        assert deadline(5000.0) <= time.monotonic() + 1000.0
        with ending_by(time.monotonic() - 1.0):
            assert time_left(5.0) == 0.0
    assert time_left(5.0) == 5.0


def test_a_write_after_its_deadline_is_refused_or_done(store_url: str, store_prefix: str) -> None:
    """A store that reports a failure doesn't carry out the write later."""
    store = open_store(store_url, StoreOptions(store_prefix))[0]
    record = a_record(time.time)
    store.create(record)
    for _ in range(10):
        changed, expected = record._replace(version=new_version()), record
        with ending_by(time.monotonic() - 1.0), suppress(StoreUnavailable):
            store.save(changed, record.version)
            expected = changed
        time.sleep(0.01)
        record = expected
        found = store.load(record.key)
        assert found is not None
        assert found.version == record.version
    store.close()
