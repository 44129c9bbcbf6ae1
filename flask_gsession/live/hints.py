"""Notices changes of watched sessions and users, by comparing their versions.

The store's listener reports which records may have changed. One thread loads those that are watched
in this process, and compares versions, so a missed or repeated hint does no harm. It also checks
without a hint: at each heartbeat, and every few seconds while the listener is down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from msgspec.structs import replace

from ..errors import StoreUnavailable, UnreadableRecord
from ..events import logger
from ..processes import is_before_fork, process
from ..repository.repository import Loaded, Repository
from ..repository.user_values import values_key
from ..stores.base import MAX_POINTERS, Record
from ..stores.parts import Changes, Feed, Subscriber, parts_of
from ..users.roster import EMPTY
from ..users.rosters import roster_key
from .messages import Message, messages_key, read_messages
from .servers import is_ending
from .states import Digests, SessionState, State, UserState, Versions

POLL = 3.0  # seconds between two checks while no changes arrive
_TICK = 1.0  # seconds between two checks of the clock and the listener
_SOON = 0.05  # like _TICK, while the listener connects
_CONNECTS = 2.0  # seconds for the listener to connect
_LINGERS = 5.0  # seconds that the thread stays alive without a watch
_REST = 9.0  # the pause after a check of everything, as a multiple of its duration

NO_RECORDS: Mapping[str, Record | None] = MappingProxyType({})
Notify = Callable[["Watch", State, State], object]


class Watch:
    """A session with its user, or a user alone, watched in this process.

    ``notify(watch, before, after)`` runs in the hints' thread, so it must be quick. ``is_over`` is
    called once a second; if it returns true, the watch is closed. ``state``: the last known state.
    """

    __slots__ = (
        *("_hints", "_lock", "checked", "closed", "handle", "is_over", "keys", "notify", "state"),
        "user_id",
    )

    def __init__(
        self,
        hints: Hints,
        handle: str | None,
        user_id: str | None,
        notify: Notify,
        is_over: Callable[[], bool] = bool,
    ) -> None:
        self._hints = hints
        self.is_over = is_over
        self._lock = threading.Lock()
        self.handle = handle
        self.user_id = user_id
        self.notify = notify
        self.state = State()
        #: the records that it depends on
        self.keys: tuple[str, ...] = ()
        self.checked = 0.0  # of time.monotonic
        #: whether it is closed
        self.closed = False

    def close(self) -> None:
        """Stop watching. Any thread may call this, and more than once."""
        self._hints.forget(self)


class _ChangedRecords(Subscriber):
    """Collects the watched records that changed. Holds no reference to the store."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start without watches, at first and after a fork."""
        self.lock = threading.RLock()  # a signal handler may write to a session
        self.watches: dict[str, dict[Watch, None]] = {}  # by the key of a record
        self.heard: set[str] = set()
        self.missed = False
        self.woken = threading.Event()

    def changed(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self.watches:
                with self.lock:
                    self.heard.add(key)
                self.woken.set()

    def lost(self) -> None:
        self.missed = True
        self.woken.set()

    def take(self) -> set[str]:
        with self.lock:
            heard, self.heard = self.heard, set()
        return heard


class Hints:
    """The watches of one application in this process. The first one starts the thread.

    All watches close when the process shuts down.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.digests = Digests(repository)
        self.heartbeat = repository.settings.live_heartbeat
        self._changed = _ChangedRecords()
        self._is_heard = False
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._lock = threading.RLock()  # a finalizer may close a watch
        self._changed.start()
        self._watches: dict[Watch, None] = {}
        self._thread: threading.Thread | None = None
        self._feeds: dict[str, Feed | None] = {}
        self._rest_until = self._next_tick = self._began = 0.0  # of time.monotonic

    # -- for watchers

    def watch(
        self,
        handle: str | None,
        user_id: str | None,
        notify: Notify,
        is_over: Callable[[], bool] = bool,
    ) -> Watch:
        """Watch a session with its user, or a user, from now on. Sets ``state`` to the current
        state.

        One to four round trips. Raises ``StoreUnavailable``, also in uWSGI's first process: its
        workers would not have the watch.
        """
        process.notice()
        if is_before_fork():
            raise StoreUnavailable(
                "live hints need a thread, but uWSGI is going to fork this process: watch "
                "in a function decorated with uwsgidecorators.postfork, or set lazy-apps = true"
            )
        watch = Watch(self, handle, user_id, notify, is_over)
        with self._lock:
            self._watches[watch] = None
        try:
            self._begin()
            self._look(watch, None, {})
        except BaseException:
            self.forget(watch)
            raise
        return watch

    def look_from(self, loaded: Loaded, others: Mapping[str, Record | None] = NO_RECORDS) -> State:
        """The state of a session that was just loaded. Three round trips if it has a user.

        ``others``: further records that were loaded, by key; None for a missing one.
        """
        process.notice()
        watch = Watch(self, loaded.record.key, None, lambda *_: None)
        return self._state_of(watch, None, {loaded.record.key: loaded.record, **others})

    def forget(self, watch: Watch) -> None:
        """See ``Watch.close``."""
        watch.closed = True
        with self._lock:
            self._watches.pop(watch, None)
            self._listen(watch, ())

    def watches(self) -> list[Watch]:
        with self._lock:
            return list(self._watches)

    def close(self) -> None:
        """End the thread and all watches."""
        process.notice()
        self._end(self.watches())
        with self._lock:
            thread, self._thread = self._thread, None
            self._changed.woken.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_TICK)
        with self._lock:
            if self._thread is None:  # otherwise, there is a new watch
                self._listen_to_store(False)

    def _end(self, watches: list[Watch]) -> None:
        """Close these watches, and notify their owners once more."""
        for watch in watches:
            watch.close()
            _call(watch, watch.state, watch.state)

    # -- the thread

    def _changes(self) -> Changes | None:
        return parts_of(self.repository.store).changes

    def _listen_to_store(self, wanted: bool) -> None:
        changes = self._changes()
        if changes is None:
            return
        if wanted and not self._is_heard:
            changes.subscribe(self._changed)
        elif self._is_heard and not wanted:
            changes.unsubscribe(self._changed)
        self._is_heard = wanted
        if wanted:
            changes.start()

    def _begin(self) -> None:
        with self._lock:
            if self._thread is not None:
                return
            self._listen_to_store(True)
            self._began = time.monotonic()
            thread = threading.Thread(target=self._run, name="gsession-live", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system can't start a thread
                raise StoreUnavailable(f"live hints need a thread: {error}") from error
            self._thread = thread

    def _run(self) -> None:
        changed, idle_since = self._changed, None
        while True:
            changed.woken.wait(self._pause())
            changed.woken.clear()
            now = time.monotonic()
            with self._lock:
                if self._thread is not threading.current_thread():
                    return
                if self._watches:
                    idle_since = None
                elif idle_since is None:
                    idle_since = now
                elif now - idle_since > _LINGERS:
                    self._thread = None
                    self._listen_to_store(False)
                    return
            try:
                self._round(now)
            except Exception:
                logger.exception("Live hints failed, and will continue")
                time.sleep(_TICK)

    def _pause(self) -> float:
        wait = _TICK
        if time.monotonic() - self._began < _CONNECTS and not all(self._feeds.values() or [None]):
            wait = _SOON
        if self._changed.missed:
            wait = min(wait, max(0.001, self._rest_until - time.monotonic()))
        return wait

    def _round(self, now: float) -> None:
        """Check all records that may have changed."""
        if is_ending():
            self._end(self.watches())
        heard = self._changed.take()
        heard |= self._newly_reported()
        everything = self._changed.missed and now >= self._rest_until
        if everything:
            self._changed.missed = False
        tick = now >= self._next_tick
        if tick:
            self._next_tick = now + _TICK
        milliseconds = self.repository.now()
        loads: dict[str, Record | None] = {}
        for watch in self.watches():
            session = watch.state.session
            due = (
                everything
                or now - watch.checked >= (self.heartbeat if self._is_reported(watch) else POLL)
                or (session is not None and milliseconds >= session.ends)
            )
            if tick and watch.is_over():
                self._end([watch])
                continue
            dirty = None if due else heard.intersection(watch.keys)
            if dirty is None or dirty:
                try:
                    self._look(watch, dirty, loads)
                except StoreUnavailable:
                    watch.checked = now - self.heartbeat + _TICK  # check it again soon
        if everything:
            self._rest_until = time.monotonic() + _REST * (time.monotonic() - now)

    def _newly_reported(self) -> set[str]:
        """The records whose changes now arrive over a new connection: some may have been missed."""
        changes = self._changes()
        if changes is None:
            return set()
        feeds = {key: changes.feed(key) for key in list(self._changed.watches)}
        before, self._feeds = self._feeds, feeds
        return {key for key, feed in feeds.items() if feed is not before.get(key)}

    def _is_reported(self, watch: Watch) -> bool:
        return all(self._feeds.get(key) is not None for key in watch.keys)

    # -- one watch

    def _look(self, watch: Watch, dirty: set[str] | None, loads: dict[str, Record | None]) -> None:
        """Load the records that may have changed (None: all), compare, and notify."""
        with watch._lock:
            before = watch.state
            after = self._state_of(watch, dirty, loads)
            watch.state, watch.checked = after, time.monotonic()
        if after != before:
            _call(watch, before, after)

    def _state_of(
        self, watch: Watch, dirty: set[str] | None, loads: dict[str, Record | None]
    ) -> State:
        session, user, user_id = watch.state.session, watch.state.user, watch.user_id
        if watch.handle is not None:
            if session is None or dirty is None or session.handle in dirty:
                session = self._session(watch, session, loads)
            user_id = None if session is None else session.user_id
        if user_id is None:
            self._listen(watch, watch.keys[:1])
            return State(session)
        if user is not None and user.user_id != user_id:
            user = None
        keys = roster_key(user_id), messages_key(user_id), values_key(user_id)
        self._listen(watch, (*watch.keys[:1], *keys) if watch.handle is not None else keys)
        if user is None:
            user, dirty = UserState(user_id, "", {}), None
        if dirty is None or keys[0] in dirty:
            user = replace(user, devices=self._devices(user_id, loads))
        if dirty is None or keys[1] in dirty:
            user = replace(user, messages=self._messages(keys[1], loads))
        if dirty is None or keys[2] in dirty:
            user = replace(user, keys=self._values(keys[2], user, loads))
        return State(session, user)

    def _session(
        self, watch: Watch, before: SessionState | None, loads: dict[str, Record | None]
    ) -> SessionState | None:
        """The session now. Follows pointers of rotated tokens within their grace."""
        repository = self.repository
        key = watch.handle if before is None else before.handle
        assert key is not None
        for _ in range(MAX_POINTERS):
            self._listen(
                watch, (key, *watch.keys[1:])
            )  # before the load, since a change may come during it
            try:
                record = self._load(key, loads)
                if record is None or repository.now() >= record.idle_expires_at:
                    return None
                body = repository.records.read(key, record)
            except UnreadableRecord as error:
                # Workers with another version or other keys may be able to read it.
                return before if error.for_others else None
            if body is not None:
                user_id = None if body.owner is None else body.owner.user_id
                versions = self.digests.of_body(record.created_at, body, repository.now())
                return SessionState(key, record.idle_expires_at, user_id, versions)
            key = record.successor or ""
        return None

    def _load(self, key: str, loads: dict[str, Record | None]) -> Record | None:
        if key not in loads:
            loads[key] = self.repository.store.load(key)
        return loads[key]

    def _devices(self, user_id: str, loads: dict[str, Record | None]) -> str:
        repository = self.repository
        try:
            record, roster = self._load(roster_key(user_id), loads), EMPTY
            if record is not None and repository.now() < record.idle_expires_at:
                roster = repository.rosters.read(record)
        except UnreadableRecord:
            return ""
        return self.digests.of_devices(user_id, roster.without_expired(repository.now()))

    def _messages(self, key: str, loads: dict[str, Record | None]) -> tuple[Message, ...]:
        try:
            return read_messages(self.repository, self._load(key, loads))
        except UnreadableRecord:
            return ()

    def _values(self, key: str, before: UserState, loads: dict[str, Record | None]) -> Versions:
        repository = self.repository
        try:
            record = self._load(key, loads)
            if record is None or repository.now() >= record.idle_expires_at:
                return {}
            body = repository.records.read(key, record)
        except UnreadableRecord as error:
            return before.keys if error.for_others else {}
        if body is None:
            return {}
        return self.digests.of_body(record.created_at, body, repository.now())

    def _listen(self, watch: Watch, keys: tuple[str, ...]) -> None:
        """Let the watch depend on these records."""
        if keys == watch.keys:
            return
        with self._lock:
            if keys and watch not in self._watches:
                return  # it is closed, or only reads the state
            by_key = self._changed.watches
            for key in set(watch.keys) - set(keys):
                those = by_key.get(key, {})
                those.pop(watch, None)
                if not those:
                    by_key.pop(key, None)
            for key in keys:
                by_key.setdefault(key, {})[watch] = None
            watch.keys = keys


def _call(watch: Watch, before: State, after: State) -> Any:
    try:
        watch.notify(watch, before, after)
    except Exception:
        logger.exception("A receiver of live hints failed")
