"""MongoDB as production runs it: a replica set, a user of the least rights, TLS, and failures."""

from __future__ import annotations

import logging
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import dns.message
import dns.rdatatype
import dns.resolver
import dns.rrset
import pymongo
import pytest
from pymongo import CursorType, MongoClient

from flask_gsession.errors import SettingError, StoreUnavailable
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import Clock, new_version
from flask_gsession.stores.mongodb import MongoDBStore
from flask_gsession.stores.mongodb import health as mongodb_health
from flask_gsession.testing import FakeClock, StoreContract, a_record
from tests.harness.apps import Site, SiteMaker, hasty
from tests.harness.marks import long
from tests.harness.topologies import HOST, MongoAuthTLS, MongoReplicaSet, until

pytest_plugins = ["tests.harness.topologies"]

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "mongodb.md"
SHORT = 0.2  # seconds for a store call that is to fail
PATIENCE = 20.0  # seconds for one that is not


def published_rights() -> list[str]:
    """The actions of the role in the documentation for administrators."""
    actions = re.search(r"actions: \[(.+?)\]", GUIDE.read_text())
    assert actions is not None
    return re.findall(r'"(\w+)"', actions[1])


@pytest.fixture
def replica_set(mongo_replica_set: MongoReplicaSet) -> Iterator[MongoReplicaSet]:
    """The replica set, made whole afterwards."""
    yield mongo_replica_set
    mongo_replica_set.start()


SETUPS = ["replica set", "least rights and TLS", "majority reads", "linearizable reads"]
# `test_reads_as_the_url_wants_them` shows the difference between the read concerns.
RARE = {"majority reads", "linearizable reads"}


@pytest.fixture(params=SETUPS)
def url(request: pytest.FixtureRequest) -> str:
    """A MongoDB URL for each setup in turn."""
    if request.param == "least rights and TLS":
        server: MongoAuthTLS = request.getfixturevalue("mongo_auth_tls")
        return server.url_of_rights(published_rights(), "gsession", "gsession_blobs")
    replica_set: MongoReplicaSet = request.getfixturevalue("mongo_replica_set")
    concern = request.param.partition(" reads")[0]
    options = "" if request.param == "replica set" else f"&readConcernLevel={concern}"
    return replica_set.url + options


@pytest.mark.parametrize("url", long(SETUPS, RARE), indirect=True)
class TestContract(StoreContract):
    """The store contract in each setup."""

    @pytest.fixture(autouse=True)
    def _where(self, url: str, store_prefix: str) -> None:
        self.url, self.prefix = url, store_prefix

    def open(self, clock: Clock) -> Store:
        store = open_store(self.url, StoreOptions(self.prefix, timeout=10, clock=clock))[0]
        # It would put off the TTL index of the tests below; it is tested with the other stores.
        store.journal = None
        return store


def add(session: Any) -> object:
    return session.update_atomic("hits", lambda hits: hits + 1)


def test_login_counter_and_logout(
    url: str, store_prefix: str, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with SiteMaker(url, store_prefix, clock) as make:
        site = make()
        visitor = site.visitor()
        visitor.run(lambda session: session.update(hits=0))
        tab = visitor.another_tab()
        visitor.run(lambda session: (session.rotate(grace=0), session.update(user="ada")))
        assert tab.run(dict) == {}
        for hits in (1, 2, 3):
            assert visitor.run(add) == hits
        assert visitor.run(dict) == {"hits": 3, "user": "ada"}
        left = visitor.another_tab()
        visitor.run(lambda session: session.destroy())
        assert left.run(dict) == {}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# A replica set ---------------------------------------------------------------------------------


@contextmanager
def stores(*urls: str, timeout: float) -> Iterator[list[Store]]:
    """A store of each URL, on the same records."""
    opened = [open_store(url, StoreOptions("replicas:", timeout))[0] for url in urls]
    try:
        yield opened
    finally:
        for store in opened:
            store.close()


@contextmanager
def paused_secondaries(replica_set: MongoReplicaSet) -> Iterator[None]:
    """For the length of the block both are frozen: the primary has no majority any more."""
    with replica_set.without_elections():
        for member in replica_set.secondaries():
            member.pause()
        yield


def test_reads_as_the_url_wants_them(replica_set: MongoReplicaSet) -> None:
    options = ("", "&readConcernLevel=majority", "&readConcernLevel=linearizable")
    with stores(*(replica_set.url + each for each in options), timeout=PATIENCE) as opened:
        local, majority, linearizable = opened
        record = a_record(time.time)
        local.create(record)
        for store in opened:
            assert store.load(record.key) == record
        with paused_secondaries(replica_set):
            newer = record._replace(version=new_version(), payload=b"not confirmed")

            def is_written() -> bool:
                error = failure_of(lambda: local.save(newer, record.version))
                assert re.search("not confirmed by a majority|timed out", error.detail)
                with hasty(local, PATIENCE):
                    return local.load(record.key) == newer

            with hasty(local, 0.5):
                until(is_written, "the write being applied")
            assert majority.load(record.key) == record
            with hasty(linearizable, SHORT):
                failure_of(lambda: linearizable.load(record.key))
        local.save(newer, record.version)
        for store in opened:
            assert store.load(record.key) == newer


def test_a_client_s_own_read_concern_is_kept(replica_set: MongoReplicaSet) -> None:
    client: MongoClient[dict[str, Any]]
    with MongoClient(replica_set.url, readConcernLevel="majority", w=1) as client:
        store = MongoDBStore(client, StoreOptions("replicas:", timeout=10))
        store.create(a_record(time.time))
        assert store.driver.collection_to_load.read_concern.level == "majority"
        assert store.driver.collection.read_concern.level == "local"
        assert store.driver.collection.write_concern.document == {"w": "majority"}


def test_another_read_concern_is_refused() -> None:
    with pytest.raises(SettingError):
        open_store("mongodb://localhost/?readConcernLevel=available", StoreOptions())


def test_a_logout_that_no_majority_confirmed_is_not_called_done(
    replica_set: MongoReplicaSet, clock: FakeClock
) -> None:
    with SiteMaker(replica_set.url, "replicas:", clock) as make:
        site = make(timeout=PATIENCE)
        visitor = site.visitor()
        visitor.run(lambda session: session.update(user="ada"))
        tab = visitor.another_tab()
        with paused_secondaries(replica_set), hasty(site.store.store, SHORT):
            # The second time there is nothing left to delete on the primary, and still it is not
            # done.
            for _ in range(2):
                response = tab.ask(lambda session: session.destroy())
                assert response.status_code == 503
                assert tab.cookie == visitor.cookie
        visitor.run(lambda session: session.destroy())
        assert tab.run(dict) == {}


def test_a_counter_continues_through_a_stepdown(
    replica_set: MongoReplicaSet, clock: FakeClock
) -> None:
    with SiteMaker(replica_set.url, "replicas:", clock) as make:
        visitor = make().visitor()
        visitor.run(lambda session: session.update(hits=0))
        old = replica_set.step_down()
        for hits in (1, 2, 3):
            assert visitor.run(add) == hits
        assert replica_set.primary() is not old


# Errors ----------------------------------------------------------------------------------------


def failure_of(call: Callable[[], object]) -> StoreUnavailable:
    with pytest.raises(StoreUnavailable) as caught:
        call()
    return caught.value


def test_errors_say_where_and_why(
    mongo_auth_tls: MongoAuthTLS, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"{HOST}:{mongo_auth_tls.port}"
    password = mongo_auth_tls.url.partition("@")[0].rpartition(":")[2]
    wrong = mongo_auth_tls.url.replace(password, "hunter2-canary")
    direct = f"mongodb://{place}/?directConnection=true"
    elsewhere = mongo_auth_tls.url.replace("/sessions?", "/elsewhere?")
    for url, reasons in (
        (wrong, (place, "AuthenticationFailed, code 18")),
        (elsewhere, (place, "lacks a permission", "Unauthorized, code 13")),
        (mongo_auth_tls.url_of(None), (place, "Unauthorized, code 13")),
        (direct, (place, "connection closed")),
        (direct + "&tls=true", (place, "certificate verify failed")),
        ("mongodb://nosuch.invalid/", ("nosuch.invalid:27017", "not known")),
        (f"mongodb://ada:hunter2-canary@{HOST}:1/", (f"{HOST}:1", "refused")),
        (mongo_auth_tls.url.replace("=gsession", "=other"), ('"other"',)),
    ):
        with stores(url, timeout=SHORT) as (store,):
            for _ in range(5):  # on a busy machine a handshake may take longer than that
                error = failure_of(lambda store=store: store.create(a_record(time.time)))
                if reasons[-1] in error.detail:
                    break
        for reason in ("mongodb: create: ", *reasons):
            assert reason in error.detail
        assert "canary" not in f"{error.detail} {error.__cause__!r}"
        assert len(error.detail) < 250
    assert "index" not in caplog.text  # which did not fail


def test_a_primary_that_gave_way_is_named(replica_set: MongoReplicaSet) -> None:
    old = replica_set.primary()
    url = f"mongodb://{HOST}:{old.port}/?directConnection=true"
    with stores(url, timeout=PATIENCE) as (store,):
        record = a_record(time.time)
        store.create(record)
        store.load(record.key)
        replica_set.step_down()
        with hasty(store, 2.0):
            error = failure_of(lambda: store.save(record._replace(version=2), record.version))
            assert f"{HOST}:{old.port}" in error.detail
            assert "not primary" in error.detail
            error = failure_of(lambda: store.load(record.key))  # which it could do, as a secondary
            assert f"{HOST}:{old.port}: a secondary" in error.detail


def test_a_user_with_read_rights_only(mongo_auth_tls: MongoAuthTLS, clock: FakeClock) -> None:
    rights = ["find", "insert"]
    urls = [mongo_auth_tls.url_of_rights(each, "gsession") for each in (rights, rights[:1])]
    with SiteMaker(urls[0], "read:", clock) as make, SiteMaker(urls[1], "read:", clock) as reader:
        visitor = make().visitor()
        visitor.run(lambda session: session.update(a=1))
        site = reader()
        there = site.visitor(visitor.cookie)
        assert there.run(dict) == {"a": 1}
        for change in (
            lambda session: session.update(a=2),
            lambda session: session.rotate(),
            lambda session: session.destroy(),
        ):
            response = there.ask(change)
            assert (response.status_code, response.headers.get("Set-Cookie")) == (503, None)
            assert int(response.headers["Retry-After"]) >= 1
        assert site.visitor().ask(lambda session: session.update(a=2)).status_code == 503
        assert there.run(dict) == {"a": 1}


def test_missing_rights_for_the_index_are_said(
    mongo_auth_tls: MongoAuthTLS, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    rights = [right for right in published_rights() if right != "createIndex"]
    url = mongo_auth_tls.url_of_rights(rights, "gsession", "gsession_blobs")
    with SiteMaker(url, "no-index:", clock) as make:
        site: Site = make()
        visitor = site.visitor()
        visitor.run(lambda session: session.update(a=1))
        assert visitor.run(dict) == {"a": 1}
    assert caplog.text.count("Unauthorized, code 13") == 1
    assert "db.gsession.createIndex" in caplog.text


# A name server ----------------------------------------------------------------------------------


class NameServer:
    """A name server for `mongodb+srv://CLUSTER`, for the length of a `with` block."""

    CLUSTER = "cluster.example.test"

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        nodes = [host.partition(":") for host in hosts.split(",")]
        self.addresses = {f"node{n}.example.test": host for n, (host, *_) in enumerate(nodes)}
        ports = [port or "27017" for *_, port in nodes]
        records = [f"0 0 {port} {name}." for port, name in zip(ports, self.addresses, strict=True)]
        options = dict(each.split("=") for each in parts.query.split("&") if each)
        told = [f"{name}={options.pop(name)}" for name in ("replicaSet",) if name in options]
        self.answers = {"SRV": records, "TXT": [f'"{each}"' for each in told]}
        options.setdefault("tls", "false")
        rest = "&".join(f"{name}={value}" for name, value in options.items())
        self.url = f"mongodb+srv://{user}{at}{self.CLUSTER}{parts.path}?{rest}"
        self.asked: list[str] = []
        self.wait = 0.0  # seconds before each answer
        self.silent = False
        owner = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, asking = self.request
                if not owner.silent:
                    time.sleep(owner.wait)
                    asking.sendto(owner.answer(data), self.client_address)

        self._server = socketserver.UDPServer((HOST, 0), Handler)

    def answer(self, data: bytes) -> bytes:
        """The answer to a question."""
        response = dns.message.make_response(dns.message.from_wire(data))
        question = response.question[0]
        name, kind = question.name.to_text(), dns.rdatatype.to_text(question.rdtype)
        self.asked.append(f"{kind} {name}")
        if name == {"SRV": "_mongodb._tcp."}.get(kind, "") + self.CLUSTER + "." and (
            texts := self.answers[kind]
        ):
            response.answer.append(dns.rrset.from_text(name, 60, "IN", kind, *texts))
        return response.to_wire()

    def __enter__(self) -> NameServer:
        self._patch = pytest.MonkeyPatch()
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = [HOST], self._server.server_address[1]
        self._patch.setattr(dns.resolver, "default_resolver", resolver)
        real = socket.getaddrinfo

        def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
            if host in self.addresses:
                self.asked.append(f"A {host}.")
            return real(self.addresses.get(host, host), *arguments, **options)

        self._patch.setattr(socket, "getaddrinfo", getaddrinfo)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._patch.undo()


@pytest.fixture
def name_server(mongodb_url: str) -> Iterator[NameServer]:
    """One that knows the shared MongoDB server, and the database of this test."""
    with NameServer(mongodb_url) as server:
        yield server


def test_a_name_server_says_where_the_servers_are(
    name_server: NameServer, store_prefix: str, clock: FakeClock
) -> None:
    with SiteMaker(name_server.url, store_prefix, clock) as make:
        site = make()
        visitor = site.visitor()
        visitor.run(lambda session: session.update(hits=0))
        visitor.run(lambda session: session.rotate(grace=0))
        assert [visitor.run(add) for _ in range(3)] == [1, 2, 3]
        assert len(site.stored()) == 1
        visitor.run(lambda session: session.destroy())
        assert not site.stored()
    asked = {
        f"SRV _mongodb._tcp.{NameServer.CLUSTER}.",
        f"TXT {NameServer.CLUSTER}.",
        "A node0.example.test.",
    }
    assert asked <= set(name_server.asked)


def test_a_name_server_that_is_silent_is_an_outage(name_server: NameServer) -> None:
    name_server.silent = True
    url = name_server.url
    if "@" not in url:
        url = url.replace("//", "//ada:hunter2-canary@", 1)
    with stores(url, timeout=SHORT) as (away,):
        error = failure_of(lambda: away.load("x"))
        found = re.search(r"expired after (.+) seconds.+DNS operation timed out", error.detail)
        assert found is not None
        assert float(found[1]) < PATIENCE / 2  # which is less than the driver's own
        assert "canary" not in f"{error.detail} {error.__cause__!r}"
    with stores(name_server.url, timeout=PATIENCE) as (store,):
        with hasty(store, SHORT):
            assert "DNS operation timed out" in failure_of(lambda: store.load("x")).detail
        name_server.silent = False
        assert store.load("x") is None


def test_the_time_of_the_name_server_counts_for_the_call(
    name_server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float] = []
    timeout = pymongo.timeout
    monkeypatch.setattr(pymongo, "timeout", lambda s: (left.append(s), timeout(s))[1])
    name_server.wait = 0.05
    with stores(name_server.url, timeout=PATIENCE) as (store,):
        assert [store.load("x"), store.load("x")] == [None, None]
    assert left[0] <= PATIENCE - 2 * name_server.wait
    assert left[1] == PATIENCE


# Other failures ---------------------------------------------------------------------------------


def test_a_pool_that_is_in_use_is_contention(mongodb_url: str) -> None:
    store = MongoDBStore(mongodb_url, StoreOptions(timeout=PATIENCE, pool_max=1))
    for _ in range(3):
        store.create(a_record(time.time))
    assert store.load("x") is None
    # Its connection is its own until it is read to its end.
    with store.driver.collection.find(cursor_type=CursorType.EXHAUST, batch_size=1) as cursor:
        next(cursor)
        with hasty(store, SHORT):
            error = failure_of(lambda: store.load("x"))
    assert error.contention
    assert "WaitQueueTimeoutError" in error.detail
    with stores(f"mongodb://{HOST}:1/", timeout=SHORT) as (away,):
        assert not failure_of(lambda: away.load("x")).contention
    store.close()


def test_the_doctor_looks_at_the_members(replica_set: MongoReplicaSet) -> None:
    store = open_store(replica_set.url, StoreOptions(timeout=10))[0]

    def members() -> list[str]:
        return [each.severity for each in store.checks.check() if each.check == "replica"]

    until(lambda: members() == ["ok", "ok"], "two well secondaries")
    assert "replicas" not in {each.check for each in store.checks.check()}
    store.close()


@pytest.mark.parametrize(
    ("kind", "written", "severity"),
    [("RSSecondary", 95.0, "ok"), ("RSSecondary", 80.0, "warning"), ("Unknown", None, "warning")],
)
def test_a_member_that_is_late_or_away(kind: str, written: float | None, severity: str) -> None:
    def member(kind: str, written: float | None, asked: float) -> Any:
        return SimpleNamespace(
            address=("db", 27017),
            server_type_name=kind,
            last_write_date=written,
            last_update_time=asked,
        )

    primary = member("RSPrimary", 100.0, 7.0)
    found = mongodb_health._member(member(kind, written, 5.0), primary)
    assert found.severity == severity
