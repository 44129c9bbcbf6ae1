"""Sessions in a Redis Cluster: each at the node that serves its slot, and slots move at any time.

A rotation writes two keys in two slots: first the new record, then the pointer under the old key.
The second write decides which of several rotations wins; no client has a token for the records of
the others. If the process dies in between, the unused record stays until it expires.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlencode

from redis.cluster import RedisCluster
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ...errors import Gone, LeaseLost, Stale, StoreUnavailable, UnreadableRecord
from ..base import Record, Replaced
from ..interrupts import interruption, reraise_interruption
from ..support import StoreOptions, closing, count_round_trip
from .blobs import RedisBlobs
from .changes import ClusterSource
from .cluster_journal import ClusterJournal
from .commands import Commands, Script, packed
from .confirmation import Confirmation
from .foreign import RedisStrings
from .layout import pack, version
from .leases import RedisLeases, ask_for_lease
from .pool import ConnectionPool, Node, Slot, ask_all, described
from .records import Records, renewed_since
from .servers import Address, connections_like, connections_of, servers_of
from .store import RedisStore

_ASKING, _SLOTS = packed(b"ASKING"), packed(b"CLUSTER", b"SLOTS")
_ROTATE = Script("rotate")
_TRIED = 500  # names to try, to find one for each node
# A repeated rotation recognises its earlier effect under the old key for so many milliseconds.
_END_SHOWN = 10_000

_SILENT = (RedisConnectionError, RedisTimeoutError, OSError)

Owners = dict[int, Address]


class Cluster:
    """Maps slots to nodes, and holds the connections to each.

    ``make`` creates a connection to an address; ``size`` limits the connections per node. There is
    no lock, so no thread waits for another thread that is stuck at a frozen node, and no fork
    inherits a held lock.
    """

    def __init__(self, make: Callable[..., Any], seeds: list[Address], size: int) -> None:
        self._make = make
        self._seeds = seeds
        self._size = size
        self._pools: dict[Address, ConnectionPool] = {}
        self._owners: Owners = {}
        self._outdated = True
        self._ask_first: Address | None = None  # the node that named another for a slot
        self._ask_last: Address | None = None  # the node that didn't answer
        #: called when records may be read from other nodes than before
        self.shifted: Callable[[], object] = bool

    def make_at(self, address: Address, **options: Any) -> Any:
        """A connection to one of the nodes."""
        return self._make(host=address[0], port=address[1], **options)

    def look(self, deadline: float) -> list[Address]:
        """Ask for the slot table, and return the nodes that serve slots."""
        self._look(deadline)
        return list(dict.fromkeys(self._owners.values()))

    def known_owner(self, slot: int) -> Address | None:
        """The node that serves a slot, or None if the slot table has to be asked for first."""
        return self._owners.get(slot)

    def make(self, **options: Any) -> Any:
        """A connection to any node, since published messages reach all of them."""
        host, port = random.choice([*(set(self._owners.values()) or self._seeds)])
        return self._make(host=host, port=port, **options)

    def pool(self, address: Address) -> ConnectionPool:
        """The connections to one node."""
        pool = self._pools.get(address)
        if pool is None:
            make = partial(self._make, host=address[0], port=address[1])
            pool = self._pools.setdefault(address, ConnectionPool(make, self._size))
        return pool

    def owner(self, slot: int, deadline: float) -> Address:
        """The node that serves a slot, according to the last slot table."""
        if self._outdated:
            self._look(deadline)
        try:
            return self._owners[slot]
        except KeyError:
            self._outdated = True
            raise RedisConnectionError(f"no node of the cluster serves slot {slot}") from None

    def nodes(self, deadline: float) -> list[Node]:
        """The known nodes that serve slots."""
        if self._outdated:
            self._look(deadline)
        first: dict[Address, int] = {}
        for slot, address in sorted(self._owners.items()):
            first.setdefault(address, slot)
        return [
            Node(slot, self.pool(address), partial(self.failed, address))
            for address, slot in first.items()
        ]

    def take(self, deadline: float, name: bytes) -> Slot:
        """A connection to the node that serves this key."""
        return self.pool(self.owner(key_slot(name), deadline)).take(deadline)

    def give(self, slot: Slot) -> None:
        """Return the slot of a command that was answered."""
        self.pool(_address_of(slot)).give(slot)

    def give_failed(self, slot: Slot, error: BaseException) -> None:
        """Return the slot of a command that failed; note if its hash slot is served elsewhere."""
        address = _address_of(slot)
        self.pool(address).give_failed(slot, error)
        if isinstance(error, AskError):
            error.host = error.host or address[0]  # empty: the host of the node that answered
            if isinstance(error, MovedError):
                self.moved(error.slot_id, (error.host, error.port))
            else:
                self.shifted()
        elif isinstance(error, _SILENT) and interruption(error) is None:
            self.failed(address)

    def failed(self, address: Address) -> None:
        """Note that a node didn't answer. A failover may have moved its slots."""
        self._ask_last, self._outdated = address, True

    def moved(self, slot: int, to: Address) -> None:
        """Note that another node serves this slot now. More slots may have moved there."""
        self._owners[slot] = to
        self._ask_first, self._outdated = to, True
        self.shifted()

    def close(self) -> None:
        """Close all connections."""
        for pool in list(self._pools.values()):
            pool.close()

    def _look(self, deadline: float) -> None:
        """Ask a node for the slot table."""
        known = list({*self._owners.values(), *self._seeds})
        random.shuffle(known)
        known.sort(key=lambda address: (address != self._ask_first, address == self._ask_last))
        last = ""
        for address in known:
            # Leaves time for the others if this node is frozen.
            share = time.monotonic() + (deadline - time.monotonic()) / 3
            try:
                owners = _owners_in(self._ask(address, share), address)
            except ResponseError:
                raise
            except (RedisError, OSError) as error:
                reraise_interruption(error)
                last = f"; {described(error)}"
                continue
            if owners:
                before, self._owners = self._owners, owners
                if owners != before:
                    self.shifted()
                self._outdated = False
                self._ask_first = self._ask_last = None
                for gone in self._pools.keys() - {*owners.values(), *self._seeds}:
                    pool = self._pools.pop(gone, None)
                    if pool is not None:
                        pool.close()
                return
        raise RedisConnectionError(f"no node of the cluster answers{last}")

    def _ask(self, address: Address, deadline: float) -> Any:
        (answer,) = ask_all(self.pool(address), deadline, [_SLOTS])
        if isinstance(answer, Exception):
            raise answer
        return answer


class ClusterCommands(Commands):
    """Sends each command to the node that serves its key's slot, and follows slots that move."""

    def __init__(self, cluster: Cluster, options: StoreOptions) -> None:
        # A failover or a moving slot sends a request from node to node before it is served.
        super().__init__(cluster, options, retries=6)
        self._cluster = cluster

    def servers(self) -> dict[bytes, str]:
        deadline = self.deadline()
        names: dict[Address, bytes] = {}
        try:
            for number in range(_TRIED):
                name = b"%d" % number
                names.setdefault(self._cluster.owner(key_slot(name), deadline), name)
        except (RedisError, OSError) as error:
            reraise_interruption(error)
            raise StoreUnavailable(f"redis: {described(error)}") from error
        return {name: f"{host}:{port}" for (host, port), name in names.items()}

    def nodes(self, deadline: float) -> list[Node]:
        return self._cluster.nodes(deadline)

    def pool_after(self, error: Exception) -> Any:
        if isinstance(error, AskError) and not isinstance(error, MovedError):
            return _Importing(self._cluster.pool((error.host, error.port)))
        return self.pool


class _Importing:
    """The connections to a node that is importing a hash slot, and has imported this key."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self.give, self.give_failed = pool.give, pool.give_failed

    def take(self, deadline: float, name: bytes) -> Slot:
        slot = self._pool.take(deadline)
        try:
            count_round_trip()
            slot.ask(_ASKING)
        except BaseException as error:
            self.give_failed(slot, error)
            raise
        return slot


# While a hash slot moves, its node refuses scripts that use both a key that has moved and one that
# hasn't. So leases are taken and ended in separate steps.


class ClusterRecords(Records):
    """Keeps records. A rotation writes two of them, in two slots."""

    def load(self, key: str, deadline: float | None = None) -> Record | None:
        # ``_end_of`` leaves pointers to nowhere, which don't count as records.
        record = super().load(key, deadline)
        return None if record is not None and record.successor == "" else record

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
        lease: str | None = None,
        deadline: float | None = None,
    ) -> Replaced:
        commands = self.commands
        deadline = deadline or commands.deadline()
        first = self._create(record, deadline)
        mine = version(record.version)
        keys = self._keys_to_remove(key, lease)
        left = pointer or self._end_of(key, record)
        confirmation = Confirmation(0 if pointer else self.logout_replicas)
        try:
            while True:
                now = commands.now()
                arguments = [
                    version(expected_version),
                    pack(left),
                    b"%d" % (commands.life(pointer, now) if pointer else _END_SHOWN),
                    b"%d" % now,
                    mine,
                    (lease or "").encode(),
                    self.names.channels,
                    b"" if shorten else b"%d" % record.idle_expires_at,
                ]
                reply = commands.run(deadline, _ROTATE, keys, arguments, mine, confirmation, b"N")
                if reply == b"N" and first:
                    raise Gone  # the rotation was done before, and the session has ended since
                if reply[:1] != b"R":
                    break
                record, shorten = renewed_since(record, reply)
                if not self.renew(record, record.idle_expires_at, deadline):
                    raise Gone
        except (Gone, Stale, LeaseLost):
            with suppress(Gone, Stale, StoreUnavailable):
                super().remove(record.key, deadline, mine, b"1")
            raise
        self.end_lease(key, deadline)
        return Replaced(confirmation.missing)

    def remove(
        self,
        key: str,
        deadline: float,
        wanted: bytes = b"",
        pointers: bytes = b"0",
        lease: str | None = None,
        confirmation: Confirmation | None = None,
    ) -> bytes:
        reply = super().remove(key, deadline, wanted, pointers, lease, confirmation)
        if reply[:1] == b"K":
            self.end_lease(key, deadline)
        return reply

    def _keys_to_remove(self, key: str, lease: str | None) -> list[bytes]:
        return [self.names.record(key), *([] if lease is None else [self.names.lease(key)])]

    def end_lease(self, key: str, deadline: float) -> None:
        """Delete the lease of an ended session, and wake the requests that wait for it.

        It has no effect without its session, but its waiters would wait until it expires.
        """
        keys = [self.names.lease(key)]
        with suppress(StoreUnavailable):
            ask_for_lease(self.commands, keys, b"end", b"-", deadline=deadline)

    def _end_of(self, key: str, record: Record) -> Record:
        """An expired pointer to nowhere, by which a repeat recognises its earlier effect."""
        now = self.commands.now()
        return record._replace(
            key=key, idle_expires_at=now, absolute_expires_at=now, payload=b"", successor=""
        )


class ClusterLeases(RedisLeases):
    """Lends sessions, after a check that the session exists."""

    def _keys_to_acquire(self, key: str, deadline: float) -> list[bytes]:
        try:
            record = self._records.load_unexpired(key, deadline)
        except UnreadableRecord:
            raise Gone from None
        if record is None or record.successor is not None:
            raise Gone
        return [self._names.lease(key)]


class ClusterBlobs(RedisBlobs):
    """Keeps large values, each in a slot of its own."""

    def _batches(self, blobs: list[bytes]) -> list[list[bytes]]:
        return [[blob] for blob in blobs]


class RedisClusterStore(ClusterRecords, RedisStore):
    """Keeps records in a Redis Cluster, whose nodes come from a URL or an existing client.

    One call takes at most ``options.timeout``. If you pass in a client, the store uses its nodes
    and the options of its connections, and makes its own connections.
    """

    def __init__(self, url_or_client: str | RedisCluster, options: StoreOptions | None = None):
        options = options or StoreOptions()
        if isinstance(url_or_client, str):
            make, seeds = _of_url(url_or_client, options.timeout)
        else:
            make, seeds = _of_client(url_or_client, options.timeout)
        cluster = Cluster(make, seeds, options.pool_max)
        closing(self, cluster.close)
        commands = ClusterCommands(cluster, options)
        Records.__init__(self, commands, options.logout_replicas)
        records = ClusterRecords(commands, options.logout_replicas)
        self._begin(url_or_client, options, records, cluster.make, ClusterSource)
        self.leases = ClusterLeases(records, self._wake_ups)
        self.blobs = ClusterBlobs(commands)
        self.journal = ClusterJournal(records, ClusterRecords)

    def strings(self) -> RedisStrings:
        return RedisStrings(self._records)


def _of_url(url: str, timeout: float) -> tuple[Callable[..., Any], list[Address]]:
    servers = servers_of(url, 6379)
    kind, settings = connections_of(f"{servers.single}?{urlencode(servers.options)}", timeout)
    if settings.get("db"):
        raise ValueError("a Redis Cluster has only database 0")
    return partial(kind, **settings), servers.addresses


def _of_client(client: RedisCluster, timeout: float) -> tuple[Callable[..., Any], list[Address]]:
    nodes: list[Any] = client.get_nodes()  # type: ignore[no-untyped-call]
    pool: Any = client.get_redis_connection(nodes[0]).connection_pool
    make = connections_like(pool, timeout)
    return make, [(node.host, node.port) for node in nodes]


def _address_of(slot: Slot) -> Address:
    return slot.connection.host, slot.connection.port


def _owners_in(answer: Any, asked: Address) -> Owners:
    """Parse ``CLUSTER SLOTS``; an entry without a host means the node that was asked."""
    owners: Owners = {}
    for first, last, (host, port, *_), *_ in answer:
        address = (host.decode() if host else asked[0], int(port))
        owners.update(dict.fromkeys(range(first, last + 1), address))
    return owners
