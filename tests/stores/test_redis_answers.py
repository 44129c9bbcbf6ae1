"""Each error of a Redis leads to the right behaviour, with a clear message."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from redis import Redis
from redis.exceptions import InvalidResponse, ResponseError

from flask_gsession.errors import StoreUnavailable, UnreadableRecord
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.testing import FakeClock, HookedStore, a_blob, a_pointer, a_record
from tests.conftest import PATIENT_WAITER
from tests.harness.apps import Site, within
from tests.harness.console import Console
from tests.harness.servers import HAS_OLDEST_REDIS, OldestRedisServer, RedisServer, redis_server
from tests.harness.topologies import HOST, RedisACL, RedisCluster, RedisSentinels, until
from tests.stores.test_redis_servers import OnServers

pytest_plugins = ["tests.harness.topologies"]

PAGE = (Path(__file__).parents[2] / "docs/how-to/redis.md").read_text(encoding="utf-8")
KEY = "A" * 43


def a_store(url: str, prefix: str = "answers:", **options: Any) -> Any:
    return open_store(url, StoreOptions(**{"prefix": prefix, "timeout": 10, **options}))[0]


@pytest.mark.usefixtures("patient_waiters")
def test_the_key_of_a_lease_goes_although_a_clock_was_set_back(
    redis_url: str, redis_client: Redis, store_prefix: str
) -> None:
    clock = FakeClock()
    store = a_store(redis_url, store_prefix, clock=clock)
    record = a_record(clock)
    store.create(record)
    store.leases.acquire(record.key, "one", 1000, 10)
    store.leases.acquire(record.key, "two", 1000, 10)
    clock.advance(-3600)
    store.leases.release(record.key, "two")  # its wait is over; the lease is written again
    assert 0 < redis_client.pttl(store.commands.names.lease(record.key)) <= PATIENT_WAITER
    store.close()


# Users of few rights ---------------------------------------------------------------------------


def rights(prefix: str) -> str:
    """The ACL that the page on Redis gives to the sessions' user, for another key prefix."""
    found = re.search(r"^ACL SETUSER shop on >password (.+)$", PAGE, re.MULTILINE)
    assert found is not None
    return found[1].replace("~gsession:*", f"~{prefix}*")


WORDS = rights("").split()[1:]


def rights_to_lock(prefix: str) -> str:
    """The further words that the page gives for session locks."""
    words = ("+publish", "+subscribe +ping", "&gsession:wake:*")
    assert all(f"`{word}`" in PAGE for word in words)
    return " ".join(words).replace("gsession:", prefix)


def rights_to_scan() -> str:
    """The further words that the page gives for the commands that go through all sessions."""
    words = "+scan +dbsize +info|server +pttl +exists"
    assert f"`{words}`" in PAGE
    return words


def rights_to_journal() -> str:
    """The further words that the page gives for the journal."""
    words = (
        "+xadd +xrange +xrevrange +zadd +zrem +zrange +zrangebyscore +zcount",
        "+zscore +hget +hset +hdel +hgetall",
    )
    assert all(f"`{some}`" in PAGE for some in words)
    return " ".join(words)


class TestWithThePublishedRights(OnServers):
    @pytest.fixture(autouse=True)
    def server(self, redis_acl: RedisACL, store_prefix: str) -> None:
        words = (
            *(rights(store_prefix), rights_to_lock(store_prefix)),
            *(rights_to_scan(), rights_to_journal()),
        )
        redis_acl.allow(" ".join(words))
        self.url, self.prefix = redis_acl.url, store_prefix


def live(store: Any) -> None:
    """Everything that a store is asked, in the life of some sessions."""
    clock = store.commands.clock = FakeClock()
    expired = a_record(clock, idle=10)
    store.create(expired)
    clock.advance(11)
    first = a_record(clock, key=expired.key)
    store.create(first)
    assert store.load(first.key) == first
    saved = first._replace(version=first.version + 1, payload=b"saved")
    store.save(saved, first.version)
    assert store.renew(saved, saved.idle_expires_at + 1000)
    second, third = a_record(clock), a_record(clock)
    store.replace(first.key, second, saved.version, a_pointer(saved, second))
    store.replace(second.key, third, second.version, None)
    assert not store.delete(first.key)
    assert store.delete(third.key, third.version)
    blob = a_blob()
    for offset in (0, 5):
        store.blobs.write_frame(blob, offset, b"frame", saved.idle_expires_at)
    store.blobs.renew_blobs([blob], saved.idle_expires_at + 1000)
    assert store.blobs.read_frame(blob, 5, 5) == b"frame"
    store.blobs.discard_blobs([blob], 0)
    assert store.blobs.read_frame(blob, 0, 5) is None


def test_the_published_rights_are_enough_and_nothing_else_is_tried(
    redis_acl: RedisACL, store_prefix: str
) -> None:
    redis_acl.allow(rights(store_prefix))
    redis_acl.denied()
    store = a_store(redis_acl.url, store_prefix)
    live(store)
    store.close()
    site = Site(redis_acl.url, store_prefix, time.time)
    visitor = site.visitor()
    visitor.run(lambda s: s.update(count=0, user="mira"))
    visitor.run(lambda s: s.rotate(grace=0))
    for _ in range(2):
        visitor.run(lambda s: s.update_atomic("count", lambda n: n + 1))

    def work(s: Any) -> None:
        s["count"] += 1

    visitor.run(lambda s: s.transaction().run(work))
    visitor.run(lambda s: s.rotate())
    assert visitor.run(dict) == {"count": 3, "user": "mira"}
    visitor.run(lambda s: s.destroy())
    assert visitor.run(dict) == {}
    site.store.close()
    assert set(redis_acl.denied()) <= {"command: client|setinfo", "command: client"}


@pytest.mark.parametrize("word", WORDS)
def test_each_of_the_published_rights_is_needed(
    redis_acl: RedisACL, store_prefix: str, word: str
) -> None:
    redis_acl.allow(" ".join(each for each in rights(store_prefix).split() if each != word))
    with Redis.from_url(redis_acl.admin_url) as admin:
        admin.script_flush()
    store = a_store(redis_acl.url, store_prefix)
    with pytest.raises(StoreUnavailable, match=r"(?i)permission|can't run this command"):
        live(store)
    store.close()


def test_the_rights_for_locks(
    redis_acl: RedisACL, store_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis_acl.allow(f"{rights(store_prefix)} {rights_to_lock(store_prefix)}")
    redis_acl.denied()
    with Site(redis_acl.url, store_prefix, time.time, lock_warn=None) as site:
        visitor = site.visitor()
        visitor.run(lambda s: s.update(count=0))

        def count(_: int) -> None:
            def work(s: Any) -> None:
                with s.lock(wait=20):
                    s["count"] += 1

            visitor.another_tab().run(work)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(count, range(20)))
        assert visitor.run(dict) == {"count": 20}
    assert set(redis_acl.denied()) <= {"command: client|setinfo", "command: client"}
    assert not caplog.records


RIGHTS_OF_THE_DOCTOR = "+info +time +scan"


@pytest.fixture
def few(redis_acl: RedisACL, store_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Few:
    """An administrator of few rights."""
    monkeypatch.setattr(
        "flask_gsession.stores.redis.scans.COUNT_ALL", 4
    )  # so that it asks for DBSIZE
    return Few(redis_acl, store_prefix)


class Few:
    """Some sessions and leftovers, and a command with limited rights."""

    def __init__(self, server: RedisACL, prefix: str) -> None:
        self.server = server
        server.allow("~* &* +@all")
        site = Site(server.url, prefix, time.time)
        self.handles = []
        for _ in range(20):
            visitor = site.visitor()
            visitor.run(lambda s: s.update(a=1))
            self.handles.append(visitor.run(lambda s: s.handle))
        visitor.run(lambda s: s.update(large="x" * 50_000))
        site.store.close()
        with Redis.from_url(server.admin_url) as admin:
            admin.persist(f"{prefix}{{{self.handles[1]}}}")
            admin.set(f"{prefix}{{{KEY}}}:lock", b"one 1 1\n", px=60_000)
            admin.script_flush()
        self.console = Console(server.url, key_prefix=prefix)

    def run(self, rights: str, *words: str) -> Result:
        """The output of `flask gsession` for a user with only these rights."""
        self.server.allow(rights)
        self.server.denied()
        return self.console.run(*words)


def test_the_published_rights_are_enough_for_each_command(
    few: Few, store_prefix: str, tmp_path: Path
) -> None:
    last, file = few.handles[-1], str(tmp_path / "sessions.jsonl")
    commands = [
        *[("list",), ("stats",), ("show", last), ("show", last[:9]), ("show", last, "--values")],
        *[("export", file), ("debug", last), ("debug", last[:9], "--off")],
        *[("revoke", last), ("revoke", few.handles[0][:9]), ("cleanup", "--dry-run"), ("cleanup",)],
        *[("import", file, "--dry-run"), ("import", file), ("revoke", "--all", "--yes")],
        *[("import", file)],
    ]
    of_command = f"{rights(store_prefix)} {rights_to_scan()}"
    said = {}
    for words in commands:
        said[words] = few.run(of_command, *words)
        assert said[words].exit_code == 0, (words, said[words].output)
        assert set(few.server.denied()) <= {"command: client|setinfo", "command: client"}, words
    for done in ("1 session without expiry given one", "1 orphaned lock removed"):
        assert done in said["cleanup",].stdout
    assert "20 records exported" in said["export", file].stdout
    assert said["import", file].stdout == "session: 20 imported\n"
    few.console.ext.close(few.console.app)


def test_the_published_rights_are_enough_for_the_doctor(few: Few, store_prefix: str) -> None:
    assert f"`{RIGHTS_OF_THE_DOCTOR}`" in PAGE
    result = few.run(f"{rights(store_prefix)} {RIGHTS_OF_THE_DOCTOR}", "doctor", "--json")
    found = {row["check"]: row["severity"] for row in json.loads(result.stdout)}
    assert found["answers"] == found["server version"] == "ok"
    assert found["clock"] != "warning"  # it may ask for the time
    assert set(few.server.denied()) <= {"command: client|setinfo", "command: client"}
    result = few.run(f"{rights(store_prefix)} +time", "doctor", "--json")
    found = {row["check"]: row["found"] for row in json.loads(result.stdout)}
    assert found["server"] == "it refuses INFO, or this user may not call it"
    few.console.ext.close(few.console.app)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        *[("+scan", (name,)) for name in ("list", "stats", "cleanup")],
        *[("+scan", ("export", "-")), ("+scan", ("revoke", "--all", "--yes"))],
        *[("+scan", (name, "1" * 9)) for name in ("show", "revoke", "debug")],
        *[("+get", ("list",)), ("+get", ("show", "")), ("+get", ("debug", ""))],
        *[("+get", ("cleanup", "--dry-run")), ("+get", ("export", "-")), ("+get", ("revoke", ""))],
        *[("+pttl", ("cleanup",)), ("+exists", ("cleanup", "--dry-run")), ("+del", ("cleanup",))],
        *[("+pexpire", ("cleanup",)), ("+del", ("revoke", "")), ("+eval", ("revoke", ""))],
        *[("+getrange", ("debug", "")), ("+set", ("debug", ""))],
        *[("+pttl", ("revoke", "")), ("+get", ("doctor",)), ("+set", ("doctor",))],
        *[("~", (name,)) for name in ("list", "cleanup", "doctor")],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_right_that_a_command_lacks_is_named(
    few: Few, store_prefix: str, word: str, words: tuple[str, ...], caplog: Any
) -> None:
    of_all = f"{rights(store_prefix)} {rights_to_scan()} {RIGHTS_OF_THE_DOCTOR}".split()
    less = [each for each in of_all if not (each.startswith("~") if word == "~" else each == word)]
    handle = few.handles[-1]
    result = few.run(" ".join(less), *(each or handle for each in words))
    right = word.removeprefix("+")
    names = [f"the '{right}' command", f"lacks {word}", f"or {word})"]
    if word == "~":
        names = ["SESSION_KEY_PREFIX"]
    assert any(name in result.output + caplog.text for name in names), result.output
    of_large_values = (word, words[0]) == ("+pttl", "revoke")  # the session has ended all the same
    assert result.exit_code == (0 if of_large_values else 1)
    few.console.ext.close(few.console.app)


@pytest.fixture(params=["sentinels", "cluster", "tls", "acl"])
def site(request: pytest.FixtureRequest, store_prefix: str) -> Iterator[Site]:
    """A site on each kind of servers in turn."""
    servers: Any = request.getfixturevalue(f"redis_{request.param}")
    if isinstance(servers, RedisACL):
        servers.allow(rights(store_prefix))
    store = HookedStore(a_store(servers.url, store_prefix))
    yield Site("redis://unused", store_prefix, time.time, store=store)
    store.close()


def test_the_guarantees_hold_on_every_kind_of_servers(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda s: s.update(user="mira", count=0))
    tab = visitor.another_tab()
    # No lost update.
    site.before_a_write(lambda: tab.run(lambda s: s.update(theirs=1)))
    visitor.run(lambda s: s.update(mine=2))
    assert tab.run(dict) == {"user": "mira", "count": 0, "theirs": 1, "mine": 2}

    def work(s: Any) -> int:
        s["count"] += 1
        return int(s["count"])

    site.before_a_write(lambda: tab.run(lambda s: s.update(count=10)))
    assert visitor.run(lambda s: s.transaction().run(work)) == 11
    # A rotated token works for its grace, and without grace not at all.
    visitor.run(lambda s: s.rotate())
    assert visitor.token != tab.token
    assert tab.run(dict)["count"] == 11
    before = visitor.another_tab()
    visitor.run(lambda s: s.rotate(grace=0))
    assert before.run(dict) == {}
    assert visitor.run(dict)["count"] == 11
    # The dead stay dead.
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(lambda s: s.destroy()))
    assert visitor.ask(lambda s: s.update(late=1)).status_code == 200
    assert visitor.run(dict) == {}


def test_another_prefix_is_out_of_reach(redis_acl: RedisACL, store_prefix: str) -> None:
    redis_acl.allow(rights(store_prefix))
    store = a_store(redis_acl.url, "other:")
    with pytest.raises(StoreUnavailable, match="redis: GET: NoPermissionError"):
        store.load(KEY)
    store.close()


def test_the_rights_for_another_database(redis_acl: RedisACL, store_prefix: str) -> None:
    assert "`+select`" in PAGE
    redis_acl.allow(rights(store_prefix))
    store = a_store(redis_acl.url.replace("/0", "/1"), store_prefix)
    with pytest.raises(StoreUnavailable, match="select"):
        store.load(KEY)
    redis_acl.allow(f"{rights(store_prefix)} +select")
    live(store)
    store.close()


@pytest.fixture
def least_with_sentinels(redis_sentinels: RedisSentinels, store_prefix: str) -> str:
    """The URL of a user with the published rights, and no others."""
    for member in redis_sentinels.data:
        words = ("reset", "on", ">pw", *rights(store_prefix).split(), "+role", "+wait")
        member.command("ACL", "SETUSER", "least", *words)
    for sentinel in redis_sentinels.sentinels:
        words = ("reset", "on", ">pw", "+sentinel|get-master-addr-by-name")
        sentinel.command("ACL", "SETUSER", "watch", *words)
    hosts = redis_sentinels.url.removeprefix("redis+sentinel://")
    users = "sentinel_username=watch&sentinel_password=pw"
    return f"redis+sentinel://least:pw@{hosts}?{users}"


def test_the_rights_with_sentinels(least_with_sentinels: str, store_prefix: str) -> None:
    assert all(f"`{word}`" in PAGE for word in ("+role", "+sentinel|get-master-addr-by-name"))
    store = a_store(least_with_sentinels, store_prefix, logout_replicas=2)
    live(store)
    store.close()


def test_the_rights_in_a_cluster(redis_cluster: RedisCluster, store_prefix: str) -> None:
    assert "`+cluster|slots +asking`" in PAGE
    for node in redis_cluster.nodes:
        words = ("reset", "on", ">pw", *rights(store_prefix).split())
        node.command("ACL", "SETUSER", "least", *words)
    url = redis_cluster.url.replace("://", "://least:pw@")
    store = a_store(url, store_prefix, logout_replicas=1)
    with pytest.raises(StoreUnavailable, match="cluster"):
        store.load(KEY)
    for node in redis_cluster.nodes:
        node.command("ACL", "SETUSER", "least", "+cluster|slots", "+asking", "+wait")
    live(store)
    slot = 1234
    with redis_cluster.migrating(slot):
        for _ in range(3):
            live(store)
    store.close()


@pytest.mark.parametrize(
    ("user", "said"),
    [("", "missing"), ("app:wrong@", "wrong"), ("nobody:wrong@", "wrong"), (":wrong@", "wrong")],
    ids=["none", "wrong password", "unknown user", "password only"],
)
def test_a_missing_or_wrong_password_is_called_so(
    redis_acl: RedisACL, user: str, said: str
) -> None:
    """The server's own words for it speak of HELLO."""
    store = a_store(redis_acl.anonymous_url.replace("://", f"://{user}"))

    def load() -> str:
        with pytest.raises(StoreUnavailable, match=f"password in SESSION_STORE .*{said}") as raised:
            store.load(KEY)
        return str(raised.value)

    assert "wrong@" not in within(5, load)  # not tried again for ten seconds
    store.close()


# Servers in trouble ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[RedisServer, OldestRedisServer])
def own_redis(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """The one that most tests have, and the oldest, which words some errors otherwise."""
    if request.param is OldestRedisServer and not HAS_OLDEST_REDIS:
        pytest.skip("Redis 6.2 is packaged for Linux x86-64 only")
    with request.param() as server:
        yield server


@pytest.fixture
def admin(own_redis: RedisServer) -> Iterator[Any]:
    with Redis.from_url(own_redis.url, socket_timeout=10) as client:
        yield client


def test_loading(store_prefix: str) -> None:
    """A server that reads its file is asked again when it has."""
    # It answers after each 2 MB that it read.
    slowly = ("--key-load-delay", "80000", "--rdbcompression", "no")
    with RedisServer(*slowly) as server:
        store = a_store(server.url, store_prefix)
        record = a_record(time.time)
        store.create(record)
        with Redis.from_url(server.url) as client:
            with client.pipeline(transaction=False) as pipe:
                for number in range(40):
                    pipe.set(f"{store_prefix}{number}", "x" * 1_000_000)
                pipe.execute()
            client.save()
        server.kill()
        server.start()
        with pytest.raises(StoreUnavailable, match="redis: GET: BusyLoadingError"):
            store.load(record.key)
        with Redis.from_url(server.url, protocol=2) as client, suppress(ResponseError):
            client.config_set("key-load-delay", 0)  # before Redis 7 not while it reads
        assert until(lambda: _loaded(store, record.key), "the file being read") == record
        store.close()


def _loaded(store: Any, key: str) -> Any:
    try:
        return store.load(key)
    except StoreUnavailable:
        return None


def test_another_type(own_redis: RedisServer, admin: Any, store_prefix: str) -> None:
    store = a_store(own_redis.url, store_prefix)
    record = a_record(time.time)
    store.create(record)
    (name,) = admin.scan_iter(f"{store_prefix}*")
    admin.delete(name)
    admin.hset(name, "user", "ada")
    for use in (
        lambda: store.load(record.key),
        lambda: store.save(record, record.version),
        lambda: store.replace(record.key, a_record(time.time), record.version, None),
        lambda: store.delete(record.key),
    ):
        with pytest.raises(UnreadableRecord):
            use()
    store.close()


@pytest.mark.parametrize(
    ("command", "change"),
    [
        ("SET", lambda store, record: store.create(a_record(time.time))),
        ("EVAL", lambda store, record: store.save(record._replace(version=1), record.version)),
    ],
)
def test_readonly(
    own_redis: RedisServer,
    admin: Any,
    store_prefix: str,
    command: str,
    change: Callable[[Any, Any], object],
) -> None:
    """All connections lead to a former primary, so none of them is used again."""
    store = a_store(own_redis.url, store_prefix)
    record = a_record(time.time)
    store.create(record)
    slots = [store.commands.pool.take(time.monotonic() + 10) for _ in range(3)]
    for slot in slots:
        slot.ask(b"PING\r\n")
        store.commands.pool.give(slot)
    before = [slot.connection for slot in slots]
    assert all(connection._sock for connection in before)
    admin.replicaof(HOST, 1)
    try:
        with pytest.raises(StoreUnavailable, match=rf"redis: {command}\w*: ReadOnlyError"):
            change(store, record)
        assert not any(connection._sock for connection in before)
    finally:
        admin.replicaof("NO", "ONE")
    assert store.delete(record.key)
    store.close()


def test_masterdown(own_redis: RedisServer, admin: Any, store_prefix: str) -> None:
    store = a_store(own_redis.url, store_prefix)
    record = a_record(time.time)
    store.create(record)
    admin.config_set("replica-serve-stale-data", "no")
    admin.replicaof(HOST, 1)
    try:
        with pytest.raises(StoreUnavailable, match="redis: GET: MasterDownError"):
            store.load(record.key)
    finally:
        admin.replicaof("NO", "ONE")
        admin.config_set("replica-serve-stale-data", "yes")
    assert store.load(record.key) == record
    store.close()


def test_misconf(own_redis: RedisServer, admin: Any, store_prefix: str) -> None:
    """It cannot write its file, and so takes no change; reads go on."""
    store = a_store(own_redis.url, store_prefix)
    record = a_record(time.time)
    store.create(record)
    saved = record._replace(version=record.version + 1)
    in_the_way = own_redis._directory / "dump.rdb"
    in_the_way.mkdir()
    (in_the_way / "file").touch()
    admin.config_set("save", "3600 1")

    def status() -> str:
        return str(admin.info("persistence")["rdb_last_bgsave_status"])

    try:
        admin.bgsave()
        until(lambda: status() == "err", "the failure of the file")
        for change in (
            lambda: store.create(a_record(time.time)),
            lambda: store.save(saved, record.version),
            lambda: store.delete(record.key),
        ):
            with pytest.raises(StoreUnavailable, match="MISCONF"):
                change()
        assert store.load(record.key) == record
    finally:
        (in_the_way / "file").unlink()
        in_the_way.rmdir()
        admin.bgsave()
        until(lambda: status() == "ok", "the file being written")
        admin.config_set("save", "")
    store.save(saved, record.version)
    assert store.delete(record.key)
    store.close()


def test_oom(own_redis: RedisServer, admin: Any, store_prefix: str) -> None:
    """A full server still lets people log out."""
    store = a_store(own_redis.url, store_prefix)
    record = a_record(time.time)
    store.create(record)
    admin.config_set("maxmemory-policy", "noeviction")
    admin.config_set("maxmemory", "1kb")
    try:
        for change in (
            lambda: store.create(a_record(time.time)),
            lambda: store.save(record._replace(version=record.version + 1), record.version),
        ):
            with pytest.raises(StoreUnavailable, match=r"OutOfMemoryError|OOM"):
                change()
        assert store.load(record.key) == record
        assert store.delete(record.key)
    finally:
        admin.config_set("maxmemory", 0)
    store.close()


class Refusing:
    """A server that answers each write with an error that quotes the command."""

    def __init__(self, quote: str) -> None:
        self.quote = quote

    def __call__(self, request: bytes) -> Exception:
        kind = InvalidResponse if self.quote.startswith("Protocol") else ResponseError
        return kind(self.quote % repr(request))


@pytest.mark.parametrize(
    "quote",
    [
        "unknown command `EVALSHA`, with args beginning with: %s",
        "unknown command 'EVALSHA', with args beginning with: 'f1' 'x:' %s",
        "ERR of a proxy: %s",
        "Protocol Error: %s",
    ],
)
def test_an_error_of_the_server_shows_no_value(
    store_prefix: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, quote: str
) -> None:
    """The error, its causes and the log show no value."""
    with Site(redis_server().url, store_prefix, time.time) as site:
        errors: list[BaseException] = []
        site.app.errorhandler(StoreUnavailable)(lambda error: (errors.append(error), ("", 503))[1])
        store: Any = site.store.store
        slot, refuse = store.commands.pool.take(time.monotonic() + 10), Refusing(quote)
        store.commands.pool.give(slot)
        ask = type(slot).ask

        def asked(slot: Any, request: bytes) -> Any:
            if b"plague" in request:
                raise refuse(request)
            return ask(slot, request)

        monkeypatch.setattr(type(slot), "ask", asked)
        caplog.set_level("DEBUG")
        visitor = site.visitor()
        response = visitor.ask(lambda session: session.update(note="diagnosis: plague"))
        assert response.status_code == 503
        assert errors
        chain, said = list(errors), [caplog.text, response.text]
        while chain:
            error = chain.pop()
            said += [str(error), repr(error), repr(error.args)]
            chain += [each for each in (error.__cause__, error.__context__) if each is not None]
        assert not [text for text in said if "plague" in text]
        assert any(quote.split(":")[0][:11] in text for text in said)
