"""The values of one session: decoded at the first look, compared when saved."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from msgspec import Struct, field

from ..errors import SessionTooLarge, ValueLost
from ..values.codec import IMMUTABLE, Codec
from ..values.marks import PLAIN, Mark, expired, is_marked, marked, split, unexpired
from ..values.merge import Change, encode_within
from ..values.references import EXT_32, holds, refers
from .state import Block

NOTHING: Any = MappingProxyType({})
NO_KEYS: Collection[str] = ()

_ABSENT: Any = object()
NO_CHANGES: Mapping[str, Change] = MappingProxyType({})


#: The stored values, and the immutable ones among them that looks without the mutex have decoded.
#: A look adds its value to them, then checks that this object is still the current one. Code that
#: replaces the stored values first removes this object, and then keeps the decoded values. So the
#: values that a request has looked at stay as they are.
Looks = tuple[dict[str, bytes], dict[str, Any]]


class TrackedValues(Struct, eq=False):
    """Decodes values one by one, and tracks what this request does to them.

    At the save, each mutable value that was looked at is encoded and compared with the bytes it
    came from. This finds nested changes, and costs nothing for other values. A value stays the same
    object until you reload the session, whatever other requests save in between.

    An expired value is absent. ``now`` gives the time in milliseconds; without it no value has a
    mark, and looking for marks costs nothing.

    A large value is a reference here, and takes the place of its bytes until the first look.

    The threads of a request share these values, so ``mutex`` guards every first look and change,
    but not the first look at an immutable value: see ``Looks``. Taking it costs more than a look.
    """

    _codec: Codec
    #: the encoded values as the store is known to hold them
    stored: dict[str, bytes] = {}
    now: Callable[[], int] | None = None
    mutex: Any = field(default_factory=threading.RLock)
    looks: Looks | None = None
    #: the open transaction or lock
    block: Block | None = None
    #: mutable objects that the application got and that left the session since, each with its key
    #: and its encoded form at that time
    abandoned: list[tuple[str, Any, bytes]] | None = None
    #: the decoded values that the application got or set
    live: dict[str, Any] = {}
    #: each key's encoded value at the first look or change, None if absent; only of keys that may
    #: differ from ``stored``: mutable, assigned, deleted and absent ones
    base: dict[str, bytes | None] = {}
    #: encoded values of this request that differ from the stored ones; their keys are in ``base``
    given: dict[str, bytes] = NOTHING
    #: keys that were looked at in encoded form only
    raw_looks: Collection[str] = NO_KEYS
    #: the keys for ``newest``, until the next change
    order: list[str] | None = None
    #: of the values in ``live``, unless ``now`` is None
    marks: dict[str, Mark] = {}

    def __repr__(self) -> str:
        """Hides the values, since error trackers store local variables."""
        return f"<{type(self).__name__}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []

    # -- the mapping

    def __getitem__(self, key: str) -> Any:
        looks, early = self.looks, None
        if looks is not None and key not in self.base and self.block is None:
            stored, looked = looks
            if key in looked:
                return looked[key]
            if key in stored:
                early = stored[key]
                value = self._codec.decode(early)
                if type(value) in IMMUTABLE:
                    looked[key] = value
                    if self.looks is looks:
                        return value
        if self.now is not None and self._has_expired(key):
            raise KeyError(key)
        block = self.block  # once, since another thread may leave it
        if block is not None:
            block.note(key)
        there = self.live.get(key, _ABSENT)
        if there is not _ABSENT:
            return there
        with self.mutex:
            live, base = self.live, self.base
            if key in live:
                return live[key]
            raw = self.given.get(key) if key in base else self.stored.get(key)
            if raw is None:  # deleted by this request, or absent
                base.setdefault(key, None)
                raise KeyError(key)
            if self.now is not None:
                value = self._decode_marked(key, raw)
            elif raw is not early:
                value = self._codec.decode(raw)
            if type(value) not in IMMUTABLE:
                base.setdefault(key, raw)
            live[key] = value
            return value

    def __setitem__(self, key: str, value: Any) -> None:
        with self.mutex:
            if self.block is not None:
                self.block.note(key)
            if self.order is not None:
                self.order = None
            self.live[key] = value  # first, since a key that is only in ``base`` was deleted
            self.base.setdefault(key, self.stored.get(key))
            if self.given:
                self.given.pop(key, None)
            if self.now is not None:
                self.marks.pop(key, None)

    def set_encoded(self, key: str, raw: bytes, now: Callable[[], int]) -> None:
        """Set an encoded value, mark included."""
        with self.mutex:
            if self.block is not None:
                self.block.note(key)
            if is_marked(raw):
                self.look_for_marks(now)
            self.base.setdefault(key, self.stored.get(key))
            self.order = None
            self.hold(key, raw)
            self.live.pop(key, None)

    def set(self, key: str, value: Any, mark: Mark, now: Callable[[], int]) -> None:
        """Set a value with a mark."""
        with self.mutex:
            self.look_for_marks(now)
            self[key] = value
            if mark != PLAIN:
                self.marks[key] = mark

    def __delitem__(self, key: str) -> None:
        with self.mutex:
            if key not in self:
                raise KeyError(key)
            self.base.setdefault(key, self.stored.get(key))
            self.live.pop(key, None)
            if self.given:
                self.given.pop(key, None)

    def __contains__(self, key: object) -> bool:
        if self.now is not None and self._has_expired(key):
            return False
        block = self.block
        if block is not None and isinstance(key, str):
            block.note(key)
        if key in self.live or key in self.given:
            return True
        with self.mutex:
            if key in self.live or key in self.given:
                return True
            if key in self.base:
                return False
            if key in self.stored:
                return True
            if isinstance(key, str):
                self.base[key] = None
            return False

    def __iter__(self) -> Iterator[str]:
        with self.mutex:
            live, base = self.live, self.base
            if self.given:
                live = live | self.given
            keys = [key for key in self.stored if key in live or key not in base]
            keys += [key for key in live if key not in self.stored]
        for key in keys:
            if self.now is None or not self._has_expired(key):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def newest(self) -> str:
        """The last key. Raises ``KeyError`` if the session is empty.

        The search continues where it ended, so that emptying a session takes linear time.
        """
        with self.mutex:
            if self.order is None:
                self.order = list(self)
            while self.order:
                if self.order[-1] in self:
                    return self.order[-1]
                self.order.pop()
        raise KeyError("popitem(): the session is empty")

    def check(self) -> None:
        """Raises ``UnreadableRecord`` unless every value can be decoded; keeps no decoded values.

        Skips large values.
        """
        for key in self:
            if key not in self.live:
                raw = self.given.get(key) or self.stored.get(key)
                if raw is not None and not refers(raw):
                    with suppress(ValueLost):  # a forged reference inside another value
                        self._codec.decode(split(raw)[1])

    def raw(self, key: str) -> bytes | None:
        """The encoded value, mark included; None if absent. Counts as a look."""
        with self.mutex:
            if self.now is not None and self._has_expired(key):
                return None
            if key in self.live:
                return self._encoded(key)
            if key in self.given:
                return self.given[key]
            if key in self.base:
                return None
            raw = self.stored.get(key)
            if raw is None:
                self.base[key] = None
            elif key not in self.raw_looks:
                self.raw_looks = {*self.raw_looks, key}
            return raw

    def mark(self, key: str) -> Mark:
        """The mark of a present key."""
        if self.now is None:
            return PLAIN
        with self.mutex:
            if key in self.live:
                return self.marks.get(key, PLAIN)
            return split(self.given.get(key) or self.stored[key])[0]

    def unexpired(self) -> dict[str, bytes]:
        """``stored`` without expired values."""
        return self.stored if self.now is None else unexpired(self.stored, self.now())

    # -- what this request changed

    def changes(self, max_keys: int = sys.maxsize) -> dict[str, Change]:
        """This request's changes by key. The caller holds the mutex.

        Raises ``ValueRefused`` for a value that can't be stored. If there are more new keys than
        ``max_keys``, it raises before it encodes any.
        """
        if not self.base:
            return {}
        if len(self.base) > max_keys:
            self._check_count(max_keys)
        found: dict[str, Change] = {}
        # Copies, since encoding may call code of the application that looks at the session.
        bases, live, given = self.base.copy(), self.live.copy(), self.given
        mine: bytes | None
        for key, base in bases.items():
            if key in live:
                try:
                    mine = self._codec.encode(key, live[key])
                except SessionTooLarge:
                    mine = encode_within(self._codec, key, live[key], base)
                if self.now is not None:
                    mine = marked(mine, self.marks.get(key, PLAIN))
            else:
                mine = given.get(key)
            if mine == base:
                continue
            if base is None or base[0] != EXT_32 or not holds(base, mine):
                found[key] = Change(base, mine)
        return found

    def _check_count(self, max_keys: int) -> None:
        """Refuse too many new keys before any of them is encoded."""
        max_keys = max(max_keys, len(self.stored))
        new = (key for key, base in self.base.items() if base is None)
        count = sum(1 for key in new if key in self.live or key in self.given)
        if count > max_keys:
            raise SessionTooLarge(
                "session", f"{count} keys or more; SESSION_MAX_KEYS allows {max_keys}"
            )

    def encode(self, key: str, value: Any) -> bytes:
        """The encoded value for ``key``, without a mark. Raises ``ValueRefused``."""
        return encode_within(self._codec, key, value, self.base.get(key), self.stored.get(key))

    def has_changed(self, key: str) -> bool:
        """Whether this request changed ``key``. Raises as ``changes`` does."""
        with self.mutex:
            if key not in self.base:
                return False
            mine = self._encoded(key) if key in self.live else self.given.get(key)
            return mine != self.base[key] and not holds(self.base[key], mine)

    def was_assigned(self, key: str) -> bool:
        """Whether a changed ``key`` was certainly assigned, so its value holds nothing stored."""
        return self.base.get(key) is None or type(self.live.get(key)) in IMMUTABLE

    # -- following the store

    def rebase(
        self,
        stored: dict[str, bytes],
        now: Callable[[], int] | None = None,
        saved: Mapping[str, Change] = NO_CHANGES,
    ) -> None:
        """Continue on ``stored``, which is in the store now. The caller holds the mutex.

        Values that this request looked at or changed stay as they are. Its changes stay pending,
        except for the ``saved`` ones. If a saved change was merged into another value, the next
        change of its key is merged again. You can safely repeat this.
        """
        if self.looks is not None:
            self.end_looks()
        if now is not None:
            self.look_for_marks(now)
        base, live = self.base, self.live
        for key, change in saved.items():
            if key not in base:  # discarded since
                continue
            if change.mine is not None:
                base[key] = change.mine
            elif key not in live:  # unless it was set again
                base.pop(key, None)
            else:
                base[key] = None
        if stored is not self.stored:
            for key in self.raw_looks:
                if key not in live and key not in base:
                    base[key] = raw = self.stored.get(key)  # before the old values are gone
                    if raw is not None:
                        self.hold(key, raw)
            for key in live:
                if key not in base:
                    base[key] = self.stored.get(key)
            self.stored = stored
            if self.order is not None:
                self.order = None

    # -- helpers; the caller holds the mutex

    def end_looks(self) -> None:
        """Let further looks take the mutex, and keep what earlier ones decoded."""
        looks, self.looks = self.looks, None
        if looks is not None:
            for key, value in looks[1].copy().items():
                if key not in self.base:
                    self.live.setdefault(key, value)

    def hold(self, key: str, raw: bytes) -> None:
        if self.given is NOTHING:
            self.given = {}
        self.given[key] = raw

    def look_for_marks(self, now: Callable[[], int]) -> None:
        self.end_looks()
        if self.now is None:
            self.marks = {}
            self.now = now

    def _encoded(self, key: str) -> bytes:
        raw = self.encode(key, self.live[key])
        return raw if self.now is None else marked(raw, self.marks.get(key, PLAIN))

    def _has_expired(self, key: Any) -> bool:
        assert self.now is not None
        if key in self.live:
            return 0 < self.marks.get(key, PLAIN).expires_at <= self.now()
        return expired(self.given.get(key) or self.stored.get(key), self.now())

    def _decode_marked(self, key: str, raw: bytes) -> Any:
        mark, plain = split(raw)
        value = self._codec.decode(plain)
        self.marks[key] = mark  # not the previous value's
        return value
