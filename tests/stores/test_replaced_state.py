"""State that one thread replaces while another is between two steps of a call."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Semaphore, Thread
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from flask import Flask
from joserfc import jwt
from joserfc.jwk import ECKey
from marshmallow import fields
from prometheus_client import CollectorRegistry

from flask_gsession import Session
from flask_gsession.contrib import metrics_watch
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.contrib.metrics_watch import StoreWatch
from flask_gsession.contrib.oidc_tokens import KeysUnavailable, ProviderKeys
from flask_gsession.errors import CutOff, PassportRefused, StoreUnavailable
from flask_gsession.live.hints import Hints
from flask_gsession.live.listener import Listener, now
from flask_gsession.operate import cleanup
from flask_gsession.protocol import gsession_pb2 as pb
from flask_gsession.sharing.passport import PassportReader
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.edge import worker
from flask_gsession.stores.edge.link import Link
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.redis import wakeup
from flask_gsession.stores.redis.pool import AllInUse, ConnectionPool, _Lent
from flask_gsession.stores.redis.servers import PrimaryPool
from flask_gsession.stores.remote import channel as remote_channel
from flask_gsession.stores.remote import forks
from flask_gsession.stores.remote.address import Address
from flask_gsession.stores.remote.changes import RemoteChanges, RemoteSource
from flask_gsession.stores.remote.channel import Channel, _Connected
from flask_gsession.stores.sqlite import file as sqlite
from flask_gsession.stores.sqlite.store import SQLiteStore
from flask_gsession.stores.wrappers.near_cache import KeptRecords
from flask_gsession.testing import a_record
from flask_gsession.typed import SessionKey
from flask_gsession.values.merge import DECLARED
from tests.harness.apps import until
from tests.harness.interleaving import before_line

# Redis --------------------------------------------------------------------------------------------


class NoConnection:
    def __init__(self) -> None:
        self.deadline = type("Deadline", (), {"at": 0.0})()
        self.open = True
        self._sock = None

    def disconnect(self) -> None:
        self.open = False


@pytest.fixture
def pool() -> ConnectionPool:
    return ConnectionPool(NoConnection, 2)


def soon() -> float:
    return time.monotonic() + 0.05


def test_a_connection_that_is_returned_while_the_pool_is_closed_is_not_lent(
    pool: ConnectionPool,
) -> None:
    """It may lead to a server that was replaced, whose records would count as current."""
    slot = pool.take(soon())
    connection = slot.connection
    with before_line(ConnectionPool.give, "idle.append(slot)", pool.close):
        pool.give(slot)
    del slot
    lent = [pool.take(soon()) for _ in range(2)]
    assert {slot.connection for slot in lent}.isdisjoint({connection})
    with pytest.raises(AllInUse):
        pool.take(soon())


def test_a_lost_slot_is_not_made_up_for_in_the_next_pool(pool: ConnectionPool) -> None:
    lent = [pool.take(soon()), pool.take(soon())]
    del lent[0]
    with before_line(ConnectionPool._wait_until_closed, "made = Slot(returned)", pool.close):
        extra = pool.take(soon())
    lent = [pool.take(soon()), pool.take(soon())]
    pool.give(extra)
    del extra
    with pytest.raises(AllInUse):
        pool.take(soon())


def test_a_pool_that_two_threads_close_keeps_its_connections_afterwards(
    pool: ConnectionPool,
) -> None:
    with before_line(_Lent.__init__, "self.slots", pool.close):
        pool.close()
    for _ in range(3):
        lent = [pool.take(soon()) for _ in range(2)]
        for slot in lent:
            pool.give(slot)
    del lent, slot
    lent = [pool.take(soon()) for _ in range(2)]
    with pytest.raises(AllInUse):
        pool.take(soon())
    assert all(slot.connection.open for slot in lent)


def test_a_connection_that_was_lent_during_a_failover_is_not_lent_again() -> None:
    """The old primary still accepts writes for a while, and they are lost."""
    primary = ["old", 1]
    pool: Any = PrimaryPool("redis+sentinel://127.0.0.1:1/main/0", 1.0, 2)
    pool.make = NoConnection
    pool._find = lambda _: tuple(primary)
    pool._pooled = pool._find(0)
    first, second = pool.take(soon()), pool.take(soon())
    connection = first.connection
    pool.give(second)
    primary[0] = "new"
    pool._look_at = 0.0
    pool.give(pool.take(soon()))
    pool.give(first)
    assert not connection.open
    assert pool.take(soon()).connection is not connection


def test_a_lock_is_not_waited_for_on_a_connection_that_just_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(wakeup._Waiter, "wait", lambda self, seconds: waited.append(seconds))
    wake_ups: Any = wakeup.WakeUps(NoConnection, b"", 0.1)
    ended = wake_ups._listener = wakeup._Listener(wake_ups)
    ended.ready.set()

    def end() -> None:
        ended.ready.clear()
        wake_ups._gone(ended, None)

    with before_line(wakeup.WakeUps.wait, "waiter = self._expect(", end):
        wake_ups._failed_at = time.monotonic()  # it doesn't connect again so soon
        assert not wake_ups.wait(b"owner", 60.0)
    assert waited == []


def test_a_server_that_ends_before_it_is_followed_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[bool] = []

    def refuse(_: object) -> None:
        raise OSError("not connected")

    store: Any = open_store("redis://127.0.0.1:1/0", StoreOptions())[0]
    source = store.changes.source
    lost = type("Lost", (), {"close": lambda _: closed.append(True)})()
    monkeypatch.setattr(source, "_connect", lambda *_: lost)
    monkeypatch.setattr(store.commands.pool, "follow", refuse)
    with pytest.raises(StoreUnavailable, match="not connected"):
        source.open("")
    assert closed
    store.close()


# SQLite -------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(tmp_path / "sessions.sqlite3", StoreOptions())
    store.create(a_record(time.time))
    yield store
    store.close()


def connections(store: SQLiteStore) -> int:
    return len(store.file._pool) + len(store.file._watching)


def test_connections_are_closed_while_a_call_takes_the_last(store: SQLiteStore) -> None:
    file = store.file
    file._give_back(file._open(), file._pool)
    file._give_back(file._open(), file._pool)
    with before_line(sqlite._close_all, "pool.pop()", lambda: sqlite._close_all(file._pool)):
        store.close()
    assert not file._pool


def test_a_connection_to_a_replaced_file_does_not_stay_open(store: SQLiteStore) -> None:
    file = store.file

    def replace() -> None:
        os.rename(file.path, f"{file.path}.old")
        file._look_for_file()

    db = file._open()
    with before_line(type(file)._give_back, "pool.append(db)", replace):
        file._give_back(db, file._pool)
    assert db not in sqlite._opened.connections


def test_a_file_that_is_opened_during_a_fork_waits_for_it(tmp_path: Path) -> None:
    """The fork goes through all files, and would fail if their set changed meanwhile."""
    opening = Thread(target=sqlite.SQLiteFile, args=(tmp_path / "other.sqlite3", 1.0))
    with sqlite._opened.forking:
        opening.start()
        opening.join(0.1)
        assert opening.is_alive()
    opening.join(30)
    assert not opening.is_alive()


def test_a_file_is_opened_in_a_child_of_a_fork_in_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the parent may have held the lock."""
    held, noticed = Event(), Event()

    def hold() -> None:
        with sqlite._opened.forking:
            held.set()
            noticed.wait(5)

    Thread(target=hold).start()
    held.wait(30)
    monkeypatch.setattr(sqlite.process, "notice", noticed.set)
    sqlite.SQLiteFile(tmp_path / "other.sqlite3", 1.0)
    assert noticed.is_set()


class Interrupt(BaseException):
    """Raised by a signal handler."""


def test_an_interrupt_while_the_file_is_replaced_loses_nothing(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, record = store.file, a_record(time.time)
    file._give_back(file._open(), file._pool)
    os.rename(file.path, f"{file.path}.old")

    def strike() -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(file, "_start_pool", strike)
        with pytest.raises(Interrupt):
            file._look_for_file()
    file._look_at = 0.0
    store.create(record)
    other = SQLiteStore(file.path, StoreOptions())
    assert other.load(record.key) == record
    other.close()


# gRPC ---------------------------------------------------------------------------------------------


@pytest.fixture
def channel() -> Iterator[Channel]:
    """To a server that isn't there."""
    store: Any = open_store("grpc://127.0.0.1:1", StoreOptions(timeout=0.2))[0]
    yield store.channel
    store.close()


def test_a_channel_that_is_closed_before_a_call_is_sent_is_replaced(channel: Channel) -> None:
    """Without a server, the call fails like any other; it isn't refused by gRPC itself."""
    with (
        before_line(Channel._send, "return send(", channel._close_all),
        pytest.raises(grpc.RpcError),
    ):
        channel._send("Load", b"", 0.2)


def test_a_call_is_not_prepared_for_a_channel_that_another_thread_dropped(
    channel: Channel,
) -> None:
    with (
        before_line(_Connected.prepare, "method = _METHODS[name]", channel._drop),
        pytest.raises(grpc.RpcError),
    ):
        channel._send("Load", b"", 0.2)
    assert channel._connected is None or channel._connected.calls == {}
    with pytest.raises(grpc.RpcError):
        channel._send("Load", b"", 0.2)


def test_dropped_channels_are_closed_by_two_threads(channel: Channel) -> None:
    channel._dropped = [(0.0, lambda: None)]
    with before_line(Channel._close_dropped, "._dropped.", lambda: channel._close_dropped(0.0)):
        channel._close_dropped(0.0)
    assert channel._dropped == []


def test_a_stream_that_begins_or_fails_before_a_fork_keeps_no_other_open() -> None:
    guard, ended = forks.ForkGuard(), []

    class Stream:
        def end_before_fork(self) -> None:
            guard.remove(self)
            ended.append(self)
            raise StoreUnavailable("gRPC is stuck")

    streams = [Stream(), Stream()]
    for stream in streams:
        guard.add(stream)
    guard.before_fork()
    guard.after_fork()
    assert ended == streams


def test_a_stream_that_is_just_beginning_ends_before_a_fork() -> None:
    guard, begins, ended = forks.ForkGuard(), Event(), Event()
    kind = type("Stream", (), {"end_before_fork": lambda _: (guard.remove(stream), ended.set())})
    stream: Any = kind()

    def begin() -> None:
        begins.set()
        while not guard.forking:
            time.sleep(0.001)
        time.sleep(0.05)  # the fork has ended other streams already
        guard.add(stream)

    thread = Thread(target=guard.run, args=(begin,))
    thread.start()
    assert begins.wait(30)
    guard.before_fork()
    guard.after_fork()
    thread.join(30)
    assert ended.is_set()


def test_a_call_gives_up_in_time_while_the_channel_is_being_opened(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC may be stuck there, with the lock that other threads need to open the channel."""
    monkeypatch.setattr(remote_channel, "_OVERDUE", 0.01)
    leave, left = Event(), []
    monkeypatch.setattr(channel, "_open", lambda: left.append(leave.wait(5)))
    with pytest.raises(StoreUnavailable, match="stuck"):
        channel.call("Load", pb.LoadRequest())
    assert left == []
    leave.set()


def test_a_watch_without_a_thread_leaves_no_stream_open(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[bool] = []
    call = SimpleNamespace(cancel=lambda: cancelled.append(True))
    channel: Any = SimpleNamespace(
        stream=lambda *arguments: arguments[-1](call), shielded=lambda call: call(), timeout=1.0
    )

    def refuse(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refuse)
    with pytest.raises(StoreUnavailable, match="needs a thread") as raised:
        RemoteChanges(channel, 1.0, bool)
    assert cancelled
    streams = [each for each in forks.guard.streams if isinstance(each, RemoteChanges)]
    assert call not in [each._call for each in streams], raised  # whose traceback keeps the stream


# Memory and the near cache ------------------------------------------------------------------------


def test_subscribers_that_come_at_the_same_time_are_all_kept() -> None:
    store = MemoryStore()
    first, second = KeptRecords(store, 1.0, 0), KeptRecords(store, 1.0, 0)
    other = Thread(target=store.subscribe, args=(first,))

    class Meanwhile(tuple[Any, ...]):
        def __iter__(self) -> Iterator[Any]:
            other.start()
            other.join(0.2)  # unless it waits for a lock
            return iter(())

    store._subscribers = Meanwhile()
    store.subscribe(second)
    other.join(30)
    assert {*store._subscribers} == {first, second}
    store.close()


class Listens:
    """Stands in for a store's listener. Another thread acts ``meanwhile``, as one subscribes."""

    def __init__(self) -> None:
        self.subscribers: list[Any] = []
        self.meanwhile = Thread()

    def subscribe(self, subscriber: Any, interval: float | None = None) -> None:
        if not self.meanwhile.ident:
            self.meanwhile.start()
            self.meanwhile.join(0.2)  # unless it waits for a lock
        self.subscribers.append(subscriber)

    def feed(self, key: str) -> Any:
        return object() if self.subscribers else "missed"


def test_the_near_cache_is_on_again_only_after_it_hears_changes() -> None:
    """Another listener's feed proves nothing for a cache that isn't subscribed to it."""
    changes: Any = Listens()
    kept = KeptRecords(changes, 1.0, 1000)
    changes.subscribers.clear()
    kept._off_until = 0.0  # its pause is over
    fed: list[Any] = []
    changes.meanwhile = Thread(target=lambda: fed.append(kept.feed("k")))
    kept.feed("k")
    changes.meanwhile.join(30)
    assert fed != ["missed"]
    assert changes.subscribers == [kept]


def test_a_near_cache_that_was_off_at_a_fork_stays_off() -> None:
    """Its subscription isn't there in the child, either."""
    changes: Any = Listens()
    kept = KeptRecords(changes, 1.0, 1000)
    kept._off_until = now() + 1000
    kept._start()
    assert kept.feed("k") is None


# Threads that have to go on -----------------------------------------------------------------------


def test_a_listener_goes_on_after_a_connection_fails_to_close() -> None:
    opened = Semaphore(0)

    class Fails:
        unproven, one_feed, timeout = "", True, 1.0
        moved = shifted = bool

        def servers(self) -> tuple[str]:
            return ("",)

        def server_of(self, key: str) -> str:
            return ""

        def open(self, server: object) -> Fails:
            opened.release()
            return self

        def beat(self) -> None:
            raise StoreUnavailable("lost")

        def shut(self) -> None:
            pass

        def close(self) -> None:
            raise StoreUnavailable("gRPC is stuck")

    source: Any = Fails()
    listener, subscriber = Listener(source), KeptRecords(MemoryStore(), 1.0, 0)
    listener.subscribe(subscriber)
    listener.start()
    assert opened.acquire(timeout=30)
    assert opened.acquire(timeout=30)
    listener.close()


def test_hints_that_are_closed_leave_a_new_watch_its_subscription() -> None:
    app = Flask(__name__)
    ext = Session(app, store="memory://")
    with app.app_context():
        hints = ext.live.hints()
    hints.watch(None, "1", lambda *_: None)

    def watch() -> None:
        hints.watch(None, "2", lambda *_: None)

    with before_line(Hints.close, "thread.join(_TICK)", watch):
        hints.close()
    assert hints._is_heard
    ext.close(app)


def test_an_edge_whose_thread_was_interrupted_at_its_start_starts_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def strike(_: Thread) -> None:
        raise Interrupt

    monkeypatch.setattr(worker, "is_at_work", lambda: True)
    edge = worker.Worker(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(worker.threading.Thread, "start", strike)
        with pytest.raises(Interrupt):
            edge.start(bool, bool, bool)
    assert edge.lacks_thread


def test_a_link_that_is_restored_during_a_call_still_gives_its_reason() -> None:
    link = Link()
    link.mark_cut(StoreUnavailable("lost"))
    with (
        before_line(Link.call, "raise CutOff(", link.mark_restored),
        pytest.raises(CutOff, match="lost"),
    ):
        link.call("load", bool)


def test_servers_that_keep_changing_never_overflow() -> None:
    source: Any = RemoteSource(Channel(Address.of("grpc://127.0.0.1:1"), 1.0))
    for _ in range(1100):
        source._stream = type("Stream", (), {"number": 1})
        source.answered_by(2, 1)
    assert source._open_at <= now() + 60


def test_calls_that_begin_while_the_mongodb_client_closes_use_the_next_one(
    mongodb_url: str, store_prefix: str
) -> None:
    store: Any = open_store(mongodb_url, StoreOptions(store_prefix))[0]
    record = a_record(time.time)
    store.create(record)
    driver, loaded = store.driver, []
    close = driver._close_client

    def slowly() -> None:
        close()
        loaded.append(store.load(record.key))

    driver._close_client = slowly
    store.close()
    assert loaded == [record]
    assert store.load(record.key) == record
    assert driver._inherited == []
    store.close()


def test_two_threads_that_meet_an_outage_start_one_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(metrics_watch, "_keep_watching", lambda *_: started.append(_))
    app = Flask(__name__)
    ext = Session(app, store="memory://")
    SessionMetrics(app, registry=CollectorRegistry())
    (watch,) = app.extensions["gsession-metrics"].values()
    with before_line(StoreWatch._begin, "self._wake = threading.Event()", watch._begin):
        watch._begin()
    until(lambda: started)
    assert len(started) == 1
    ext.close(app)


def test_two_requests_start_one_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(cleanup, "_work", lambda *_: started.append(_))
    app = Flask(__name__)
    ext = Session(app, store=f"sqlite:///{tmp_path}/sessions.sqlite3")
    cleanup.CleanupWorker(app)
    worker = app.extensions[cleanup.NAME][ext]
    with before_line(cleanup._Worker.begin, "is_before_fork()", worker.begin):
        worker.begin()
    until(lambda: started)
    assert len(started) == 1
    worker.end()
    ext.close(app)


def test_a_typed_key_is_declared_while_another_thread_goes_through_its_namesakes() -> None:
    keys = [SessionKey("namesake", fields.Integer())]
    found = iter(DECLARED["namesake"])
    next(found)
    keys.append(SessionKey("namesake", fields.Integer()))
    assert [*found] == []
    assert {*map(id, DECLARED["namesake"])} == {*map(id, keys)}


# Keys that are fetched ----------------------------------------------------------------------------


class Fetches:
    """Fetches keys. Another thread, which needs them too, starts ``meanwhile``."""

    def __init__(self, keys: Any) -> None:
        self.keys = keys
        self.meanwhile = Thread()

    def __call__(self) -> Any:
        self.meanwhile.start()  # a second fetch would fail here
        self.meanwhile.join(0.2)  # unless it waits for this fetch
        return self.keys


def test_passports_are_read_while_another_thread_fetches_the_keys() -> None:
    key = ECKey.generate_key("P-256", {"kid": "1", "alg": "ES256"})
    claims = {"iss": "shop", "aud": "billing", "sub": "17", "jti": "1"}
    claims |= {"iat": int(time.time()), "exp": int(time.time()) + 60}
    text = jwt.encode({"alg": "ES256", "kid": "1"}, claims, key)
    fetch, users = Fetches({"keys": [key.as_dict(private=False)]}), []
    reader = PassportReader(fetch, "shop", "billing", once=False)
    fetch.meanwhile = Thread(target=lambda: users.append(reader.read(text).user))
    users.append(reader.read(text).user)
    fetch.meanwhile.join(30)
    assert users == ["17", "17"]


def test_logout_tokens_are_read_while_another_thread_fetches_the_keys() -> None:
    key = ECKey.generate_key("P-256", {"kid": "1", "use": "sig"})
    fetch, found = Fetches({"keys": [key.as_dict(private=False)]}), []
    keys = ProviderKeys(fetch)
    fetch.meanwhile = Thread(target=lambda: found.append(len(keys.candidates("1"))))
    found.append(len(keys.candidates("1")))
    fetch.meanwhile.join(30)
    assert found == [1, 1]


def test_a_fetch_of_keys_may_check_tokens_itself() -> None:
    """As a service does in its own requests, for example. The keys aren't there yet."""

    def read() -> None:
        with pytest.raises(PassportRefused):
            reader.read("x.y.z")

    def fetch_and_read() -> Any:
        read()
        return keys

    def fetch_and_check() -> Any:
        with pytest.raises(KeysUnavailable):
            logouts.candidates("1")
        return keys

    key = ECKey.generate_key("P-256", {"kid": "1", "use": "sig"})
    keys = {"keys": [key.as_dict(private=False)]}
    reader = PassportReader(fetch_and_read, "shop", "billing")
    logouts = ProviderKeys(fetch_and_check)
    for call in (read, lambda: logouts.candidates("1")):
        thread = Thread(target=call, daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("lock", ["near cache", "sqlite"])
def test_a_finalizer_or_a_signal_handler_may_take_a_lock_again(lock: str) -> None:
    near = KeptRecords(MemoryStore(), 1.0, 0)._lock
    again = {"near cache": near, "sqlite": sqlite._opened.lock}[lock]
    with again:
        taken = again.acquire(blocking=False)
        if taken:
            again.release()
    assert taken
