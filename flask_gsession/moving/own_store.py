"""Our own sessions in another store, or under other settings: another key prefix or cookie.

The old cookie holds one of our tokens, signed for the old cookie's name. The new session keeps the
old one's values, creation and absolute end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SessionTooLarge, UnreadableRecord, ValueLost
from ..repository.repository import Repository
from ..stores.base import MAX_POINTERS
from ..stores.foreign import Together
from ..tokens import TokenSigner, session_key
from ..users.roster import Since
from ..values.marks import marked, split
from ..values.references import refers
from .contents import RefusedContents
from .source import Contents, OldRecord

LABEL = "gsession"


class OwnStoreSource:
    """The sessions in the store of ``old``, a repository with the old settings.

    ``cookie_name``: the old cookie's name. ``secret_keys``: the keys that may have signed it.
    """

    label = LABEL
    together: Together | None = None

    def __init__(
        self,
        old: Repository,
        cookie_name: str,
        secret_keys: Callable[[], Sequence[str | bytes]],
    ) -> None:
        self._old = old
        self._cookie_name = cookie_name
        self._secret_keys = secret_keys

    def name_of(self, cookie: str) -> str | None:
        token = TokenSigner(self._secret_keys(), self._cookie_name).check(cookie).token
        return None if token is None else session_key(token)

    def load(self, name: str, cookie: str = "") -> OldRecord | None:
        at = name
        for _ in range(MAX_POINTERS):
            record = self._old.store.load(at)
            if record is None or self._old.now() >= record.idle_expires_at:
                return None
            if self._old.records.read(at, record) is not None:
                return OldRecord(at, record, record.idle_expires_at, by_pointer=at != name)
            at = record.successor or ""
        raise UnreadableRecord("corrupt", "too many pointers")

    def contents(self, repository: Repository, old: OldRecord) -> Contents:
        record: Any = old.stored
        body = self._old.records.read(old.name, record)
        if body is None:
            raise RefusedContents("a pointer")
        values, dropped = {}, []
        for key, raw in body.values.items():
            if not refers(raw):
                values[key] = raw
                continue
            mark, plain = split(raw)
            try:
                values[key] = marked(self._resolved(repository, key, plain), mark)
            except (ValueLost, UnreadableRecord, SessionTooLarge):
                dropped.append(ascii(key)[:60])
        return Contents(
            values,
            tuple(dropped),
            body.lifetime,
            record.created_at,
            record.absolute_expires_at,
            None if body.owner is None else body.owner.user_id,
        )

    def is_of_one_visitor(self, old: OldRecord) -> bool:
        return True

    def since(self, old: OldRecord) -> Since:
        # The time of the sign-in, or when the roster last saw the session.
        record: Any = old.stored
        body = self._old.records.read(old.name, record)
        seen = 0 if body is None or body.owner is None else body.owner.seen
        return Since(None, max(record.created_at, seen * 1000))

    def delete(self, name: str) -> None:
        self._old.store.delete(name)

    def _resolved(self, repository: Repository, key: str, plain: bytes) -> bytes:
        """A large value, instead of the reference to it."""
        return repository.codec.encode(key, self._old.codec.decode(plain))
