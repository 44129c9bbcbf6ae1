"""Exceptions from outside that interrupt a store call, such as a view's deadline by a signal.

They reach the caller, whatever their kind, and don't affect later calls.
"""

from __future__ import annotations

import contextvars
import ctypes
import gc
import linecache
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
from flask import Flask
from redis import Redis

from flask_gsession.errors import Gone, KeyTaken, Stale, StoreUnavailable
from flask_gsession.stores import Record, StoreOptions, open_store
from flask_gsession.stores.base import new_version, unexpired
from flask_gsession.stores.interrupts import Condition, interruption
from flask_gsession.testing import a_record
from tests.harness.servers import RedisServer

pytest_plugins = ["tests.harness.topologies"]

PATIENCE = 20.0  # seconds for a call


class TooLong(Exception):
    """A deadline of the application's own."""


class TooLongAsItIsUsual(TimeoutError):
    """A deadline that looks like a socket error."""


KINDS = [TooLong, TooLongAsItIsUsual, TimeoutError, ConnectionResetError]


def struck(call: Callable[[], object]) -> None:
    """Make a call that gets SIGALRM, in it or, on a busy machine, just before."""
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    call()


@contextmanager
def handler(kind: type[Exception]) -> Iterator[list[Exception]]:
    """SIGALRM and SIGUSR1 raise this. Gives the exceptions they raised."""
    raised: list[Exception] = []

    def strike(number: int, frame: FrameType | None) -> None:
        raised.append(kind("the view took too long"))
        raise raised[-1]

    numbers = (signal.SIGALRM, signal.SIGUSR1)
    before = [signal.signal(number, strike) for number in numbers]
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # it may strike a finalizer
    try:
        yield raised
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, one in zip(numbers, before, strict=True):
            signal.signal(number, one)
        gc.collect()  # sockets that were cut off complain
        sys.unraisablehook = hook


def struck_at(number: int, files: tuple[str, ...], call: Callable[[], object]) -> bool:
    """Run ``call``, struck at this line in these files; whether there are so many."""
    left = number

    def enter(frame: FrameType, event: str, _: object) -> Any:
        return line if frame.f_code.co_filename.endswith(files) else None

    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        # On its way out of a block Python comes by its first line, too, and raises nothing there.
        if event == "line" and not text.startswith("with "):
            left -= 1
            if left == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGUSR1)
        return line

    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(None)
    return left <= 0


@pytest.fixture
def store(store_url: str, store_prefix: str) -> Iterator[Any]:
    opened = open_store(store_url, StoreOptions(store_prefix, timeout=PATIENCE))[0]
    with Flask(__name__).test_request_context():  # or SQLite would keep no connection
        yield opened
    opened.close()


_REDIS = ("store", "records", "layout", "commands", "failures", "pool")

FILES = {
    "memory": ("stores/memory/store.py",),
    "sqlite": tuple(f"stores/sqlite/{name}.py" for name in ("store", "records", "layout", "file")),
    "redis": tuple(f"stores/redis/{name}.py" for name in _REDIS),
    "mongodb": (
        *(f"stores/mongodb/{name}.py" for name in ("store", "records", "layout", "driver")),
        "pymongo/_csot.py",
        "pymongo/synchronous/client_session.py",
    ),
}


def files_of(store: Any) -> tuple[str, ...]:
    return next(
        files for name, files in FILES.items() if type(store).__name__.lower().startswith(name)
    )


def our_files_of(store: Any) -> tuple[str, ...]:
    """The files without PyMongo's, which takes any ``OSError`` for a network error."""
    return tuple(file for file in files_of(store) if file.startswith("stores/"))


def changed(record: Record) -> Record:
    return record._replace(version=new_version(), payload=b"changed")


def loading(store: Any, record: Record) -> tuple[Callable[[], object], list[str]]:
    """A call, and the keys that the session may be under afterwards."""
    return lambda: store.load(record.key), [record.key]


def saving(store: Any, record: Record) -> tuple[Callable[[], object], list[str]]:
    saved = changed(record)
    return lambda: store.save(saved, record.version), [record.key]


def rotating_without_grace(store: Any, record: Record) -> tuple[Callable[[], object], list[str]]:
    new = a_record(time.time)
    return lambda: store.replace(record.key, new, record.version, None), [record.key, new.key]


CALLS = [
    pytest.param(loading, TooLong, marks=pytest.mark.long),
    (loading, TimeoutError),
    pytest.param(saving, TimeoutError, marks=pytest.mark.long),
    (rotating_without_grace, TooLong),
]


@pytest.mark.parametrize(("verb", "kind"), CALLS)
def test_an_interrupt_at_any_line_harms_no_later_call(
    verb: Callable[..., Any], kind: type[Exception], store: Any
) -> None:
    """It comes out; a logout that follows ends the session, whatever is repeated afterwards."""
    files = our_files_of(store) if issubclass(kind, OSError) else files_of(store)
    number, struck, held = 0, True, []
    with handler(kind) as raised:
        while struck:
            number += 1
            record = a_record(time.time)
            store.create(record)
            call, keys = verb(store, record)
            try:
                struck = contextvars.copy_context().run(struck_at, number, files, call)
                assert not struck, f"swallowed at line {number}"
            except (kind, StoreUnavailable) as error:
                held = [error]  # as error reports do: with all frames and their variables
            for key in keys:
                store.delete(key)
            with suppress(Gone, Stale, KeyTaken):
                call()
            now = int(time.time() * 1000)
            assert [unexpired(store, key, now) for key in keys] == [None] * len(keys), number
    assert len(raised) == number - 1
    assert number > 1
    assert held


def test_an_interrupt_of_the_decoder_corrupts_nothing(mongodb_url: str, store_prefix: str) -> None:
    """The driver calls it invalid BSON: the record is read again, where nothing strikes."""
    store: Any = open_store(mongodb_url, StoreOptions(store_prefix, timeout=PATIENCE))[0]
    record = a_record(time.time)
    store.create(record)
    number, struck = 0, True
    with handler(TooLong):
        while struck:
            number += 1
            with suppress(TooLong):
                files = ("bson/__init__.py", "bson/datetime_ms.py")
                struck = struck_at(number, files, lambda: store.load(record.key))
            assert store.load(record.key) == record
    assert number > 2
    store.delete(record.key)
    store.close()


def test_a_full_stack_corrupts_nothing(mongodb_url: str, store_prefix: str) -> None:
    """The decoder's own recursion doesn't either, with hardly anything of the stack left."""
    store: Any = open_store(mongodb_url, StoreOptions(store_prefix, timeout=PATIENCE))[0]
    record = a_record(time.time)
    store.create(record)

    def load(depth: int) -> object:
        return load(depth - 1) if depth else store.load(record.key)

    outcomes = set()
    for depth in range(sys.getrecursionlimit() - 300, sys.getrecursionlimit()):
        try:
            outcomes.add(load(depth))
        except (RecursionError, StoreUnavailable) as error:
            outcomes.add(type(error))
    assert record in outcomes
    assert RecursionError in outcomes
    assert store.load(record.key) == record
    store.delete(record.key)
    store.close()


def test_a_storm_of_signals_leaves_sqlite_open(sqlite_url: str) -> None:
    """Some interrupt the finalizer of an earlier interrupted call."""
    store: Any = open_store(sqlite_url, StoreOptions())[0]
    record = a_record(time.time, payload=bytes(2000))
    store.create(record)

    def work() -> None:
        there = store.load(record.key)
        store.save(there._replace(version=new_version()), there.version)

    took = []
    with Flask(__name__).test_request_context():  # or it would keep no connection
        for _ in range(20):
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)
    usual = min(took)
    dice = random.Random(13)
    with handler(TooLong) as raised, Flask(__name__).test_request_context():
        for _ in range(1500):
            with suppress(TooLong):
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.05, 1.5) * usual)
                try:
                    work()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            work()  # at once, while the interrupted objects may still exist
    assert raised
    store.close()


def test_a_storm_of_signals_leaves_no_condition_held() -> None:
    """With the standard library's conditions, it would leave about seventy held."""
    condition, dice = Condition(threading.Lock()), random.Random(13)
    with handler(TooLong) as raised:
        for _ in range(2000):
            with suppress(TooLong):
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, 1e-5))
                try:
                    for _ in range(20):
                        with condition:
                            pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert condition.acquire(blocking=False)
            condition.release()
    assert raised


@contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


@pytest.mark.parametrize("manner", ["url", "client"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_while_redis_is_slow_is_raised(
    kind: type[Exception], manner: str, own_redis: RedisServer
) -> None:
    client = Redis.from_url(own_redis.url, socket_timeout=PATIENCE)
    source = own_redis.url if manner == "url" else client
    store: Any = open_store(source, StoreOptions(timeout=PATIENCE))[0]
    record = a_record(time.time)
    store.create(record)
    calls = [
        lambda: store.load(record.key),
        lambda: store.save(changed(record), record.version),
        lambda: store.renew(record, record.idle_expires_at + 1000),
        lambda: store.leases.acquire(record.key, "one", 1000, 1),
        lambda: store.blobs.read_frame("0" * 32, 0, 10),
        store.scans.scan,
        store.counts.count,
        lambda: store.delete(record.key),
    ]
    with handler(kind) as raised:
        for call in calls:
            store.load(record.key)
            with frozen(own_redis), pytest.raises(kind) as caught:
                struck(call)
            assert caught.value is raised[-1]
    assert store.load(a_record(time.time).key) is None
    store.close()
    client.close()


def test_an_exception_from_another_thread_is_raised(own_redis: RedisServer) -> None:
    store: Any = open_store(own_redis.url, StoreOptions(timeout=PATIENCE))[0]
    record = a_record(time.time)
    store.create(record)
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    main = ctypes.c_ulong(threading.get_ident())

    def strike() -> None:
        raise_in(main, ctypes.py_object(TimeoutError))
        own_redis.resume()  # it is raised when the thread comes back to Python

    own_redis.pause()
    timer = threading.Timer(0.1, strike)
    timer.start()
    with pytest.raises(TimeoutError):
        store.load(record.key)
    timer.join()
    assert store.load(record.key) == record
    store.close()


def test_an_exception_that_was_handled_before_is_ignored() -> None:
    """An error page reads the session; the later error is a lost connection."""
    with handler(TimeoutError):
        met: list[tuple[OSError, BaseException | None]] = []
        try:
            signal.raise_signal(signal.SIGUSR1)
        except TimeoutError as first:
            met.append((first, interruption(first)))
            try:
                raise ConnectionRefusedError(111, "refused")
            except OSError as error:
                met.append((error, interruption(error)))
    assert met[0][1] is met[0][0]
    assert met[1][0].__context__ is met[0][0]
    assert met[1][1] is None


def test_one_that_a_driver_made_another_of_is_found() -> None:
    def driver() -> None:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except OSError:
            raise RuntimeError("the connection is lost")  # noqa: B904  # as drivers do

    with handler(TimeoutError) as raised, pytest.raises(RuntimeError) as caught:
        driver()
    assert interruption(caught.value) is raised[0]
