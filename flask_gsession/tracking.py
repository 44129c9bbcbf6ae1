"""The values of one session: decoded when looked at, compared when saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .codec import IMMUTABLE, Codec
from .merge import Change


class TrackedValues:
    """Values decoded one by one, and what this request did to them.

    A mutable value that was looked at is compared, in encoded form, with the bytes it came from;
    so nested changes are found, and only such values cost anything. A value that was looked at
    stays the same object until it is reloaded, whatever other requests save meanwhile.
    """

    __slots__ = ("_base", "_codec", "_live", "stored")

    def __init__(self, codec: Codec, stored: dict[str, bytes] | None = None) -> None:
        self._codec = codec
        #: the encoded values as the store is known to hold them
        self.stored: dict[str, bytes] = stored or {}
        self._live: dict[str, Any] = {}
        # What each key held when this request first looked at or changed it; None: nothing. Only
        # keys that may differ from ``stored`` are here: mutable, assigned, deleted, absent ones.
        self._base: dict[str, bytes | None] = {}

    def __getitem__(self, key: str) -> Any:
        try:
            return self._live[key]
        except KeyError:
            pass
        if key in self._base:  # deleted by this request, or not there when it looked
            raise KeyError(key)
        raw = self.stored.get(key)
        if raw is None:
            self._base[key] = None
            raise KeyError(key)
        value = self._live[key] = self._codec.decode(raw)
        if type(value) not in IMMUTABLE:
            self._base[key] = raw
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._base.setdefault(key, self.stored.get(key))
        self._live[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._base.setdefault(key, self.stored.get(key))
        self._live.pop(key, None)

    def __contains__(self, key: object) -> bool:
        if key in self._live:
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
        for key in list(self.stored):
            if key in live or key not in base:
                yield key
        for key in list(live):
            if key not in self.stored:
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check(self) -> None:
        """Raises ``UnreadableRecord`` unless every value can be decoded; keeps none of them."""
        for key in self:
            if key not in self._live:
                self._codec.decode(self.stored[key])

    def changes(self) -> dict[str, Change]:
        """What this request changed, key by key.

        Raises ``ValueRefused`` for a value that cannot be kept.
        """
        found: dict[str, Change] = {}
        for key, base in self._base.items():
            mine = self._codec.encode(key, self._live[key]) if key in self._live else None
            if mine != base:
                found[key] = Change(base, mine)
        return found

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

    def follow(self, stored: dict[str, bytes]) -> None:
        """``stored`` is in the store now; what this request looked at or changed stays as it is."""
        if stored is not self.stored:
            for key in self._live:
                self._base.setdefault(key, self.stored.get(key))
            self.stored = stored

    def settle(self, key: str, value: Any, raw: bytes) -> None:
        """``key`` holds ``value`` in the store now."""
        self._live[key] = value
        self._base[key] = raw
