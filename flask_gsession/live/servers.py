"""The server's worker in this process: how many threads it has, and whether it is shutting down."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

try:
    import uwsgi as _uwsgi  # type: ignore[import-untyped]  # only processes of uWSGI have it
except ImportError:
    _uwsgi = None

#: The poll event for a connection that the client closed. None if the system lacks it.
_CLOSED: int | None = getattr(select, "POLLRDHUP", None)
#: The socket option that ends a TCP connection if data stays unread. None if the system lacks it.
_UNREAD: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
_UNKNOWN = 4  # threads to assume for an unknown server; waitress has 4 by default
_MANY = 1000  # parallel requests, if each has its own greenlet or thread


def threads(environ: Mapping[str, Any]) -> int:
    """How many requests this process serves at the same time. If 1, it can't stream.

    ``environ``: a request's WSGI environment.
    """
    if not environ.get("wsgi.multithread"):
        return 1
    configuration = getattr(_gunicorn_worker(), "cfg", None)
    if _is_green():
        return int(getattr(configuration, "worker_connections", _MANY))
    if configuration is not None:
        return int(configuration.threads)
    if _uwsgi is not None:
        return int(_uwsgi.opt.get("threads", b"1"))
    return _MANY if "werkzeug.socket" in environ else _UNKNOWN


class Connection:
    """A request's connection. ``file``: its descriptor; None if the server hides it."""

    def __init__(self, file: int | None) -> None:
        self._file = file

    def expect_reader(self, seconds: float) -> None:
        """Let writes fail if the client reads nothing for this long, where the system supports
        that.

        Otherwise a client that stopped reading, or vanished, would occupy a thread forever.
        """
        if self._file is None or _UNREAD is None:
            return
        with suppress(OSError), socket.socket(fileno=os.dup(self._file)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, _UNREAD, int(seconds * 1000))

    def is_gone(self) -> bool:
        """Whether the client has closed it, or vanished. False if the system can't tell."""
        if self._file is None or _CLOSED is None:
            return False
        waits = _poll()
        try:
            waits.register(self._file, _CLOSED)
            if not waits.poll(0):
                return False
            with socket.socket(fileno=os.dup(self._file)) as connection:
                # So that the next write fails like on a closed connection: servers would log a
                # timeout.
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except (OSError, ValueError):
            pass
        return True


def connection_of(environ: Mapping[str, Any]) -> Connection:
    """The connection of the current request."""
    if _uwsgi is not None:
        return Connection(_uwsgi.connection_fd())
    ours: Any = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    return Connection(ours.fileno() if hasattr(ours, "fileno") else None)


def is_ending() -> bool:
    """Whether the worker is shutting down, and waiting for its requests to end."""
    worker = _gunicorn_worker()
    return worker is not None and not worker.alive


def _gunicorn_worker() -> Any:
    """The worker object of gunicorn, from its handler of SIGTERM."""
    worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return worker if hasattr(worker, "cfg") and hasattr(worker, "alive") else None


def _poll() -> Any:
    """The system's own poll object: gevent's doesn't report closed connections."""
    if _is_green():
        return sys.modules["gevent.monkey"].get_original("select", "poll")()
    return select.poll()


def _is_green() -> bool:
    """Whether gevent runs the threads."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")
