"""Redis and MongoDB as production runs them, real and on loopback, for the tests that need it.

| class             | what it is                                                                |
|-------------------|---------------------------------------------------------------------------|
| `RedisSentinels`  | a primary, two replicas and three sentinels that fail over                |
| `RedisCluster`    | three primaries that share the slots, each with a replica                 |
| `RedisTLS`        | a Redis that speaks TLS only                                              |
| `RedisACL`        | a Redis with one user, whose rights an ACL string names                   |
| `MongoReplicaSet` | three members that elect a primary                                        |
| `MongoAuthTLS`    | a replica set of one, with users, that speaks TLS only                    |
| `TCPProxy`        | stands before any server and delays, cuts, loses or withholds what passes |

All are context managers. `start()` starts the servers that are down, resumes those that are
paused, and returns when all of them work again: a test that broke something ends with
it. `stop()` ends it. Every process has the guard of `tests.harness.servers`, and is gone when the
test process is.

A test module gets the fixtures at the end of this file, each the one of its kind in the
process and started when first asked for, with the line

    pytest_plugins = ["tests.harness.topologies"]

PYTEST_DONT_REWRITE: that line would be an error after an import of this module, and there is no
`assert` of a test here for pytest to rewrite.
"""

import asyncio
import ipaddress
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError
from redis import Redis
from redis.connection import AbstractConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError

from tests.harness.servers import (
    MongoServer,
    RedisServer,
    Server,
    ServerFailed,
    find,
    free_port,
    listens,
)

HOST = "127.0.0.1"
SETTLE_TIMEOUT = 60.0  # seconds for a failover, an election, or getting well again
# So that a connection does not introduce itself.
NO_INFO: dict[str, Any] = (
    {"driver_info": None}
    if "driver_info" in signature(AbstractConnection).parameters
    else {"lib_name": None, "lib_version": None}  # in redis-py before 7.2
)
ANSWER_TIMEOUT = 10.0  # seconds that a member has to answer a question about the others

S = TypeVar("S", bound=Server)
T = TypeVar("T")
R = TypeVar("R", bound="Server | Topology")


def until(condition: Callable[[], T | None], what: str, timeout: float = SETTLE_TIMEOUT) -> T:
    """Ask again and again, a server's error being no answer; return the first true answer.

    :raises ServerFailed: saying that `what` did not come, after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        error: Exception | None = None
        try:
            if answer := condition():
                return answer
        except (RedisError, PyMongoError, OSError) as raised:
            error = raised
        if time.monotonic() > deadline:
            raise ServerFailed(f"{what}: not within {timeout:g} s") from error
        time.sleep(0.05)


class Topology:
    """Several servers that work as one."""

    def __init__(self, members: Sequence[Server]) -> None:
        self.members = members
        self._introduced = False

    @property
    def url(self) -> str:
        """The address of the whole, as `SESSION_STORE` takes it."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the members that are down, resume the paused ones, and wait until all is well.

        :raises ServerMissing: when the machine has no such server.
        :raises ServerFailed: when it is not well within `SETTLE_TIMEOUT`.
        """
        with ThreadPoolExecutor(len(self.members)) as pool:
            for _ in pool.map(_start, self.members):
                pass
        if not self._introduced:
            self._introduce()
            self._introduced = True
        until(self._well, f"{type(self).__name__} getting well")

    def stop(self) -> None:
        """End all members and delete their files."""
        for member in self.members:
            member.stop()
        self._introduced = False

    def _introduce(self) -> None:
        """Tell the new members about each other."""
        raise NotImplementedError

    def _well(self) -> bool:
        """Whether every member is up and each knows all others; may help one that lags."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _start(server: Server) -> None:
    if server.running:
        server.resume()
    else:
        server.kill()  # for the case that it ended by itself
    server.start()


def _most_said(ask: Callable[[S], T], members: Sequence[S]) -> T:
    """The answer of most members; the ones that don't answer don't count.

    :raises ConnectionError: when none answers.
    """
    answers: Counter[T] = Counter()
    for member in members:
        if member.awake:
            with suppress(RedisError, PyMongoError, OSError):
                answers[ask(member)] += 1
    if not answers:
        raise ConnectionError("no member answers")
    return answers.most_common(1)[0][0]


# Redis ----------------------------------------------------------------------------------------


class RedisMember(RedisServer):
    """A Redis server that replicates at once, where the default is to wait for seconds."""

    def _arguments(self) -> list[str]:
        return [
            *super()._arguments(),
            *("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"),
            *("--repl-ping-replica-period", "1"),
        ]

    def command(self, *words: object) -> Any:
        """Ask this very server, by its unix socket; an answer of several parts is a list."""
        # A bare connection: a client would cost ten times as much, and `until` asks often.
        connection = UnixDomainSocketConnection(
            path=f"{self._directory}/redis.sock",
            protocol=2,
            decode_responses=True,
            socket_timeout=ANSWER_TIMEOUT,
            **NO_INFO,
        )
        try:
            connection.send_command(*words)
            return connection.read_response()
        finally:
            connection.disconnect()

    def replicates(self, primary: "RedisMember") -> bool:
        """Whether this server is a replica of `primary` and has caught up to its stream."""
        role = self.command("ROLE")
        return list(role[:4]) == ["slave", HOST, primary.port, "connected"]


class Sentinel(RedisMember):
    """A `redis-server --sentinel`: it watches a primary, and promotes a replica if need be."""

    def _prepare(self) -> None:
        # It keeps its state there, and does not start without.
        (self._directory / "sentinel.conf").touch()

    def _arguments(self) -> list[str]:
        return [
            f"{self._directory}/sentinel.conf",
            *("--bind", HOST, "--port", str(self.port), "--dir", str(self._directory)),
            *("--unixsocket", f"{self._directory}/redis.sock", "--sentinel"),
        ]


class RedisSentinels(Topology):
    """One Redis primary, two replicas, and three sentinels that replace a dead primary.

    :param options: further command line options of the primary and the replicas.
    """

    SERVICE = "sessions"
    # Milliseconds without an answer until a sentinel takes a server for dead. It connects to a
    # new primary up to a second late: with less, it soon takes that for dead as well.
    DOWN_AFTER = 1500
    FAILOVER_TIMEOUT = 2000  # milliseconds; failovers are at least twice as long apart

    def __init__(self, *options: str) -> None:
        self.data = [RedisMember(*options) for _ in range(3)]
        self.sentinels = [Sentinel() for _ in range(3)]
        super().__init__([*self.data, *self.sentinels])

    @property
    def url(self) -> str:
        """The sentinels, the name of the service, and database 0, as `redis+sentinel://`."""
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.SERVICE}/0"

    def primary(self) -> RedisMember:
        """The server that most sentinels name as the primary, alive or not."""
        port = _most_said(self._named_by, self.sentinels)
        return next(server for server in self.data if server.port == port)

    def replicas(self) -> list[RedisMember]:
        """The other two, be they alive or not."""
        primary = self.primary()
        return [server for server in self.data if server is not primary]

    def kill_primary(self) -> RedisMember:
        """Kill the primary as a crash does; returns it, for `wait_for_failover`.

        It comes back empty. Started before the failover it is still the primary, and its
        replicas empty themselves too, as they do in production.
        """
        primary = self.primary()
        primary.kill()
        return primary

    def failover(self) -> RedisMember:
        """Have a sentinel replace the living primary; returns that, for `wait_for_failover`.

        The old primary keeps taking writes until the sentinels turn it into a replica, up to
        10 seconds later. Those writes are lost; so it is in production.
        """
        primary = self.primary()

        def begun() -> bool:
            answer = self.sentinels[0].command("SENTINEL", "FAILOVER", self.SERVICE)
            return bool(answer)

        until(begun, "a sentinel beginning a failover")
        return primary

    def wait_for_failover(self, old: RedisMember) -> RedisMember:
        """Wait until all sentinels name another primary than `old`; returns the new one.

        Replicas that are alive follow it by then, `old` not necessarily.

        :raises ServerFailed: after `SETTLE_TIMEOUT`.
        """

        def new_primary() -> RedisMember | None:
            ports = {self._named_by(each) for each in self.sentinels if each.awake}
            primary = self.primary()
            followers = [each for each in self.replicas() if each is not old and each.awake]
            done = (
                ports == {primary.port}
                and primary is not old
                and primary.command("ROLE")[0] == "master"
                and all(each.replicates(primary) for each in followers)
            )
            return primary if done else None

        return until(new_primary, "a new primary")

    def _named_by(self, sentinel: Sentinel) -> int:
        _, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.SERVICE)
        return int(port)

    def _introduce(self) -> None:
        primary, *replicas = self.data
        for replica in replicas:
            replica.command("REPLICAOF", HOST, primary.port)
        for sentinel in self.sentinels:
            sentinel.command("SENTINEL", "MONITOR", self.SERVICE, HOST, primary.port, 2)
            for name, value in (
                ("down-after-milliseconds", self.DOWN_AFTER),
                ("failover-timeout", self.FAILOVER_TIMEOUT),
                ("parallel-syncs", 2),
            ):
                sentinel.command("SENTINEL", "SET", self.SERVICE, name, value)

    def _well(self) -> bool:
        primary = self.primary()
        if primary.command("ROLE")[0] != "master":
            return False
        for replica in self.replicas():
            if not replica.replicates(primary):
                # The sentinels would do so too, but only after 8 seconds.
                replica.command("REPLICAOF", HOST, primary.port)
                return False
        return all(self._sees_all(sentinel, primary) for sentinel in self.sentinels)

    def _sees_all(self, sentinel: Sentinel, primary: RedisMember) -> bool:
        def flags(subject: str) -> list[str]:
            about = () if subject == "MASTERS" else (self.SERVICE,)
            answer = sentinel.command("SENTINEL", subject, *about)
            return [dict(zip(each[::2], each[1::2], strict=True))["flags"] for each in answer]

        # A sentinel keeps `master_down`, said of another's opinion, for seconds after the fact.
        others = [each.replace(",master_down", "") for each in flags("SENTINELS")]
        return (
            self._named_by(sentinel) == primary.port
            and flags("MASTERS") == ["master"]
            and flags("REPLICAS") == ["slave", "slave"]
            and others == ["sentinel", "sentinel"]
        )


class ClusterNode(RedisMember):
    """A Redis server that is part of a cluster."""

    NODE_TIMEOUT = 2000  # milliseconds without an answer until the others take it for dead

    def _free_port(self) -> int:
        # The nodes talk to each other at the port plus 10000. That one must be free, and is
        # kept below the range that outgoing connections take theirs from.
        while True:
            port = free_port()
            with socket.socket() as probe, suppress(OSError):
                if port + 10000 < 32768:
                    probe.bind((HOST, port + 10000))
                    return port

    def _arguments(self) -> list[str]:
        return [
            *super()._arguments(),
            *("--cluster-enabled", "yes", "--cluster-announce-ip", HOST),
            *("--cluster-node-timeout", str(self.NODE_TIMEOUT)),
            # A replica is promoted however long it was without its primary.
            *("--cluster-replica-validity-factor", "0"),
        ]

    def id(self) -> str:
        """The name that it has in the cluster."""
        return str(self.command("CLUSTER", "MYID"))


class RedisCluster(Topology):
    """Six Redis nodes: three primaries that share the 16384 slots, each with a replica.

    :param options: further command line options of the nodes.
    """

    SLOTS = 16384

    def __init__(self, *options: str) -> None:
        self.nodes = [ClusterNode(*options) for _ in range(6)]
        super().__init__(self.nodes)

    @property
    def url(self) -> str:
        """Three of the nodes, from which a client learns the others, as `redis+cluster://`."""
        hosts = ",".join(f"{HOST}:{node.port}" for node in self.nodes[:3])
        return f"redis+cluster://{hosts}"

    def primary(self, slot: int = 0) -> ClusterNode:
        """The node that serves `slot` according to most nodes, alive or not.

        The slot of a key is `redis.crc.key_slot(key)`.
        """

        def owner(node: ClusterNode) -> int:
            return self._owner(node, slot)

        return self._at(_most_said(owner, self.nodes))

    def primaries(self) -> list[ClusterNode]:
        """The nodes that serve slots in the eyes of most, be they alive or not."""

        def owners(node: ClusterNode) -> tuple[int, ...]:
            return tuple(sorted({each[2][1] for each in node.command("CLUSTER", "SLOTS")}))

        return [self._at(port) for port in _most_said(owners, self.nodes)]

    def kill_primary(self, slot: int = 0) -> ClusterNode:
        """Kill the node that serves `slot`; returns it, for `wait_for_failover`.

        It comes back empty. Started before the failover it is still the primary, and its
        replica empties itself too, as it does in production.
        """
        primary = self.primary(slot)
        primary.kill()
        return primary

    def failover(self, slot: int = 0) -> ClusterNode:
        """Have the replica take over `slot` from its living primary (`CLUSTER FAILOVER`).

        Returns the old primary, for `wait_for_failover`. Nothing is lost.
        """
        primary = self.primary(slot)
        self._replica_of(primary).command("CLUSTER", "FAILOVER")
        return primary

    def wait_for_failover(self, old: ClusterNode) -> None:
        """Wait until the slots of `old` are served by others, in the eyes of all that live.

        :raises ServerFailed: after `SETTLE_TIMEOUT`.
        """

        def over() -> bool:
            alive = [node for node in self.nodes if node.awake and node is not old]
            return all(
                self._state(node) == "ok" and old.port not in self._owners(node) for node in alive
            )

        until(over, "a replica taking over")

    def wait_for_replica(self, slot: int) -> None:
        """Wait until the replica of the node that serves `slot` has all that was written so far.

        `WAIT` from another connection than the writer's would wait for nothing.

        :raises ServerFailed: after `SETTLE_TIMEOUT`.
        """
        primary = self.primary(slot)
        replica = self._replica_of(primary)
        written = primary.command("ROLE")[1]
        until(lambda: replica.command("ROLE")[4] >= written, "the replica catching up")

    def migrate_slot(self, slot: int, to: ClusterNode | None = None) -> ClusterNode:
        """Move `slot` and its keys to the primary `to`, by default any other; returns that."""
        with self.migrating(slot, to) as target:
            return target

    @contextmanager
    def migrating(self, slot: int, to: ClusterNode | None = None) -> Iterator[ClusterNode]:
        """Be in the middle of moving `slot` to the primary `to` for the length of a `with` block.

        All its keys are at the target then, while everybody still takes the source for the
        owner, which answers `ASK`. The value is the target. The end of the block completes it.
        """
        primaries = self.primaries()
        source = self.primary(slot)
        target = to or next(node for node in primaries if node is not source)
        if target is source:
            raise ValueError(f"slot {slot} is there already")
        source_id, target_id = source.id(), target.id()
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        move = ("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS")
        try:
            while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                source.command(*move, *keys)
            yield target
        finally:
            # The target first, so that one node always considers itself the owner.
            others = [node for node in primaries if node not in (source, target)]
            for node in (target, source, *others):
                node.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def _at(self, port: int) -> ClusterNode:
        return next(node for node in self.nodes if node.port == port)

    def _owner(self, node: ClusterNode, slot: int) -> int:
        for first, last, primary, *_ in node.command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return int(primary[1])
        raise ConnectionError(f"nobody serves slot {slot}")

    def _owners(self, node: ClusterNode) -> set[int]:
        return {int(each[2][1]) for each in node.command("CLUSTER", "SLOTS")}

    def _replica_of(self, primary: ClusterNode) -> ClusterNode:
        return next(node for node in self.nodes if node.awake and node.replicates(primary))

    def _state(self, node: ClusterNode) -> str:
        lines = str(node.command("CLUSTER", "INFO")).splitlines()
        return dict(line.split(":", 1) for line in lines)["cluster_state"]

    def _introduce(self) -> None:
        primaries, replicas = self.nodes[:3], self.nodes[3:]
        # Everybody to everybody: by hearsay it would take seconds longer.
        for number, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for other in self.nodes[:number]:
                node.command("CLUSTER", "MEET", HOST, other.port)
        for number, node in enumerate(primaries):
            first, end = (self.SLOTS * share // 3 for share in (number, number + 1))
            node.command("CLUSTER", "ADDSLOTS", *range(first, end))
        until(lambda: all(map(self._knows_all, self.nodes)), "the nodes meeting")
        for replica, primary in zip(replicas, primaries, strict=True):
            replica.command("CLUSTER", "REPLICATE", primary.id())

    def _knows_all(self, node: ClusterNode) -> bool:
        others = self._others(node)
        return len(others) == 5 and all(
            "handshake" not in flags and "fail" not in flags and "fail?" not in flags
            for flags in others
        )

    def _others(self, node: ClusterNode) -> list[list[str]]:
        """The flags of every other node in the eyes of this one."""
        lines = str(node.command("CLUSTER", "NODES")).splitlines()
        flags = [line.split()[2].split(",") for line in lines]
        return [each for each in flags if "myself" not in each]

    def _well(self) -> bool:
        primaries = self.primaries()
        replicas = [node for node in self.nodes if node not in primaries]
        return (
            len(primaries) == 3
            and all(map(self._knows_all, self.nodes))
            and all(self._state(node) == "ok" for node in self.nodes)
            and all(self._owners(node) == {each.port for each in primaries} for node in self.nodes)
            and all(any(node.replicates(each) for each in primaries) for node in replicas)
            and all(any(node.replicates(each) for node in replicas) for each in primaries)
        )


class RedisTLS(RedisServer):
    """A Redis server that speaks TLS only, with certificates made at its start.

    Where `redis-server` was built without TLS, a `TCPProxy` of this process speaks it instead, in
    front of a plain server; `native` says whether, and a line is printed.

    :param options: further command line options.
    :param client_certificates: whether a client must show one; otherwise it may.
    """

    def __init__(self, *options: str, client_certificates: bool = False) -> None:
        super().__init__(*options)
        self.client_certificates = client_certificates
        self.native = False
        self._proxy: TCPProxy | None = None

    @property
    def certificates(self) -> "Certificates":
        """The files, from the start on."""
        return Certificates(self._directory)

    @property
    def tls_port(self) -> int:
        """The port at which TLS is spoken."""
        return self._proxy.port if self._proxy else self.port

    @property
    def url(self) -> str:
        """The server's `rediss://` URL, with a client certificate if it needs one."""
        files = {"ssl_ca_certs": self.certificates.ca}
        if self.client_certificates:
            client = self.certificates.client
            files |= {"ssl_certfile": client, "ssl_keyfile": client}
        return f"rediss://{HOST}:{self.tls_port}/0?{urlencode(files)}"

    def start(self) -> None:
        """Start the server, and the proxy if need be; see `Server.start`."""
        super().start()
        if self.native:
            return
        if self._proxy is None:
            print("redis-server has no TLS: a proxy in front of it speaks TLS instead")
            self._proxy = TCPProxy(self.port, tls=self._server_context())
            self._proxy.start()
        self._proxy.forward()

    def kill(self) -> None:
        """End the server as a crash does; connections are refused until the next `start`."""
        super().kill()
        if self._proxy is not None:
            self._proxy.refuse()

    def stop(self) -> None:
        """End the server and delete its files."""
        super().stop()
        if self._proxy is not None:
            self._proxy.stop()
            self._proxy = None

    def _prepare(self) -> None:
        self.native = has_tls(find(self.binary, self.package, self.missing))
        self.certificates.make()

    def _arguments(self) -> list[str]:
        if not self.native:
            return super()._arguments()
        files = self.certificates
        return [
            *super()._arguments(),
            *("--port", "0", "--tls-port", str(self.port)),
            *("--tls-ca-cert-file", str(files.ca)),
            *("--tls-cert-file", str(files.server), "--tls-key-file", str(files.server)),
            *("--tls-auth-clients", "yes" if self.client_certificates else "optional"),
        ]

    def _server_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.certificates.ca)
        context.load_cert_chain(self.certificates.server)
        context.verify_mode = ssl.CERT_REQUIRED if self.client_certificates else ssl.CERT_OPTIONAL
        return context


@cache
def has_tls(program: str) -> bool:
    """Whether a `redis-server` was built with TLS."""
    # It refuses the first option that it does not know; the second one is invalid.
    options = ["--tls-port", "0", "--no-such-option", "1"]
    answer = subprocess.run([program, *options], capture_output=True, check=False, timeout=10)
    return b"'tls-port" not in answer.stdout + answer.stderr


class RedisACL(RedisServer):
    """A Redis server that answers nobody but an administrator and one user with few rights.

    :param acl: the user's rights, as in `"~gsession:* +get +set"`, and no others; in
        particular no channels, as is the default from Redis 7 on.
    :param options: further command line options.
    """

    def __init__(self, acl: str, *options: str) -> None:
        super().__init__(*options)
        self.acl = acl
        self._password = secrets.token_hex(8)

    @property
    def url(self) -> str:
        """The URL for the user."""
        return f"redis://app:{self._password}@{HOST}:{self.port}/0"

    @property
    def admin_url(self) -> str:
        """The URL for the administrator, with all rights."""
        return f"redis://admin:{self._password}@{HOST}:{self.port}/0"

    @property
    def anonymous_url(self) -> str:
        """The URL without a user, for which every command is refused with `NOAUTH`."""
        return super().url

    def allow(self, acl: str) -> None:
        """Give the user these rights instead, in open connections too.

        :raises redis.ResponseError: when `acl` is not as `ACL SETUSER` wants it.
        """
        with Redis.from_url(self.admin_url) as client:
            rules = ("reset", "on", f">{self._password}", *acl.split())
            client.execute_command("ACL", "SETUSER", "app", *rules)
            client.acl_save()
        self.acl = acl

    def denied(self) -> list[str]:
        """The refusals of the user since the last call, such as `"command: keys"`, newest first."""
        with Redis.from_url(self.admin_url, decode_responses=True) as client:
            log = client.acl_log()
            client.acl_log_reset()
        return [f"{entry['reason']}: {entry['object']}" for entry in log]

    def _prepare(self) -> None:
        (self._directory / "users.acl").write_text(
            "user default off\n"
            f"user admin on >{self._password} ~* &* +@all\n"
            f"user app on >{self._password} {self.acl}\n"
        )

    def _arguments(self) -> list[str]:
        return [
            *super()._arguments(),
            *("--aclfile", f"{self._directory}/users.acl"),
            *("--acl-pubsub-default", "resetchannels"),
        ]


# MongoDB --------------------------------------------------------------------------------------


class MongoMember(MongoServer):
    """One member of a replica set of several."""

    def _answers(self) -> bool:
        if not listens(self.socket_path):
            return False
        with self.client() as client, suppress(PyMongoError):
            return bool(client.admin.command("ping"))
        return False

    def hello(self) -> dict[str, Any]:
        """This server's own view of itself and the set."""
        with self.client(timeoutMS=int(ANSWER_TIMEOUT * 1000)) as client:
            return client.admin.command("hello")


class MongoReplicaSet(Topology):
    """Three MongoDB servers, of which one is elected primary.

    :param options: further command line options of the members.
    """

    ELECTION_TIMEOUT = 1500  # milliseconds without a word from the primary until an election
    HEARTBEAT = 300  # milliseconds between two words

    def __init__(self, *options: str) -> None:
        self.servers = [MongoMember(*options) for _ in range(3)]
        super().__init__(self.servers)

    @property
    def url(self) -> str:
        """All members and the name of the set."""
        hosts = ",".join(f"{HOST}:{server.port}" for server in self.servers)
        return f"mongodb://{hosts}/?replicaSet=gsession"

    def primary(self) -> MongoMember:
        """The server that takes writes.

        :raises ConnectionError: while there is no primary.
        """
        for server in self.servers:
            if server.awake:
                with suppress(PyMongoError):
                    if server.hello()["isWritablePrimary"]:
                        return server
        raise ConnectionError("the replica set has no primary")

    def secondaries(self) -> list[MongoMember]:
        """The other two, be they alive or not."""
        primary = self.primary()
        return [server for server in self.servers if server is not primary]

    def kill_primary(self) -> MongoMember:
        """Kill the primary as a crash does; returns it, for `wait_for_primary`."""
        primary = self.primary()
        primary.kill()
        return primary

    def step_down(self, seconds: int = 20) -> MongoMember:
        """Make the primary give way and stand in no election for `seconds`, at least 2.

        Returns it, for `wait_for_primary`. It keeps its clients' connections and answers writes
        with `NotWritablePrimary`.
        """
        primary = self.primary()

        def done() -> bool:
            with primary.client() as client, suppress(PyMongoError):
                client.admin.command("replSetStepDown", seconds, secondaryCatchUpPeriodSecs=1)
            return not primary.hello()["isWritablePrimary"]

        until(done, "the primary giving way")
        return primary

    @contextmanager
    def without_elections(self) -> Iterator[None]:
        """For the length of a `with` block the primary stays one, even cut off from the others."""
        self._reconfigure(electionTimeoutMillis=600_000)
        try:
            yield
        finally:
            self.start()
            self._reconfigure(electionTimeoutMillis=self.ELECTION_TIMEOUT)

    def _reconfigure(self, **settings: int) -> None:
        with self.primary().client() as client:
            config = client.admin.command("replSetGetConfig")["config"]
            config["version"] += 1
            config["settings"].update(settings)
            client.admin.command("replSetReconfig", config)

    def wait_for_primary(self, other_than: MongoMember | None = None) -> MongoMember:
        """Wait until a primary, other than one that went away, is known to all that live.

        :raises ServerFailed: after `SETTLE_TIMEOUT`.
        """

        def elected() -> MongoMember | None:
            primary = self.primary()
            address = f"{HOST}:{primary.port}"
            alive = [each for each in self.servers if each.awake and each is not other_than]
            known = all(each.hello().get("primary") == address for each in alive)
            return primary if known and primary is not other_than else None

        return until(elected, "a new primary")

    def _introduce(self) -> None:
        members = [
            {"_id": number, "host": f"{HOST}:{server.port}"}
            for number, server in enumerate(self.servers)
        ]
        settings = {
            "electionTimeoutMillis": self.ELECTION_TIMEOUT,
            "heartbeatIntervalMillis": self.HEARTBEAT,
        }
        config = {"_id": "gsession", "members": members, "settings": settings}
        with self.servers[0].client() as client:
            client.admin.command("replSetInitiate", config)
            # An election now, not after the time that the others give a primary to be heard of.
            until(lambda: client.admin.command("replSetStepUp"), "the first election")

    def _well(self) -> bool:
        with self.primary().client(timeoutMS=int(ANSWER_TIMEOUT * 1000)) as client:
            status = client.admin.command("replSetGetStatus")
        states = sorted(member["stateStr"] for member in status["members"])
        return states == ["PRIMARY", "SECONDARY", "SECONDARY"]


class MongoAuthTLS(MongoServer):
    """A MongoDB server, a replica set of one, with users, that speaks TLS only.

    | user    | may                                                                 |
    |---------|---------------------------------------------------------------------|
    | `admin` | do everything                                                       |
    | `app`   | read and write the database `DATABASE`, and make indexes there      |
    | `frail` | read and write its documents and list its indexes, but not make any |
    """

    DATABASE = "sessions"
    FRAIL_RIGHTS: ClassVar = ("find", "insert", "update", "remove", "listIndexes")

    def __init__(self, *options: str) -> None:
        super().__init__(*options)
        self._password = secrets.token_hex(8)

    @property
    def certificates(self) -> "Certificates":
        """The files, from the start on."""
        return Certificates(self._directory)

    @property
    def url(self) -> str:
        """The URL for the user `app`."""
        return self.url_of("app")

    def url_of(self, user: Literal["admin", "app", "frail"] | None) -> str:
        """The URL for a user of the database `DATABASE`; None: without a user."""
        options = {"replicaSet": "gsession", "tls": "true", "tlsCAFile": self.certificates.ca}
        if user is None:
            return f"mongodb://{HOST}:{self.port}/{self.DATABASE}?{urlencode(options)}"
        options["authSource"] = "admin"
        name = f"{quote(user)}:{self._password}"
        return f"mongodb://{name}@{HOST}:{self.port}/{self.DATABASE}?{urlencode(options)}"

    def url_of_rights(
        self, actions: Sequence[str], *collections: str, **more: Sequence[str]
    ) -> str:
        """The URL for a new user with only these rights on collections of `DATABASE`.

        `more`: further actions, by collection.
        """
        name = f"user{secrets.token_hex(4)}"
        rights = dict.fromkeys(collections, actions)
        privileges = [
            {
                "resource": {"db": self.DATABASE, "collection": each},
                "actions": [*rights.get(each, ()), *more.get(each, ())],
            }
            for each in dict.fromkeys((*rights, *more))
            if rights.get(each) or more.get(each)
        ]
        client: MongoClient[dict[str, Any]]
        with MongoClient(self.url_of("admin"), timeoutMS=10_000) as client:
            client.admin.command("createRole", name, privileges=privileges, roles=[])
            client.admin.command("createUser", name, pwd=self._password, roles=[name])
        return self.url_of("app").replace("//app:", f"//{name}:")

    def client(self, **options: Any) -> "MongoClient[dict[str, Any]]":
        """A client of this very server, by its unix socket, signed in as nobody."""
        files = {"tls": True, "tlsCAFile": str(self.certificates.ca)}
        return super().client(**files, tlsAllowInvalidHostnames=True, **options)

    def _prepare(self) -> None:
        self.certificates.make()
        key = self._directory / "members.key"
        key.touch(0o600)
        key.write_text(secrets.token_hex(32))

    def _arguments(self) -> list[str]:
        return [
            *super()._arguments(),
            *("--auth", "--keyFile", f"{self._directory}/members.key"),
            *("--tlsMode", "requireTLS", "--tlsAllowConnectionsWithoutCertificates"),
            *("--tlsCertificateKeyFile", str(self.certificates.server)),
            *("--tlsCAFile", str(self.certificates.ca)),
        ]

    def _answers(self) -> bool:
        if not super()._answers():
            return False
        with self.client() as client, suppress(OperationFailure):  # has them already
            self._make_users(client)
        return True

    def _make_users(self, client: "MongoClient[dict[str, Any]]") -> None:
        # Anyone on this machine may create the first user, and only that user can create others.
        client.admin.command("createUser", "admin", pwd=self._password, roles=["root"])
        admin: MongoClient[dict[str, Any]] = MongoClient(self.url_of("admin"), timeoutMS=10_000)
        with admin:
            where = {"db": self.DATABASE, "collection": ""}
            rights = [{"resource": where, "actions": list(self.FRAIL_RIGHTS)}]
            admin.admin.command("createRole", "frail", privileges=rights, roles=[])
            for user, role, source in (
                ("app", "readWrite", self.DATABASE),
                ("frail", "frail", "admin"),
            ):
                roles = [{"role": role, "db": source}]
                admin.admin.command("createUser", user, pwd=self._password, roles=roles)


# Certificates ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """A certificate authority's files in a directory. Each certificate has its key beside it."""

    directory: Path

    @property
    def ca(self) -> Path:
        """The certificate of the authority, for both sides to trust."""
        return self.directory / "ca.pem"

    @property
    def server(self) -> Path:
        """The certificate and key of a server at 127.0.0.1, alias localhost."""
        return self.directory / "server.pem"

    @property
    def client(self) -> Path:
        """The certificate and key of a client."""
        return self.directory / "client.pem"

    def make(self) -> None:
        """Write the files. They are good for a day."""
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca_name = _common_name("Flask-GSession test authority")
        ca = (
            _certificate(ca_name, ca_name, ca_key, ca_key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        self.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        addresses: list[x509.GeneralName] = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address(HOST)),
        ]
        for path, names in ((self.server, addresses), (self.client, addresses[:1])):
            key = ec.generate_private_key(ec.SECP256R1())
            purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
            certificate = (
                _certificate(_common_name(path.stem), ca_name, key, ca_key)
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .add_extension(_key_usage(signs_certificates=False), critical=True)
                .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
                .add_extension(x509.SubjectAlternativeName(names), critical=False)
                .sign(ca_key, hashes.SHA256())
            )
            path.touch(0o600)
            path.write_bytes(
                certificate.public_bytes(serialization.Encoding.PEM)
                + key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_id, critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# Faults on the way ----------------------------------------------------------------------------

Way = Literal["request", "reply"]


@dataclass(eq=False)
class _Fault:
    """A manipulation of the bytes that pass the proxy, until `over` is set."""

    kind: Literal["none", "delay", "drip", "cut", "blackhole", "refuse"] = "none"
    way: Way = "reply"
    seconds: float = 0.0  # of a delay, or between two drops
    size: int = 0  # the bytes of a drop, or the bytes that pass before a cut
    match: bytes = b""
    times: int | None = None  # how many replies are still to be cut; None means all
    over: asyncio.Event = field(default_factory=asyncio.Event)


class _Link:
    """One connection of a client, and the proxy's own to the server on its behalf."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.left: int | None = None  # bytes of replies until the cut, when one is due
        self.tail = b""  # the end of the last piece of a request, for a match across two

    def cut(self) -> None:
        """Close both connections. Data that was written to the client still arrives."""
        self.client.close()
        if self.server is not None:
            self.server.transport.abort()

    def drop(self) -> None:
        """Close both connections at once."""
        self.client.transport.abort()
        self.cut()


class TCPProxy:
    """A proxy before a server on loopback, which the test controls.

    It starts by passing all on. Each of the methods `forward`, `delay`, `drip`, `cut`,
    `lose_reply`, `blackhole` and `refuse` changes that at once, for open connections too. Used
    with `with`, it ends with the block, and all is passed on again.

    :param port: of the server.
    :param tls: to speak TLS to the client, and plain TCP to the server.
    """

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.target = port
        self.port = 0
        self.accepted = 0  # connections since the start
        self.cuts = 0  # replies that were cut or lost
        self._tls = tls
        self._fault = _Fault()
        self._links: set[_Link] = set()
        self._listener: asyncio.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop  # these two from the start on
        self._ended: asyncio.Event

    @property
    def open(self) -> int:
        """How many connections there are to the server now."""
        return len(self._links)

    def through(self, url: str) -> str:
        """The URL of the server, led through the proxy.

        The URL makes a MongoDB client stay with this address, instead of going to those that the
        replica set names.
        """
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        query = parts.query.replace("replicaSet=gsession", "directConnection=true")
        return parts._replace(netloc=f"{user}{at}{HOST}:{self.port}", query=query).geturl()

    def forward(self) -> None:
        """Forward everything, including data that a delay or a black hole held back."""
        self._switch(_Fault())

    def delay(self, seconds: float, way: Way = "reply") -> AbstractContextManager[object]:
        """Deliver everything that long after it came: replies, or requests.

        A delayed request reaches the server even if the client has given up by then.
        """
        return self._switch(_Fault("delay", way, seconds))

    def drip(
        self, size: int, seconds: float = 0.01, way: Way = "reply"
    ) -> AbstractContextManager[object]:
        """Deliver `size` bytes at a time, with `seconds` in between."""
        return self._switch(_Fault("drip", way, seconds, size))

    def cut(
        self, after: int, match: bytes = b"", times: int | None = None
    ) -> AbstractContextManager[object]:
        """Close a connection after that many bytes of a reply; the server got the request.

        :param match: only for requests with these bytes in them, as in `b"EVALSHA"`. Without,
            the setup of a new connection counts as a request too.
        :param times: only for so many requests.
        """
        return self._switch(_Fault("cut", size=after, match=match, times=times))

    def lose_reply(
        self, match: bytes = b"", times: int | None = None
    ) -> AbstractContextManager[object]:
        """Pass a request on, and instead of the reply close the connection; else as `cut`."""
        return self.cut(0, match, times)

    def blackhole(self) -> AbstractContextManager[object]:
        """Accept connections and requests and say nothing.

        As after a network partition, requests are delivered when it is over.
        """
        return self._switch(_Fault("blackhole"))

    def refuse(self) -> AbstractContextManager[object]:
        """Close all connections and refuse new ones, as when the server's process is gone."""
        return self._switch(_Fault("refuse"))

    def disconnect(self) -> None:
        """Close all connections, and accept new ones as before."""
        self._wait_for(self._drop_links())

    def start(self) -> None:
        """Listen at a free port, which `port` then holds."""
        if self._thread is None:
            listening: Future[None] = Future()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._live(listening)), name="tcp-proxy", daemon=True
            )
            self._thread.start()
            listening.result()

    def stop(self) -> None:
        """Close all connections and the port."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # All methods from here on run in the proxy's thread, except the first two.

    def _switch(self, fault: _Fault) -> AbstractContextManager[object]:
        self._wait_for(self._set(fault))
        end = ExitStack()
        end.callback(self.forward)
        return end

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _live(self, listening: "Future[None]") -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._fault = _Fault()
        try:
            while self._listener is None:
                self.port = free_port()
                with suppress(OSError):  # somebody else took it
                    await self._listen()
        except BaseException as error:
            listening.set_exception(error)
            raise
        listening.set_result(None)
        await self._ended.wait()
        await self._set(_Fault("refuse"))
        # Whoever still waits for a piece or a moment is cancelled by `asyncio.run`.

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(
            self._serve, HOST, self.port, ssl=self._tls, backlog=1024
        )

    async def _set(self, fault: _Fault) -> None:
        before, self._fault = self._fault, fault
        before.over.set()
        if fault.kind == "refuse":
            if self._listener is not None:
                self._listener.close()
                self._listener = None
            await self._drop_links()
        elif self._listener is None:
            await self._listen()

    async def _drop_links(self) -> None:
        for link in self._links:
            link.drop()
        await asyncio.sleep(0)  # the sockets are closed in the loop's next round

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(writer)
        self._links.add(link)
        try:
            answers, link.server = await asyncio.open_connection(HOST, self.target)
            await asyncio.gather(
                self._pass_on(link, "request", reader, link.server),
                self._pass_on(link, "reply", answers, writer),
            )
        except OSError:
            link.drop()  # the server is down, or one side hung up
        finally:
            link.cut()
            self._links.discard(link)

    async def _pass_on(
        self,
        link: _Link,
        way: Way,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        # Pieces are read as they come, and wait here with their time: a delay is then the same
        # for each, and does not add up.
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def read() -> None:
            piece = b"?"
            while piece:
                try:
                    piece = await reader.read(1 << 16)
                except OSError:
                    piece = b""
                await pieces.put((self._loop.time(), piece))

        reading = asyncio.create_task(read())
        try:
            while True:
                arrived, piece = await pieces.get()
                await self._hold(way, arrived)
                if not piece:
                    break
                if way == "request":
                    self._arm(link, piece)
                elif link.left is not None:
                    piece = piece[: link.left]
                    link.left -= len(piece)
                await self._write(writer, way, piece)
                if way == "reply" and link.left == 0:
                    self.cuts += 1
                    return link.cut()
            if writer.can_write_eof():
                writer.write_eof()
            else:
                writer.close()
        finally:
            reading.cancel()

    async def _hold(self, way: Way, arrived: float) -> None:
        """Wait as long as the fault holds back data that arrived at that time."""
        while True:
            fault, left = self._fault, None
            if fault.kind == "delay" and fault.way == way:
                left = arrived + fault.seconds - self._loop.time()
                if left <= 0:
                    return
            elif fault.kind != "blackhole":
                return
            await _wait(fault.over, left)

    def _arm(self, link: _Link, piece: bytes) -> None:
        """Note that the reply to this piece of a request is to be cut, if it is."""
        fault = self._fault
        if fault.kind != "cut":
            return
        seen = link.tail + piece
        if link.left is None and fault.times != 0 and fault.match in seen:
            link.left = fault.size
            if fault.times is not None:
                fault.times -= 1
        link.tail = seen[len(seen) - max(len(fault.match) - 1, 0) :]

    async def _write(self, writer: asyncio.StreamWriter, way: Way, piece: bytes) -> None:
        fault = self._fault
        if fault.kind == "drip" and fault.way == way:
            while len(piece) > fault.size and not fault.over.is_set():
                writer.write(piece[: fault.size])
                await writer.drain()
                piece = piece[fault.size :]
                await _wait(fault.over, fault.seconds)
        writer.write(piece)
        await writer.drain()


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


# Fixtures -------------------------------------------------------------------------------------

_shared: dict[Callable[[], Any], Any] = {}


def _shared_one(make: Callable[[], R]) -> R:
    """The one of its kind in this process: started at the first call, made whole at each."""
    if make not in _shared:
        _shared[make] = make()
    one: R = _shared[make]
    if isinstance(one, Server):
        _start(one)
    else:
        one.start()
    return one


def pytest_sessionfinish() -> None:
    """Stop the servers of this process."""
    while _shared:
        _shared.popitem()[1].stop()


@pytest.fixture(scope="module")
def redis_sentinels() -> RedisSentinels:
    """A Redis primary with two replicas and three sentinels. Start it again after a kill."""
    return _shared_one(RedisSentinels)


@pytest.fixture(scope="module")
def redis_cluster() -> RedisCluster:
    """A Redis cluster of three primaries and three replicas. Start it again after a kill."""
    return _shared_one(RedisCluster)


@pytest.fixture(scope="module")
def redis_tls() -> RedisTLS:
    """A Redis that speaks TLS only. Start it again after a kill."""
    return _shared_one(RedisTLS)


@pytest.fixture(scope="module")
def redis_acl() -> RedisACL:
    """A Redis that wants a password; its user has no rights until the test calls `allow`."""
    server = _shared_one(_acl_server)
    server.allow("")
    return server


def _acl_server() -> RedisACL:
    return RedisACL("")


@pytest.fixture(scope="module")
def mongo_replica_set() -> MongoReplicaSet:
    """Three MongoDB servers with a primary. Start them again after a kill."""
    return _shared_one(MongoReplicaSet)


@pytest.fixture(scope="module")
def mongo_auth_tls() -> MongoAuthTLS:
    """A MongoDB that wants TLS and a password. Start it again after a kill."""
    return _shared_one(MongoAuthTLS)
