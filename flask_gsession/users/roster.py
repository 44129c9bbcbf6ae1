"""A user's roster: the sessions bound to the user, and which of them are about to end.

The roster is a separate record. All functions here are pure: a step takes a roster and returns the
next one, which is stored with a compare-and-set. ``tests/simulation/roster_model.py`` explores the
protocol around the steps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

#: The limit of devices for each user, unless ``SESSION_MAX_PER_USER`` sets a lower one.
MOST_DEVICES = 1000
#: How far the clocks of two servers may differ, in milliseconds.
CLOCK_SKEW = 5000

Policy = Literal["oldest", "refuse"]


class Device(Struct, frozen=True):
    """One session of a user, through all its rotations: a browser, or another client.

    ``key`` is the session's key. Times are in seconds since 1970. ``expires`` is never before the
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

    def __repr__(self) -> str:
        """Without the person's network and labels."""
        return f"<Device {self.id!r}>"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("id", self.id)]


class Roster(Struct, frozen=True):
    """A user's devices, oldest first.

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
        """The devices that aren't ending."""
        return tuple(device for device in self.devices if not device.ending)

    @property
    def ending(self) -> tuple[Device, ...]:
        """The devices whose revocation isn't finished."""
        return tuple(device for device in self.devices if device.ending)

    def without_expired(self, now: int) -> Roster:
        """The roster without devices whose sessions have expired at ``now``, in milliseconds."""
        if all(now < device.expires * 1000 for device in self.devices):
            return self
        left = tuple(device for device in self.devices if now < device.expires * 1000)
        return replace(self, devices=left)


EMPTY = Roster()


class Since(NamedTuple):
    """When a sign-in began, as far as we know.

    ``epoch``: the roster's epoch at that time, if it was read then. Otherwise the sign-in began at
    ``began``, in milliseconds by the clock ``clock``.
    """

    epoch: int | None = None
    began: int = 0
    clock: int = 0


def is_revoked_since(roster: Roster, since: Since) -> bool:
    """Whether the user's sessions were, or may have been, revoked after that time."""
    if since.epoch is not None:
        return roster.epoch != since.epoch
    skew = 0 if since.clock == roster.clock else CLOCK_SKEW
    return roster.epoch > 0 and roster.epoch + skew >= since.began


class Entered(NamedTuple):
    """The result of entering a session in a roster.

    ``refused``: the reason; empty for a member. ``over``: how many devices over the limit were
    marked as ending. ``device``: the device in the roster.
    """

    roster: Roster
    refused: Literal["", "revoked", "full"] = ""
    over: int = 0
    device: Device | None = None


def is_full(roster: Roster, cap: int, policy: Policy) -> bool:
    """Whether another device would be refused."""
    return policy == "refuse" and len(roster.members) >= cap


def enter(roster: Roster, device: Device, since: Since, cap: int, policy: Policy) -> Entered:
    """Enter a session that was bound to the user. Marks devices over ``cap`` as ending, oldest
    first.

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
    """Note a rotation to ``key``. Refused unless an earlier key of the session is a member."""
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
    """Note a use of the session. Refused unless it is a member, or was rotated from one.

    In the latter case (one of the keys ``before`` is the member's), it replaces that member.
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
    """Mark these devices as ending. Their sessions are deleted next, then they are dropped."""
    devices = (
        replace(device, ending=True) if device.id in device_ids else device
        for device in roster.devices
    )
    return replace(roster, devices=tuple(devices))


def revoke_all(
    roster: Roster,
    now: int,
    clock: int,
    keep: str | None = None,
    tags: Collection[str] | None = None,
) -> Roster:
    """Mark all devices but ``keep`` as ending, and refuse sign-ins that are under way.

    ``tags``: only the devices with one of these.
    """
    others = {
        device.id
        for device in roster.devices
        if device.id != keep and (tags is None or not set(tags).isdisjoint(device.tags))
    }
    ending = mark_ending(roster, others)
    return replace(ending, epoch=max(now, roster.epoch + 1), clock=clock)


def retag(roster: Roster, device_id: str, start: str, tag: str) -> Roster:
    """Give a device this tag, in place of its tags that begin with ``start``."""
    there = roster.by_id(device_id)
    if there is None:
        return roster
    kept = [each for each in there.tags if not each.startswith(start)]
    return _with(roster, replace(there, tags=(*kept, tag)))


def drop(roster: Roster, keys: Collection[str]) -> Roster:
    """Remove the devices of these sessions, which have ended."""
    left = tuple(device for device in roster.devices if device.key not in keys)
    return roster if len(left) == len(roster.devices) else replace(roster, devices=left)


def _with(roster: Roster, changed: Device) -> Roster:
    devices = tuple(changed if each.id == changed.id else each for each in roster.devices)
    return roster if devices == roster.devices else replace(roster, devices=devices)
