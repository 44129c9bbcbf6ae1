"""G12 in real processes: nothing is served the bound or longer after its end was acknowledged.

`FRESHNESS_WRITES=100000 FRESHNESS_WORKERS=8` makes the first test a long one: `make soak`.
"""

from __future__ import annotations

import os
import time
from typing import Any

from redis import Redis

from flask_gsession.stores.wrappers.near_cache import NearCache
from tests.harness.freshness import BOUND, Race
from tests.harness.servers import RedisServer
from tests.harness.topologies import RedisCluster, RedisSentinels, TCPProxy

pytest_plugins = ["tests.harness.topologies"]

WRITES = int(os.environ.get("FRESHNESS_WRITES", "600"))
WORKERS = int(os.environ.get("FRESHNESS_WORKERS", "3"))


def without_bound(cache: NearCache) -> None:
    """Serves cached records without any proof."""
    cache.bound = float("inf")


def without_position(cache: NearCache) -> None:
    """Keeps a record although it changed while it was loaded."""
    kept: Any = cache._kept
    enter = kept.enter
    kept.enter = lambda record, feed, mark: enter(record, feed, kept.mark(record.key))


def test_writes_and_revocations(redis_url: str, store_prefix: str) -> None:
    with Race(redis_url, store_prefix, workers=WORKERS) as race:
        for _ in range(5):
            race.write(WRITES // 5)
        race.wait_for_hits(1)
    assert race.worst < BOUND
    print(f"{WRITES} writes, {race.hits} hits: worst {race.worst:.4f} s of {BOUND} s")


def test_without_the_check_of_the_position_it_fails(redis_url: str, store_prefix: str) -> None:
    with Race(redis_url, store_prefix, broken=without_position) as race:
        for _ in range(20):
            race.write(100)
            if race.worst >= BOUND:
                break
    assert race.worst >= BOUND


def delayed(url: str, prefix: str, port: int, **options: Any) -> float:
    """How old a record is that a worker serves whose server's answers and reports come late."""
    with TCPProxy(port) as proxy:
        late = f"redis://127.0.0.1:{proxy.port}"
        with Race(late, prefix, writes_to=url, workers=2, **options) as race:
            with proxy.delay(3 * BOUND):
                race.write(50)
                race.rest()
            race.write(50)
            with proxy.drip(5, 0.01):
                race.write(50)
        return race.worst


def test_reports_that_come_late(own_redis: RedisServer, store_prefix: str) -> None:
    assert delayed(own_redis.url, store_prefix, own_redis.port) < BOUND


def test_without_the_check_of_the_bound_it_fails(own_redis: RedisServer, store_prefix: str) -> None:
    worst = delayed(own_redis.url, store_prefix, own_redis.port, broken=without_bound)
    assert worst >= BOUND


def test_connections_that_break(own_redis: RedisServer, store_prefix: str) -> None:
    with TCPProxy(own_redis.port) as proxy:
        late = f"redis://127.0.0.1:{proxy.port}"
        with Race(late, store_prefix, writes_to=own_redis.url, workers=2) as race:
            for _ in range(3):
                proxy.disconnect()
                race.write(50)
            with proxy.cut(0):  # no answer arrives
                race.write(50)
            race.wait_for_hits(20)
            with proxy.blackhole():
                race.write(50)
            race.wait_for_hits(20)
    assert race.worst < BOUND


def test_servers_and_workers_that_stand_still(own_redis: RedisServer, store_prefix: str) -> None:
    with Race(own_redis.url, store_prefix, workers=2) as race:
        with own_redis.paused():
            time.sleep(2 * BOUND)
        race.write(50)
        with race.stopped():
            race.write(50)
        race.wait_for_hits(20)
    assert race.worst < BOUND


def test_a_flush(own_redis: RedisServer, store_prefix: str) -> None:
    with Race(own_redis.url, store_prefix, workers=2) as race:
        with Redis.from_url(own_redis.url) as client:
            client.flushall()
        race.flushed()
        race.wait_for_hits(20)
    assert race.worst < BOUND


def test_forks(redis_url: str, store_prefix: str) -> None:
    with Race(redis_url, store_prefix, workers=2, forks=True) as race:
        race.write(100)
        race.wait_for_hits(20)
        race.write(100)
    assert race.worst < BOUND


def test_a_failover_by_sentinels(redis_sentinels: RedisSentinels, store_prefix: str) -> None:
    with Race(redis_sentinels.url, store_prefix, workers=2) as race:
        race.write(50)
        old = redis_sentinels.kill_primary()
        redis_sentinels.wait_for_failover(old)
        race.write(50)
        race.wait_for_hits(20)
        race.write(50)
    redis_sentinels.start()
    assert race.worst < BOUND


def test_a_failover_and_moving_slots_in_a_cluster(
    redis_cluster: RedisCluster, store_prefix: str
) -> None:
    with Race(redis_cluster.url, store_prefix, workers=2) as race:
        moving, taken = race.slots()[:2]
        with redis_cluster.migrating(moving):
            race.write(50)
        race.write(50)
        redis_cluster.wait_for_failover(redis_cluster.failover(taken))
        race.write(50)
        race.wait_for_hits(20)
    redis_cluster.start()
    assert race.worst < BOUND
