"""The steps on a roster, one by one. How they play together: ``test_roster_model.py``."""

from __future__ import annotations

import pytest

from flask_gsession.users.roster import (
    CLOCK_SKEW,
    EMPTY,
    Device,
    Roster,
    Since,
    drop,
    enter,
    is_full,
    is_revoked_since,
    mark_ending,
    move,
    revoke_all,
    touch,
)

NOW = Since(epoch=0)


def device(name: str, **how: object) -> Device:
    return Device(
        **{"id": name, "key": f"{name}-1", "created": 10, "seen": 10, "expires": 99} | how
    )  # type: ignore[arg-type]


def roster(*names: str) -> Roster:
    return Roster(devices=tuple(map(device, names)))


def ids(of: Roster) -> list[str]:
    return [each.id for each in of.members]


def test_enter_appends_the_newest() -> None:
    entered = enter(roster("a"), device("b"), NOW, 1000, "oldest")
    assert (ids(entered.roster), entered.refused, entered.over) == (["a", "b"], "", 0)


def test_enter_beyond_the_cap_ends_the_oldest() -> None:
    entered = enter(roster("a", "b", "c"), device("d"), NOW, 2, "oldest")
    assert ids(entered.roster) == ["c", "d"]
    assert [each.id for each in entered.roster.ending] == ["a", "b"]
    assert entered.over == 2


def test_devices_that_are_ending_do_not_count() -> None:
    crowded = mark_ending(roster("a", "b"), {"a", "b"})
    entered = enter(crowded, device("c"), NOW, 1, "oldest")
    assert (ids(entered.roster), entered.over) == (["c"], 0)
    assert not is_full(crowded, 1, "refuse")


def test_a_full_roster_refuses_where_it_should() -> None:
    entered = enter(roster("a"), device("b"), NOW, 1, "refuse")
    assert entered.refused == "full"
    assert entered.roster == roster("a")


def test_entering_a_session_again_changes_nothing() -> None:
    again = enter(roster("a"), device("x", key="a-1"), Since(epoch=-1), 1, "refuse")
    assert (again.refused, again.roster) == ("", roster("a"))
    assert again.device == device("a")


@pytest.mark.parametrize("there", [mark_ending(roster("a"), {"a"}), roster("a")])
def test_a_key_that_is_ending_or_an_id_that_went_on_is_refused(there: Roster) -> None:
    entered = enter(there, device("a", key="a-1" if there.ending else "a-0"), NOW, 9, "oldest")
    assert entered.refused == "revoked"
    assert entered.roster == there


def test_a_sign_in_from_before_a_revocation_is_refused() -> None:
    revoked = revoke_all(roster("a"), now=5000, clock=7)
    assert [each.id for each in revoked.ending] == ["a"]
    assert enter(revoked, device("b"), NOW, 9, "oldest").refused == "revoked"
    assert enter(revoked, device("b"), Since(epoch=5000), 9, "oldest").refused == ""


@pytest.mark.parametrize(
    ("since", "revoked"),
    [
        (Since(began=5001, clock=7), False),
        (Since(began=5000, clock=7), True),
        (Since(began=5001 + CLOCK_SKEW, clock=8), False),
        (Since(began=5000 + CLOCK_SKEW, clock=8), True),
        (Since(began=0, clock=7), True),
    ],
)
def test_times_of_another_clock_are_judged_with_its_skew(since: Since, revoked: bool) -> None:
    assert is_revoked_since(revoke_all(EMPTY, now=5000, clock=7), since) is revoked
    assert not is_revoked_since(EMPTY, since)


def test_the_epoch_never_moves_back() -> None:
    once = revoke_all(EMPTY, now=5000, clock=1)
    assert revoke_all(once, now=4000, clock=1).epoch == 5001
    assert revoke_all(once, now=5000, clock=1).epoch == 5001


def test_revoking_the_others_keeps_one() -> None:
    revoked = revoke_all(roster("a", "b", "c"), now=5, clock=1, keep="b")
    assert ids(revoked) == ["b"]
    assert revoked.epoch == 5


@pytest.mark.parametrize(
    ("device_id", "replaces", "refused"),
    [
        ("a", {"a-1"}, ""),
        ("a", {"a-0", "a-1"}, ""),
        ("a", {"a-0"}, "revoked"),
        ("a", set(), "revoked"),
        ("b", {"b-1"}, "revoked"),
    ],
)
def test_a_rotation_moves_the_device(device_id: str, replaces: set[str], refused: str) -> None:
    moved = move(roster("a"), device_id, "a-2", replaces)
    assert moved.refused == refused
    assert moved.roster.devices[0].key == ("a-1" if refused else "a-2")


def test_a_rotation_of_an_ending_device_is_refused() -> None:
    assert move(mark_ending(roster("a"), {"a"}), "a", "a-2", {"a-1"}).refused == "revoked"


def test_a_touch_moves_times_forward_only() -> None:
    used = touch(roster("a"), "a", "a-1", (), seen=20, expires=120, network=b"\1\2\3").roster
    assert used.devices == (device("a", seen=20, expires=120, network=b"\1\2\3"),)
    again = touch(used, "a", "a-1", (), seen=15, expires=110, network=b"").roster
    assert again == used


def test_a_touch_heals_an_interrupted_rotation() -> None:
    used = touch(roster("a"), "a", "a-2", {"a-1"}, seen=20, expires=120, network=b"")
    assert (used.refused, used.roster.devices[0].key) == ("", "a-2")
    assert touch(roster("a"), "a", "a-3", {"a-2"}, seen=2, expires=2, network=b"").refused


def test_drop_goes_by_the_key() -> None:
    assert ids(drop(roster("a", "b"), {"a-1", "b-0"})) == ["b"]
    same = roster("a")
    assert drop(same, {"b-1"}) is same


def test_expired_devices_are_left_out() -> None:
    there = Roster(devices=(device("a", expires=50), device("b", expires=51)))
    assert ids(there.without_expired(50_000)) == ["b"]
    assert there.without_expired(49_999) is there
