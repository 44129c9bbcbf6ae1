"""Changes of sessions in MongoDB: a change stream, or on a single server a poll every second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from pymongo.read_concern import ReadConcern

from ...errors import StoreUnavailable
from ...live.listener import Heard
from .driver import Call, Driver

_AWAIT = 0.5  # seconds that the server waits for changes
_POLL = 1.0  # seconds
_NO_STREAMS = (40573, 136)  # no replica set, or a history that isn't readable yet
_HISTORY_LOST = (280, 286)  # the resume token is too old, or from another server
_WRITES = ("insert", "update", "replace", "delete")
_EMPTYING = ("drop", "rename", "dropDatabase", "invalidate")


class MongoDBSource:
    """The replica set, as a listener's only server."""

    unproven = "a quiet change stream of MongoDB doesn't prove that nothing changed"
    one_feed = True

    def __init__(self, driver: Driver, prefix: str) -> None:
        self._driver = driver
        self._prefix = prefix
        self.timeout = driver.timeout
        self.moved: Callable[[], object] = bool
        self.shifted: Callable[[], object] = bool
        self._token: Any = None

    def servers(self) -> Iterable[Hashable]:
        return ("",)

    def server_of(self, key: str) -> Hashable:
        return ""

    def open(self, server: Hashable) -> MongoDBChanges | Polls:
        try:
            return self._open(self._token)
        except StoreUnavailable as error:
            code = getattr(error.__cause__, "code", None)
            if code in _NO_STREAMS:
                return Polls()
            if code not in _HISTORY_LOST:
                raise
        return self._open(None)

    def _open(self, token: Any) -> MongoDBChanges:
        waits = int(min(_AWAIT, self.timeout / 2) * 1000)
        kinds: list[Any] = [{"$match": {"operationType": {"$in": [*_WRITES, *_EMPTYING]}}}]
        with Call(self._driver, "watch") as collection:
            certain = collection.with_options(read_concern=ReadConcern("majority"))
            stream = certain.watch(
                [*kinds, {"$project": {"operationType": 1, "documentKey": 1}}],
                max_await_time_ms=waits,
                resume_after=token,
            )
        return MongoDBChanges(self, stream)

    def next_of(self, stream: Any) -> Any:
        """The next change of a stream, or None if there is none for a while."""
        with Call(self._driver, "watch"):
            change = stream.try_next()
        self._token = stream.resume_token
        return change

    def key_in(self, change: Any) -> str | None:
        """The key of the record that changed, if it is one of ours."""
        name = change["documentKey"]["_id"]
        ours = isinstance(name, str) and name.startswith(self._prefix)
        return name[len(self._prefix) :] if ours else None


class MongoDBChanges:
    """One change stream, which starts where the last one ended."""

    def __init__(self, source: MongoDBSource, stream: Any) -> None:
        self._source = source
        self._stream = stream
        self._shut = False

    def read(self, seconds: float) -> Heard:
        if self._shut or not self._stream.alive:
            raise StoreUnavailable("mongodb: watch: the change stream has ended")
        change = self._source.next_of(self._stream)
        if change is None:
            return Heard([])
        if change["operationType"] not in _WRITES:
            return Heard([], more=True)
        key = self._source.key_in(change)
        return Heard([] if key is None else [key])

    def beat(self) -> None:
        """Never called, since an answer would prove nothing."""

    def shut(self) -> None:
        self._shut = True

    def close(self) -> None:
        self._stream.close()


class Polls:
    """For a single server, which has no change streams: any record may have changed at any time."""

    def __init__(self) -> None:
        self._shut = threading.Event()

    def read(self, seconds: float) -> Heard:
        if self._shut.wait(_POLL):
            raise StoreUnavailable("mongodb: closed")
        return Heard([], more=True)

    def beat(self) -> None:
        """Never called, since an answer would prove nothing."""

    def shut(self) -> None:
        self._shut.set()

    def close(self) -> None:
        """Nothing to release."""
