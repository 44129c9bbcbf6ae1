"""Wake-ups for waiting lock owners: one connection per process, on which Redis publishes them."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from socket import SHUT_RDWR
from typing import Any

import redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from ...events import logger
from ...processes import process
from ..lease import WAITER_LIFE
from .driver import read_within

# Without a wake-up for so many seconds, the thread checks its connection, and whether anyone waits.
_LOOK_AROUND = 5.0
_TRY_AGAIN = 10.0  # seconds until the next attempt after a failed connection
_FORGOTTEN = 3 * WAITER_LIFE / 1000  # seconds after which a silent waiter is dropped


class WakeUps:
    """Wake-ups on a channel per process. One thread listens while there are waiting owners.

    ``make`` creates a connection; ``prefix`` starts the names of channels. Forked processes share
    nothing. Without a connection, ``wait`` returns False, and the caller has to poll.
    """

    def __init__(self, make: Callable[[], Any], prefix: bytes, timeout: float) -> None:
        self._make = make
        self._prefix = prefix
        self._timeout = timeout
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self.channel = secrets.token_hex(8).encode()
        self._lock = threading.RLock()  # a finalizer may close in any thread, at any time
        self._waiters: dict[bytes, _Waiter] = {}
        self._listener: _Listener | None = None
        self._failed_at = float("-inf")

    def expect(self, owner: bytes) -> None:
        """Keep wake-ups for this owner from now on, until ``forget``."""
        process.notice()
        if self._listener is not None:
            self._expect(owner)

    def _expect(self, owner: bytes, seconds: float = 0.0) -> _Waiter:
        waiter = self._waiters.setdefault(owner, _Waiter())
        waiter.kept_until = time.monotonic() + seconds + _FORGOTTEN
        return waiter

    def forget(self, owner: bytes) -> None:
        """Stop keeping wake-ups for this owner."""
        process.notice()
        self._waiters.pop(owner, None)

    def wait(self, owner: bytes, seconds: float) -> bool:
        """Wait for a wake-up. May return early if one was missed.

        Returns False if there is no connection.
        """
        process.notice()
        listener = self._listener
        if listener is not None:
            waiter = self._expect(owner, seconds)  # first: a listener that ends wakes it
            if listener.ready.is_set():
                waiter.wait(seconds)
                waiter.clear()
                return True
        with self._lock:
            self._expect(owner, seconds)
            if self._listener is None:
                if time.monotonic() - self._failed_at < _TRY_AGAIN:
                    return False
                listener = _Listener(self)
                try:
                    listener.thread.start()
                except RuntimeError as error:
                    self._failed(error)
                    return False
                self._listener = listener
            listener = self._listener
        return listener.ready.wait(min(seconds, self._timeout))

    def close(self) -> None:
        """End the thread, which closes the connection."""
        process.notice()
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def _wake(self, owner: bytes) -> None:
        waiter = self._waiters.get(owner)
        if waiter is not None:
            waiter.set()

    def _wake_all(self) -> None:
        for waiter in list(self._waiters.values()):
            waiter.set()

    def _gone(self, listener: _Listener, error: Exception | None) -> None:
        with self._lock:
            if self._listener is listener:
                self._listener = None
                if error is not None:
                    self._failed(error)
        self._wake_all()

    def _failed(self, error: Exception) -> None:
        self._failed_at = time.monotonic()
        logger.warning(
            "Redis can't wake up requests that wait for a lock (%s: %s): polling instead",
            type(error).__name__,
            error,
        )

    def _ended_idle(self, listener: _Listener) -> bool:
        now = time.monotonic()
        with self._lock:
            # Waiters whose end never reached the store because a circuit was open.
            for owner, waiter in list(self._waiters.items()):
                if now >= waiter.kept_until:
                    self.forget(owner)
            if self._waiters and self._listener is listener:
                return False
            if self._listener is listener:
                self._listener = None
            return True


class _Waiter(threading.Event):
    kept_until = 0.0  # of time.monotonic


class _Listener:
    """The connection, and the thread that reads from it."""

    def __init__(self, wake_ups: WakeUps) -> None:
        self._wake_ups = wake_ups
        self.connection = wake_ups._make()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run, name="gsession-wakeup", daemon=True)

    def stop(self) -> None:
        """Shut the socket, so that the thread closes the connection and ends."""
        socket = self.connection._sock
        if socket is not None:
            with suppress(OSError):
                socket.shutdown(SHUT_RDWR)
        if threading.current_thread() is not self.thread:
            self.thread.join(self._wake_ups._timeout)

    def _run(self) -> None:
        wake_ups, failure = self._wake_ups, None
        try:
            self._listen()
        except (redis.RedisError, OSError) as error:
            failure = error
        finally:
            self.ready.clear()
            self.connection.disconnect()
            wake_ups._gone(self, failure)

    def _listen(self) -> None:
        wake_ups = self._wake_ups
        channel = wake_ups._prefix + wake_ups.channel
        self._send(b"SUBSCRIBE", channel)
        asked = True
        while True:
            try:
                message = self._read(wake_ups._timeout if asked else _LOOK_AROUND)
            except RedisTimeoutError:
                if asked:
                    raise
                if wake_ups._ended_idle(self):
                    return
                self._send(b"PING")
                asked = True
                continue
            if message[0] == b"message":
                wake_ups._wake(message[2])
            elif message[0] == b"subscribe":
                asked = False
                self.ready.set()
            elif message[0] == b"pong":
                asked = False

    def _send(self, *command: bytes) -> None:
        self._allow(self._wake_ups._timeout)
        self.connection.send_command(*command)

    def _read(self, seconds: float) -> Any:
        self._allow(seconds)
        return read_within(self.connection, seconds, disconnect_on_error=False)

    def _allow(self, seconds: float) -> None:
        deadline = getattr(self.connection, "deadline", None)
        if deadline is not None:
            deadline.at = time.monotonic() + seconds
