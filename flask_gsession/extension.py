"""``Session``: puts server-side sessions into a Flask application."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from flask import Flask, current_app, has_request_context, request
from flask import session as flask_session
from flask.signals import got_request_exception
from werkzeug.local import LocalProxy

from .authentication import freshen, rotate_at_sign_in
from .config import LiveSettings, SettingKeywords, read_settings, warn, warn_without_secret_key
from .errors import SettingError
from .events import Event, Events
from .interface import GSessionInterface, note_error_page, session_of_request
from .opening import OpenSession, SessionPeek, peek
from .processes import warn_without_threads
from .reconciling import SessionReconciler
from .repository.repository import Repository
from .request.session import SessionData
from .request.template import prepare_templates
from .stores import Store, StoreOptions, open_blobs, open_store
from .stores.base import Clock
from .stores.parts import Edge, parts_of
from .stores.wrappers import Breaker, Near, compose
from .users.opening import OpenUser
from .users.rosters import checked_user_id
from .users.users import Users
from .watching.audit import write_audit_log
from .watching.debug import prepare

if TYPE_CHECKING:
    from .journal.consuming import Consumer
    from .live.hints import Hints
    from .live.live import Live

NAME = "gsession"
DEFAULT_STORE = "sqlite:///gsession.sqlite3"

E = TypeVar("E", bound=Event)


class Session:
    """Server-side sessions for Flask.

    ``app``: the application. You can also call ``init_app`` later, even for several applications.
    ``settings``: each setting ``SESSION_X`` as the keyword ``x``, which overrides ``app.config``.
    ``help(flask_gsession.config.SettingKeywords)`` lists them. ``clock``: a function that returns
    the time in seconds since 1970, for tests.

    The first ``Session`` of an application serves ``flask.session``. Further ones need another
    ``cookie_name``; their session is ``ext.session``.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        clock: Clock = time.time,
        **settings: Unpack[SettingKeywords],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._events = Events()
        write_audit_log(self._events)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Check the settings of ``app`` and replace its session interface. Connects to no server.

        Raises ``SettingError``, also if this ``Session``, or one with this cookie name, is already
        on the application.
        """
        if not isinstance(app, Flask):
            raise SettingError(
                f"Session() takes the Flask application first, not a value of type "
                f"{type(app).__name__}; settings are keywords, as in Session(app, store=...)"
            )
        interfaces: dict[Session, GSessionInterface] = app.extensions.setdefault(NAME, {})
        settings = read_settings(app, self._settings, further=bool(interfaces))
        if self in interfaces:
            raise SettingError(
                "This Session is on the application already: call Session(app) or init_app(app), "
                "not both"
            )

        def is_taken(cookie: str) -> bool:
            others = (interface for ext, interface in interfaces.items() if ext is not self)
            return any(other.get_cookie_name(app) == cookie for other in others)

        if is_taken(settings.cookie_name):
            raise SettingError(
                f"The application has a Session with the cookie {settings.cookie_name!r} "
                "already: pass the second Session another cookie_name"
            )
        options = StoreOptions(
            prefix=settings.key_prefix,
            timeout=settings.store_timeout,
            pool_max=settings.pool_max,
            clock=self._clock,
            logout_replicas=settings.logout_replicas,
            edge_sync=settings.edge_sync,
        )
        if settings.store_follows and settings.flask_session is not None:
            # Flask-Session's clients have their own timeouts; a setting names its MongoDB database.
            options = replace(
                options, own_connections=True, database=settings.flask_session.database
            )
        source = DEFAULT_STORE if settings.store is None else settings.store
        store, owned = open_store(source, options, app.instance_path)
        if settings.logout_replicas and owned and not store.confirms_logouts:
            warn("SESSION_LOGOUT_REPLICAS has no effect on this store; it works with Redis only")
        raw = store
        journaling = None
        if settings.journal:
            from .journal.opening import with_journal  # most applications don't need it

            store = journaling = with_journal(store, settings.journal_events, self._clock)
        events = self._events.of(app)
        breaker, is_edge = None, parts_of(store).edge is not None
        if settings.breaker_failures and not is_edge:  # an edge node has its own
            breaker = Breaker(
                settings.breaker_failures, settings.breaker_pause, settings.store_timeout, events
            )
        near = None
        if settings.near_cache and not is_edge:  # an edge node has its own
            _check_near_cache(store)
            near = Near(settings.near_cache, settings.near_cache_bytes, self._clock)
        calls = compose(store, breaker=breaker, near=near)
        blobs = None
        if settings.spill_store is not None:
            blobs = open_blobs(settings.spill_store, calls, options)
        live = LiveSettings(app, settings, self._settings, is_taken)
        repository = Repository(settings, live, calls, events, self._clock, blobs)
        if journaling is not None:
            from .journal.opening import describe_by

            describe_by(journaling, repository)
        if repository.edge is not None:
            _check_outbox(repository.edge, interfaces.values())
            reconciler = SessionReconciler(repository, repository.edge.centre)
            repository.edge.use(reconciler)
            repository.reconciler = reconciler
        if settings.schema is not None:
            _declare(settings.schema, repository)
        if settings.imports:
            from .moving.sources import open_imports

            repository.imports = open_imports(
                app, settings, repository, raw, source, options, app.session_interface
            )
        interface = GSessionInterface(repository, store, owns_store=owned)
        if interfaces:
            next(iter(interfaces.values())).has_further = True
        else:
            app.session_interface = interface
            warn_without_secret_key(app)
            got_request_exception.connect(note_error_page, app, weak=False)
            prepare_templates(app)
            rotate_at_sign_in(app, remembers=settings.remember == "session")
            repository.on_confirm = freshen
        interfaces[self] = interface
        if settings.debug:
            prepare(app, live.cookie_name, interface.tokens.present)

    @property
    def session(self) -> SessionData:
        """The session of this ``Session`` in the current request, as a proxy.

        For an application's first ``Session`` it is ``flask.session``.
        """
        return LocalProxy(self._current)  # type: ignore[return-value]  # stands for a SessionData

    def open(self, handle: str | None, *, renew: bool = True) -> OpenSession:
        """The session with this handle, as a block: ``with ext.open(handle) as session:``.

        For jobs, socket handlers and administration, in an application context; inside a request,
        for other sessions. ``async with`` works too. ``handle``: from ``session.handle``, the log
        or ``flask gsession list``. An earlier handle works for as long as its token does.
        ``renew``: with False, the block doesn't count as use, and the idle expiry stays.

        Raises ``ValueError`` for an impossible handle. For errors of the block, and its cost, see
        ``OpenSession``.
        """
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
        return OpenSession(self._interface(app).repository, app, handle, renew)

    def peek(self, handle: str | None) -> SessionPeek | None:
        """The present contents of the session with this handle, read-only, or None.

        This doesn't count as use of the session: nothing is written, and the idle expiry stays.
        Needs an application context. Raises ``ValueError`` for an impossible handle. One round
        trip.
        """
        return peek(self._interface(None).repository, handle)

    def open_user(self, user_id: str | int, *, renew: bool = True) -> OpenUser:
        """The values of a user, as a block: ``with ext.open_user(user_id) as values:``.

        For jobs and administration, in an application context; a view has them in
        ``session.shared``. ``async with`` works too. ``user_id``: the argument of ``session.bind``;
        the user need not be signed in. ``renew``: with False, the block doesn't count as use.

        Raises ``ValueError`` for an invalid id. For errors of the block, and its cost, see
        ``OpenUser``.
        """
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
        return OpenUser(self._interface(app).repository, app, checked_user_id(user_id), renew)

    @cached_property
    def users(self) -> Users:
        """The users of the current application and their devices, and how to sign them out."""
        return Users(lambda: self._interface(None).repository, self._session_here)

    @cached_property
    def live(self) -> Live:
        """Live hints for browsers: a session ended, or values or devices changed."""
        from .live.live import Live  # most applications don't need it

        return Live(self._hints)

    def journal(self, consumer: str, *, follow: bool = False, sweep: bool = True) -> Consumer:
        """The events that this consumer hasn't acknowledged: ``for event in ext.journal("siem")``.

        Needs an application context and ``SESSION_JOURNAL``. ``follow``: wait for more instead of
        ending. ``sweep``: also look for sessions that have expired, at most every 5 seconds. Run
        one process for each ``consumer``; for the fields of an event see ``JournalEvent``.

        Raises ``ValueError`` for an impossible name, ``SettingError`` if the journal is off, and
        ``StoreUnavailable``; with ``follow`` it waits for the store instead.
        """
        from .journal.consuming import Consumer  # most applications don't need it

        repository = self._interface(None).repository
        if repository.journaling is None:
            raise SettingError("SESSION_JOURNAL is off: set it to True")
        return Consumer(
            repository.journaling, repository.clock, consumer, follow=follow, sweep=sweep
        )

    def store(self, app: Flask | None = None) -> Store:
        """The store of ``app``, or of the current application."""
        return self._interface(app).store

    def on(
        self, event: type[E], receiver: Callable[[E], object] | None = None
    ) -> Callable[[Callable[[E], object]], Callable[[E], object]]:
        """Call ``receiver`` with every event of a type. Also a decorator: ``@ext.on(Event)``.

        The events are in ``flask_gsession.events``. A receiver runs inside the request, so it
        should be quick. If it fails, the error is logged, and the request continues.
        """

        def subscribe(function: Callable[[E], object]) -> Callable[[E], object]:
            self._events.subscribe(event, function)
            return function

        if receiver is not None:
            subscribe(receiver)
        return subscribe

    def close(self, app: Flask | None = None) -> None:
        """Release the store's connections, unless you passed in the store object."""
        interface = self._interface(app)
        if interface.hints is not None:
            interface.hints.close()
        if interface.owns_store:
            interface.store.close()
        if interface.repository.imports is not None:
            interface.repository.imports.close()

    def _interface(self, app: Flask | None) -> GSessionInterface:
        target = app or current_app
        interfaces: dict[Session, GSessionInterface] = target.extensions.get(NAME, {})
        if self not in interfaces:
            raise SettingError("This Session is not on the application: call init_app first")
        return interfaces[self]

    def _hints(self) -> Hints:
        interface = self._interface(None)
        if interface.hints is None:
            from .live.hints import Hints

            made = Hints(interface.repository)
            # In one step, since several threads may do this at the same time.
            interface.hints = vars(interface).setdefault("_made_hints", made)
        return interface.hints

    def _session_here(self) -> SessionData | None:
        """The session of this ``Session`` in the current request; None outside a request."""
        session = self._current() if has_request_context() else None
        # Another application may have pushed a context inside the request.
        return session if self._interface(None).has_opened(session) else None

    def _current(self) -> Any:
        interface = self._interface(None)
        if not has_request_context():
            return flask_session._get_current_object()  # type: ignore[attr-defined]  # a proxy
        # Check the session too, since the application may have wrapped the interface.
        own = current_app.session_interface is interface
        if own or interface.has_opened(session_of_request()):
            return flask_session._get_current_object()  # type: ignore[attr-defined]  # a proxy
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
        now = request._get_current_object()  # type: ignore[attr-defined]  # another one later
        return interface.open_further(app, now)


def _check_near_cache(store: Store) -> None:
    """Raises ``SettingError`` unless the store can prove how fresh a near cache is."""
    changes = parts_of(store).changes
    why = "it doesn't report changes" if changes is None else changes.unproven
    if why:
        raise SettingError(
            f"SESSION_NEAR_CACHE can't be used with this SESSION_STORE, a "
            f"{type(store).__name__}: {why}. Remove it, or store sessions in Redis, directly "
            "or behind a gRPC server"
        )
    warn_without_threads("SESSION_NEAR_CACHE has no effect, and every read asks the store")


def _check_outbox(edge: Edge, others: Iterable[GSessionInterface]) -> None:
    """Raises ``SettingError`` if another ``Session`` would settle the changes of this one."""
    known = [other.repository.edge for other in others]
    if edge.outbox in [other.outbox for other in known if other is not None]:
        raise SettingError(
            "Two Sessions of this application have the same edge file and SESSION_KEY_PREFIX, so "
            "each would merge the other's changes by its own policies: pass the second Session "
            "another file or another key_prefix"
        )


def _declare(schema: object, repository: Repository) -> None:
    """Let ``schema`` check all values of the repository's sessions."""
    from .typed import SessionSchema  # needs an extra

    check = SessionSchema(schema, repository.now)
    repository.check = check
    repository.typed_keys.update(check.typed)
    repository.merger.policies = check.policies(repository.merger.policies)
