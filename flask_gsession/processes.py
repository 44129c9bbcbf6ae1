"""Detects a fork, even one that Python doesn't see.

``os.fork`` and ``multiprocessing`` run Python's fork hooks. uWSGI and some daemons fork in C, where
no hook runs, so the child would use the sockets, locks and threads of its parent. Every object with
state per process therefore registers a method here that resets it, and calls ``process.notice()``
before each use, which compares process ids.
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
    """The process that the registered objects belong to."""

    def __init__(self) -> None:
        self.pid = getpid()
        # No WeakMethod: its callback may fail at exit, and print an error.
        self._begins: weakref.WeakKeyDictionary[object, Callable[[Any], object]] = (
            weakref.WeakKeyDictionary()
        )
        #: Whether this is a server without requests or commands of Flask, which won't fork again.
        self.serves = False
        # By process id: the parent's lock may be held forever in the child.
        self._locks: dict[int, threading.RLock] = {}

    def register(self, begin: Callable[[], object]) -> None:
        """Call the method ``begin`` in each process forked from this one, before the next use.

        Holds a weak reference to the method's object, which can register one method. ``begin`` must
        not raise, and may be called twice.
        """
        method: Any = begin
        self._begins[method.__self__] = method.__func__

    def notice(self) -> None:
        """Call the registered methods if this process was forked since the last call."""
        if getpid() != self.pid:
            self._begin()

    def _begin(self) -> None:
        pid = getpid()
        with self._locks.setdefault(pid, threading.RLock()):
            if pid == self.pid:
                return  # another thread was faster
            for owner, begin in list(self._begins.items()):
                begin(owner)
            random.seed()  # as Python does after a fork, so that random pauses differ
            self.pid = pid


def at_fork(**hooks: Callable[[], object]) -> None:
    """``os.register_at_fork``, if the system has it (Windows doesn't)."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**hooks)


process = Process()
at_fork(after_in_child=process.notice)


def is_before_fork() -> bool:
    """Whether this is uWSGI's first process, before it forks its workers."""
    return _uwsgi is not None and _uwsgi.worker_id() == 0 and _uwsgi.mule_id() == 0


def is_at_work() -> bool:
    """Whether this process runs a request or a command, so that its server has forked already.

    Other code may run while the application is being loaded.
    """
    in_command = get_current_context(silent=True) is not None
    return (has_request_context() or in_command or process.serves) and not is_before_fork()


def runs_threads() -> bool:
    """Whether threads run between requests. In older uWSGI, they need ``enable-threads``."""
    return _uwsgi is None or bool(_uwsgi.has_threads) or "gevent" in _uwsgi.opt


def warn_without_threads(effect: str) -> None:
    """Log ``effect`` as a warning if background threads don't run here."""
    if not runs_threads():
        logger.warning(
            "uWSGI runs no background threads between requests: %s. Set enable-threads = true in "
            "the configuration of uWSGI.",
            effect,
        )
