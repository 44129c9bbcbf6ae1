"""A gRPC channel per process, and each call within one time budget, with the store's errors."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc

from ...errors import StoreError, StoreUnavailable
from ...processes import process
from ...protocol.errors import error_in
from ...protocol.methods import LONGEST_MESSAGE, is_understood, methods_of
from ..interrupts import reraise_interruption
from ..support import closing, count_round_trip
from .address import Address
from .forks import guard

_METHODS = methods_of("Store")
_RECONNECT = 0.25  # of the budget, for a repeat on another connection
_KEEPALIVE = 10  # seconds
#: Sent when the connection was lost, or the server is ending; all calls may be repeated.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Channel:
    """Calls the server at ``address``; one call takes at most ``timeout`` seconds, repeats too."""

    def __init__(self, address: Address, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        token = address.token
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._calls: dict[str, Callable[..., Any]] = {}
        self._channel: Any = None
        self._close: Any = None
        self._inherited: list[object] = []
        self._lock = threading.Lock()
        process.register(self._begin)

    def _begin(self) -> None:
        """In a forked process: leave the channel of the parent alone, and open another."""
        self._lock = threading.Lock()
        self._calls = {}
        if self._close is not None:
            self._close.detach()
            self._close = None
        if self._channel is not None:
            self._inherited.append(self._channel)  # never collected: that would ask gRPC's threads
            self._channel = None

    def call(self, name: str, request: Any, seconds: float = 0.0) -> Any:
        """The reply to ``request``, after at most ``seconds`` more than the time budget.

        Raises what the far store raised, and ``StoreUnavailable``.
        """
        budget = self.timeout + seconds
        deadline = time.monotonic() + budget
        count_round_trip()
        try:
            reply = guard.run(lambda: self._send(name, request, budget))
        except grpc.RpcError as error:
            left = deadline - time.monotonic()
            if left <= 0 or not _is_lost(error):
                self._fail(name, error)
            reply = self._call_again(name, request, left, error)
        if not is_understood(reply):
            raise StoreUnavailable(f"{self._where(name)}: {_OTHER_VERSION}")
        return reply

    def _call_again(self, name: str, request: Any, left: float, lost: Any) -> Any:
        """The reply, on another connection, if there is one soon."""
        count_round_trip()
        # Older versions of gRPC connect only while a thread waits in a call.
        seconds = min(left, max(self.timeout * _RECONNECT, left - self.timeout))
        try:
            return guard.run(lambda: self._send(name, request, seconds, wait_for_ready=True))
        except grpc.RpcError as error:
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            self._fail(name, lost if late else error)

    def incomplete(self, name: str) -> StoreUnavailable:
        """The error for a reply that lacks what every reply of this call has."""
        return StoreUnavailable(f"{self._where(name)}: {_OTHER_VERSION}")

    def stream(self, name: str, requests: Iterator[Any]) -> Any:
        """A call of many messages to and fro; its replies are to be iterated over."""
        return guard.run(lambda: self._send(name, requests, None))

    def _send(
        self, name: str, request: Any, seconds: float | None, wait_for_ready: bool = False
    ) -> Any:
        process.notice()
        send = self._calls.get(name) or self._connect(name)
        return send(
            request, timeout=seconds, metadata=self._metadata, wait_for_ready=wait_for_ready
        )

    def _connect(self, name: str) -> Callable[..., Any]:
        with self._lock:
            if self._channel is None:
                if self._inherited and _forks_unsupported():
                    raise StoreUnavailable(
                        "grpc: this process was forked after its parent had used gRPC, and "
                        "GRPC_ENABLE_FORK_SUPPORT is turned off: remove that variable"
                    )
                self._channel = self._open()
                self._close = closing(self, self._channel.close)
            method = _METHODS[name]
            make = self._channel.stream_stream if method.streams else self._channel.unary_unary
            send: Callable[..., Any] = make(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.reply.FromString,
            )
            self._calls[name] = send
            return send

    def _open(self) -> Any:
        _prepare_for_gevent()
        address, milliseconds = self.address, int(self.timeout * 1000)
        options: list[tuple[str, object]] = [
            ("grpc.max_receive_message_length", LONGEST_MESSAGE),
            ("grpc.max_send_message_length", LONGEST_MESSAGE),
            ("grpc.enable_retries", 0),  # they are made here, within the budget
            ("grpc.enable_http_proxy", 0),  # a variable for web pages must not lead sessions away
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.min_reconnect_backoff_ms", max(100, milliseconds)),  # how long connecting takes
            ("grpc.keepalive_time_ms", _KEEPALIVE * 1000),
            ("grpc.keepalive_timeout_ms", max(1000, milliseconds)),
        ]
        if address.certificates is None:
            return grpc.insecure_channel(address.target, options)
        if address.name is not None:
            options.append(("grpc.ssl_target_name_override", address.name))
        ca, chain, key = address.certificates
        return grpc.secure_channel(
            address.target, grpc.ssl_channel_credentials(ca, key, chain), options
        )

    def _fail(self, name: str, error: Any) -> NoReturn:
        reraise_interruption(error)
        raise self.translated(name, error) from None

    def translated(self, name: str, error: Any) -> StoreError:
        """What an error of gRPC means."""
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

    def close(self) -> None:
        if self._close is not None:
            close, self._close = self._close, None
            self._channel, self._calls = None, {}
            close()


_OTHER_VERSION = (
    "the reply has other fields than this version knows; the server has another version of "
    "Flask-GSession, or something else answers there"
)


def _is_lost(error: Any) -> bool:
    return error.code() in _LOST and error_in(error.trailing_metadata()) is None


def _forks_unsupported() -> bool:
    return os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "1").lower() in ("0", "false", "no", "off")


def _prepare_for_gevent() -> None:
    """Let gRPC wait by gevent, where that has replaced the sockets; else it would stop them all."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("socket"):
        from grpc.experimental.gevent import init_gevent

        init_gevent()
