"""The values of one session: decoded when looked at, compared when saved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from .codec import IMMUTABLE, Codec
from .errors import SessionTooLarge
from .marks import PLAIN, Mark, expired, is_marked, marked, split, unexpired
from .merge import Change, encode_within
from .references import holds, refers

_NOTHING: dict[str, bytes] = {}
_NO_KEYS: Collection[str] = ()

_ABSENT: Any = object()


class TrackedValues:
    """Values decoded one by one, and what this request did to them.

    A mutable value that was looked at is compared, in encoded form, with the bytes it came from;
    so nested changes are found, and only such values cost anything. A value that was looked at
    stays the same object until it is reloaded, whatever other requests save meanwhile.

    A value that has expired is absent to every look at it from then on. ``now`` gives the time in
    milliseconds; without it no value has a mark, and nothing is spent on looking for one.

    A large value is a reference here, which is as good as its bytes until somebody looks at it.
    """

    __slots__ = ("_base", "_codec", "_given", "_live", "_marks", "_seen", "now", "stored")

    def __init__(
        self,
        codec: Codec,
        stored: dict[str, bytes] | None = None,
        now: Callable[[], int] | None = None,
    ) -> None:
        self._codec = codec
        self.now = now
        #: the encoded values as the store is known to hold them
        self.stored: dict[str, bytes] = stored or {}
        self._live: dict[str, Any] = {}
        # What each key held when this request first looked at or changed it; None: nothing. Only
        # keys that may differ from ``stored`` are here: mutable, assigned, deleted, absent ones.
        self._base: dict[str, bytes | None] = {}
        # What a key holds for this request in encoded form, where that is not what is stored.
        self._given = _NOTHING
        self._seen = _NO_KEYS  # what was looked at in encoded form only
        if now is not None:
            self._marks: dict[str, Mark] = {}  # of what is in ``_live``

    def __getitem__(self, key: str) -> Any:
        if self.now is not None and self._has_expired(key):
            raise KeyError(key)
        value = self._live.get(key, _ABSENT)
        if value is not _ABSENT:
            return value
        raw = self._given.get(key)
        if raw is None:
            if key in self._base:  # deleted by this request, or not there when it looked
                raise KeyError(key)
            raw = self.stored.get(key)
        if raw is None:
            self._base[key] = None
            raise KeyError(key)
        value = self._codec.decode(raw) if self.now is None else self._decode_marked(key, raw)
        self._live[key] = value
        if type(value) not in IMMUTABLE:
            self._base.setdefault(key, raw)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._live[key] = value  # first: what is in ``_base`` only was deleted
        self._base.setdefault(key, self.stored.get(key))
        if self._given:
            self._given.pop(key, None)
        if self.now is not None:
            self._marks.pop(key, None)

    def give(self, key: str, raw: bytes, now: Callable[[], int]) -> None:
        """Set a value in encoded form, mark included."""
        if is_marked(raw):
            self._look_for_marks(now)
        self._base.setdefault(key, self.stored.get(key))
        self._live.pop(key, None)
        self._hold(key, raw)

    def set(self, key: str, value: Any, mark: Mark, now: Callable[[], int]) -> None:
        """Set a value with a mark."""
        self._look_for_marks(now)
        self[key] = value
        if mark != PLAIN:
            self._marks[key] = mark

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._base.setdefault(key, self.stored.get(key))
        self._live.pop(key, None)
        if self._given:
            self._given.pop(key, None)

    def __contains__(self, key: object) -> bool:
        if self.now is not None and self._has_expired(key):
            return False
        if key in self._live or key in self._given:
            return True
        if key in self._base:
            return False
        if key in self.stored:
            return True
        if isinstance(key, str):
            self._base[key] = None
        return False

    def __iter__(self) -> Iterator[str]:
        live, base = self._live, self._base
        if self._given:
            live = live | self._given
        keys = [key for key in self.stored if key in live or key not in base]
        keys += [key for key in live.copy() if key not in self.stored]
        for key in keys:
            if self.now is None or not self._has_expired(key):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check(self) -> None:
        """Raises ``UnreadableRecord`` unless every value can be decoded; keeps none of them.

        Large ones are not looked at.
        """
        for key in self:
            if key not in self._live:
                raw = self._given.get(key) or self.stored.get(key)
                if raw is not None and not refers(raw):
                    self._codec.decode(split(raw)[1])

    def raw(self, key: str) -> bytes | None:
        """A look at the encoded value, its mark included; None where there is none."""
        if self.now is not None and self._has_expired(key):
            return None
        if key in self._live:
            return self._encoded(key)
        if key in self._given:
            return self._given[key]
        if key in self._base:
            return None
        raw = self.stored.get(key)
        if raw is None:
            self._base[key] = None
        else:
            self._seen = {*self._seen, key}
        return raw

    def mark(self, key: str) -> Mark:
        """The mark of a key that is there."""
        if self.now is None:
            return PLAIN
        if key in self._live:
            return self._marks.get(key, PLAIN)
        return split(self._given.get(key) or self.stored[key])[0]

    def unexpired(self) -> dict[str, bytes]:
        """``stored``, without what has expired."""
        return self.stored if self.now is None else unexpired(self.stored, self.now())

    def changes(self, max_keys: int = sys.maxsize) -> dict[str, Change]:
        """What this request changed, key by key.

        Raises ``ValueRefused`` for a value that cannot be kept, and before it encodes any where
        there are more new keys than ``max_keys``.
        """
        max_keys = max(max_keys, len(self.stored))
        if len(self._base) > max_keys:
            new = (key for key, base in self._base.items() if base is None)
            count = sum(1 for key in new if key in self._live or key in self._given)
            if count > max_keys:
                raise SessionTooLarge(
                    "session", f"{count} keys or more; SESSION_MAX_KEYS allows {max_keys}"
                )
        found: dict[str, Change] = {}
        if not self._base:
            return found
        # Written out: every write of every session comes by here. Of copies, since another thread
        # of the request may look at further keys meanwhile; this one first, as they are written.
        bases = self._base.copy()
        live, encode, marks = self._live.copy(), self._codec.encode, self.now is not None
        for key, base in bases.items():
            try:
                mine = encode(key, live[key]) if key in live else None
            except SessionTooLarge:
                mine = encode_within(self._codec, key, live[key], base)
            if marks and mine is not None:
                mine = marked(mine, self._marks.get(key, PLAIN))
            if mine is None:
                mine = self._given.get(key)
            if mine != base and not holds(base, mine):
                found[key] = Change(base, mine)
        return found

    def encode(self, key: str, value: Any) -> bytes:
        """The encoded value, without a mark, as ``key`` may hold it. Raises ``ValueRefused``."""
        return encode_within(self._codec, key, value, self._base.get(key), self.stored.get(key))

    def has_changed(self, key: str) -> bool:
        """Whether this request changed ``key``. Raises as ``changes`` does."""
        if key not in self._base:
            return False
        mine = self._encoded(key) if key in self._live else self._given.get(key)
        return mine != self._base[key] and not holds(self._base[key], mine)

    def accept(self, stored: dict[str, bytes], changes: Mapping[str, Change]) -> None:
        """``stored`` is in the store now, ``changes`` included.

        What this request holds stays as it is, also where its change was merged into something
        else: its next change is then merged again.
        """
        for key, change in changes.items():
            if change.mine is None:
                del self._base[key]
            else:
                self._base[key] = change.mine
        self.follow(stored)

    def follow(self, stored: dict[str, bytes], now: Callable[[], int] | None = None) -> None:
        """``stored`` is in the store now; what this request looked at or changed stays as it is."""
        if now is not None:
            self._look_for_marks(now)
        if stored is not self.stored:
            for key in self._seen:
                if key not in self._live and key not in self._base:
                    self._look(key)  # in the old state
            for key in self._live.copy():
                self._base.setdefault(key, self.stored.get(key))
            self.stored = stored

    def settle(self, key: str, value: Any, raw: bytes) -> None:
        """``key`` holds ``value`` in the store now."""
        self._live[key] = value
        if self._given:
            self._given.pop(key, None)
        self._base[key] = raw
        if self.now is not None:
            self._marks[key] = split(raw)[0]

    def drop(self, key: str) -> None:
        """The store holds nothing under ``key`` any more, by what this request did."""
        self._live.pop(key, None)
        if self._given:
            self._given.pop(key, None)
        self._base[key] = None

    def held(self, key: str) -> bytes | None:
        """The encoded value of a key that was not decoded; None for any other."""
        if key not in self or key in self._live:
            return None
        return self._given.get(key) or self.stored[key]

    def correct(self, key: str, raw: bytes, now: Callable[[], int]) -> None:
        """What was to be under ``key`` is lost; this is stored there by now."""
        self.hide(key)
        del self._base[key]
        if is_marked(raw):
            self._look_for_marks(now)
        self.stored = {**self.stored, key: raw}

    def hide(self, key: str) -> None:
        """What is under ``key`` is lost: it is absent, and nothing that this request did."""
        self._live.pop(key, None)
        if self._given:
            self._given.pop(key, None)
        self._base[key] = None

    def _look(self, key: str) -> None:
        raw = self.stored[key]
        if refers(raw):
            self._base[key] = raw
            self._hold(key, raw)
        else:
            self[key]

    def _hold(self, key: str, raw: bytes) -> None:
        if self._given is _NOTHING:
            self._given = {}
        self._given[key] = raw

    def _look_for_marks(self, now: Callable[[], int]) -> None:
        if self.now is None:
            self.now, self._marks = now, {}

    def _encoded(self, key: str) -> bytes:
        raw = self.encode(key, self._live[key])
        return raw if self.now is None else marked(raw, self._marks.get(key, PLAIN))

    def _has_expired(self, key: Any) -> bool:
        assert self.now is not None
        if key in self._live:
            return 0 < self._marks.get(key, PLAIN).expires_at <= self.now()
        return expired(self._given.get(key) or self.stored.get(key), self.now())

    def _decode_marked(self, key: str, raw: bytes) -> Any:
        mark, plain = split(raw)
        value = self._codec.decode(plain)
        self._marks[key] = mark  # and not that of what was here before
        return value
