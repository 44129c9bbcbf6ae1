"""Runs gRPC's code where no exception from outside can interrupt it.

A signal handler can raise an exception at almost any step of the main thread, and a thread can
raise one in any other thread. If that interrupts gRPC, gRPC may never release a lock: the
channel's, or one that all channels and servers of the process share. Then no thread gets an answer
any more. So gRPC runs on private threads, and each caller waits on its own lock.
"""

from __future__ import annotations

import sys
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, TypeVar
from weakref import ref

T = TypeVar("T")

_IN_ORDER = 0.1  # seconds that a thread's next call waits for an interrupted one to end
#: how the errors begin if the system can't start a thread, or the interpreter shuts down
_NO_THREAD = ("can't start new thread", "can't create new thread")


class Overdue(Exception):
    """A call didn't return in time."""


class Shield:
    """Makes calls on other threads. Under gevent, which has no real threads, on the caller's."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._interrupted = _Interrupted()

    def run(self, call: Callable[[], T], seconds: float) -> T:
        """Return the result of ``call``. Raises ``Overdue`` after ``seconds``.

        ``call`` must return by itself: after ``Overdue``, or if an exception interrupts the wait,
        it continues and its result is discarded.
        """
        if has_gevent():
            return call()
        earlier = self._interrupted.job
        if earlier is not None:
            self._interrupted.job = None
            if not earlier.is_over:
                earlier.over.acquire(True, _IN_ORDER)
        try:
            job = _Job(call, self._worker(), self._idle)
        except RuntimeError as error:
            if not str(error).startswith(_NO_THREAD):  # a signal handler may raise one, too
                raise
            return call()
        try:
            job.worker.jobs.put(job)
            in_time = job.over.acquire(True, seconds)
        except BaseException:
            job.is_wanted = False
            self._interrupted.job = job
            raise
        if not in_time:
            job.is_wanted = False
            raise Overdue
        if job.error is not None:
            try:
                raise job.error
            finally:
                del job  # the error's traceback refers to it
        result: T = job.result
        return result

    def _worker(self) -> _Worker:
        try:
            return self._idle.pop()
        except IndexError:
            return _Worker()


class _Job:
    """A call, and its outcome once ``over`` is released."""

    __slots__ = (
        *("call", "worker", "idle", "context", "over"),
        *("is_wanted", "is_over", "result", "error"),
    )

    def __init__(self, call: Callable[[], Any], worker: _Worker, idle: list[_Worker]) -> None:
        self.call = call
        self.worker = worker
        self.idle = idle
        self.context = copy_context()
        self.over = allocate_lock()
        self.over.acquire()
        self.is_wanted = True
        self.is_over = False
        self.result: Any = None
        self.error: BaseException | None = None


class _Interrupted(threading.local):
    """The thread's last call, if it was interrupted."""

    job: _Job | None = None


class _Worker:
    """A thread for ``jobs``. It ends when this object is garbage-collected, so no thread leaks."""

    __slots__ = ("__weakref__", "jobs")

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Any] = SimpleQueue()
        # No ``__del__``: it would swallow an exception from outside. No ``Thread``: an exception
        # could interrupt its start.
        start_new_thread(_work, (self.jobs, ref(self, self.jobs.put)))


def _work(jobs: SimpleQueue[Any], end: ref[_Worker]) -> None:
    while (job := jobs.get()) is not end:
        try:
            if job.is_wanted:
                job.result = job.context.run(job.call)
        except BaseException as error:
            job.error = error
        job.is_over = True
        job.idle.append(job.worker)
        job.over.release()
        del job


def has_gevent() -> bool:
    """Whether gevent has patched the sockets, so that threads are greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))
