"""A gRPC channel per process. Each call has one time budget, and raises the store's errors."""

from __future__ import annotations

import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from ...errors import StoreError, StoreUnavailable
from ...processes import process
from ...protocol import gsession_pb2 as pb
from ...protocol.errors import error_in
from ...protocol.methods import LONGEST_MESSAGE, is_understood, methods_of
from ..interrupts import reraise_interruption
from ..support import closing, count_round_trip, time_left
from .address import Address
from .forks import guard
from .shield import Overdue, Shield, has_gevent

_METHODS = methods_of("Store")
_RECONNECT = 0.25  # the share of the budget for a repeat on another connection
_LONGEST_WAIT = 5.0  # seconds that a call may take beyond the budget
_OVERDUE = 2.0  # seconds beyond the budget after which gRPC itself counts as stuck
_CALM = 0.05  # seconds for gRPC's own threads to finish with a closed channel
_MOST_UNSETTLED = 10_000  # keys
_KEEPALIVE = 10  # seconds
#: The status if the connection was lost, or the server is shutting down. All calls can be repeated.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class _Connected:
    """A channel of gRPC, the calls that were made over it, and the function that closes it."""

    __slots__ = ("_channel", "calls", "close")

    def __init__(self, channel: Any, close: weakref.finalize[..., object]) -> None:
        self._channel = channel
        self.close = close
        self.calls: dict[str, Callable[..., Any]] = {}

    def prepare(self, name: str) -> Callable[..., Any]:
        """The function that makes the call ``name``."""
        method = _METHODS[name]
        send: Callable[..., Any]
        if method.streams:
            send = self._channel.stream_stream(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.reply.FromString,
            )
        else:
            # Use bytes: gRPC would mistake an exception from outside for an encoding error.
            send = self._channel.unary_unary(method.path)
        self.calls[name] = send
        return send


class Channel:
    """Calls the server at ``address``. A call and its repeats take at most ``timeout`` seconds."""

    def __init__(self, address: Address, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        token = address.token
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        #: by session key: the versions of writes that may still be on their way
        self._unsettled: dict[str, set[int]] = {}
        self._connected: _Connected | None = None  # other threads replace it at any time
        self._inherited: list[object] = []
        self._dropped: list[tuple[float, Any]] = []  # when, and the function that closes it
        # A signal handler may call the store, too, so each thread may take a lock twice.
        self._lock = threading.RLock()  # never held while gRPC runs, in which it may be stuck
        self._opening = threading.RLock()
        self._shield = Shield()
        process.register(self._begin)

    def _begin(self) -> None:
        """In a forked process: leave the channel of the parent alone, and open another."""
        self._lock = threading.RLock()
        self._opening = threading.RLock()
        self._shield = Shield()
        connected, self._connected = self._connected, None
        dropped, self._dropped = [close for _, close in self._dropped], []
        if connected is not None:
            # Never garbage-collected: that would need gRPC's threads.
            self._inherited.append(connected)
            dropped.append(connected.close)
        self._inherited += [close.detach() for close in dropped]

    def call(self, name: str, request: Any, seconds: float = 0.0) -> Any:
        """The reply to ``request``, after at most ``seconds`` more than the time budget.

        Raises the remote store's error, or ``StoreUnavailable``.
        """
        process.notice()
        budget = time_left(self.timeout + seconds)
        request = request.SerializeToString()
        try:
            raw = self._shield.run(lambda: self._exchange(name, request, budget), budget + _OVERDUE)
        except grpc.RpcError as error:
            self._fail(name, error)
        except Overdue:
            self._drop()
            raise StoreUnavailable(f"{self._where(name)}: gRPC itself is stuck") from None
        except BaseException:  # from outside; the call may still be running
            guard.add(self)
            raise
        try:
            reply: Any = _METHODS[name].reply.FromString(raw)
        except DecodeError:
            raise self.incomplete(name) from None
        if not is_understood(reply):
            raise StoreUnavailable(f"{self._where(name)}: {_OTHER_VERSION}")
        return reply

    def _exchange(self, name: str, request: bytes, budget: float) -> Any:
        """The reply, over another connection if the first one was lost."""
        deadline = time.monotonic() + budget
        count_round_trip()
        try:
            try:
                return guard.run(lambda: self._send(name, request, budget))
            except grpc.RpcError as error:
                left = deadline - time.monotonic()
                if left <= 0 or not _is_lost(error):
                    raise
                return self._exchange_again(name, request, left, error)
        except grpc.RpcError:
            raise
        except BaseException as struck:  # by another thread, or by a signal under gevent
            traceback.clear_frames(struck.__traceback__)  # suspended generators of gRPC hold locks
            self._drop()
            raise

    def _exchange_again(self, name: str, request: bytes, left: float, lost: Any) -> Any:
        """The reply over another connection, if there is one soon."""
        self.renew_certificates()
        count_round_trip()
        # Old versions of gRPC connect only while a thread waits in a call.
        seconds = min(left, max(self.timeout * _RECONNECT, left - self.timeout))
        try:
            return guard.run(lambda: self._send(name, request, seconds, wait_for_ready=True))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise lost from None
            raise

    def renew_certificates(self) -> None:
        """Use a new channel if the certificate files were replaced. Called before connecting."""
        certificates = self.address.certificates
        if certificates is not None and certificates.renewed():
            self._drop()

    def _drop(self) -> None:
        """Use a new channel from now on, since an exception may have broken this one."""
        connected = self._take_connected()
        if connected is not None:
            self._dropped.append((time.monotonic(), connected.close))
        self._close_dropped(2 * self.timeout + _LONGEST_WAIT)

    def _close_dropped(self, seconds: float) -> None:
        """Close dropped channels that no thread can still be using."""
        now = time.monotonic()
        for dropped in list(self._dropped):
            when, close = dropped
            if now - when < seconds:
                return
            close()  # once: the second time has no effect
            with suppress(ValueError):  # another thread was faster
                self._dropped.remove(dropped)

    def _take_connected(self) -> _Connected | None:
        """The current channel. The next call opens another one."""
        with self._lock:
            connected, self._connected = self._connected, None
        return connected

    def write(self, name: str, request: Any, version: int, *keys: str) -> Any:
        """The reply to a write of ``version`` under these keys.

        If its outcome is unknown, it is settled before the next call about one of the keys.
        """
        try:
            return self.call(name, request)
        except StoreUnavailable:
            self._note(version, keys)
            raise
        except StoreError:
            raise
        except BaseException:  # a signal, or another thread, ended the wait
            self._note(version, keys)
            raise

    def _note(self, version: int, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._unsettled.setdefault(key, set()).add(version)
            while len(self._unsettled) > _MOST_UNSETTLED:
                self._unsettled.pop(next(iter(self._unsettled)))

    def settle(self, *keys: str) -> None:
        """Make sure that no earlier write under these keys is applied later, if there are any."""
        if not self._unsettled:
            return
        with self._lock:
            versions = {version for key in keys for version in self._unsettled.get(key, ())}
        if versions:
            if not self.call("Settle", pb.SettleRequest(versions=versions)).done:
                raise self.incomplete("Settle")
            with self._lock:
                for key in keys:
                    left = self._unsettled.pop(key, versions) - versions
                    if left:  # another thread has settled it
                        self._unsettled[key] = left

    def incomplete(self, name: str) -> StoreUnavailable:
        """The error for a reply that lacks a required field."""
        return StoreUnavailable(f"{self._where(name)}: {_OTHER_VERSION}")

    def stream(self, name: str, requests: Iterator[Any], begun: Callable[[Any], object]) -> None:
        """Begin a call with many messages in both directions.

        ``begun`` gets the call, whose replies one iterates over, before a fork can continue.
        """
        process.notice()
        self.shielded(lambda: guard.run(lambda: begun(self._send(name, requests, None))))

    def shielded(self, call: Callable[[], Any]) -> Any:
        """Run ``call``, which doesn't wait for the server, safe from signals."""
        try:
            return self._shield.run(call, self.timeout + _LONGEST_WAIT)
        except Overdue:
            raise StoreUnavailable(f"grpc {self.address.target}: gRPC is stuck") from None

    def _send(
        self, name: str, request: Any, seconds: float | None, wait_for_ready: bool = False
    ) -> Any:
        while True:
            connected = self._connected or self._connect()
            send = connected.calls.get(name) or connected.prepare(name)
            try:
                return send(
                    request, timeout=seconds, metadata=self._metadata, wait_for_ready=wait_for_ready
                )
            except grpc.RpcError as error:
                # Release the call before a fork continues.
                raise error.with_traceback(None) from None
            except ValueError:  # gRPC's error for a closed channel, before it sends anything
                if connected is self._connected:
                    raise
            # Another thread closed the channel just before: use the next one.

    def _connect(self) -> _Connected:
        with self._opening:
            connected = self._connected
            if connected is None:
                if self._inherited and _forks_unsupported():
                    raise StoreUnavailable(
                        "grpc: this process was forked after its parent had used gRPC, and "
                        "GRPC_ENABLE_FORK_SUPPORT is turned off: remove that variable"
                    )
                channel = self._open()
                connected = _Connected(channel, closing(self, channel.close))
                self._connected = connected
            return connected

    def _open(self) -> Any:
        _prepare_for_gevent()
        address, milliseconds = self.address, int(self.timeout * 1000)
        options: list[tuple[str, object]] = [
            ("grpc.max_receive_message_length", LONGEST_MESSAGE),
            ("grpc.max_send_message_length", LONGEST_MESSAGE),
            ("grpc.enable_retries", 0),  # we retry here, within the budget
            ("grpc.enable_http_proxy", 0),  # HTTP proxies are for web pages
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            (
                "grpc.min_reconnect_backoff_ms",
                max(100, milliseconds),
            ),  # also limits how long connecting takes
            ("grpc.keepalive_time_ms", _KEEPALIVE * 1000),
            ("grpc.keepalive_timeout_ms", max(1000, milliseconds)),
        ]
        if address.certificates is None:
            return grpc.insecure_channel(address.target, options)
        if address.name is not None:
            options.append(("grpc.ssl_target_name_override", address.name))
        ca, chain, key = address.certificates.current
        return grpc.secure_channel(
            address.target, grpc.ssl_channel_credentials(ca, key, chain), options
        )

    def _fail(self, name: str, error: Any) -> NoReturn:
        reraise_interruption(error)
        raise self.translated(name, error) from None

    def translated(self, name: str, error: Any) -> StoreError:
        """The store's error for an error of gRPC."""
        answer = error_in(error.trailing_metadata())
        if answer is not None:
            if isinstance(answer, StoreUnavailable):
                answer.detail = f"{self._where(name)}: {answer.detail}"
            return answer
        code = error.code()
        details = " ".join(str(error.details() or "").split())[:200]
        return StoreUnavailable(
            f"{self._where(name)}: {code.name}: {details}",
            contention=code is grpc.StatusCode.RESOURCE_EXHAUSTED,
        )

    def _where(self, name: str) -> str:
        return f"grpc {self.address.target}: {name}"

    def end_before_fork(self) -> None:
        """End calls whose callers were interrupted. Others are repeated on a new channel."""
        guard.remove(self)
        self.close()
        time.sleep(_CALM)

    def close(self) -> None:
        process.notice()
        self.shielded(self._close_all)

    def _close_all(self) -> None:
        self._close_dropped(0.0)
        connected = self._take_connected()
        if connected is not None:
            connected.close()


_OTHER_VERSION = (
    "the reply has fields that this version doesn't know: the server has another version of "
    "Flask-GSession, or isn't a session server"
)


def _is_lost(error: Any) -> bool:
    return error.code() in _LOST and error_in(error.trailing_metadata()) is None


def _forks_unsupported() -> bool:
    return os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "1").lower() in ("0", "false", "no", "off")


def _prepare_for_gevent() -> None:
    """Let gRPC wait with gevent, if that is in use. Otherwise it would block all greenlets."""
    if has_gevent():
        from grpc.experimental.gevent import init_gevent

        init_gevent()
