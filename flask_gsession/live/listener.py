"""Hears which records of a store change: one connection and one thread for each of its servers.

Where changes and answers come in one order (Redis), the listener sends beats. A beat that is
answered can't have overtaken an earlier change, so everything heard is complete up to the moment
the last but one answered beat was sent: not the last one, since a server may answer two beats in
one round of its event loop and report the changes of that round afterwards. No clocks of two
machines are compared. Where there are no such beats, nothing is proven, and changes are only hints.
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
from ..processes import process
from ..stores.parts import NEVER, Changes, Feed, Hearer

#: Seconds. It also counts while the machine is suspended, and a test that freezes the time of the
#: application doesn't reach it.
now: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)
LOOK_AGAIN = 1.0  # seconds after which it asks again which servers there are
_UNANSWERED = 2  # beats at a time: with a third, the last but one would prove too much
_PAUSES = (0.05, 0.2, 1.0)  # seconds after a connection that failed, once, twice, more often
_ENDING = 1.0  # seconds that a thread has to end


class Heard(NamedTuple):
    """The keys of changed records, and how many beats were answered.

    ``more``: any other record may have changed, too.
    """

    keys: list[str]
    answers: int = 0
    more: bool = False


class Connection(Protocol):
    """To one server of a store, opened by a ``Source``. One thread uses it, but for ``shut``."""

    def read(self, seconds: float) -> Heard:
        """Wait at most so long for changes or an answer. Raises ``StoreUnavailable``.

        A change that came before an answer is never returned after it.
        """

    def beat(self) -> None:
        """Ask for an answer that comes after all changes until now. Raises ``StoreUnavailable``."""

    def shut(self) -> None:
        """Let ``read`` raise soon; may be called in any thread."""

    def close(self) -> None:
        """Release the connection."""


class Source(Protocol):
    """What a store has to offer for its listener."""

    #: Why connections can't send beats, which prove how fresh what is heard is; "" if they can.
    unproven: str
    one_feed: bool  # whether there is only one server
    timeout: float  # seconds until a beat must be answered
    #: Methods of the listener that the store calls, before a record is read from there: another
    #: server took over, or some records are served by other servers than before.
    moved: Callable[[], object]
    shifted: Callable[[], object]

    def servers(self) -> Iterable[Hashable]:
        """The servers that take writes now. Raises ``StoreUnavailable``."""

    def server_of(self, key: str) -> Hashable:
        """The one that has this record, as far as that is known without asking."""

    def open(self, server: Hashable) -> Connection:
        """Connect; changes from then on are heard. Raises ``StoreUnavailable``."""


class Listener(Changes):
    """The part ``changes`` of a store, over its ``source``. Starts when it is first needed.

    Nothing is shared with a forked process, which starts again. Threads end with ``close``.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        source.moved, source.shifted = self.moved, self.shifted
        self._hearers: list[Hearer] = []
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
        """Why feeds don't say as of when they are exact; "" if they do."""
        return self.source.unproven

    @property
    def one_feed(self) -> bool:
        """Whether one feed speaks for every record."""
        return self.source.one_feed

    @property
    def trouble(self) -> str:
        """Why nothing is heard at present, as it was logged; "" if all is well."""
        return self._said

    def hear(self, hearer: Hearer, interval: float | None = None) -> None:
        """Let ``hearer`` know of changes from now on, with a beat at least every ``interval``.

        ``hearer`` must not refer to the store, which could not be collected then.
        """
        with self._lock:
            self._hearers = [*self._hearers, hearer]
            if interval is not None:
                self.interval = min(self.interval, interval)

    def leave(self, hearer: Hearer) -> None:
        """Stop that. Without any hearer the connections are closed."""
        with self._lock:
            self._hearers = [each for each in self._hearers if each is not hearer]
            is_last = not self._hearers
        if is_last:
            self.close()

    def feed(self, key: str) -> Feed | None:
        """The feed on which changes of this record are heard; None while there is none."""
        if not self._threads:
            self.start()
        return self._feeds.get(self.source.server_of(key)) if self._feeds else None

    def start(self) -> None:
        """Listen from soon on, in a thread of its own."""
        process.notice()
        with self._lock:
            if not self._threads and self._hearers:
                self._add(None)

    def close(self) -> None:
        """End the threads, which close their connections. The next use starts them again."""
        process.notice()
        with self._lock:
            threads = list(self._threads.values())
            self._threads, self._feeds = {}, {}
        for thread in threads:
            thread.stop()
        self._lost()

    def moved(self) -> None:
        """Other servers take the writes from now on: listen there, and rely on nothing until then.

        Called by a store, in any thread, before it reads from these servers.
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
        """Some records are read from other servers than before; each of them is still heard.

        Called by a store, in any thread, before it reads from these servers.
        """
        self._look_at = NEVER
        self._lost()

    def _lost(self) -> None:
        for hearer in self._hearers:
            hearer.lost()

    def _add(self, server: Hashable) -> None:
        thread = _Thread(self, server)
        self._threads[server] = thread
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no thread now
            del self._threads[server]
            self.failed(error)

    # -- for the threads

    def is_wanted(self, thread: _Thread) -> bool:
        """Whether this thread is to go on."""
        return self._threads.get(thread.server) is thread

    def look(self, thread: _Thread) -> None:
        """Have a thread for each server, if it is time to look which there are.

        The first thread takes the first one. Raises ``StoreUnavailable``.
        """
        with self._lock:
            if now() < self._look_at and thread.server is not None:
                return
            self._look_at = now() + LOOK_AGAIN  # the other threads need not look
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
        """How often ``moved`` was called."""
        return self._moves

    def opened(self, thread: _Thread, moves: int) -> Feed:
        """Changes at the server of this thread are heard now, that was looked up after ``moves``.

        Raises ``StoreUnavailable`` where it may be another one by now.
        """
        feed = Feed()
        with self._lock:
            if not self.is_wanted(thread) or self._moves != moves:
                raise StoreUnavailable("another server takes the writes now")
            self._feeds[thread.server] = feed
            self._said = ""
        return feed

    def heard(self, keys: list[str], *, more: bool) -> None:
        """These changed; ``more``: others may have, too."""
        for hearer in self._hearers:
            if more:
                hearer.lost()
            elif keys:
                hearer.changed(keys)

    def proved(self, thread: _Thread, feed: Feed, exact_as_of: float) -> None:
        """All changes until then were heard."""
        with self._lock:
            # After ``moved`` the feed is about a server that nobody reads from any more.
            if self._feeds.get(thread.server) is feed:
                feed.exact_as_of = exact_as_of

    def cut(self, thread: _Thread, feed: Feed) -> None:
        """Nothing more will be heard on this feed."""
        with self._lock:
            if self._feeds.get(thread.server) is feed:
                del self._feeds[thread.server]
        self._lost()

    def failed(self, error: Exception) -> None:
        """Log why nothing is heard, once."""
        said = f"{type(error).__name__}: {error}"
        if said != self._said:
            self._said = said
            logger.warning(
                "Changes of sessions can't be heard, so that every read asks the store: %s", said
            )


class _Thread(threading.Thread):
    """Listens to one server. ``server`` is None until the first thread has looked for one."""

    def __init__(self, listener: Listener, server: Hashable) -> None:
        super().__init__(name="gsession-listener", daemon=True)
        self.server = server
        self._listener = listener
        self._connection: Connection | None = None
        self._ended = threading.Event()

    def reopen(self) -> None:
        """Drop the connection; go on with another one if still wanted."""
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
                logger.exception("A listener failed, and begins again")
            finally:
                connection, self._connection = self._connection, None
                if feed is not None:
                    listener.cut(self, feed)
                if connection is not None:
                    connection.close()
            self._ended.wait(_PAUSES[min(failures, len(_PAUSES) - 1)])
            failures += 1

    def _listen(self, connection: Connection, feed: Feed) -> None:
        listener = self._listener
        beats, timeout = not listener.unproven, listener.source.timeout
        sent: deque[float] = deque()  # when each beat was sent that is not answered yet
        last = NEVER  # when the last one was that is answered
        next_beat = now()
        look_at = now() + LOOK_AGAIN
        while listener.is_wanted(self):
            moment = now()
            due = moment >= next_beat or feed.exact_as_of == NEVER  # two at once in the beginning
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
                with suppress(StoreUnavailable):  # where nobody knows, it stays as it is
                    listener.look(self)
                look_at = now() + LOOK_AGAIN
