"""Sessions of Flask-Session, versions 0.5 to 0.8.

The cookie holds the session's id, plain or signed: 43 characters of base64url
(``SESSION_ID_LENGTH`` bytes, 32 by default), or a UUID in 0.5. The record's name is
``SESSION_KEY_PREFIX`` plus the id. Redis, MongoDB and SQLAlchemy hold MessagePack or JSON from 0.7
on, and pickles before; cachelib, including its files, holds pickles in every version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from itsdangerous import BadSignature, Signer, want_bytes

from ..repository.repository import Repository
from ..stores.foreign import Foreign, ForeignValues, Together
from ..users.roster import Since
from .contents import read_contents, read_pickled
from .source import Contents, OldRecord, encoded

LABEL = "flask-session"
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SIGNED = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{27}")
_SALT = "flask-session"
DEFAULT_ID_LENGTH = 32


class FlaskSessionSource:
    """The sessions that Flask-Session keeps in ``store``.

    ``secret_keys``: None unless the ids in cookies are signed. ``pickled``: whether the store holds
    only pickles.
    """

    label = LABEL

    def __init__(
        self,
        store: ForeignValues,
        *,
        prefix: str,
        id_length: int = DEFAULT_ID_LENGTH,
        secret_keys: Callable[[], Sequence[str | bytes]] | None = None,
        pickled: bool = False,
        together: Together | None = None,
    ) -> None:
        self.store = store
        self.together = together
        self._prefix = prefix
        self._secret_keys = secret_keys
        self._read = read_pickled if pickled else read_contents
        lengths = {_length_of(DEFAULT_ID_LENGTH), _length_of(id_length)}
        self._tokens = re.compile("|".join(f"[A-Za-z0-9_-]{{{length}}}" for length in lengths))

    def name_of(self, cookie: str) -> str | None:
        sid = cookie
        if self._secret_keys is not None:
            if not cookie.isascii():
                return None
            # itsdangerous expects the newest key last
            keys = [want_bytes(key) for key in reversed(self._secret_keys())]
            try:
                sid = Signer(keys, salt=_SALT, key_derivation="hmac").unsign(cookie).decode()
            except (BadSignature, UnicodeDecodeError):
                return None
        elif _SIGNED.fullmatch(cookie):
            sid = cookie.partition(".")[0]  # the signer was turned off since
        return self._prefix + sid if self._is_id(sid) else None

    def names(self) -> Iterator[str]:
        """The names of all old records, perhaps with duplicates.

        Raises ``StoreUnavailable``, and ``NotImplementedError`` if the store can't list them.
        """
        start = len(self._prefix)
        return (name for name in self.store.names(self._prefix) if self._is_id(name[start:]))

    def _is_id(self, sid: str) -> bool:
        return bool(self._tokens.fullmatch(sid) or _UUID.fullmatch(sid))

    def load(self, name: str, cookie: str = "") -> OldRecord | None:
        return self.old(name, self.store.load(name))

    def old(self, name: str, found: Foreign | None) -> OldRecord | None:
        """The old record under ``name``, if any."""
        return None if found is None else OldRecord(name, found, found.expires_at)

    def contents(self, repository: Repository, old: OldRecord) -> Contents:
        stored: Any = old.stored
        return encoded(repository, self._read(stored.value))

    def is_of_one_visitor(self, old: OldRecord) -> bool:
        return True

    def since(self, old: OldRecord) -> Since:
        # The time of the sign-in is unknown, so any revocation ends sessions not yet imported.
        return Since(epoch=0)

    def delete(self, name: str) -> None:
        self.store.delete(name)


def _length_of(id_length: int) -> int:
    """The length of this many bytes as base64url without padding."""
    return -(-id_length * 4 // 3)
