"""Several Redis servers behind one URL: their addresses, and which of them is the primary.

redis-py's own classes for this have no deadline, and only one thread may use them. So only the
connections come from redis-py here, and they keep to our time budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from ..interrupts import reraise_interruption
from ..parts import Finding
from ..urls import without_hosts
from .commands import packed
from .driver import HAS_HEALTH_HOOK
from .pool import ConnectionPool, Slot, bounded, described

# After a manual failover, the old primary accepts writes for seconds, and they are lost. So the
# sentinels are asked again after so many seconds, even while the connections work.
LOOK_AGAIN = 1.0
# Options of a client's connections that are useless here, or would read from a replica.
_OF_THE_CLIENT = ("redis_connect_func", "himport_registry", "cache", "event_dispatcher")
_NO_FAILOVER = "They couldn't replace a failed primary: start the ones that are down."

Address = tuple[str, int]
Make = Callable[[], Any]  # returns a connection that isn't connected yet


class Servers(NamedTuple):
    """The parts of a URL with several hosts."""

    addresses: list[Address]
    path: str
    options: dict[str, str]  # of the query
    single: str  # the URL with only the first host, without path and query


def servers_of(url: str, default_port: int) -> Servers:
    """Parse a URL that may name several hosts. Raises ``ValueError``."""
    parts, hosts = without_hosts(url)
    user, at, hosts = hosts.rpartition("@")
    addresses = []
    for host in hosts.split(","):
        one = urlsplit(f"//{host}")
        if not one.hostname or one.username is not None:
            raise ValueError("a host is missing")
        addresses.append((one.hostname, one.port or default_port))
    scheme = parts.scheme.partition("+")[0]
    return Servers(
        addresses,
        parts.path,
        dict(parse_qsl(parts.query, keep_blank_values=True)),
        f"{scheme}://{user}{at}{hosts.split(',')[0]}",
    )


def connections_of(url: str, timeout: float) -> tuple[type, dict[str, Any]]:
    """The class and the options of the connections for a redis-py URL."""
    made = redis.ConnectionPool.from_url(
        url,
        socket_connect_timeout=timeout / 4,
        socket_timeout=timeout / 4,
        retry=Retry(NoBackoff(), 0),
    )
    kind = bounded(made.connection_class)
    kind(**made.connection_kwargs)  # doesn't connect, but raises for wrong options
    return kind, made.connection_kwargs


def connections_like(pool: Any, timeout: float) -> Callable[..., Any]:
    """A function that makes connections as a client's pool does, but with our own timeouts."""
    settings = {
        name: value
        for name, value in pool.connection_kwargs.items()
        if name not in _OF_THE_CLIENT and "maint_notifications" not in name
    }
    settings |= {
        "socket_connect_timeout": timeout / 4,
        "socket_timeout": timeout / 4,
        "retry": Retry(NoBackoff(), 0),
    }
    return partial(bounded(pool.connection_class), **settings)


def ask_once(make: Make, request: bytes, deadline: float) -> Any:
    """The reply to one command, on a connection of its own."""
    slot = Slot(None)
    slot.connection = make()
    slot.connection.deadline.at = deadline
    try:
        return slot.ask(request)
    finally:
        slot.connection.disconnect()


class Sentinels:
    """Finds the primary of a service. Thread-safe; keeps no connection open.

    ``makes``: a function for each sentinel, which creates a connection to it.
    """

    def __init__(self, makes: list[Make], service: str) -> None:
        self._makes = makes
        self._service = service

    def primary(self, deadline: float) -> Address:
        """The primary's address, from the first sentinel that knows it."""
        request = packed(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._service.encode())
        last = ""
        for make in self._makes:
            # Leaves time for the others if this sentinel is frozen.
            share = time.monotonic() + (deadline - time.monotonic()) / 3
            try:
                answer = ask_once(make, request, share)
            except (RedisError, OSError) as error:
                reraise_interruption(error)
                last = f"; {described(error)}"
                continue
            if isinstance(answer, list) and len(answer) == 2:
                self._makes = [make, *(each for each in self._makes if each is not make)]
                return answer[0].decode(), int(answer[1])
        raise RedisConnectionError(f"no sentinel knows a primary of {self._service!r}{last}")

    def check(self, timeout: float) -> list[Finding]:
        """Whether enough sentinels answer to agree on another primary."""
        makes = list(self._makes)
        request = packed(b"SENTINEL", b"CKQUORUM", self._service.encode())
        answering, refusal = 0, ""
        for make in makes:
            try:
                ask_once(make, request, time.monotonic() + timeout)
            except ResponseError as error:
                refusal = str(error)
            except (RedisError, OSError) as error:
                reraise_interruption(error)
                continue
            answering += 1
        found = f"{answering} of {len(makes)} answer"
        if refusal:
            return [Finding("error", "sentinels", f"{found}: {refusal}", _NO_FAILOVER)]
        if answering < len(makes):
            return [
                Finding(
                    "warning",
                    "sentinels",
                    found,
                    "Start the ones that are down, or name others.",
                )
            ]
        return [Finding("ok", "sentinels", found)]


class _ToPrimary:
    """A mixin for connection classes: connects to the current primary, and checks its role."""

    def __init__(self, *, find: Callable[[float], Address], **options: Any) -> None:
        super().__init__(**options)
        self._find = find

    def _connect(self) -> Any:
        self.host, self.port = self._find(self.deadline.at)  # type: ignore[attr-defined]
        return super()._connect()  # type: ignore[misc]

    def on_connect(self) -> None:
        super().on_connect()  # type: ignore[misc]
        if not HAS_HEALTH_HOOK:
            self._check_role()

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health)  # type: ignore[misc]
        self._check_role()

    def _check_role(self) -> None:
        self.send_command("ROLE", check_health=False)  # type: ignore[attr-defined]
        role = self.read_response(disable_decoding=True)[0].decode()  # type: ignore[attr-defined]
        if role != "master":
            raise RedisConnectionError(f"{self.host}:{self.port} isn't the primary (role {role})")


class PrimaryPool(ConnectionPool):
    """Connections to the primary of a service, also after a failover."""

    def __init__(self, url: str, timeout: float, size: int) -> None:
        servers = servers_of(url, 26379)
        _, service, *database = servers.path.split("/")
        options = servers.options
        users = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
        kind, settings = connections_of(
            f"{servers.single}/{''.join(database)}?{urlencode(options)}", timeout
        )
        watchers = {**settings, **users, "db": 0, "credential_provider": None}
        self._sentinels = Sentinels(
            [
                partial(kind, **{**watchers, "host": host, "port": port})
                for host, port in servers.addresses
            ],
            service,
        )
        # The server of the connections. Another thread may find the next primary first.
        self._pooled: Address | None = None
        self._followed: Address | None = None
        self._look_at = 0.0  # of time.monotonic: when to ask the sentinels again
        to_primary = type(kind.__name__, (_ToPrimary, kind), {})
        super().__init__(partial(to_primary, find=self._find, **settings), size)

    def take(self, deadline: float, name: bytes = b"") -> Slot:
        """A slot whose connection leads, or will lead, to the primary."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_AGAIN  # other threads need not ask at the same time
            before = self._pooled
            if before is not None:
                with suppress(RedisConnectionError):  # if no sentinel answers, keep the primary
                    found = self._find(now + (deadline - now) / 4)
                    if found != before:
                        self._pooled = found
                        self.close()  # lent connections, too, lead to the old primary
        return super().take(deadline)

    def look(self, deadline: float) -> None:
        """Ask the sentinels, and call ``moved`` if they name a new primary."""
        with suppress(RedisConnectionError):
            found, followed = self._find(deadline), self._followed
            if followed is not None and found != followed:
                self._followed = None
                self.moved()

    def follow(self, connection: Any) -> None:
        """See ``ConnectionPool.follow``."""
        self._followed = connection.host, connection.port
        super().follow(connection)

    def check(self, timeout: float) -> list[Finding]:
        """Whether the sentinels can replace the primary."""
        return self._sentinels.check(timeout)

    def _find(self, deadline: float) -> Address:
        found = self._sentinels.primary(deadline)
        if self._pooled is None:
            self._pooled = found
        return found
