"""The interface for a source of old sessions: from an old cookie to a record and its contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ..errors import ValueRefused
from ..repository.repository import Repository
from ..stores.base import Record
from ..stores.foreign import Foreign, Together
from ..users.roster import Since
from ..values.codec import is_valid_text


class OldRecord(NamedTuple):
    """An old record: its ``name`` in its store, and the stored data.

    ``by_pointer``: the cookie holds an earlier token, within the grace of a rotation.
    """

    name: str
    stored: Foreign | Record
    expires_at: int | None
    by_pointer: bool = False

    def __repr__(self) -> str:
        """Without the name, which is a secret."""
        return "<Old record>"


class Contents(NamedTuple):
    """The contents to store for an old session.

    ``values``: encoded. ``dropped``: the keys with values that can't be kept. ``lifetime``: the
    session's own idle timeout in milliseconds. ``began`` and ``ends``: the old session's creation
    and absolute end, if the new session keeps them. ``user_id``: the user it is bound to.
    ``idle_ends``: when the new session ends if it isn't used.
    """

    values: dict[str, bytes]
    dropped: tuple[str, ...] = ()
    lifetime: int | None = None
    began: int | None = None
    ends: int | None = None
    user_id: str | None = None
    idle_ends: int | None = None

    def __repr__(self) -> str:
        """Without the values."""
        return f"<Contents: {len(self.values)} keys>"


class Source(Protocol):
    """A source of old sessions.

    ``label`` names the source in marks: the same label and name mean the same old session.
    """

    label: str
    #: set if the source's server also keeps the new sessions
    together: Together | None

    def is_of_one_visitor(self, old: OldRecord) -> bool:
        """Whether only one visitor has this old cookie; equal Flask cookies are possible."""

    def name_of(self, cookie: str) -> str | None:
        """The name of the old record, or None if the cookie is malformed or has a wrong signature.
        No round trip.
        """

    def load(self, name: str, cookie: str) -> OldRecord | None:
        """The old record, perhaps under another name. At most one round trip.

        Raises ``StoreUnavailable`` and ``UnreadableRecord``.
        """

    def contents(self, repository: Repository, old: OldRecord) -> Contents:
        """The record's values, encoded. Raises ``RefusedContents`` and ``StoreUnavailable``."""

    def since(self, old: OldRecord) -> Since:
        """The time of the old session's sign-in, for the roster of its user."""

    def delete(self, name: str) -> None:
        """Remove the old record, if that is possible. At most one round trip."""


def encoded(repository: Repository, contents: Mapping[Any, Any]) -> Contents:
    """The keys and values of an old session that we can store, within the limits for one value."""
    values: dict[str, bytes] = {}
    dropped = []
    settings = repository.settings
    for key, value in contents.items():
        if type(key) is not str or not is_valid_text(key) or len(values) >= settings.max_keys:
            dropped.append(ascii(key)[:60])
            continue
        try:
            raw = repository.codec.encode(key, value)
        except ValueRefused:
            dropped.append(ascii(key)[:60])
            continue
        values[key] = raw
    return Contents(values, tuple(dropped))
