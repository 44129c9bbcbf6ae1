"""Many sign-ins of one user at once, and many devices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from flask_gsession.tokens import new_token, session_key
from flask_gsession.users.format import pack
from flask_gsession.users.roster import Device, Roster
from flask_gsession.users.rosters import new_device_id, roster_key
from tests.harness.apps import Site, SiteMaker, Visitor

from .test_devices import device_id, ids, owner, signed_in


def sign_in_at_once(site: Site, number: int, threads: int) -> list[Visitor]:
    visitors = [site.visitor() for _ in range(number)]
    with ThreadPoolExecutor(threads) as pool:
        statuses = list(
            pool.map(
                lambda visitor: visitor.ask(lambda session: session.bind("ada")).status_code,
                visitors,
            )
        )
    assert set(statuses) <= {200, 409}, statuses
    return visitors


def test_fifty_sign_ins_with_a_cap_of_three_leave_three(make_site: SiteMaker) -> None:
    site = make_site(max_per_user=3)
    visitors = sign_in_at_once(site, 50, 25)
    assert [owner(visitor) for visitor in visitors].count("ada") == 3
    assert len(ids(site)) == 3
    assert len(site.sessions()) == 3


def test_sign_ins_at_once_are_refused_exactly(make_site: SiteMaker) -> None:
    site = make_site(max_per_user=3, max_policy="refuse")
    visitors = sign_in_at_once(site, 20, 20)
    assert [owner(visitor) for visitor in visitors].count("ada") == 3
    assert len(ids(site)) == len(site.sessions()) == 3


def test_many_sign_ins_at_once_are_all_served(site: Site) -> None:
    number = 80 if site.url.startswith("mongodb") else 200  # its races are slow
    visitors = sign_in_at_once(site, number, 100)
    assert len(ids(site)) == number
    with site.app.app_context():
        assert site.ext.users.revoke_all("ada") == number
    assert {owner(visitor) for visitor in visitors} == {None}
    assert site.sessions() == {}


def filled(site: Site, number: int, label: str = "") -> None:
    """A roster with this many devices of before."""
    rosters = site.app.extensions["gsession"][site.ext].repository.rosters
    now = int(site.clock())
    devices = tuple(
        Device(new_device_id(), session_key(new_token()), now, now, now + 7200, label)
        for _ in range(number)
    )
    rosters.change("ada", lambda _: (Roster(devices=devices), None))


def test_a_thousand_devices(site: Site) -> None:
    filled(site, 999)
    visitor = signed_in(site)
    with site.app.app_context():
        with site.counted() as count:
            devices = site.ext.users.devices("ada")
        assert (len(devices), count.calls) == (1000, ["load"])
        again = signed_in(site)
        assert len(site.ext.users.devices("ada")) == 1000, "the oldest ended"
        assert site.ext.users.revoke("ada", device_id(visitor)) is True
        assert (owner(visitor), owner(again)) == (None, "ada")
        with site.counted() as count:
            assert site.ext.users.revoke_all("ada") == 999
        assert len([call for call in count.calls if call != "delete"]) <= 4
    assert owner(again) is None


@pytest.mark.parametrize("store_url", ["redis"], indirect=True)
def test_the_size_of_a_bound_session_in_redis(site: Site, redis_client: Redis) -> None:
    def used(key: str) -> int:
        return int(redis_client.memory_usage(f"{site.prefix}{{{key}}}") or 0)

    def size(visitor: Visitor) -> int:
        return used(visitor.run(lambda session: session.handle))

    anonymous = site.visitor()
    anonymous.run(lambda session: session.update(cart=["mug"] * 10))
    visitors = []
    label = "Firefox on Windows 1"
    for _ in range(100):
        visitor = site.visitor()
        visitor.run(lambda session: session.update(cart=["mug"] * 10))
        visitor.run(lambda session: session.bind("user-1234567", label=label))
        visitors.append(visitor)
    roster = used(roster_key("user-1234567"))
    sessions = sum(size(visitor) - size(anonymous) for visitor in visitors)
    print(roster, sessions)
    assert (roster + sessions - 300) / 100 <= 160
    lone = site.visitor()
    lone.run(lambda session: session.update(cart=["mug"] * 10))
    lone.run(lambda session: session.bind("lone", label=label))
    print(used(roster_key("lone")), size(lone) - size(anonymous))
    assert used(roster_key("lone")) + size(lone) - size(anonymous) <= 300 + 160
    lone.run(lambda session: session.rotate())
    assert used(roster_key("lone")) + size(lone) - size(anonymous) <= 300 + 160


def test_a_device_takes_few_bytes() -> None:
    device = Device(new_device_id(), session_key(new_token()), 1_800_000_000, 1_800_000_300,
                    1_800_090_000, "Firefox on Windows 1", b"\1\2\3")  # fmt: skip
    one, two = (len(pack(Roster(1_800_000_000_000, 1, (device,) * n))) for n in (1, 2))
    assert two - one <= 90
