"""The worker that runs this process: how many threads it has for requests, and whether it ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from typing import Any

try:
    import uwsgi as _uwsgi  # type: ignore[import-untyped]  # only processes of uWSGI have it
except ImportError:
    _uwsgi = None

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


def is_ending() -> bool:
    """Whether the worker waits for its requests to end, so that it can end too."""
    worker = _gunicorn_worker()
    return worker is not None and not worker.alive


def _gunicorn_worker() -> Any:
    """The worker object of gunicorn, from its handler of SIGTERM."""
    worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return worker if hasattr(worker, "cfg") and hasattr(worker, "alive") else None


def _is_green() -> bool:
    """Whether gevent runs the threads."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")
