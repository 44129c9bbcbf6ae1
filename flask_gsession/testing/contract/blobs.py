"""The contract of the part ``blobs``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ...errors import Gone
from ...stores.base import (
    milliseconds,
)
from ...stores.parts import parts_of
from ..clock import FakeClock
from ..records import a_blob
from .base import Contract, clean_up


class BlobContract(Contract):
    @contextmanager
    def _with_blobs(self) -> Iterator[tuple[Any, FakeClock]]:
        """The part ``blobs``; None if the store lacks it."""
        with self._store() as (store, clock):
            yield parts_of(store).blobs, clock

    def test_a_blob_reads_as_it_was_written(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            end = milliseconds(clock) + 60_000
            frames = {0: bytes(range(256)) * 1024, 262_144: b"\0" * 262_144, 524_288: b"end"}
            one, other = a_blob(), a_blob()
            for offset, frame in frames.items():
                blobs.write_frame(one, offset, frame, end)
            blobs.write_frame(other, 0, b"\0", end)
            for offset, frame in frames.items():
                assert blobs.read_frame(one, offset, len(frame)) == frame
            assert blobs.read_frame(other, 0, 1) == b"\0"

    def test_a_frame_that_was_not_written_is_none(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            name = a_blob()
            assert blobs.read_frame(name, 0, 10) is None
            blobs.write_frame(name, 0, b"0123456789", milliseconds(clock) + 60_000)
            assert blobs.read_frame(name, 10, 10) is None
            assert blobs.read_frame(a_blob(), 0, 10) is None

    def test_a_frame_may_be_written_again(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            name, end = a_blob(), milliseconds(clock) + 60_000
            for offset, frame in ((0, b"first"), (0, b"first"), (5, b"second"), (5, b"second")):
                blobs.write_frame(name, offset, frame, end)
            blobs.write_frame(name, 0, b"first", end)  # a late duplicate
            assert blobs.read_frame(name, 0, 5) == b"first"
            assert blobs.read_frame(name, 5, 6) == b"second"

    def test_a_later_frame_creates_no_blob(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            name = a_blob()
            with suppress(Gone):
                blobs.write_frame(name, 5, b"second", milliseconds(clock) + 60_000)
            assert blobs.read_frame(name, 0, 5) is None

    def test_a_blob_stays_until_its_expiry(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            names = [a_blob() for _ in range(3)]
            for name in names:
                blobs.write_frame(name, 0, b"frame", milliseconds(clock) + 10_000)
            blobs.renew_blobs(names[1:], milliseconds(clock) + 60_000)
            blobs.renew_blobs(names[2:], milliseconds(clock) + 20_000)  # its current expiry
            clock.advance(9)
            assert [blobs.read_frame(name, 0, 5) for name in names] == [b"frame"] * 3
            clock.advance(50)
            assert [blobs.read_frame(name, 0, 5) for name in names[1:]] == [b"frame"] * 2

    def test_a_renewal_creates_no_blob(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            name = a_blob()
            blobs.renew_blobs([name], milliseconds(clock) + 60_000)
            assert blobs.read_frame(name, 0, 5) is None

    def test_discarded_blobs_are_removed(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            now, names = milliseconds(clock), [a_blob() for _ in range(4)]
            for name in names:
                for offset in (0, 5):
                    blobs.write_frame(name, offset, b"frame", now + 60_000)
            blobs.discard_blobs(names[:2], now)
            blobs.discard_blobs([names[2]], now + 30_000)
            blobs.discard_blobs([names[2]], now + 90_000)  # it expires earlier
            blobs.discard_blobs([a_blob(), names[0]], now)
            for offset in (0, 5):
                found = [blobs.read_frame(name, offset, 5) for name in names]
                assert found == [None, None, b"frame", b"frame"]

    def test_a_clean_up_removes_expired_blobs(self) -> None:
        with self._store() as (store, clock):
            blobs, upkeep = parts_of(store).blobs, parts_of(store).upkeep
            if blobs is None or upkeep is None:
                return
            end = milliseconds(clock) + 10_000
            short, long = a_blob(), a_blob()
            for name in (short, long):
                blobs.write_frame(name, 0, b"frame", end)
                blobs.write_frame(name, 5, b"frame", end)
            blobs.renew_blobs([long], end + 10_000)
            clock.advance(10)
            if not clean_up(upkeep, dry_run=False).get("expired large values"):
                return  # the server itself removes them
            clock.advance(-10)
            assert blobs.read_frame(short, 0, 5) is None
            assert blobs.read_frame(short, 5, 5) is None
            assert blobs.read_frame(long, 5, 5) == b"frame"
