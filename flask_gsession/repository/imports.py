"""The interface through which requests take over old sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..stores.base import Record
from ..values.payload import Body

if TYPE_CHECKING:
    from .repository import Loaded, Repository


class TakenOver(NamedTuple):
    """The session that an old cookie led to, if any.

    ``token``: for the client; None if the cookie led to the session through a pointer.
    ``dead_cookie``: the old cookie leads to no session, and never will again. ``mark``: the record
    to pass to ``may_set_cookie``, if several visitors may share the cookie.
    """

    loaded: Loaded | None = None
    token: str | None = None
    dead_cookie: bool = False
    mark: Record | None = None

    def __repr__(self) -> str:
        """Without the token."""
        return f"TakenOver({self.loaded!r}, dead_cookie={self.dead_cookie})"


class Imports(Protocol):
    """Takes over old sessions. ``moving.takeover.Takeover`` implements it."""

    def take_over(self, repository: Repository, request: Any) -> TakenOver:
        """The session that the old cookie of the request leads to."""

    def may_set_cookie(
        self, repository: Repository, mark: Record, began: int, *, wrote: bool
    ) -> bool:
        """Whether the response may set our cookie, if several visitors may share the old one."""

    def end_old(self, repository: Repository, body: Body) -> None:
        """Remove the old record of a session that is about to end."""

    def end_presented(self, repository: Repository, request: Any, body: Body | None) -> None:
        """Remove the record of the request's old cookie, unless ``end_old`` does."""

    def has_ended(self, repository: Repository, body: Body) -> bool:
        """Whether a worker of the old system ended the session."""

    def forget_cookie(self, request: Any, response: Any) -> None:
        """Delete the old cookie, if the request has it."""

    def close(self) -> None:
        """Release the connections to old stores."""
