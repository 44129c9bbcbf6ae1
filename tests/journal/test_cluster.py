"""The journal in a Redis Cluster, where a write and its entries are in other slots."""

import json

import pytest
from redis.cluster import RedisCluster as Client

from flask_gsession.testing import FakeClock, a_pointer, a_record
from flask_gsession.testing.contract.journals import entries_of
from tests.harness.topologies import RedisCluster
from tests.journal.test_killed import journaling, opened

pytest_plugins = ["tests.harness.topologies"]


@pytest.mark.parametrize("by_version", [False, True])
def test_a_rotation_that_is_entered_again_has_one_id(
    redis_cluster: RedisCluster, store_prefix: str, clock: FakeClock, by_version: bool
) -> None:
    store = opened(redis_cluster.url, store_prefix, clock)
    journaled, record, new = journaling(store, clock), a_record(clock), a_record(clock)
    journaled.create(record)
    journaled.replace(record.key, new, record.version, a_pointer(record, new))
    journaled.load(record.key)  # as a request with the old token, while the new one is on its way
    journaled.delete(new.key, new.version if by_version else None)
    assert store.journal is not None
    _, _, *found = map(json.loads, entries_of(store.journal))
    once = {entry["id"]: entry for entry in found}
    assert [entry["kind"] for entry in once.values()] == ["rotated", "bound", "ended"]
    assert len(found) == 4
    assert [entry["owner"] for entry in found] == ["ada"] * len(found)


def test_junk_of_another_type_stops_no_sweep(
    redis_cluster: RedisCluster, store_prefix: str, clock: FakeClock
) -> None:
    store = opened(redis_cluster.url, store_prefix, clock)
    journaled, record, other = journaling(store, clock), a_record(clock), a_record(clock)
    journaled.create(record)
    journaled.create(other)
    name = f"{store_prefix}{{{record.key}}}"
    node = redis_cluster.url.split("://")[1].split(",")[0]
    with Client.from_url(f"redis://{node}") as client:
        client.delete(name)
        client.rpush(name, "x")
    clock.advance(61)
    assert journaled.sweep() == 2
    assert not journaled.sweep()
