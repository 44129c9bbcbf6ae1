"""Records of an OpenID provider's sessions: which users signed in through them.

::

    key         digest of a kind, the issuer and a name; ends with ``-``, unlike a session's sign-in
    kind "sid" or "sub": ["oidc", user ids, when it was logged out (ms, 0: never)] token       kind
    "jti": b"", until the token expires

The record of a sign-in is written before the session is bound, and a logout marks it before it ends
the sessions. With the roster's epoch, which the sign-in reads first, every order is safe:

- The logout marks first: the sign-in sees the mark, and is refused. - The logout marks later, and
changes the roster before the session enters it: the epoch refuses it. - The logout changes the
roster later still: it finds the session there, and ends it.
"""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Struct

from ..errors import KeyTaken, SignInRefused, StoreUnavailable, UnreadableRecord
from ..events import logger
from ..repository.races import tries, write
from ..repository.repository import Repository
from ..stores.base import KEY_LENGTH, Record

_MARGIN = 60_000  # milliseconds that a record outlives the sessions
#: How long an unknown session of the provider is remembered as logged out, in case a sign-in is
#: under way.
_UNDER_WAY = 3_600_000  # milliseconds
_MOST_USERS = 20  # that one subject may have signed in as


class SignIn(Struct, array_like=True, frozen=True):
    """The users that signed in through one session, or one subject, of the provider."""

    users: tuple[str, ...] = ()
    ended: int = 0


class _Stored(Struct, array_like=True, frozen=True):
    kind: str
    users: tuple[str, ...]
    ended: int


class SignIns:
    """The records of one issuer in the store of one ``Session``."""

    def __init__(self, repository: Repository, issuer: str) -> None:
        self._repository = repository
        self._issuer = issuer

    def note(self, kind: str, name: str, user_id: str, began: int) -> None:
        """Note a sign-in that began at ``began``, in milliseconds. Two round trips; one if it was
        noted before.

        Raises ``SignInRefused`` if the provider has logged it out since.
        """
        end = self._repository.now() + self._longest

        def step(there: SignIn) -> SignIn:
            # A session of the provider ends for good, but a subject can sign in again.
            if there.ended and (kind == "sid" or there.ended >= began):
                raise SignInRefused
            others = [user for user in there.users if user != user_id]
            return SignIn((*others, user_id)[-_MOST_USERS:], there.ended)

        self._change(kind, name, step, end)

    def log_out(self, kind: str, name: str) -> tuple[str, ...]:
        """Mark it as logged out. Returns the users whose sessions must end. Two round trips."""
        now = self._repository.now()
        found: tuple[str, ...] = ()

        def step(there: SignIn) -> SignIn:
            nonlocal found
            found = there.users
            return SignIn(found, now)

        self._change(kind, name, step, now + _UNDER_WAY)
        return found

    def users(self, kind: str, name: str) -> tuple[str, ...]:
        """The users that signed in through it. One round trip."""
        return self._load(self._key(kind, name))[1].users

    def is_used(self, jti: str) -> bool:
        """Whether a token with this id was used. One round trip."""
        return self._load(self._key("jti", jti))[0] is not None

    def note_used(self, jti: str, end: int) -> None:
        """Remember the id of a token until ``end``, in milliseconds. One round trip."""
        key, repository = self._key("jti", jti), self._repository
        try:
            repository.store.create(repository.other_records.draft(key, b"", end))
        except KeyTaken:  # a parallel request with the same token
            return

    @property
    def _longest(self) -> int:
        return int(self._repository.settings.absolute_timeout * 1000) + _MARGIN

    def _change(self, kind: str, name: str, step: Callable[[SignIn], SignIn], end: int) -> None:
        key, repository = self._key(kind, name), self._repository

        def prepare() -> tuple[Record | None, Record] | None:
            old, there = self._load(key)
            after = step(there)
            last = end if old is None else max(end, old.idle_expires_at)
            if old is not None and after == there and last == old.idle_expires_at:
                return None
            content = msgspec.msgpack.encode(("oidc", after.users, after.ended))
            return old, repository.other_records.draft_renewable(key, content, last, old)

        def send(drafts: tuple[Record | None, Record], _: int) -> None:
            old, draft = drafts
            if old is None:
                repository.store.create(draft)
            else:
                repository.store.save(draft, old.version)

        write(prepare, send, partial(tries, repository.settings.store_timeout, _lost))

    def _load(self, key: str) -> tuple[Record | None, SignIn]:
        repository = self._repository
        record = repository.store.load(key)
        if record is None or repository.now() >= record.idle_expires_at:
            return None, SignIn()
        try:
            content = repository.other_records.read(record)
            stored = msgspec.msgpack.decode(content, type=_Stored) if content else None
        except (UnreadableRecord, msgspec.DecodeError) as error:
            # For example, its encryption key was removed. That must not lock users out.
            logger.error("The record %s of an OpenID sign-in can't be read: %s", key, error)
            stored = None
        return record, SignIn() if stored is None else SignIn(stored.users, stored.ended)

    def _key(self, kind: str, name: str) -> str:
        text = f"flask-gsession oidc {kind}\0{self._issuer}\0{name}"
        digest = hashlib.sha256(text.encode()).digest()
        return urlsafe_b64encode(digest).decode()[: KEY_LENGTH - 1] + "-"


def tag_of(issuer: str, kind: str, name: str) -> str:
    """The tag of sessions that this session, or subject, of the provider signed in."""
    digest = hashlib.sha256(f"{kind}\0{issuer}\0{name}".encode()).digest()
    return f"oidc:{urlsafe_b64encode(digest[:24]).decode()}"


def _lost() -> StoreUnavailable:
    return StoreUnavailable(
        "too many simultaneous sign-ins by one session of the provider", contention=True
    )
