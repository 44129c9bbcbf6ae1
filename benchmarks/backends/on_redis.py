"""Redis: ours, Flask-Session's and the bare redis-py client on one server."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from importlib.resources import files
from itertools import count
from struct import pack
from time import time
from typing import Any

import redis
from flask import Flask
from flask_session import Session as FlaskSession  # type: ignore[import-untyped]
from redis.client import Monitor

from benchmarks.backends.base import Traffic
from benchmarks.measure import Call
from flask_gsession import Session


class RedisBackend:
    """Two fresh key prefixes on the server: one for ours, one for Flask-Session."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = redis.Redis.from_url(url)
        self._opened = ExitStack()
        self.place = f"bench-{secrets.token_hex(4)}:"
        self.our_prefix = f"{self.place}ours:"
        self.their_prefix = f"{self.place}theirs:"

    def flask_session(self, app: Flask) -> None:
        app.config.update(
            SESSION_TYPE="redis",
            SESSION_REDIS=redis.Redis.from_url(self.url),
            SESSION_KEY_PREFIX=self.their_prefix,
        )
        FlaskSession(app)

    def ours(self, app: Flask) -> None:
        session = Session(
            app, store=self.url, key_prefix=self.our_prefix, newcomers_per_minute=None
        )
        self._opened.callback(session.close, app)

    def floor(self) -> BareRedis:
        # Large values have keys of their own beside the record.
        (key,) = self.client.scan_iter(f"{self.our_prefix}{{*", count=1_000)
        return BareRedis(self.client, key, self.place)

    def traffic(self, call: Call, times: int) -> Traffic:
        idle = self._statistics()
        before = self._statistics()
        for _ in range(times):
            call()
        after = self._statistics()
        # Two queries in a row show the cost of the query itself.
        spent = {
            name: (after[name] - before.get(name, 0) - (before.get(name, 0) - idle.get(name, 0)))
            / times
            for name in after
        }
        received, sent = spent.pop("received"), spent.pop("sent")
        return Traffic(
            round_trips=self._round_trips(call, times),
            commands={name: n for name, n in spent.items() if n and name != "info"},
            received=received,
            sent=sent,
        )

    def versions(self) -> dict[str, str]:
        return {"Redis": self.client.info("server")["redis_version"], "redis-py": redis.__version__}

    def close(self) -> None:
        self._opened.close()
        delete_prefix(self.client, self.place)
        self.client.close()

    def _statistics(self) -> dict[str, int]:
        """Calls per command and bytes, since the server started."""
        commands = self.client.info("commandstats")
        stats = self.client.info("stats")
        return {
            **{name.removeprefix("cmdstat_"): row["calls"] for name, row in commands.items()},
            "received": stats["total_net_input_bytes"],
            "sent": stats["total_net_output_bytes"],
        }

    def _round_trips(self, call: Call, times: int) -> float:
        """Commands sent by clients. MONITOR marks the ones that ran inside a script."""
        begin, end = secrets.token_hex(8), secrets.token_hex(8)
        sent = 0
        with Monitor(self.client.connection_pool) as monitor:  # type: ignore[no-untyped-call]
            # The first ECHO also opens the connection of the second: no greeting is counted.
            self.client.echo(begin)
            for _ in range(times):
                call()
            self.client.echo(end)
            counting = False
            while end not in (line := _text(monitor.connection.read_response())):
                sent += counting and " lua] " not in line[:80]
                counting = counting or begin in line
        return sent / times


class BareRedis:
    """GET, and the script that a save runs, on a copy of one of our records."""

    LIFE = 7_200_000  # milliseconds

    def __init__(self, client: Any, key: bytes, place: str) -> None:
        self._client = client
        self._key = f"{place}floor:{'k' * 43}"
        self._fresh = count(1)
        source = files("flask_gsession.stores.redis").joinpath("save.lua").read_text()
        self._script = client.script_load(source)
        client.set(self._key, client.get(key), px=self.LIFE)

    def read(self) -> object:
        return self._client.get(self._key)

    def write(self) -> object:
        record = self._client.get(self._key)
        version = next(self._fresh).to_bytes(8, "big")
        # A record begins with one byte of kind and eight of version.
        condition = record[1:9] + pack(">QQ?", int(time() * 1000), self.LIFE, True)
        value = record[:1] + version + record[9:]
        reply = self._client.evalsha(self._script, 1, self._key, condition, value)
        if reply != b"K" + version:
            raise RuntimeError(f"the bare script answered {reply!r}")
        return None


def delete_prefix(client: Any, prefix: str) -> None:
    """Deletes every key under `prefix`, and nothing else: the server may be somebody's own."""
    batch: list[bytes] = []
    for key in client.scan_iter(f"{prefix}*", count=10_000):
        batch.append(key)
        if len(batch) == 10_000:
            client.unlink(*batch)
            batch.clear()
    if batch:
        client.unlink(*batch)


def _text(line: Any) -> str:
    return line.decode("utf-8", "replace") if isinstance(line, bytes) else str(line)
