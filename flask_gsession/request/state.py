"""The small values that make up a session's lifecycle. Each is replaced in one assignment."""

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
from ..values.payload import Body, Join, Owner

# How far the request has come, from its session's point of view. No Enum: in Python 3.11 each look
# at a member takes as long as reading a value.
#: Before or in the view: a response with a new token can still follow.
IN_VIEW: Final = "view"
#: Flask processes the response or makes an error page, so an exception would break it.
IN_RESPONSE: Final = "response"
#: The session was saved with the response. It is too late to send a token.
SAVED: Final = "saved"


class Presented(Struct, frozen=True, gc=False):
    """The checked token that the request brought; None without a token.

    ``handle``: of a session from ``ext.open()``. No response can carry its token.
    """

    checked: Checked | None = None
    by_header: bool = False
    handle: str | None = None


class HidesFields(Struct, frozen=True):
    """Shows no fields in ``repr``, since error trackers store local variables."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class Seen(HidesFields, frozen=True, gc=False):
    """The stored session as this request knows it. The version guards exactly these values.

    ``token`` is None if the client has no current token: it has none, or an old one within its
    grace. ``presented``: the request's token led here. ``for_others``: this worker can't read the
    record, but a worker of another version or with other keys may.
    """

    token: str | None = None
    record: Record | None = None
    body: Body | None = None
    presented: bool = False
    for_others: bool = False

    def __repr__(self) -> str:
        """Hides the token, since error trackers store local variables."""
        return f"<Seen handle={self.record.key if self.record else None!r}>"

    @property
    def is_old_token(self) -> bool:
        """Whether the request found a stored session by an old token of it."""
        return self.record is not None and self.token is None


NOTHING_SEEN = Seen()


class NearLook(HidesFields, frozen=True):
    """The record that a request saw first, and whether it came from the near cache."""

    record: Record | None = None
    hit: bool = False


#: Set before the first look, to bypass the near cache.
FROM_STORE = NearLook()


class Binding(HidesFields, frozen=True):
    """The user to bind the session to. An empty ``user_id`` unbinds it.

    ``since``: when the sign-in began. ``found``: the roster at that time. ``fresh``: whether the
    user has just proved who they are.
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
    """The changes to rosters that are due when a session is stored, before its token is sent.

    ``binding``: enter the session. ``moves``: the session was rotated, and the roster lists one of
    these keys. ``leaves``: its previous owner and key. ``key``: its key in the store.
    ``unreachable``: the client has no other token that leads to it.
    """

    binding: Binding | None = None
    moves: tuple[str, ...] = ()
    leaves: tuple[Owner, str] | None = None
    key: str = ""
    unreachable: bool = False


class Wishes(Struct, frozen=True):
    """The tasks of the next save besides storing changed values.

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
    """The same wishes without a rotation, and without the binding that comes with it."""
    binding = wishes.binding if but_binding else None
    if wishes.rotation is None and wishes.binding is binding:
        return wishes
    return replace(wishes, rotation=None, binding=binding)


def remaining(done: Wishes, wishes: Wishes) -> Wishes:
    """The wishes that remain after ``done`` was stored."""
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


class Outage(Struct, frozen=True):
    """An outage that this request met, so that it doesn't wait for the store a second time.

    ``loading``: the session couldn't be loaded; otherwise, a later write may have been applied.
    ``unseen``: the request continued with an empty session, so the response must report the outage.
    """

    error: StoreUnavailable
    loading: bool = False
    unseen: bool = False


class Behind(HidesFields, frozen=True):
    """The values of the session behind an old token that join the user's at the sign-in.

    ``values``: as they are stored, for ``join``, which is None without any. ``ends_at``: when that
    session ends at the latest. ``changes``: this request's changes to them.
    """

    join: Join | None
    values: Mapping[str, bytes]
    ends_at: int
    changes: Mapping[str, Change]


class Attempt(HidesFields, frozen=True, gc=False):
    """A write that was sent, kept until its outcome is known.

    An interrupted command may still be on its way to the server. So if the server still has the
    version that it replaces, that proves nothing. ``changes``: the request's own changes in it,
    which stay pending until the outcome is known.
    """

    record: Record
    token: str | None
    body: Body
    changes: Mapping[str, Change]
    wishes: Wishes
    entry: Entry | None = None

    def __repr__(self) -> str:
        """Hides the token, since error trackers store local variables."""
        return f"<Attempt handle={self.record.key!r}>"


class Block:
    """An open transaction or lock: its changes are stored at its end, or not at all.

    Other threads and tasks that use the session are not part of it. ``inside`` and ``outside`` hold
    the keys that each side looked at or changed.
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
        #: the block that was open before, perhaps in another thread
        self.outer = outer
        #: the block that this thread or task is in
        self.within = current_block.get()
        #: changes before the block, if the session isn't stored yet
        self.pending = pending
        self.inside: set[str] = set()
        self.outside: set[str] = set()

    @property
    def is_around(self) -> bool:
        """Whether this thread or task runs inside the block."""
        within = current_block.get()
        while within is not None and within is not self:
            within = within.within
        return within is self

    def note(self, key: str) -> None:
        """Note that ``key`` is looked at or changed now, for this block and all outer ones."""
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
