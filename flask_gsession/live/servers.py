"""The worker that runs this process: how many threads it has for requests, and whether it ends."""

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

#: A client that has closed its connection. None: this system has no such event.
_CLOSED: int | None = getattr(select, "POLLRDHUP", None)
#: The time until unread data ends a connection of TCP. None: this system has no such option.
_UNREAD: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
_UNKNOWN = 4  # threads of a server that we don't know; waitress has so many by default
_MANY = 1000  # at once, where each request has its own greenlet or thread


def threads(environ: Mapping[str, Any]) -> int:
    """How many requests this process serves at once. 1: it can't stream.

    ``environ``: of a request.
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
    """The connection of a request. ``file``: its descriptor; None if the server hides it."""

    def __init__(self, file: int | None) -> None:
        self._file = file

    def expect_reader(self, seconds: float) -> None:
        """Let writes fail if the client accepts nothing for so long, as far as the system can.

        Otherwise a client that reads nothing, or has vanished, would keep its thread forever.
        """
        if self._file is None or _UNREAD is None:
            return
        with suppress(OSError), socket.socket(fileno=os.dup(self._file)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, _UNREAD, int(seconds * 1000))

    def is_gone(self) -> bool:
        """Whether the client has closed it, as far as this system can tell."""
        if self._file is None or _CLOSED is None:
            return False
        waits = _poll()
        try:
            waits.register(self._file, _CLOSED)
            return bool(waits.poll(0))
        except (OSError, ValueError):
            return True


def connection_of(environ: Mapping[str, Any]) -> Connection:
    """The connection of the request that is being served."""
    if _uwsgi is not None:
        return Connection(_uwsgi.connection_fd())
    ours: Any = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    return Connection(ours.fileno() if hasattr(ours, "fileno") else None)


def is_ending() -> bool:
    """Whether the worker waits for its requests to end, so that it can end too."""
    worker = _gunicorn_worker()
    return worker is not None and not worker.alive


def _gunicorn_worker() -> Any:
    """The worker object of gunicorn, from its handler of SIGTERM."""
    worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return worker if hasattr(worker, "cfg") and hasattr(worker, "alive") else None


def _poll() -> Any:
    """A poll object of the system: gevent's own doesn't know about closed connections."""
    if _is_green():
        return sys.modules["gevent.monkey"].get_original("select", "poll")()
    return select.poll()


def _is_green() -> bool:
    """Whether gevent runs the threads."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")
