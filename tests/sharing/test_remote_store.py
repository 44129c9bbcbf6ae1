"""A store over gRPC: outages within the budget, forks, interrupts, and malformed answers."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from flask import Flask

from flask_gsession import Session
from flask_gsession.errors import SettingError, Stale, StoreUnavailable
from flask_gsession.protocol import gsession_pb2 as pb
from flask_gsession.protocol.methods import methods_of
from flask_gsession.sharing.server import Service
from flask_gsession.sharing.store_service import StoreService
from flask_gsession.sharing.writes import Writes
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import new_version
from flask_gsession.stores.parts import parts_of
from flask_gsession.stores.remote import forks
from flask_gsession.stores.support import count_round_trips
from flask_gsession.testing import HookedStore, a_record
from tests.harness.apps import PATIENCE, Site, until, within
from tests.harness.sharing import ServeCommand, serving, store_servers
from tests.stores.test_interrupts import TooLong, handler

BUDGET = 0.4  # seconds for a call
BOUND = 5 * BUDGET  # on a busy machine


@pytest.fixture
def far(store_url: str, store_prefix: str) -> Iterator[HookedStore]:
    store = HookedStore(open_store(store_url, StoreOptions(store_prefix, timeout=PATIENCE))[0])
    yield store
    store.close()


def reach(url: str, timeout: float = PATIENCE) -> Any:
    return open_store(url, StoreOptions(timeout=timeout))[0]


# The URL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("grpc://sessions.internal:7443", "leads to another machine without TLS"),
        ("grpc://10.0.0.7", "leads to another machine without TLS"),
        ("grpcs://", "names no host"),
        ("grpcs:///run/x.sock", "names no host"),
        ("grpc:///", "names no host"),
        ("grpcs://host:99999", "can't be read"),
        ("grpcs://host/path", "more than a host"),
        ("grpcs://user:word@host", "more than a host"),
        ("grpcs://host?cert=/x", "one of cert and key"),
        ("grpcs://host?ca=/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("grpcs://host?tls=1", "the option 'tls'"),
        ("grpc://localhost?without=verbs", "without='verbs'"),
        ("grpc://localhost?ca=/x", "doesn't use TLS"),
        ("grpc://localhost?ca", "can't be read"),
    ],
)
def test_a_url_that_can_not_be_is_named_at_init_app(url: str, why: str) -> None:
    with pytest.raises(SettingError, match="gRPC URL") as caught:
        Session(Flask(__name__), store=url)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "grpc://localhost",
        "grpc://127.0.0.9:1",
        "grpc://[::1]:7443",
        "grpc:///run/gsession%20a.sock",
        "grpc://s3cret@localhost?without=leases,blobs",
        "grpcs://sessions.internal",
        "GRPCS://sessions.internal:1",
    ],
)
def test_a_url_asks_no_server_and_shows_no_token(url: str) -> None:
    app = Flask(__name__)
    ext = Session(app, store=url)
    store: Any = ext.store(app)
    assert "s3cret" not in repr(vars(store)) + repr(store.channel.address)
    assert (parts_of(store).leases is None) == ("without" in url)


# An outage --------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Iterator[ServeCommand]:
    settings = {"SESSION_STORE": f"sqlite:///{tmp_path}/far.sqlite3"}
    with ServeCommand(tmp_path / "serve", settings) as command:
        yield command


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeCommand]:
    """A server in another process, to be left running."""
    folder = tmp_path_factory.mktemp("lasting")
    settings = {"SESSION_STORE": f"sqlite:///{folder}/far.sqlite3"}
    with ServeCommand(folder / "serve", settings) as command:
        yield command


@pytest.fixture
def remote_site(command: ServeCommand) -> Iterator[Site]:
    with Site(command.url, "", time.time, timeout=BUDGET) as site:
        yield site


@pytest.mark.parametrize("how", ["killed", "frozen", "ended"])
def test_a_server_that_goes_away_is_503_in_time_and_comes_back(
    how: str, command: ServeCommand, remote_site: Site
) -> None:
    visitor = remote_site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    {
        "killed": command.kill,
        "ended": command.stop,
        "frozen": lambda: command.signal(signal.SIGSTOP),
    }[how]()
    for _ in range(3):
        response = within(BOUND, lambda: visitor.ask(dict))
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert "Set-Cookie" not in response.headers
    assert visitor.get("/untouched").status_code == 200
    if how == "frozen":
        command.signal(signal.SIGCONT)
    else:
        command.start()
    deadline = time.monotonic() + 20
    while visitor.ask(dict).status_code != 200:
        assert time.monotonic() < deadline, "it does not recover"
        time.sleep(0.05)
    assert visitor.run(dict) == {"cart": ["mug"]}


def outage(store: Any) -> str:
    """The error of a load that must fail."""
    with pytest.raises(StoreUnavailable) as caught:
        store.load("x" * 43)
    return str(caught.value)


def test_nobody_listens(store_prefix: str) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        store = reach(f"grpc://127.0.0.1:{taken.getsockname()[1]}", BUDGET)
        assert "grpc 127.0.0.1" in within(BOUND, lambda: outage(store))
        store.close()


def test_a_server_that_listens_and_never_answers() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        store = reach(f"grpc://127.0.0.1:{silent.getsockname()[1]}", BUDGET)
        within(BOUND, lambda: outage(store))
        store.close()


def test_a_slow_far_store_costs_the_budget_and_no_more(far: HookedStore) -> None:
    release = threading.Event()
    for _ in range(4):
        far.before("load", lambda: release.wait(PATIENCE))
    with store_servers() as serve:
        store = reach(serve(far), BUDGET)
        assert "DEADLINE_EXCEEDED" in within(BOUND, lambda: outage(store))
        release.set()
        store.close()


def test_an_expired_call_is_not_started(far: HookedStore) -> None:
    """The deadline travels with the call: one that waited until then changes nothing."""
    release, record = threading.Event(), a_record(time.time)
    far.before("load", lambda: release.wait(PATIENCE))
    with serving(StoreService(far), threads=1) as address:
        busy, impatient = reach(f"grpc://{address}"), reach(f"grpc://{address}", BUDGET)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(busy.load, record.key)
            while "load" not in far.calls:
                time.sleep(0.001)
            with pytest.raises(StoreUnavailable):
                impatient.create(record)
            release.set()
            assert loading.result() is None
        assert busy.load(record.key) is None
        assert "create" not in far.calls
        busy.close()
        impatient.close()


def test_a_full_server_refuses_immediately(
    far: HookedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_gsession.sharing.server._STREAMS", 1)
    release = threading.Event()
    for _ in range(8):
        far.before("load", lambda: release.wait(PATIENCE))
    with serving(StoreService(far), threads=1) as address, ThreadPoolExecutor(9) as pool:
        store = reach(f"grpc://{address}", PATIENCE)
        calls = [pool.submit(store.load, "x" * 43) for _ in range(8)]
        while not any(call.done() for call in calls):
            time.sleep(0.001)
        release.set()
        errors = [call.exception() for call in calls]
        full = [error for error in errors if isinstance(error, StoreUnavailable)]
        assert full
        assert all(error.contention for error in full)
        store.close()


def test_an_error_of_the_far_store_says_where_it_came_from(far: HookedStore) -> None:
    def fail() -> None:
        raise StoreUnavailable("redis: refused", 9, contention=True)

    far.before("load", fail)
    with store_servers() as serve:
        store = reach(serve(far))
        with pytest.raises(StoreUnavailable, match=r"grpc .*: Load: redis: refused") as caught:
            store.load("x" * 43)
        assert caught.value.retry_after == 9
        assert caught.value.contention
        assert far.calls.count("load") == 1, "an answer is not asked for again"
        store.close()


def test_a_defect_of_the_far_store_is_an_outage_and_shows_nothing(
    far: HookedStore, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("with a secret")

    far.before("load", fail)
    with store_servers() as serve:
        store = reach(serve(far))
        with pytest.raises(StoreUnavailable, match="ZeroDivisionError") as caught:
            store.load("x" * 43)
        assert "secret" not in str(caught.value)
        assert "A call of Load failed" in caplog.text
        store.close()


# Malformed answers --------------------------------------------------------------------------------


class Odd(Service):
    """A service that answers whatever it is given."""

    methods = methods_of("Store")

    def __init__(self, reply: Any) -> None:
        self.reply = reply

    def answer(self, name: str, request: Any, grant: object) -> Any:
        if isinstance(self.reply, bytes):
            return self.methods[name].reply.FromString(self.reply)
        return self.methods[name].reply()


RECORD = a_record(time.time)
CALLS: dict[str, Callable[[Any], object]] = {
    "create": lambda store: store.create(RECORD),
    "load": lambda store: store.load(RECORD.key),
    "save": lambda store: store.save(RECORD, 1),
    "renew": lambda store: store.renew(RECORD, 1),
    "replace": lambda store: store.replace(RECORD.key, a_record(time.time), 1, None),
    "delete": lambda store: store.delete(RECORD.key),
    "acquire": lambda store: store.leases.acquire(RECORD.key, "me", 1, 1),
    "extend": lambda store: store.leases.extend(RECORD.key, "me", 1),
    "release": lambda store: store.leases.release(RECORD.key, "me"),
    "write_frame": lambda store: store.blobs.write_frame("0" * 32, 0, b"x", 1),
    "read_frame": lambda store: store.blobs.read_frame("0" * 32, 0, 1),
    "renew_blobs": lambda store: store.blobs.renew_blobs(["0" * 32], 1),
    "discard_blobs": lambda store: store.blobs.discard_blobs(["0" * 32], 1),
    "scan": lambda store: store.scans.scan(),
    "tidy": lambda store: store.upkeep.tidy(),
    "count": lambda store: store.counts.count(),
    "check": lambda store: store.checks.check(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("reply", [b"", b"\xf8\x07\x01"], ids=["empty", "unknown field"])
def test_an_answer_of_another_version_is_an_outage(call: str, reply: bytes) -> None:
    """Never a silent "not found": a proxy or a newer server may send unreadable answers."""
    with serving(Odd(reply)) as address:
        store = reach(f"grpc://{address}")
        with pytest.raises(StoreUnavailable, match="another version"):
            CALLS[call](store)
        store.close()


def test_the_record_of_another_key_is_not_taken() -> None:
    """G8: an answer that belongs to another call."""
    other = pb.LoadReply(record=pb.Record(key="y" * 43)).SerializeToString()
    with serving(Odd(other)) as address:
        store = reach(f"grpc://{address}")
        with pytest.raises(StoreUnavailable):
            store.load("x" * 43)
        store.close()


@contextmanager
def proxy(code: grpc.StatusCode) -> Iterator[str]:
    """Something between, that answers for the server."""

    def refuse(request: bytes, context: Any) -> bytes:
        context.abort(code, "from a proxy")
        raise AssertionError

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
        def service(self, details: object) -> Any:
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"grpc://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"])
def test_a_status_of_a_proxy_never_means_that_a_session_ended(code: grpc.StatusCode) -> None:
    with proxy(code) as url:
        store = reach(url, BUDGET)
        with pytest.raises(StoreUnavailable):
            store.load(RECORD.key)
        with pytest.raises(StoreUnavailable):
            store.save(RECORD, 1)
        store.close()


def test_a_page_of_large_records_fits_into_a_message(
    far: HookedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_gsession.sharing.store_service._MOST_BYTES", 1000)
    records = {record.key: record for record in (a_record(time.time) for _ in range(12))}
    for record in records.values():
        far.create(record)
    with store_servers() as serve:
        store = reach(serve(far))
        found, cursor, pages = {}, "", 0
        while cursor or not pages:
            page = store.scans.scan(cursor)
            found |= {record.key: record for record in page.records}
            cursor, pages = page.cursor, pages + 1
        assert found == records
        assert pages > 2
        store.close()


def test_a_request_of_a_later_version_is_refused(far: HookedStore) -> None:
    with store_servers() as serve:
        url = serve(far)
        with grpc.insecure_channel(url.removeprefix("grpc://")) as channel:
            call = channel.unary_unary(methods_of("Store")["Load"].path)
            with pytest.raises(grpc.RpcError) as caught:
                call(pb.LoadRequest(key="x").SerializeToString() + b"\xf8\x07\x01")
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "update" in caught.value.details()
            unknown = channel.unary_unary("/flask_gsession.v2.Store/Load")
            with pytest.raises(grpc.RpcError) as caught:
                unknown(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "load" not in far.calls


def test_doctor_names_parts_that_the_url_promises_and_the_far_store_lacks() -> None:
    class Verbs(Store):
        load = staticmethod(lambda key: None)

    with store_servers() as serve:
        url = serve(Verbs())
        findings = reach(url).checks.check()
        assert {finding.severity for finding in findings} == {"error"}
        assert "?without=blobs,counts,leases,scans,upkeep" in findings[0].advice
        with pytest.raises(StoreUnavailable, match="without=leases"):
            reach(url).leases.acquire("x" * 43, "me", 1, 1)


# Forks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_process_has_a_channel_of_its_own(busy: bool, lasting: ServeCommand) -> None:
    """Also one that is forked while other threads are in the middle of calls."""
    store = reach(lasting.url)
    record = a_record(time.time)
    store.create(record)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            assert store.load(record.key) == record

    threads = [threading.Thread(target=work) for _ in range(3 if busy else 0)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    signal.alarm(20)
                    if all(store.load(record.key) == record for _ in range(20)):
                        status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
            assert store.load(record.key) == record
    finally:
        over.set()
        for thread in threads:
            thread.join()
    store.close()


def test_a_call_waits_for_a_fork_and_a_fork_for_calls() -> None:
    guard, order = forks.ForkGuard(), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            inside.set()
            leave.wait(5)
            order.append(f"end of {name}")

        return run

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(guard.run, call("first"))
        inside.wait(5)
        forking = pool.submit(guard.before_fork)
        while not guard.forking:
            time.sleep(0.001)
        second = pool.submit(guard.run, call("second"))
        assert not forking.done()
        leave.set()
        first.result()
        forking.result()
        order.append("fork")
        guard.after_fork()
        second.result()
    assert order == ["first", "end of first", "fork", "second", "end of second"]


def test_a_child_without_fork_support_is_named(
    lasting: ServeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hang."""
    store = reach(lasting.url)
    assert store.load("x" * 43) is None
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
    store.channel._begin()  # as in a child
    with pytest.raises(StoreUnavailable, match="GRPC_ENABLE_FORK_SUPPORT"):
        store.load("x" * 43)


# Writes that were given up --------------------------------------------------------------------


def changed(record: Any) -> Any:
    return record._replace(version=new_version(), payload=b"changed")


@pytest.mark.parametrize("how", ["interrupted", "too slow"])
def test_a_load_shows_the_outcome_of_an_abandoned_write(how: str, far: HookedStore) -> None:
    """Also if it is still running: else it would be taken for lost, and done twice."""
    started, release = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        if how == "interrupted":
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # the caller waits by then
        release.wait(PATIENCE)

    with store_servers() as serve, ThreadPoolExecutor(1) as pool:
        url = serve(far)
        store = reach(url, PATIENCE if how == "interrupted" else BUDGET)
        record = a_record(time.time)
        store.create(record)
        saved = changed(record)
        far.before("save", hold)
        if how == "interrupted":
            with handler(TooLong), pytest.raises(TooLong):
                store.save(saved, record.version)
        else:
            with pytest.raises(StoreUnavailable):
                store.save(saved, record.version)
            store.channel.timeout = PATIENCE
        assert started.is_set()
        loading = pool.submit(store.load, record.key)
        time.sleep(0.05)
        assert not loading.done()
        release.set()
        # A far store of which the caller's deadline ended the call may have refused the write.
        found = loading.result()
        assert found == saved or (found == record and how == "too slow")
        assert store.load(record.key) == found
        store.close()


def test_a_write_cancelled_before_it_began_never_runs(far: HookedStore) -> None:
    release = threading.Event()
    with serving(StoreService(far), threads=2) as address:
        store, busy = reach(f"grpc://{address}", BUDGET), reach(f"grpc://{address}")
        record = a_record(time.time)
        busy.create(record)
        for _ in range(2):
            far.before("load", lambda: release.wait(PATIENCE))
        with ThreadPoolExecutor(2) as pool:
            held = [pool.submit(busy.load, "x" * 43) for _ in range(2)]
            until(lambda: far.calls.count("load") == 2)
            with pytest.raises(StoreUnavailable):
                store.save(changed(record), record.version)
            time.sleep(0.2)  # the server's deadline passes a little after the client's
            release.set()
            for each in held:
                each.result()
        store.channel.timeout = PATIENCE
        assert store.load(record.key) == record
        time.sleep(0.05)
        assert store.load(record.key) == record
        store.close()
        busy.close()


def test_writes_are_settled() -> None:
    writes = Writes()
    with writes.of(1):
        assert not writes.settle([1], 0.01)
        assert writes.settle([2], 0.01)
    assert writes.settle([1], 0.01)
    for version in (1, 2):
        with pytest.raises(StoreUnavailable, match="cancelled"), writes.of(version):
            raise AssertionError("it began")
    with writes.of(3):
        pass


def test_no_write_is_settled_without_a_cancelled_one(far: HookedStore) -> None:
    """Each call still takes one round trip."""
    with store_servers() as serve:
        store = reach(serve(far))
        record = a_record(time.time)
        with count_round_trips() as trips:
            store.create(record)
            store.save(changed(record), record.version)
            store.load(record.key)
            with pytest.raises(Stale):
                store.save(changed(record), 5)
            store.load(record.key)
        assert trips.count == 5
        store.close()


def test_no_proxy_for_web_pages_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, store_servers() as serve:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        store = reach(serve(open_store("memory://", StoreOptions())[0]), BUDGET)
        assert store.load("x" * 43) is None
        store.close()
