"""The thread that settles with the centre, and tries to reach it while it is cut off."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from ...errors import StoreUnavailable
from ...events import logger
from ...processes import is_at_work, process, runs_threads

_LOOK = 0.25  # seconds between two attempts while the node is cut off
_JITTER = 0.25
_LONGEST = 20  # times the interval, after failures


class Worker:
    """Calls ``look`` every quarter of a second while ``is_cut``, and else ``settle`` every
    ``interval`` seconds, later after failures. Refers to no store.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._lock = threading.Lock()

    @property
    def runs(self) -> bool:
        """Whether the thread was started in this process."""
        return self._thread is not None

    @property
    def lacks_thread(self) -> bool:
        """Whether calls must do the thread's work: in a job, and in a server without threads."""
        return self._thread is None and bool(self.interval)

    def start(
        self,
        is_cut: Callable[[], bool],
        look: Callable[[], object],
        settle: Callable[[], bool],
    ) -> None:
        """Start the thread, unless it runs or this process serves no requests."""
        process.notice()
        if self._thread is not None or not self.interval or not is_at_work() or not runs_threads():
            return
        with self._lock:
            if self._thread is not None:
                return
            self._thread = threading.Thread(
                target=self._run, args=(is_cut, look, settle), name="gsession-edge", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:  # the system can't start a thread
                self._thread = None
            except BaseException:  # from a signal: the thread may start or not
                self._thread = None
                raise

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread. The next ``start`` starts a new one."""
        with self._lock:
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)

    def _run(
        self, is_cut: Callable[[], bool], look: Callable[[], object], settle: Callable[[], bool]
    ) -> None:
        this, failures = threading.current_thread(), 0
        due = time.monotonic() + self._pause(0)
        while self._thread is this:
            self._wake.wait(_LOOK if is_cut() else max(0.01, due - time.monotonic()))
            self._wake.clear()
            if self._thread is not this:
                return
            try:
                if is_cut():
                    look()
                    due, failures = time.monotonic() + self._pause(0), 0
                elif time.monotonic() >= due:
                    failures = 0 if settle() else failures + 1
                    due = time.monotonic() + self._pause(failures)
            except Exception as error:
                known = isinstance(error, StoreUnavailable)  # such as for a damaged file
                logger.log(
                    logging.WARNING if known else logging.ERROR,
                    "An edge could not settle, and will try again: %s",
                    error,
                    exc_info=not known,
                )
                failures += 1
                due = time.monotonic() + self._pause(failures)

    def _pause(self, failures: int) -> float:
        times = min(1 << failures, _LONGEST)
        return self.interval * times * random.uniform(1 - _JITTER, 1 + _JITTER)
