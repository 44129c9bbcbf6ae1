"""Notices that this process is another one than before, also where Python didn't see the fork.

``os.fork`` and ``multiprocessing`` run Python's fork hooks. uWSGI forks its workers in C, as
daemons may, and then no hook runs: the child would go on with the sockets, locks and threads of
its parent. So everything that is kept per process is registered here, with the method that begins
it again, and calls ``process.notice()`` before it is used. That costs a comparison of process ids.
"""

from __future__ import annotations

import os
import random
import threading
import weakref
from collections.abc import Callable
from os import getpid
from typing import Any

from click import get_current_context
from flask import has_request_context

from .events import logger

try:
    import uwsgi as _uwsgi  # type: ignore[import-untyped]  # only processes of uWSGI have it
except ImportError:
    _uwsgi = None


class Process:
    """The process that what is registered belongs to."""

    def __init__(self) -> None:
        self._pid = getpid()
        # No WeakMethod: at the end of the interpreter its callback can fail, which is printed.
        self._begins: weakref.WeakKeyDictionary[object, Callable[[Any], object]] = (
            weakref.WeakKeyDictionary()
        )
        #: Whether it serves others outside of requests and commands, and forks no more.
        self.serves = False
        # By process id: a lock of the parent may be held for good in the child.
        self._locks: dict[int, threading.RLock] = {}

    def register(self, begin: Callable[[], object]) -> None:
        """Call the method ``begin`` in each process forked from this one, before the next use.

        Its object is referred to weakly, and has one such method. ``begin`` must not raise, and may
        be called twice.
        """
        method: Any = begin
        self._begins[method.__self__] = method.__func__

    def notice(self) -> None:
        """Begin again where this process is a forked one that has not done so yet."""
        if getpid() != self._pid:
            self._begin()

    def _begin(self) -> None:
        pid = getpid()
        with self._locks.setdefault(pid, threading.RLock()):
            if pid == self._pid:
                return  # another thread was faster
            for owner, begin in list(self._begins.items()):
                begin(owner)
            random.seed()  # as Python does in a fork it sees: pauses at random must differ
            self._pid = pid


def at_fork(**hooks: Callable[[], object]) -> None:
    """Register ``hooks`` of ``os.register_at_fork``, where the system forks: Windows does not."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**hooks)


process = Process()
at_fork(after_in_child=process.notice)


def is_before_fork() -> bool:
    """Whether uWSGI has yet to fork its workers from this process, or to make it the only one."""
    return _uwsgi is not None and _uwsgi.worker_id() == 0 and _uwsgi.mule_id() == 0


def is_at_work() -> bool:
    """Whether this process is in a request or a command, so that its server has forked already.

    Code outside of these may run while the application is loaded.
    """
    in_command = get_current_context(silent=True) is not None
    return (has_request_context() or in_command or process.serves) and not is_before_fork()


def runs_threads() -> bool:
    """Whether threads go on between requests: not in older uWSGI without ``enable-threads``."""
    return _uwsgi is None or bool(_uwsgi.has_threads) or "gevent" in _uwsgi.opt


def warn_without_threads(effect: str) -> None:
    """Log ``effect``, where it is so because background threads don't run here."""
    if not runs_threads():
        logger.warning(
            "uWSGI runs no background threads between requests: %s. Set enable-threads = true in "
            "the configuration of uWSGI.",
            effect,
        )
