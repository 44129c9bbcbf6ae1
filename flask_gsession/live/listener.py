"""Listens for changes of a store's records, with one connection and one thread for each server.

If changes and answers arrive in one order (Redis), the listener sends beats. The answer to a beat
can't overtake an earlier change, so all changes are known up to the time of the last but one
answered beat. The last one doesn't count, since a server may answer two beats in one round of its
event loop, and report the changes of that round afterwards. This never compares the clocks of two
machines. Without such beats nothing is proven, and changes are only hints.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol

from ..errors import StoreUnavailable
from ..events import logger
from ..processes import is_before_fork, process
from ..stores.parts import NEVER, Changes, Feed, Subscriber

#: Seconds. This clock also runs while the machine is suspended, and tests that freeze the
#: application's time don't affect it.
now: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)
LOOK_AGAIN = 1.0  # seconds between two lookups of the servers
_UNANSWERED = 2  # beats in flight: with a third, the last but one would prove too much
_PAUSES = (0.05, 0.2, 1.0)  # seconds after the first, second and any further failed connection
_ENDING = 1.0  # seconds to wait for a thread to end


class Heard(NamedTuple):
    """The keys of changed records, and how many beats were answered.

    ``more``: any other record may have changed as well.
    """

    keys: list[str]
    answers: int = 0
    more: bool = False


class Connection(Protocol):
    """A connection to one server of a store, from a ``Source``. Only ``shut`` is thread-safe."""

    def read(self, seconds: float) -> Heard:
        """Wait up to this long for changes or an answer. Raises ``StoreUnavailable``.

        Never returns a change after an answer that came later.
        """

    def beat(self) -> None:
        """Request an answer that comes after all changes so far. Raises ``StoreUnavailable``."""

    def shut(self) -> None:
        """Make ``read`` raise soon. Any thread may call this."""

    def close(self) -> None:
        """Release the connection."""


class Source(Protocol):
    """The interface between a store and its listener."""

    #: Why connections can't send beats, which prove freshness; "" if they can.
    unproven: str
    one_feed: bool  # whether there is only one server
    timeout: float  # seconds within which a beat must be answered
    #: Methods of the listener. The store calls them before it reads from a server that took over,
    #: or after some records moved to other servers.
    moved: Callable[[], object]
    shifted: Callable[[], object]

    def servers(self) -> Iterable[Hashable]:
        """The servers that accept writes now. Raises ``StoreUnavailable``."""

    def server_of(self, key: str) -> Hashable:
        """The server that has this record, as far as we know. No round trip."""

    def open(self, server: Hashable) -> Connection:
        """Connect, and receive changes from then on. Raises ``StoreUnavailable``."""


class Listener(Changes):
    """The part ``changes`` of a store, over its ``source``. Starts at first use. A forked process
    shares nothing with its parent and starts again. Threads end with ``close``.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        source.moved, source.shifted = self.moved, self.shifted
        self._subscribers: list[Subscriber] = []
        #: seconds between beats
        self.interval = source.timeout / 4
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._lock = threading.RLock()  # a finalizer may close in any thread, at any time
        self._threads: dict[Hashable, _Thread] = {}
        self._feeds: dict[Hashable, Feed] = {}
        self._look_at = NEVER
        self._moves = 0
        self._said = ""

    @property
    def unproven(self) -> str:
        """Why feeds don't prove when they are exact; "" if they do."""
        return self.source.unproven

    @property
    def one_feed(self) -> bool:
        """Whether one feed covers all records."""
        return self.source.one_feed

    @property
    def trouble(self) -> str:
        """The logged reason why no changes arrive; "" while they arrive."""
        return self._said

    def subscribe(self, subscriber: Subscriber, interval: float | None = None) -> None:
        """Report changes to ``subscriber`` from now on, with a beat at least every ``interval``.

        ``subscriber`` must not refer to the store, which then couldn't be garbage-collected.
        """
        with self._lock:
            self._subscribers = [*self._subscribers, subscriber]
            if interval is not None:
                self.interval = min(self.interval, interval)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Stop reporting to ``subscriber``. Without any subscriber, the connections are closed."""
        with self._lock:
            self._subscribers = [each for each in self._subscribers if each is not subscriber]
            is_last = not self._subscribers
        if is_last:
            self.close()

    def feed(self, key: str) -> Feed | None:
        """The feed for changes of this record; None before it exists."""
        if not self._threads:
            self.start()
        return self._feeds.get(self.source.server_of(key)) if self._feeds else None

    def start(self) -> None:
        """Start to listen, in a thread, but not in a process that uWSGI is going to fork.

        A child of a fork in C hangs forever if another thread was waiting for the interpreter's
        lock.
        """
        process.notice()
        if is_before_fork():
            return
        with self._lock:
            if not self._threads and self._subscribers:
                self._add(None)

    def close(self) -> None:
        """End the threads and their connections. The next use starts them again."""
        process.notice()
        with self._lock:
            threads = list(self._threads.values())
            self._threads, self._feeds = {}, {}
        for thread in threads:
            thread.stop()
        self._lost()

    def moved(self) -> None:
        """Listen to other servers, which accept the writes now, and trust nothing until then.

        A store calls this, in any thread, before it reads from those servers.
        """
        with self._lock:
            self._feeds = {}
            self._moves += 1
            self._look_at = NEVER
            threads = list(self._threads.values())
        self._lost()
        for thread in threads:
            thread.reopen()

    def shifted(self) -> None:
        """Distrust the feeds once: some records moved between servers, which all stay connected.

        A store calls this, in any thread, before it reads from those servers.
        """
        self._look_at = NEVER
        self._lost()

    def _lost(self) -> None:
        for subscriber in self._subscribers:
            subscriber.lost()

    def _add(self, server: Hashable) -> None:
        thread = _Thread(self, server)
        self._threads[server] = thread
        try:
            thread.start()
        except RuntimeError as error:  # the system can't start a thread
            del self._threads[server]
            self.failed(error)
        except BaseException:  # from a signal: the thread may start or not
            self._threads.pop(server, None)
            raise

    # -- for the threads

    def is_wanted(self, thread: _Thread) -> bool:
        """Whether this thread should continue."""
        return self._threads.get(thread.server) is thread

    def look(self, thread: _Thread) -> None:
        """Start a thread for each server, if it is time to look the servers up.

        The first thread takes the first server. Raises ``StoreUnavailable``.
        """
        with self._lock:
            if now() < self._look_at and thread.server is not None:
                return
            self._look_at = now() + LOOK_AGAIN  # so that the other threads don't
        servers = dict.fromkeys(self.source.servers())
        with self._lock:
            if not self.is_wanted(thread):
                return
            if thread.server is None and servers:
                del self._threads[None]
                thread.server = next(iter(servers))
                self._threads[thread.server] = thread
            for server in self._threads.keys() - servers.keys():
                self._feeds.pop(server, None)
                self._threads.pop(server).reopen()
            for server in servers.keys() - self._threads.keys():
                self._add(server)

    @property
    def moves(self) -> int:
        """How many times ``moved`` was called."""
        return self._moves

    def opened(self, thread: _Thread, moves: int) -> Feed:
        """Note that this thread's server, which was looked up after ``moves``, reports changes now.

        Raises ``StoreUnavailable`` if another server may have taken over since.
        """
        feed = Feed()
        with self._lock:
            if not self.is_wanted(thread) or self._moves != moves:
                raise StoreUnavailable("another server accepts the writes now")
            self._feeds[thread.server] = feed
            self._said = ""
        return feed

    def heard(self, keys: list[str], *, more: bool) -> None:
        """Report that these records changed; with ``more``, any other may have changed as well."""
        for subscriber in self._subscribers:
            if more:
                subscriber.lost()
            elif keys:
                subscriber.changed(keys)

    def proved(self, thread: _Thread, feed: Feed, exact_as_of: float) -> None:
        """Note that all changes until ``exact_as_of`` have arrived."""
        with self._lock:
            # After ``moved``, the feed belongs to a server that we no longer read from.
            if self._feeds.get(thread.server) is feed:
                feed.exact_as_of = exact_as_of

    def cut(self, thread: _Thread, feed: Feed) -> None:
        """Note that this feed reports no more changes."""
        with self._lock:
            if self._feeds.get(thread.server) is feed:
                del self._feeds[thread.server]
        self._lost()

    def failed(self, error: Exception) -> None:
        """Log, once, why no changes arrive."""
        said = f"{type(error).__name__}: {error}"
        if said != self._said:
            self._said = said
            logger.warning(
                "Changes of sessions don't arrive, so every read asks the store, and live "
                "updates come late: %s",
                said,
            )


class _Thread(threading.Thread):
    """Listens to one server. ``server`` is None until the first thread has found one."""

    def __init__(self, listener: Listener, server: Hashable) -> None:
        super().__init__(name="gsession-listener", daemon=True)
        self.server = server
        self._listener = listener
        self._connection: Connection | None = None
        self._ended = threading.Event()

    def reopen(self) -> None:
        """Drop the connection, and open a new one if still wanted."""
        connection = self._connection
        if connection is not None:
            connection.shut()

    def stop(self) -> None:
        """End soon."""
        self._ended.set()
        self.reopen()
        if threading.current_thread() is not self:
            self.join(_ENDING)

    def run(self) -> None:
        listener, failures = self._listener, 0
        while listener.is_wanted(self):
            feed = None
            try:
                moves = listener.moves
                listener.look(self)
                if self.server is not None:
                    self._connection = listener.source.open(self.server)
                    feed = listener.opened(self, moves)
                    failures = 0
                    self._listen(self._connection, feed)
            except StoreUnavailable as error:
                if feed is None and listener.is_wanted(self):
                    listener.failed(error)
            except Exception:
                logger.exception("A listener failed, and will start again")
            finally:
                connection, self._connection = self._connection, None
                if feed is not None:
                    listener.cut(self, feed)
                if connection is not None:
                    try:
                        connection.close()
                    except Exception as error:  # this thread has to go on
                        listener.failed(error)
            self._ended.wait(_PAUSES[min(failures, len(_PAUSES) - 1)])
            failures += 1

    def _listen(self, connection: Connection, feed: Feed) -> None:
        listener = self._listener
        beats, timeout = not listener.unproven, listener.source.timeout
        sent: deque[float] = deque()  # the times of unanswered beats
        last = NEVER  # the time of the last answered beat
        next_beat = now()
        look_at = now() + LOOK_AGAIN
        while listener.is_wanted(self):
            moment = now()
            due = moment >= next_beat or feed.exact_as_of == NEVER  # two at once at the start
            if beats and due and len(sent) < _UNANSWERED:
                sent.append(moment)
                next_beat = moment + listener.interval
                connection.beat()
            if sent and moment - sent[0] > timeout:
                raise StoreUnavailable(f"a beat was not answered within {timeout:g} s")
            until = sent[0] + timeout if len(sent) == _UNANSWERED else next_beat
            until = min(until, look_at) if beats else look_at
            keys, answers, more = connection.read(max(0.001, until - now()))
            listener.heard(keys, more=more)
            for _ in range(answers):
                answered = sent.popleft()
                if last != NEVER:
                    listener.proved(self, feed, last)
                last = answered
            if now() >= look_at:
                with suppress(StoreUnavailable):  # keep the known servers
                    listener.look(self)
                look_at = now() + LOOK_AGAIN
