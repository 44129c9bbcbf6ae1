"""A user's roster: which sessions are bound to the user, and which of them are about to end.

The roster is a record of its own. Everything here is pure: a step takes a roster and returns the
next one, which is stored with a compare-and-set. The protocol around the steps is explored by
``tests/simulation/roster_model.py``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

#: The most devices of a user where ``SESSION_MAX_PER_USER`` sets no lower limit.
MOST_DEVICES = 1000
#: How far the clocks of two servers may differ, in milliseconds.
CLOCK_SKEW = 5000

Policy = Literal["oldest", "refuse"]


class Device(Struct, frozen=True):
    """One session of a user, through all its rotations: a browser, or another client.

    ``key`` is the session's. Times are in seconds since 1970. ``expires`` is never before the
    session's own end. An ``ending`` device is being revoked: its session is deleted next.
    """

    id: str
    key: str
    created: int
    seen: int
    expires: int
    label: str = ""
    network: bytes = b""
    tags: tuple[str, ...] = ()
    remembered: bool = False
    ending: bool = False


class Roster(Struct, frozen=True):
    """The devices of a user, the oldest first.

    ``epoch`` is the time of the last revocation of all, or all other, sessions: milliseconds since
    1970, by the clock ``clock``; 0 if there was none. It never moves back.
    """

    epoch: int = 0
    clock: int = 0
    devices: tuple[Device, ...] = ()

    def by_id(self, device_id: str) -> Device | None:
        return next((device for device in self.devices if device.id == device_id), None)

    @property
    def members(self) -> tuple[Device, ...]:
        """The devices that are not about to end."""
        return tuple(device for device in self.devices if not device.ending)

    @property
    def ending(self) -> tuple[Device, ...]:
        """The devices whose revocation isn't finished."""
        return tuple(device for device in self.devices if device.ending)

    def without_expired(self, now: int) -> Roster:
        """Without the devices whose session has expired at ``now``, in milliseconds."""
        if all(now < device.expires * 1000 for device in self.devices):
            return self
        left = tuple(device for device in self.devices if now < device.expires * 1000)
        return replace(self, devices=left)


EMPTY = Roster()


class Since(NamedTuple):
    """What is known of the time at which a sign-in began.

    ``epoch``: the roster's at that time, if it was looked at. Otherwise the sign-in began at
    ``began``, in milliseconds by the clock ``clock``.
    """

    epoch: int | None = None
    began: int = 0
    clock: int = 0


def is_revoked_since(roster: Roster, since: Since) -> bool:
    """Whether the user's sessions were revoked after that time, or perhaps were."""
    if since.epoch is not None:
        return roster.epoch != since.epoch
    skew = 0 if since.clock == roster.clock else CLOCK_SKEW
    return roster.epoch > 0 and roster.epoch + skew >= since.began


class Entered(NamedTuple):
    """The result of a step that lets a session in.

    ``refused``: why not; empty if it is a member now. ``over``: how many devices were marked as
    ending because there were too many. ``device``: as it is in the roster then.
    """

    roster: Roster
    refused: Literal["", "revoked", "full"] = ""
    over: int = 0
    device: Device | None = None


def is_full(roster: Roster, cap: int, policy: Policy) -> bool:
    """Whether one more device would be refused."""
    return policy == "refuse" and len(roster.members) >= cap


def enter(roster: Roster, device: Device, since: Since, cap: int, policy: Policy) -> Entered:
    """A session was bound to the user. Beyond ``cap`` the oldest devices are marked as ending.

    Entering a session again changes nothing.
    """
    for there in roster.devices:
        if there.key == device.key and not there.ending:
            return Entered(roster, device=there)
        if there.key == device.key or there.id == device.id:
            return Entered(roster, "revoked")
    if is_revoked_since(roster, since):
        return Entered(roster, "revoked")
    if is_full(roster, cap, policy):
        return Entered(roster, "full")
    members = roster.members
    oldest = sorted(members, key=lambda member: member.created)
    over = {each.id for each in oldest[: max(len(members) + 1 - cap, 0)]}
    devices = mark_ending(roster, over).devices
    return Entered(replace(roster, devices=(*devices, device)), over=len(over), device=device)


def move(roster: Roster, device_id: str, key: str, replaces: Collection[str]) -> Entered:
    """The session was rotated to ``key``. Refused unless one of the keys before is a member."""
    there = roster.by_id(device_id)
    if there is None or there.ending or there.key not in {key, *replaces}:
        return Entered(roster, "revoked")
    return Entered(_with(roster, replace(there, key=key)))


def touch(
    roster: Roster,
    device_id: str,
    key: str,
    before: Collection[str],
    *,
    seen: int,
    expires: int,
    network: bytes,
) -> Entered:
    """The session is in use. Refused unless it is a member, or was rotated from one.

    In the latter case (one of the keys ``before`` is the member's), it takes that one's place.
    """
    moved = move(roster, device_id, key, before)
    there = moved.roster.by_id(device_id)
    if moved.refused or there is None:
        return moved
    used = replace(
        there,
        seen=max(there.seen, seen),
        expires=max(there.expires, expires),
        network=network or there.network,
    )
    return Entered(_with(moved.roster, used))


def mark_ending(roster: Roster, device_ids: Collection[str]) -> Roster:
    """These devices are to end. Their sessions are deleted next, then they are dropped."""
    devices = (
        replace(device, ending=True) if device.id in device_ids else device
        for device in roster.devices
    )
    return replace(roster, devices=tuple(devices))


def revoke_all(roster: Roster, now: int, clock: int, keep: str | None = None) -> Roster:
    """All devices are to end, but for ``keep``; so are sign-ins that are under way."""
    others = {device.id for device in roster.devices if device.id != keep}
    ending = mark_ending(roster, others)
    return replace(ending, epoch=max(now, roster.epoch + 1), clock=clock)


def drop(roster: Roster, keys: Collection[str]) -> Roster:
    """The sessions under these keys have ended."""
    left = tuple(device for device in roster.devices if device.key not in keys)
    return roster if len(left) == len(roster.devices) else replace(roster, devices=left)


def _with(roster: Roster, changed: Device) -> Roster:
    devices = tuple(changed if each.id == changed.id else each for each in roster.devices)
    return roster if devices == roster.devices else replace(roster, devices=devices)
