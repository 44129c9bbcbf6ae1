"""G11 where servers fail over and slots move, and where a worker is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from redis.cluster import key_slot

from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.testing import FakeClock, HookedStore
from flask_gsession.users.rosters import roster_key
from tests.harness.apps import PATIENCE, InsideRedis, SiteMaker
from tests.harness.topologies import HOST, RedisCluster, RedisMember, until

from .test_devices import device_id, ids, owner, signed_in
from .test_every_step import OPERATIONS, Case, at_call

pytest_plugins = ["tests.harness.topologies"]

# Failover ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[RedisMember, RedisMember]]:
    """A primary, and a replica to promote."""
    primary, replica = RedisMember(), RedisMember()
    primary.start()
    replica.start()
    yield primary, replica
    replica.stop()
    primary.stop()


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_failover_that_lost_the_delete(
    pair: tuple[RedisMember, RedisMember], confirmed: bool, store_prefix: str, clock: FakeClock
) -> None:
    """The session ends at its next touch; with SESSION_LOGOUT_REPLICAS, it isn't lost."""
    primary, replica = pair
    replica.command("REPLICAOF", HOST, primary.port)
    until(lambda: replica.replicates(primary), "the replica")
    options = StoreOptions(
        prefix=store_prefix, clock=clock, timeout=PATIENCE, logout_replicas=int(confirmed)
    )
    store = HookedStore(open_store(primary.url, options)[0])
    there = InsideRedis(replica.url, store_prefix)

    def promote() -> None:
        replica.command("REPLICAOF", "NO", "ONE")

    def lose_what_follows() -> None:
        until(lambda: there.stored() == before.stored(), "the replica knowing of the mark")
        promote()

    with (
        SiteMaker(primary.url, store_prefix, clock) as make_before,
        SiteMaker(replica.url, store_prefix, clock) as make_after,
    ):
        before = make_before(store=store)
        visitor, other = signed_in(before), signed_in(before)
        device, kept = device_id(visitor), device_id(other)
        if not confirmed:
            store.before("delete", lose_what_follows)
        with before.app.app_context():
            assert before.ext.users.revoke("ada", device)
        if confirmed:
            promote()
        assert owner(visitor) is None, "acknowledged"
        after = make_after()
        back = after.visitor(visitor.cookie)
        assert owner(back) == (None if confirmed else "ada")
        assert ids(after) == [kept], "although the server does not know that it ended"
        clock.advance(301)
        back.run(dict)
        assert owner(back) is None
        assert owner(after.visitor(other.cookie)) == "ada"
        assert len(after.sessions()) == 1
    there.close()


# A cluster ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["roster", "session"])
def test_revoking_while_a_slot_moves(
    redis_cluster: RedisCluster, whose: str, store_prefix: str, clock: FakeClock
) -> None:
    options = StoreOptions(prefix=store_prefix, clock=clock, timeout=PATIENCE)
    store = HookedStore(open_store(redis_cluster.url, options)[0])
    with SiteMaker(redis_cluster.primary().url, store_prefix, clock) as make_site:
        site = make_site(store=store)
        visitors = [signed_in(site) for _ in range(3)]
        key = visitors[0].run(lambda session: session.handle)
        if whose == "roster":
            key = roster_key("ada")
        with redis_cluster.migrating(key_slot(f"{store_prefix}{{{key}}}".encode())):
            late = signed_in(site)
            with site.app.app_context():
                assert site.ext.users.revoke_all("ada") == 4
            assert {owner(visitor) for visitor in (*visitors, late)} == {None}
            again = signed_in(site)
        assert {owner(visitor) for visitor in (*visitors, late)} == {None}
        assert ids(site) == [device_id(again)]


# A worker that is killed -------------------------------------------------------------------------


def exit_status(work: Callable[[], object]) -> int:
    """The exit status of a process that does this work."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("store_url", "operation"),
    [
        *(("sqlite", name) for name in ("sign_in", "rotate_at_once", "revoke_all")),
        *(("redis", name) for name in ("sign_in", "revoke_all")),
        ("mongodb", "revoke_all"),
    ],
    indirect=["store_url"],
)
def test_a_worker_is_killed_after_each_step(make_site: SiteMaker, operation: str) -> None:
    """Another worker finishes what it left, and serves no session that is not listed."""
    number = 0
    while True:
        number += 1
        case = Case(make_site)

        def work(case: Case = case, number: int = number) -> None:
            with at_call(case.site, number, "after", kill_this_process):
                OPERATIONS[operation](case)

        if exit_status(work) == 0:
            break  # there were fewer steps
        case.check(crashed=True)
    assert number > 4
