"""The large values of sessions: which values are too large for a record, and where they go.

``values.large_values`` writes and reads the frames of one value.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from ..config import Settings
from ..errors import CutOff, SessionTooLarge, UnreadableRecord, ValueLost
from ..stores.parts import Blobs
from ..values.codec import Codec
from ..values.large_values import LargeValueStorage, pieces_of
from ..values.marks import marked, split
from ..values.payload import Body, BodyFormat
from ..values.references import BLANK, BYTES, Reference, content_of, length_of, names_in, refers
from .expiry import blob_expiry

# A replaced large value stays this long, for requests that loaded the session before.
BLOB_GRACE = 60_000  # milliseconds

#: The large values that a request has written, by kind and digest.
Written = dict[tuple[int, bytes], Reference]


class LargeValues:
    """Moves large values out of records, and reads, renews and discards them."""

    def __init__(
        self,
        storage: LargeValueStorage | None,
        settings: Settings,
        bodies: BodyFormat,
        codec: Codec,
        now: Callable[[], int],
    ) -> None:
        #: None if there is no place for large values
        self.storage = storage
        limit = None if storage is None else settings.spill_bytes
        self._inline = sys.maxsize if limit is None else limit
        self._total = settings.total_limit
        self._bodies = bodies
        self._codec = codec
        self._now = now

    def through(self, blobs: Blobs, codec: Codec) -> LargeValues:
        """A copy that uses another object for the same blobs, such as a wrapper."""
        other = copy.copy(self)
        assert self.storage is not None  # it has blobs
        other.storage, other._codec = self.storage.through(blobs), codec
        return other

    # -- at a save

    def is_any_too_long(
        self, values: Mapping[str, bytes], changed: Iterable[str], others: int = 0
    ) -> bool:
        """Whether one of the encoded values needs a place outside the record.

        Looks only at ``changed`` if no other value can be longer than ``others``, in bytes.
        """
        if others > self._inline:
            changed = values
        inline = self._inline
        for key in changed:  # noqa: SIM110  # a generator is slower
            if key in values and len(values[key]) > inline:
                return True
        return False

    def write(
        self,
        body: Body,
        expires_at: Callable[[], int],
        written: Written,
        before: Mapping[str, bytes],
    ) -> dict[str, bytes]:
        """Write the large values of ``body``, and return its values with references to them.

        ``written`` holds the large values that this request has written already; this adds to it,
        and writes each value once. ``before`` holds the session's values as they are stored. If
        one of them exceeds a limit that was lowered since, it may stay, or be replaced by a value
        that is no longer. Raises ``ValueRefused`` before it writes anything, and
        ``StoreUnavailable``. One round trip for each frame.
        """
        values = body.values
        large = [key for key, raw in values.items() if self._is_too_long(raw)]
        self._check_total(values, before)
        if not large:
            return values
        storage = self.storage
        assert storage is not None  # otherwise no value is too long
        moved = []
        for key in large:
            raw, stored = values[key], before.get(key)
            length = len(content_of(split(raw)[1])[1])
            if length > storage.max_bytes and raw == stored:
                continue
            if length > length_of(stored):
                storage.check(f"session[{ascii(key)[:60]}]", length)
            moved.append(key)
        blank = {key: marked(BLANK, split(values[key])[0]) for key in moved}
        self._bodies.encode(replace(body, values={**values, **blank}), lambda: before)  # may refuse
        return {**values, **self._write({key: values[key] for key in moved}, expires_at, written)}

    def write_all(
        self, values: Mapping[str, bytes], expires_at: Callable[[], int], written: Written
    ) -> dict[str, bytes]:
        """Write the values that are too long, without checking limits. Returns as ``write``."""
        large = {key: raw for key, raw in values.items() if self._is_too_long(raw)}
        return {**values, **self._write(large, expires_at, written)}

    def _is_too_long(self, raw: bytes) -> bool:
        return len(raw) > self._inline and not refers(raw)

    def _write(
        self, values: Mapping[str, bytes], expires_at: Callable[[], int], written: Written
    ) -> dict[str, bytes]:
        """The references to these values."""
        storage, found = self.storage, {}
        for key, raw in values.items():
            assert storage is not None  # otherwise no value is too long
            mark, plain = split(raw)
            kind, content = content_of(plain)
            same = (kind, hashlib.sha256(content).digest())
            if same not in written:
                pieces = pieces_of(content, storage.frame_bytes)
                written[same] = storage.write(key, kind, pieces, expires_at, len(content))
            found[key] = marked(written[same].pack(), mark)
        return found

    # -- limits

    def room_for(self, key: str, stored: Mapping[str, bytes]) -> int:
        """How many bytes a large value under ``key`` may have, given the other large values."""
        there = self._lengths(stored)
        own, total = there.pop(key, 0), sum(there.values())
        return max(self._total - total, own)

    def _check_total(self, values: Mapping[str, bytes], before: Mapping[str, bytes]) -> None:
        """Raises ``SessionTooLarge`` if the large values of a session exceed the limit together.

        The values ``before`` may exceed it, if the setting was lowered since they were stored.
        """
        lengths = self._lengths(values)
        total, limit = sum(lengths.values()), self._total
        if total > limit and total > sum(self._lengths(before).values()):
            largest = max(lengths, key=lambda key: lengths[key])
            raise SessionTooLarge(
                "session",
                f"{total} bytes in large values; SESSION_MAX_TOTAL_BYTES allows {limit}; "
                f"the largest key is {ascii(largest)[:60]}",
            )

    def _lengths(self, values: Mapping[str, bytes]) -> dict[str, int]:
        """The length in bytes of each large value, by key."""
        return {
            key: length_of(raw) if refers(raw) else len(content_of(split(raw)[1])[1])
            for key, raw in values.items()
            if refers(raw) or len(raw) > self._inline
        }

    # -- once they are written

    def resolve(self, data: bytes) -> Any:
        """The value of a reference. Raises ``ValueLost`` and ``StoreUnavailable``."""
        if self.storage is None:
            raise ValueLost("missing")
        reference = Reference.of(data)
        content = self.storage.read(reference)
        if reference.kind == BYTES:
            return content
        try:
            return self._codec.decode(content)
        except UnreadableRecord:
            raise ValueLost("altered") from None

    def discard(self, names: Iterable[str], grace: int) -> None:
        """Delete these blobs in ``grace`` milliseconds. One round trip. Only logs an outage."""
        if self.storage is not None and (all_of := sorted(names)):
            self.storage.discard(all_of, self._now() + grace)

    def renew(self, references: Iterable[Reference], end: int) -> None:
        """Keep these blobs until ``end``, in milliseconds. One round trip."""
        if self.storage is not None:
            self.storage.renew(sorted(reference.name for reference in references), end)

    def renew_for(self, body: Body, idle_end: int) -> bool:
        """Renew the large values of a session before you store it with this idle expiry.

        Returns False at an edge that is cut off, which renews them when it settles. The edge may
        reach its centre again before you store the session, so call this once more afterwards.
        """
        if body.has_large and self.storage is not None:
            names = sorted(names_in(body.values.values()))
            try:
                self.storage.renew(names, blob_expiry(idle_end))
            except CutOff:
                return False
        return True


def names_of(body: Body) -> set[str]:
    """The names of all large values of a record, including the ones in its joins."""
    sides = (body.values, *(join.values for join in body.joins))
    return set().union(*(names_in(side.values()) for side in sides))
