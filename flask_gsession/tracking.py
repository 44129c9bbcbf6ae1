"""The values of one session: decoded when looked at, compared when saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Raw

from .codec import IMMUTABLE, Codec
from .merge import Change


class TrackedValues:
    """Values decoded one by one, and what this request did to them.

    A mutable value that was looked at is compared, in encoded form, with the bytes it came from;
    so nested changes are found, and only such values cost anything. A value that was looked at
    stays the same object until it is reloaded, whatever other requests save meanwhile.
    """

    __slots__ = ("_assigned", "_base", "_codec", "_live", "stored")

    def __init__(self, codec: Codec, stored: dict[str, Raw] | None = None) -> None:
        self._codec = codec
        #: the encoded values as the store is known to hold them
        self.stored: dict[str, Raw] = stored or {}
        self._live: dict[str, Any] = {}
        # What each key held when this request first looked at or changed it. Only keys that may
        # differ from ``stored`` are here: mutable ones, assigned ones, deleted ones.
        self._base: dict[str, Raw | None] = {}
        self._assigned: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        try:
            return self._live[key]
        except KeyError:
            pass
        if key in self._base:  # deleted by this request
            raise KeyError(key)
        raw = self.stored[key]
        value = self._live[key] = self._codec.decode(raw)
        if type(value) not in IMMUTABLE:
            self._base[key] = raw
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._base.setdefault(key, self.stored.get(key))
        self._assigned.add(key)
        self._live[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._base.setdefault(key, self.stored.get(key))
        self._assigned.discard(key)
        self._live.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._live or (key in self.stored and key not in self._base)

    def __iter__(self) -> Iterator[str]:
        live, base = self._live, self._base
        for key in self.stored:
            if key in live or key not in base:
                yield key
        for key in live:
            if key not in self.stored:
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

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

    def looked_at(self) -> dict[str, Any]:
        """The values of this request that could have changed in place."""
        return {key: self._live[key] for key in self._base if key in self._live}

    def accept(self, stored: dict[str, Raw], changes: dict[str, Change]) -> None:
        """``stored`` is in the store now, ``changes`` included; what is live stays as it is."""
        for key, change in changes.items():
            if stored.get(key) != change.mine:  # merged into something else: decode it anew
                self._live.pop(key, None)
                self._base.pop(key, None)
            elif change.mine is None:
                self._base.pop(key, None)
            else:
                self._base[key] = change.mine
            self._assigned.discard(key)
        self.follow(stored)

    def follow(self, stored: dict[str, Raw]) -> None:
        """``stored`` is in the store now; what this request looked at or changed stays as it is."""
        for key in [key for key in self._live if key not in self._base]:
            if stored.get(key) != self.stored.get(key):
                del self._live[key]
        self.stored = stored

    def settle(self, key: str, value: Any, raw: Raw) -> None:
        """``key`` holds ``value`` in the store now."""
        self._live[key] = value
        self._base[key] = raw
        self._assigned.discard(key)
