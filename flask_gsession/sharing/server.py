"""The gRPC server of ``flask gsession serve``: authentication, permissions, error statuses."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import grpc

from ..errors import SettingError, StoreError
from ..events import AccessDenied, Events, logger
from ..protocol.errors import ERROR_KEY, status_of
from ..protocol.methods import LONGEST_MESSAGE, Method, is_understood
from ..stores.remote.address import CertificateFiles, Certificates, is_loopback
from ..stores.support import ending_by
from .grants import Grant, Grants, GrantsFile

Status = grpc.StatusCode

_BEARER = "Bearer "
_QUEUE = 4  # waiting calls per thread
_SHARE = 0.95  # the store's share of the caller's time, so that the reply arrives in time
_STREAMS = 100  # watchers, each with a thread
_NAMES = ("x509_subject_alternative_name", "x509_common_name")


class Denied(Exception):
    """A service requested something that isn't granted."""


class Refused(Exception):
    """A call can't be answered, with a ``code`` and ``details`` for the caller."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Service:
    """One gRPC service, with its ``methods`` by name.

    ``answer`` handles a call. It raises ``Denied``, ``Refused`` or any error of a store.
    ``answer_stream`` handles a streaming call. ``strict``: whether to refuse a request with an
    unknown field. ``stop`` is called when the server shuts down.
    """

    methods: ClassVar[Mapping[str, Method]]
    strict = True

    def answer(self, name: str, request: Any, grant: Grant) -> Any:
        raise NotImplementedError

    def answer_stream(self, name: str, requests: Iterator[Any], grant: Grant) -> Iterator[Any]:
        raise NotImplementedError

    def stop(self) -> None:
        """By default, does nothing."""


class Server:
    """Serves ``services`` to the callers in ``grants``, with ``threads`` threads."""

    def __init__(
        self,
        services: list[Service],
        grants: Grants | GrantsFile,
        events: Events,
        threads: int = 32,
    ) -> None:
        self._grants = grants
        self._events = events
        self._services = services
        self._watchers = ThreadPoolExecutor(_STREAMS, "gsession-watcher")
        self._server = grpc.server(
            ThreadPoolExecutor(threads, "gsession-grpc"),
            options=[
                ("grpc.max_receive_message_length", LONGEST_MESSAGE),
                ("grpc.max_send_message_length", LONGEST_MESSAGE),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),  # for keepalives
                ("grpc.so_reuseport", 0),  # otherwise, a second server would get half of the calls
            ],
            maximum_concurrent_rpcs=threads * _QUEUE + _STREAMS,
        )
        for service in services:
            handlers = {
                name: self._handler(service, name, method)
                for name, method in service.methods.items()
            }
            path = next(iter(service.methods.values())).path
            handler = grpc.method_handlers_generic_handler(path.split("/")[1], handlers)
            self._server.add_generic_rpc_handlers((handler,))
        self._socket: Path | None = None

    def listen(self, address: str, files: CertificateFiles | None) -> int:
        """Bind ``HOST:PORT`` or ``unix:/path``, and return the port. Raises ``SettingError``.

        With a file ``ca``, callers need a certificate from that authority. Replaced files apply to
        new connections.
        """
        try:
            if address.startswith("unix:"):
                with self._own_socket(Path(address.removeprefix("unix:"))):
                    return int(self._server.add_insecure_port(address))
            if files is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, _credentials(files)))
        except RuntimeError as error:
            raise SettingError(f"The server can't listen on {address}: {error}") from None

    @contextmanager
    def _own_socket(self, path: Path) -> Iterator[None]:
        """Let only this process's user connect to a socket that the block creates."""
        with_mode = os.umask(0o177)
        try:
            if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
                raise SettingError(f"{path} exists and isn't a socket")
            yield
        finally:
            os.umask(with_mode)
        self._socket = path

    def start(self) -> None:
        self._server.start()

    def wait(self) -> None:
        """Block until ``stop``."""
        self._server.wait_for_termination()

    def stop(self, grace: float | None = None) -> threading.Event:
        """Refuse new calls, and give running ones ``grace`` seconds. The event is set when they
        have ended.
        """
        for service in self._services:
            service.stop()
        ended: threading.Event = self._server.stop(grace)
        return ended

    def _handler(self, service: Service, name: str, method: Method) -> Any:
        def answer(request: Any, context: Any) -> Any:
            try:
                grant = self._grant_of(context, _credentials_of(context))
                if not context.is_active():
                    # It waited for a thread until its deadline: the caller has given up.
                    raise Refused(Status.DEADLINE_EXCEEDED, "too late")
                left = context.time_remaining()
                if service.strict and not is_understood(request):
                    raise Refused(
                        Status.FAILED_PRECONDITION,
                        "the request has fields that this server doesn't know: update "
                        "Flask-GSession here before its clients",
                    )
                # Calls to our store end before the caller stops waiting.
                with ending_by(None if left is None else time.monotonic() + _SHARE * left):
                    try:
                        return service.answer(name, request, grant)
                    except Denied as denied:
                        self._deny(context, grant.service, f"{name}: {denied}")
            except Exception as error:
                self._abort(name, context, error)

        def answer_stream(requests: Any, context: Any) -> Iterator[Any]:
            try:
                credentials = _credentials_of(context)
                grant = self._grant_of(context, credentials)
                try:
                    for reply in service.answer_stream(name, requests, grant):
                        if self._grants.of(*credentials) != grant:
                            raise Refused(Status.UNAVAILABLE, "the grants were replaced")
                        yield reply
                except Denied as denied:
                    self._deny(context, grant.service, f"{name}: {denied}")
            except Exception as error:
                self._abort(name, context, error)

        # Streams stay open, so they have their own threads.
        answer_stream.experimental_thread_pool = self._watchers  # type: ignore[attr-defined]
        coding = method.request.FromString, method.reply.SerializeToString
        if method.streams:
            return grpc.stream_stream_rpc_method_handler(answer_stream, *coding)
        return grpc.unary_unary_rpc_method_handler(answer, *coding)

    def _abort(self, name: str, context: Any, error: Exception) -> NoReturn:
        """Abort a call with the status for its error."""
        if context.code() is not None:  # already aborted
            raise error
        if isinstance(error, Refused):
            context.abort(error.code, error.details)
        elif isinstance(error, StoreError):
            code, details, message = status_of(error)
            context.set_trailing_metadata(((ERROR_KEY, message.SerializeToString()),))
            context.abort(code, details[:1000])
        else:
            logger.error("A call of %s failed", name, exc_info=error)
            context.abort(Status.INTERNAL, type(error).__name__)
        raise AssertionError("abort raises")

    def _grant_of(self, context: Any, credentials: tuple[list[str], str | None]) -> Grant:
        """The caller's grant. Aborts the call of an unknown caller."""
        names, token = credentials
        grant = self._grants.of(names, token)
        if grant is None:
            shown = ", ".join(names)[:200] if names else "no certificate"
            with_token = "" if token is None else ", an unknown token"
            self._events.emit(AccessDenied, "", "unknown service")
            logger.warning("Refused a call by an unknown service: %s%s", shown, with_token)
            context.abort(Status.UNAUTHENTICATED, "this caller isn't in the grants file")
        assert grant is not None
        return grant

    def _deny(self, context: Any, service: str, what: str) -> NoReturn:
        self._events.emit(AccessDenied, service, what)
        logger.warning("Refused the service %s: %s", service, what)
        context.abort(Status.PERMISSION_DENIED, f"not granted: {what}")
        raise AssertionError("abort raises")


def _credentials_of(context: Any) -> tuple[list[str], str | None]:
    """The names in the caller's certificate, and its token."""
    shown_by = context.auth_context()
    # Use the common name only if there are no other names (RFC 9525): authorities may not check it.
    certified = next((shown_by[name] for name in _NAMES if shown_by.get(name)), ())
    names = [value.decode("utf-8", "replace") for value in certified]
    token = None
    for key, value in context.invocation_metadata():
        if key == "authorization" and value.startswith(_BEARER):
            token = value[len(_BEARER) :]
    return names, token


def _credentials(files: CertificateFiles) -> Any:
    def configuration() -> Any:
        ca, chain, key = files.current
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=ca)

    def renewed() -> Any:
        """Called for each connection, before its handshake."""
        return configuration() if files.renewed() else None

    return grpc.dynamic_ssl_server_credentials(
        configuration(), renewed, require_client_authentication=files.current.ca is not None
    )


def check_address(address: str, certificates: Certificates | None) -> None:
    """Refuse to serve without TLS beyond this machine. Raises ``SettingError``."""
    if address.startswith("unix:"):
        if certificates is not None:
            raise SettingError(
                "A Unix socket needs no certificates: remove --cert, --key and --ca, or listen on "
                "HOST:PORT"
            )
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise SettingError(
            f"{address!r} isn't an address: use HOST:PORT, such as 0.0.0.0:7443, or "
            "unix:/run/g.sock"
        )
    if certificates is None and not is_loopback(host.strip("[]")):
        raise SettingError(
            f"{address} can be reached from other machines: add --cert, --key and --ca, or "
            "listen on 127.0.0.1"
        )
    if certificates is not None and (certificates.chain is None or certificates.ca is None):
        raise SettingError(
            "With TLS, the server needs all three: --cert and --key, its own certificate, and "
            "--ca, the authority that signs its callers' certificates"
        )
