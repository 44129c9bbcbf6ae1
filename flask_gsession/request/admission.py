"""Whether a user's roster admits a sign-in: it wasn't revoked since, and there is room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from ..errors import SignInRefused, TooManySessions, UnreadableRecord
from ..events import DeviceLimitReached, SignInRejected
from ..repository.repository import Repository
from ..users.roster import Roster, Since, drop, is_full, is_revoked_since
from ..users.rosters import Found, Rosters
from .lifecycle import Lifecycle

_NO_EPOCHS: Mapping[tuple[int, str], int] = MappingProxyType({})


#: The epochs at the start of ``ext.users.login``, by the application's rosters and the user.
_epochs: ContextVar[Mapping[tuple[int, str], int]] = ContextVar(
    "gsession_epochs", default=_NO_EPOCHS
)


@contextmanager
def sign_in_since(rosters: Rosters, user_id: str, epoch: int) -> Iterator[None]:
    """Let a sign-in of this user in the block count as begun at this epoch."""
    token = _epochs.set({**_epochs.get(), (id(rosters.own), user_id): epoch})
    try:
        yield
    finally:
        _epochs.reset(token)


def note_own_revocation(life: Lifecycle, user_id: str, before: Roster, epoch: int) -> None:
    """Note that this request revoked the user's sessions, so that it can still sign the user in."""
    if not is_revoked_since(before, _since(life, user_id, before)):
        life.epochs = {**life.epochs, user_id: epoch}


def _since(life: Lifecycle, user_id: str, roster: Roster) -> Since:
    rosters = life.repository.rosters
    epoch = life.epochs.get(user_id, _epochs.get().get((id(rosters.own), user_id)))
    return rosters.since(user_id, roster, life.began) if epoch is None else Since(epoch)


def check_roster(life: Lifecycle, user_id: str) -> Found:
    """Look up the roster, and raise now if it would refuse the sign-in, before anything changes.

    One round trip.
    """
    repository = life.repository
    rosters = repository.rosters
    for checked in (False, True):
        found = rosters.look(user_id)
        if is_revoked_since(found.roster, _since(life, user_id, found.roster)):
            raise refusal(repository, user_id, "revoked")
        roster = found.roster.without_expired(repository.now())
        if not is_full(roster, rosters.limit, rosters.policy):
            return found
        if not checked:
            drop_absent(repository, user_id, roster)
    raise refusal(repository, user_id, "full")


def refusal(repository: Repository, user_id: str, reason: str) -> SignInRefused | TooManySessions:
    """Report a refused sign-in, and return its error."""
    repository.events.emit(SignInRejected, user_id, reason)
    if reason == "revoked":
        return SignInRefused()
    repository.events.emit(DeviceLimitReached, user_id, repository.rosters.limit, 0)
    return TooManySessions()


def drop_absent(repository: Repository, user_id: str, roster: Roster) -> None:
    """Drop entries whose sessions ended without leaving the roster, for example in an outage."""
    absent = set()
    for device in roster.members:
        try:
            if repository.find(device.key) is None:
                absent.add(device.key)
        except UnreadableRecord:
            continue
    if absent:
        repository.rosters.change(user_id, lambda roster: (drop(roster, absent), None))
