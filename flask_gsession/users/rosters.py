"""Users' rosters in the store: one record for each user, changed by compare-and-set."""

from __future__ import annotations

import copy
import hashlib
import ipaddress
import secrets
import time
import uuid
from base64 import urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

from ..config import Settings
from ..errors import RosterUnreadable, StoreUnavailable, UnreadableRecord
from ..events import logger
from ..repository.races import tries, write
from ..stores.base import KEY_LENGTH, Clock, Record, Store, milliseconds, new_version
from ..values.codec import is_valid_text
from ..values.envelope import Envelope
from ..values.payload import Owner
from .format import pack, unpack
from .roster import EMPTY, MOST_DEVICES, Roster, Since, drop, revoke_all

A = TypeVar("A")

#: Flask-Login's key for the user who is signed in.
LOGIN = "_user_id"
LONGEST_ID = 256  # characters of a user id
#: A roster is kept this much longer than its sessions, and lists each this much longer than it
#: lives.
MARGIN = 60_000  # milliseconds
_LIFE = 100 * 366 * 86_400_000  # milliseconds; the idle expiry ends a roster earlier
_KEY_SUFFIX = "_"
_MAX_OWN_REVOCATIONS = 1000  # that a process remembers


class Found(NamedTuple):
    """A roster, and its record, if there is one."""

    roster: Roster
    record: Record | None


class Began(NamedTuple):
    """When a request began: the clock's time, and ``OwnRevocations.count`` at that time."""

    time: float
    revocations: int


class OwnRevocations:
    """Numbers the latest revocations of all sessions of a user by this process, in order."""

    def __init__(self) -> None:
        self.count = 0
        self._numbers: OrderedDict[tuple[str, int], int] = OrderedDict()

    def add(self, user_id: str, epoch: int) -> None:
        self.count += 1
        self._numbers[user_id, epoch] = self.count
        while len(self._numbers) > _MAX_OWN_REVOCATIONS:
            self._numbers.popitem(last=False)

    def number(self, user_id: str, epoch: int) -> int | None:
        return self._numbers.get((user_id, epoch))


class Rosters:
    """The rosters of all users of an application."""

    def __init__(self, settings: Settings, envelope: Envelope, clock: Clock) -> None:
        self._settings = settings
        self._envelope = envelope
        self._clock = clock
        self.own = OwnRevocations()
        self._store: Store
        self.limit = settings.max_per_user or MOST_DEVICES
        self.policy = settings.max_policy
        self._clock_id = _system_clock() if clock is time.time else secrets.randbits(32)

    def through(self, store: Store) -> Rosters:
        """The same rosters, in this store or wrapper."""
        other = copy.copy(self)
        other._store = store
        return other

    def look(self, user_id: str) -> Found:
        """The user's roster now. Raises ``RosterUnreadable``. One round trip."""
        return self.look_at(roster_key(user_id))

    def look_at(self, key: str) -> Found:
        """Like ``look``, by the key of the roster."""
        try:
            record = self._store.load(key)
            if record is None or self._now() >= record.idle_expires_at:
                return Found(EMPTY, None)
            return Found(self.read(record), record)
        except UnreadableRecord as error:
            raise RosterUnreadable(
                f"the roster {key} of a user can't be read: {error}. ext.users.rebuild repairs "
                "it; add replace_foreign=True if no worker has its encryption key or version",
                for_others=error.for_others,
            ) from None

    def change(
        self, user_id: str, step: Callable[[Roster], tuple[Roster, A]], found: Found | None = None
    ) -> A:
        """Replace the roster by the result of ``step``; return the answer of the step that won.

        ``found``: the roster, if you have read it already. Two round trips, two more for each lost
        race; one if nothing changes, or ``found`` is still current. Raises ``StoreUnavailable``
        after too many lost races.
        """
        return self.change_at(roster_key(user_id), step, found)

    def change_at(
        self, key: str, step: Callable[[Roster], tuple[Roster, A]], found: Found | None = None
    ) -> A:
        """Like ``change``, by the key of the roster."""
        look: Found | None = found
        answer: list[A] = []

        def prepare() -> tuple[Record | None, Roster] | None:
            nonlocal look
            there, look = look or self.look_at(key), None
            roster, now_answered = step(there.roster.without_expired(self._now()))
            answer[:] = [now_answered]
            return None if roster == there.roster else (there.record, roster)

        write(prepare, partial(self._send, key), self._tries)
        return answer[0]

    def leave(self, owner: Owner, *keys: str) -> None:
        """Remove these keys from the user's roster: their sessions ended, or changed their user.

        Two round trips. Never raises for an outage: the roster then lists the session until it
        would have expired.
        """
        ended = {*keys, *([owner.predecessor] if owner.predecessor else ())}
        try:
            self.change(owner.user_id, lambda roster: (drop(roster, ended), None))
        except StoreUnavailable as error:
            logger.warning("Session %s stays in its user's list: %s", keys[0], error)

    def replace_unreadable(self, key: str, roster: Roster) -> bool:
        """Store this roster in place of an unreadable one. False if it can be read by now.

        Two round trips.
        """
        replaces = False

        def prepare() -> tuple[Record | None, Roster] | None:
            nonlocal replaces
            replaces = True
            try:
                record = self._store.load(key)
            except UnreadableRecord:
                self._store.delete(key)
                return None, roster
            if record is not None:
                try:
                    self.read(record)
                except UnreadableRecord:
                    return record, roster
                replaces = False
                return None
            return None, roster

        write(prepare, partial(self._send, key), self._tries)
        return replaces

    def revoke_all(
        self, roster: Roster, keep: str | None = None, tags: Collection[str] | None = None
    ) -> Roster:
        """Apply ``roster.revoke_all`` at the current time of this process's clock."""
        return revoke_all(roster, self._now(), self._clock_id, keep, tags)

    def since(self, user_id: str, roster: Roster, began: Began) -> Since:
        """When a sign-in began, in a form that can be compared with ``roster``."""
        own = self.own.number(user_id, roster.epoch)
        if own is None:
            return Since(None, int(began.time * 1000), self._clock_id)
        # This process knows the order of its own revocations without a clock.
        return Since(roster.epoch if own <= began.revocations else -1)

    def read(self, record: Record) -> Roster:
        """The roster in a record. Raises ``UnreadableRecord``."""
        times = record.created_at, record.absolute_expires_at
        return unpack(self._envelope.open_other(record.key, record.payload, times))

    def _tries(self) -> Iterator[int]:
        return tries(self._settings.store_timeout, _lost, patient=True)

    def _send(self, key: str, step: tuple[Record | None, Roster], _: int) -> None:
        there, roster = step
        now = self._now()
        created, absolute = now, now + _LIFE
        if there is not None:
            created, absolute = there.created_at, there.absolute_expires_at
        end = min(self._end(roster, now), absolute)
        payload = self._envelope.seal(key, pack(roster), (created, absolute))
        record = Record(key, new_version(), created, end, absolute, payload)
        if there is None:
            self._store.create(record)
        elif end < there.idle_expires_at:
            self._store.save(record, there.version, shorten=True)
        else:
            self._store.save(record, there.version)

    def _end(self, roster: Roster, now: int) -> int:
        """When a roster expires: no session from before its epoch may outlive it."""
        ends = [device.expires * 1000 for device in roster.devices]
        if roster.epoch:
            ends.append(roster.epoch + int(self._settings.absolute_timeout * 1000))
            if self._settings.imports:  # the epoch refuses imports of older sessions
                ends.append(self._settings.marks_end(now))
            if self._settings.remember_until is not None:
                ends.append(self._settings.remember_end)
        return max([now, *ends]) + MARGIN

    def _now(self) -> int:
        return milliseconds(self._clock)


def roster_key(user_id: str) -> str:
    """The key of the user's roster. No session key ends with its last character."""
    digest = hashlib.sha256(b"flask-gsession roster " + user_id.encode()).digest()
    return urlsafe_b64encode(digest).decode()[: KEY_LENGTH - 1] + _KEY_SUFFIX


def is_roster(record: Record) -> bool:
    """Whether this is a user's roster, even if its content can't be read."""
    life = record.absolute_expires_at - record.created_at
    return record.successor is None and record.key.endswith(_KEY_SUFFIX) and life == _LIFE


def checked_user_id(user_id: object) -> str:
    """The id as text. Raises ``ValueError`` with the reason."""
    if type(user_id) is int:
        if abs(user_id) >= 10**LONGEST_ID:
            raise ValueError(f"user_id has more than {LONGEST_ID} digits")
        return str(user_id)
    if not isinstance(user_id, str):
        raise ValueError(f"user_id is a {type(user_id).__name__}; it must be text, or an int")
    if not user_id:
        raise ValueError("user_id is empty; without a user, leave the session unbound")
    if len(user_id) > LONGEST_ID:
        raise ValueError(f"user_id has {len(user_id)} characters; at most {LONGEST_ID} are allowed")
    if "\0" in user_id or not is_valid_text(user_id):
        raise ValueError(f"user_id {ascii(user_id)[:60]} contains NUL or lone surrogates")
    return str.__str__(user_id)  # a plain str, even for a str subclass such as an Enum


def new_device_id() -> str:
    """A new device id: 48 random bits. It isn't secret."""
    return secrets.token_urlsafe(6)


def network_of(address: str | None) -> bytes:
    """The network of a client: the first 3 bytes of an IPv4 address, 6 of an IPv6 one."""
    try:
        parsed: Any = ipaddress.ip_address(address or "")
    except ValueError:
        return b""
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return bytes(parsed.packed[: 3 if parsed.version == 4 else 6])


@lru_cache(maxsize=1024)  # a user's devices share a few networks
def network_text(network: bytes) -> str | None:
    """A network as text, such as ``"203.0.113.0/24"``."""
    if len(network) == 3:
        return f"{network[0]}.{network[1]}.{network[2]}.0/24"
    if len(network) == 6:
        return f"{ipaddress.IPv6Address(network + bytes(10))}/48"
    return None


def _lost() -> StoreUnavailable:
    return StoreUnavailable(
        "too many simultaneous sign-ins and other changes of one user", contention=True
    )


@cache
def _system_clock() -> int:
    """An id of this machine's clock: the same in all its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = b"%d" % uuid.getnode()
    return crc32(boot)
