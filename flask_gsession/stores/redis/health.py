"""Doctor checks for Redis: whether its version and settings suit sessions."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import redis
from redis.connection import UnixDomainSocketConnection
from redis.exceptions import RedisError, ResponseError

from ...errors import StoreUnavailable
from ..exposure import exposure_of, known_faults, unchecked
from ..interrupts import reraise_interruption
from ..parts import Checks, Finding
from .commands import Commands, packed
from .servers import PrimaryPool, ask_once

_OLDEST = (6, 2)
# The first releases with the fix of CVE-2025-49844. Redis 7.0 has none.
_FIXED_REDIS = {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2}
_FIXED_VALKEY = {(7, 2): 11, (8, 0): 6, (8, 1): 4}
_SKEW = 1.0  # seconds
_LAG = 5  # seconds since a replica last reported, which it does once a second
_FULL = 0.9  # of maxmemory

About = Mapping[str, str]


class RedisChecks(Checks):
    """The part ``checks`` of a Redis store. ``logout_replicas``: how many must confirm a logout."""

    def __init__(self, commands: Commands, logout_replicas: int) -> None:
        self._commands = commands
        self._logout_replicas = logout_replicas

    def check(self) -> list[Finding]:
        nodes = self._commands.servers()
        findings = []
        for name, address in nodes.items():
            for finding in self._check_at(name):
                where = f"{address}: " if len(nodes) > 1 else ""
                findings.append(finding._replace(found=where + finding.found))
        findings += self._exposures()
        if isinstance(self._commands.pool, PrimaryPool):
            findings += self._commands.pool.check(self._commands.timeout)
        return findings

    def _exposures(self) -> list[Finding]:
        """Whether strangers can connect or listen in; each finding once."""
        commands = self._commands
        found = [
            finding
            for node in commands.nodes(commands.deadline())
            for finding in _exposure_of(node.pool.make, commands.timeout)
        ]
        return list(dict.fromkeys(found))

    def _check_at(self, name: bytes) -> list[Finding]:
        commands = self._commands

        def ask(*words: bytes) -> Any:
            """The answer; None if the server refuses the command."""
            try:
                return commands.ask(commands.deadline(), name, packed(*words))
            except StoreUnavailable as error:
                if isinstance(error.__cause__, ResponseError):
                    return None
                raise

        info = ask(b"INFO", b"everything")
        if info is None:
            return [
                Finding(
                    "warning",
                    "server",
                    "it refuses INFO, or this user may not call it",
                    "Its eviction policy, persistence and replicas couldn't be checked.",
                )
            ]
        now = ask(b"TIME")
        skew = None if now is None else int(now[0]) + int(now[1]) / 1e6 - commands.clock()
        return checked(parsed(info), skew, self._logout_replicas)


def _exposure_of(make: Callable[[], Any], timeout: float) -> Iterator[Finding]:
    """The findings on the password and on TLS of the server that ``make`` connects to."""
    stranger = make()
    stranger.username = stranger.password = stranger.credential_provider = None
    try:
        ask_once(lambda: stranger, packed(b"PING"), time.monotonic() + timeout)
        is_open = True
    except (RedisError, OSError) as error:  # most likely NOAUTH, of whatever was sent first
        reraise_interruption(error)
        is_open = False
    if isinstance(stranger, UnixDomainSocketConnection):
        yield from exposure_of(is_open, tls=None, host="")
    else:
        is_tls = isinstance(stranger, redis.SSLConnection)
        yield from exposure_of(is_open, tls=is_tls, host=stranger.host)
        if is_tls and stranger.cert_reqs == ssl.CERT_NONE:
            yield unchecked("ssl_cert_reqs=none")


def parsed(info: bytes) -> dict[str, str]:
    """Parse the reply to INFO."""
    lines = info.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def checked(about: About, skew: float | None, logout_replicas: int) -> list[Finding]:
    """The findings of one server.

    ``skew``: the seconds that its clock is ahead of ours, or None if unknown.
    ``logout_replicas``: the number of replicas that must confirm a logout.
    """
    return [
        _version(about),
        *_known_faults(about),
        *_memory(about),
        *_persistence(about),
        *_replicas(about, logout_replicas),
        *_clock(skew),
    ]


def _version(about: About) -> Finding:
    version = about.get("redis_version", "")
    numbers = version.split(".")[:2]
    if len(numbers) < 2 or not all(map(str.isdecimal, numbers)):
        return Finding("warning", "server version", "unknown", "6.2 or newer is required.")
    if tuple(map(int, numbers)) < _OLDEST:
        return Finding("error", "server version", version, "6.2 or newer is required.")
    return Finding("ok", "server version", version)


def _known_faults(about: About) -> Iterator[Finding]:
    is_valkey = about.get("server_name") == "valkey"
    version = about.get("valkey_version" if is_valkey else "redis_version", "")
    yield from known_faults(
        version,
        _FIXED_VALKEY if is_valkey else _FIXED_REDIS,
        "CVE-2025-49844: anyone who may run scripts can run any code on the server",
    )


def _memory(about: About) -> Iterator[Finding]:
    policy = about.get("maxmemory_policy")
    used, limit = (int(about.get(name, 0)) for name in ("used_memory", "maxmemory"))
    if policy is None:
        yield Finding("warning", "eviction", "unknown", "It must be noeviction.")
    elif policy == "noeviction":
        yield Finding("ok", "eviction", policy)
    else:
        yield Finding(
            "error" if limit else "warning",
            "eviction",
            f"{policy}, {f'at {limit} bytes' if limit else 'without a limit yet'}",
            "A full server ends sessions at random: set maxmemory-policy to noeviction.",
        )
    if limit and used > _FULL * limit:
        yield Finding(
            "error",
            "memory",
            f"{used / limit:.0%} of {limit} bytes",
            "A full server refuses writes, or drops sessions: raise maxmemory.",
        )


def _persistence(about: About) -> Iterator[Finding]:
    if about.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding(
            "error",
            "persistence",
            "the last snapshot failed",
            "Redis may refuse writes until a snapshot succeeds: check its log and its disk.",
        )
    elif about.get("aof_last_write_status", "ok") != "ok":
        yield Finding(
            "error",
            "persistence",
            "the append-only file cannot be written",
            "Redis refuses writes until it can: check its log and its disk.",
        )
    elif about.get("aof_enabled") == "1":
        yield Finding("ok", "persistence", "append-only file")
    else:
        yield Finding(
            "warning",
            "persistence",
            "no append-only file",
            "A crash logs out everybody who signed in after the last snapshot, if there is one: "
            "set appendonly yes.",
        )


def _replicas(about: About, logout_replicas: int) -> Iterator[Finding]:
    role = about.get("role", "master")
    if role != "master":
        yield Finding("error", "role", role, "It accepts no writes: name the primary.")
        return
    count = int(about.get("connected_slaves", 0))
    if count < logout_replicas:
        yield Finding(
            "error",
            "replicas",
            f"{count}, and SESSION_LOGOUT_REPLICAS is {logout_replicas}",
            "No logout is confirmed: bring the replicas back, or lower the setting.",
        )
    elif not count:
        yield Finding(
            "warning",
            "replicas",
            "none: a single server",
            "While it is down nobody has a session: run replicas, and sentinels or a cluster.",
        )
    for number in range(count):
        yield _replica(about, about.get(f"slave{number}", ""))


def _replica(about: About, line: str) -> Finding:
    fields = dict(part.split("=", 1) for part in line.split(",") if "=" in part)
    state, lag = fields.get("state", "unknown"), int(fields.get("lag", 0))
    behind = int(about.get("master_repl_offset", 0)) - int(fields.get("offset", 0))
    where = f"{fields.get('ip')}:{fields.get('port')}"
    found = f"{where} {state}, {behind} bytes behind, last heard from {lag} s ago"
    if state == "online" and lag <= _LAG:
        return Finding("ok", "replica", found)
    return Finding(
        "warning",
        "replica",
        found,
        "A failover to it would bring back ended sessions and lose new ones: check it.",
    )


def _clock(skew: float | None) -> Iterator[Finding]:
    if skew is None:
        yield Finding(
            "warning", "clock", "this user may not call TIME", "A wrong clock goes unnoticed."
        )
        return
    found = f"the server's is {round(skew, 1) + 0:+.1f} s from this machine's"  # no -0.0
    if abs(skew) > _SKEW:
        yield Finding(
            "error",
            "clock",
            found,
            "Sessions end early or late: synchronise both clocks with a time server.",
        )
    else:
        yield Finding("ok", "clock", found)
