"""The small values that a session's life consists of; each is replaced whole, in one assignment."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from ..errors import StoreUnavailable
from ..stores.base import Record
from ..tokens import Checked
from ..users.roster import Since
from ..users.rosters import Found
from ..values.merge import Change
from ..values.payload import Body, Owner


class Phase:
    """Where the request is, as far as its session is concerned."""

    # No Enum: in Python 3.11 each look at a member takes as long as reading a value.

    #: Before or in the view: a response with a new token can still follow.
    VIEW: Final = "view"
    #: Flask processes the response, or makes an error page: an exception would spoil it.
    RESPONSE: Final = "response"
    #: The session was saved with the response: no token can be sent any more.
    SAVED: Final = "saved"


class Presented(Struct, frozen=True, gc=False):
    """The checked token that the request brought; None if it brought none.

    ``handle``: of a session that the application opened by it. No response can carry its token.
    """

    checked: Checked | None = None
    by_header: bool = False
    handle: str | None = None


class HidesFields(Struct, frozen=True):
    """Shows no fields: error trackers keep what they are shown."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class Seen(HidesFields, frozen=True):
    """What this request knows of the stored session; the version guards exactly these values.

    ``token`` is None while the client holds no current token: it has none, or an old one within
    its grace. ``presented`` says that the token of the request led here. ``for_others``: the
    record can't be read here, but perhaps by a worker of another version or with other keys.
    """

    token: str | None = None
    record: Record | None = None
    body: Body | None = None
    presented: bool = False
    for_others: bool = False

    def __repr__(self) -> str:
        """Without the token, since error trackers show local variables."""
        return f"<Seen handle={self.record.key if self.record else None!r}>"

    @property
    def is_old_token(self) -> bool:
        """Whether a stored session was found, but by a token that isn't its current one."""
        return self.record is not None and self.token is None


NOTHING_SEEN = Seen()


class NearLook(HidesFields, frozen=True):
    """The record that a request saw first, with a near cache, and whether it came from there."""

    record: Record | None = None
    hit: bool = False


#: Before the first look, if that must not be at the near cache.
FROM_STORE = NearLook()


class Binding(HidesFields, frozen=True):
    """The user that the session is to be bound to; without a ``user_id``, it is to be unbound.

    ``since``: when the sign-in began. ``found``: the roster as it was looked at. ``fresh``: whether
    the user has just proved who they are.
    """

    user_id: str
    device_id: str
    since: Since
    label: str = ""
    tags: tuple[str, ...] = ()
    remembered: bool = False
    found: Found | None = None
    fresh: bool = False


class Entry(HidesFields, frozen=True):
    """What is to be done in rosters when a session is stored, before its token leaves.

    ``binding``: it is to be entered. ``moves``: it was rotated, and one of these keys is in the
    roster. ``leaves``: the owner and key that it had before. ``key``: that it is stored under.
    """

    binding: Binding | None = None
    moves: tuple[str, ...] = ()
    leaves: tuple[Owner, str] | None = None
    key: str = ""


class Wishes(Struct, frozen=True):
    """What the next save is to do, besides storing changed values.

    ``rotation`` is the grace in seconds, ``lifetime`` the session's own idle timeout in
    milliseconds. ``sign_in``: the absolute lifetime starts again with the rotation, as it does with
    a binding.
    """

    rotation: float | None = None
    lifetime: int | None = None
    forced: bool = False
    cleared: bool = False
    binding: Binding | None = None
    sign_in: bool = False


NO_WISHES = Wishes()


def without_rotation(wishes: Wishes, *, but_binding: bool = False) -> Wishes:
    """The same without the rotation, and without the binding that comes with it."""
    binding = wishes.binding if but_binding else None
    if wishes.rotation is None and wishes.binding is binding:
        return wishes
    return replace(wishes, rotation=None, binding=binding)


def remaining(done: Wishes, wishes: Wishes) -> Wishes:
    """What is left of the wishes when what was ``done`` is stored."""
    if wishes is done:
        return NO_WISHES
    left = Wishes(
        None if wishes.rotation == done.rotation else wishes.rotation,
        None if wishes.lifetime == done.lifetime else wishes.lifetime,
        wishes.forced and not done.forced,
        wishes.cleared and not done.cleared,
        None if wishes.binding == done.binding else wishes.binding,
        wishes.sign_in and not done.sign_in,
    )
    return NO_WISHES if left == NO_WISHES else left


class Trouble(Struct, frozen=True):
    """An outage that this request met. It is not waited for a second time.

    ``loading``: the session couldn't be loaded; else a later write may have been applied.
    ``unseen``: the request went on with an empty session, so the response must report it.
    """

    error: StoreUnavailable
    loading: bool = False
    unseen: bool = False


class Attempt(HidesFields, frozen=True):
    """A write that was sent. It stays noted until its outcome is known.

    ``changes`` are the request's own among its values, which stay pending until then.
    """

    record: Record
    token: str | None
    body: Body
    changes: Mapping[str, Change]
    wishes: Wishes

    def __repr__(self) -> str:
        """Without the token, since error trackers show local variables."""
        return f"<Attempt handle={self.record.key!r}>"


class Block:
    """A transaction or a lock that is open: its changes are stored at its end, or not at all.

    Threads and tasks that work on the session beside it are not part of it. ``inside`` and
    ``outside`` are the keys that either side looked at or changed.
    """

    __slots__ = ("before", "inside", "kind", "outer", "outside", "pending", "version", "within")

    def __init__(
        self,
        kind: str,
        seen: Seen,
        before: Wishes,
        outer: Block | None,
        pending: Mapping[str, Change] | None = None,
    ) -> None:
        self.kind = kind
        #: the version that a transaction starts on; None for a session that isn't stored
        self.version = seen.record.version if seen.record else None
        self.before = before
        #: the one that was open before, perhaps of another thread
        self.outer = outer
        #: the one that this thread or task is in
        self.within = current_block.get()
        #: what a session that isn't stored was given before the block
        self.pending = pending
        self.inside: set[str] = set()
        self.outside: set[str] = set()

    @property
    def is_around(self) -> bool:
        """Whether this thread or task is inside the block."""
        within = current_block.get()
        while within is not None and within is not self:
            within = within.within
        return within is self

    def note(self, key: str) -> None:
        """``key`` is looked at or changed now, by the block or beside it, and all before it."""
        mine = set()
        within = current_block.get()
        while within is not None:
            mine.add(within)
            within = within.within
        block: Block | None = self
        while block is not None:
            (block.inside if block in mine else block.outside).add(key)
            block = block.outer


#: The innermost block that this thread or task is in.
current_block: ContextVar[Block | None] = ContextVar("gsession_block", default=None)
