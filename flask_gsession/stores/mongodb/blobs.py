"""The part ``blobs`` of a MongoDB store: each frame of a large value is a document."""

from __future__ import annotations

from collections.abc import Sequence

from bson.datetime_ms import DatetimeMS

from ..parts import Blobs
from .driver import Document, Driver, call
from .layout import Layout
from .round_trips import SessionCollection


class MongoDBBlobs(Blobs):
    """Keeps large values, which a TTL index removes when they expire."""

    def __init__(self, driver: Driver, layout: Layout) -> None:
        self.driver = driver
        self.layout = layout

    @call("write_frame")
    def write_frame(
        self, collection: SessionCollection, name: str, offset: int, frame: bytes, expires_at: int
    ) -> None:
        end = DatetimeMS(expires_at)
        document = {"_id": self._frame_id(name, offset), "expires_at": end, "frame": frame}
        blobs = collection.of(self.driver.blobs)
        blobs.replace_one({"_id": document["_id"]}, document, upsert=True)
        self.driver.ensure_index(blobs, "expires_at")

    @call("read_frame")
    def read_frame(
        self, collection: SessionCollection, name: str, offset: int, size: int
    ) -> bytes | None:
        now = DatetimeMS(self.layout.now())
        wanted = {"_id": self._frame_id(name, offset), "expires_at": {"$gt": now}}
        found = collection.of(self.driver.blobs).find_one(wanted, ["frame"])
        frame = None if found is None else found.get("frame")
        return frame if isinstance(frame, bytes) else None

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        self._move_expiry(names, {"$max": {"expires_at": DatetimeMS(expires_at)}})

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        if at > self.layout.now():
            self._move_expiry(names, {"$min": {"expires_at": DatetimeMS(at)}})
        else:
            self._delete_blobs(names)

    @call("discard_blobs")
    def _delete_blobs(self, collection: SessionCollection, names: Sequence[str]) -> None:
        collection.of(self.driver.blobs).delete_many(self._frames_of(names))

    @call("renew_blobs")
    def _move_expiry(
        self, collection: SessionCollection, names: Sequence[str], update: Document
    ) -> None:
        live = {"expires_at": {"$gt": DatetimeMS(self.layout.now())}}
        collection.of(self.driver.blobs).update_many({**self._frames_of(names), **live}, update)

    def _frame_id(self, name: str, offset: int) -> str:
        return f"{self.layout.prefix}{name}:{offset:010}"

    def _frames_of(self, names: Sequence[str]) -> Document:
        start = (f"{self.layout.prefix}{name}" for name in names)
        return {"$or": [{"_id": {"$gt": f"{each}:", "$lt": f"{each};"}} for each in start]}
