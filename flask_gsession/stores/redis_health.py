"""What the INFO of a Redis says about its fitness for sessions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .base import Finding

_OLDEST = (6, 2)
_SKEW = 1.0  # seconds


def checked(about: Mapping[str, Any], skew: float) -> list[Finding]:
    """The findings; ``skew``: how many seconds the server's clock is ahead of ours."""
    return list(_checked(about, skew))


def _checked(about: Mapping[str, Any], skew: float) -> Iterator[Finding]:
    version = str(about["redis_version"])
    old = tuple(int(part) for part in version.split(".")[:2]) < _OLDEST
    yield Finding(
        "error" if old else "ok", "server version", version, "6.2 is the oldest." if old else ""
    )
    policy, limit = about["maxmemory_policy"], about["maxmemory"]
    if policy == "noeviction":
        yield Finding("ok", "eviction", policy)
    else:
        yield Finding(
            "error" if limit else "warning",
            "eviction",
            f"{policy}, {'at ' + str(limit) + ' bytes' if limit else 'without a limit yet'}",
            "A full server ends sessions at random: set maxmemory-policy to noeviction.",
        )
    if about["role"] != "master":
        yield Finding("error", "role", about["role"], "It takes no writes: name the primary.")
    if about["rdb_last_bgsave_status"] != "ok":
        yield Finding(
            "error",
            "persistence",
            "the last snapshot failed",
            "Redis may refuse writes until one succeeds: look into its log and at its disk.",
        )
    elif not about["aof_enabled"]:
        yield Finding(
            "warning",
            "persistence",
            "no append-only file",
            "A crash logs out everybody since the last snapshot: appendonly yes prevents it.",
        )
    if abs(skew) > _SKEW:
        yield Finding(
            "error",
            "clock",
            f"the server's is {skew:+.1f} s from this machine's",
            "Sessions end early or late: let both follow a time server.",
        )
