"""Changes in the remote store, in one ordered stream with the answers to our beats."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from ...errors import StoreUnavailable
from ...live.listener import Heard, now
from ...protocol import gsession_pb2 as pb
from ...protocol.methods import is_understood
from ..parts import NEVER
from .channel import Channel
from .forks import guard

_ONLY = ""  # the name of the only server
_ENDING = 1.0  # seconds for gRPC's threads to end
_LONGEST_PAUSE = 60.0  # seconds without a stream, if loads keep reaching other servers


class RemoteSource:
    """The session server, as a listener's only server."""

    unproven = ""  # a server that can't prove freshness says so; then nothing is cached
    one_feed = True

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.timeout = channel.timeout
        #: gives the seconds between beats
        self.interval: Callable[[], float] = lambda: self.timeout / 4
        self.moved: Callable[[], object] = bool
        self.shifted: Callable[[], object] = bool
        self._stream: RemoteChanges | None = None
        self._strangers = 0  # other servers than the stream's that answered loads lately
        self._met_at = self._open_at = NEVER

    @property
    def number(self) -> int | None:
        """The number of the server whose changes arrive; None if there is none."""
        stream = self._stream
        return None if stream is None else stream.number

    def answered_by(self, number: int, heard: int) -> None:
        """Note that the server ``number`` answered a load while changes arrived from ``heard``.

        Called before the record is used. Another server may read from another primary, for example
        after a failover that only one of them has noticed. This stream proves nothing about such a
        load, so the listener begins again.
        """
        if number == heard or heard != self.number:
            return
        moment = now()
        if moment - self._met_at > 2 * _LONGEST_PAUSE:
            self._strangers = 0
        self._met_at = moment
        self._strangers += 1
        if self._strangers > 1:  # the first one may be due to a new connection
            self._open_at = moment + min(_LONGEST_PAUSE, 0.5 * 2 ** min(self._strangers, 10))
        self._stream = None
        self.moved()

    def servers(self) -> Iterable[Hashable]:
        return (_ONLY,)

    def server_of(self, key: str) -> Hashable:
        return _ONLY

    def open(self, server: Hashable) -> RemoteChanges:
        if now() < self._open_at:
            raise StoreUnavailable(
                f"grpc {self._channel.address.target}: calls and changes reach different servers: "
                "route all connections of a process to one server"
            )
        self._channel.renew_certificates()
        stream = RemoteChanges(self._channel, self.interval(), self._left)
        self._stream = stream
        return stream

    def _left(self, stream: RemoteChanges) -> None:
        if self._stream is stream:
            self._stream = None


class RemoteChanges:
    """One stream, from the server with ``number``."""

    def __init__(
        self, channel: Channel, interval: float, left: Callable[[RemoteChanges], object]
    ) -> None:
        self._channel = channel
        self._left = left
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._replies: SimpleQueue[Any] = SimpleQueue()
        self._number = 0
        self._requests.put(pb.WatchRequest(interval=interval, name_server=True))
        self._reader = threading.Thread(target=self._read, name="gsession-watch", daemon=True)
        channel.stream("Watch", iter(self._requests.get, None), self._begun)
        try:
            try:
                self._reader.start()
            except RuntimeError as error:  # the system can't start a thread
                raise StoreUnavailable(f"grpc: Watch needs a thread: {error}") from error
            first = self._next(channel.timeout)
            if not first.started or not first.HasField("server"):
                raise channel.incomplete("Watch")
            self.number: int = first.server
        except Empty:
            self.close()
            raise StoreUnavailable("grpc: Watch: the server did not begin in time") from None
        except BaseException:
            self.close()
            raise

    def _begun(self, call: Any) -> None:
        self._call = call
        guard.add(self)

    def _read(self) -> None:
        try:
            for reply in self._call:
                self._replies.put(reply)
            self._replies.put(StoreUnavailable("grpc: Watch: the server ended the stream"))
        except grpc.RpcError as error:
            self._replies.put(self._channel.translated("Watch", error))
        finally:
            self._requests.put(None)

    def _next(self, seconds: float) -> Any:
        reply = self._replies.get(timeout=max(0.0, seconds))
        if isinstance(reply, Exception):
            self._replies.put(reply)  # for the next call, too
            raise reply
        if not is_understood(reply):
            raise self._channel.incomplete("Watch")
        return reply

    def beat(self) -> None:
        self._number += 1
        self._requests.put(pb.WatchRequest(beat=self._number))

    def read(self, seconds: float) -> Heard:
        """The changes and answers within ``seconds``. Returns early if there are any."""
        keys: list[str] = []
        answers = 0
        try:
            reply = self._next(seconds)
            while True:
                keys += reply.keys
                answers += reply.HasField("beat")
                reply = self._next(0.0)
        except Empty:
            pass
        return Heard(keys, answers)

    def shut(self) -> None:
        """Cancel the stream, so that the reading thread notices."""
        self._cancel()

    def close(self) -> None:
        self._left(self)
        self._cancel()
        self._requests.put(None)
        if self._reader.is_alive() and threading.current_thread() is not self._reader:
            self._reader.join(_ENDING)
        guard.remove(self)

    def _cancel(self) -> None:
        self._channel.shielded(self._call.cancel)

    def end_before_fork(self) -> None:
        """End the stream and its threads. The listener opens a new one after the fork."""
        guard.remove(self)
        self._cancel()
        self._requests.put(None)
        until = time.monotonic() + _ENDING
        while time.monotonic() < until and (self._reader.is_alive() or _grpc_runs_threads()):
            time.sleep(0.001)


def _grpc_runs_threads() -> bool:
    """Whether gRPC runs threads for streams. It names threads after their functions."""
    names = ("(channel_spin)", "(consume_request_iterator)")
    return any(thread.name.endswith(names) for thread in threading.enumerate())
