"""Opens the sources of old sessions that the settings name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flask import Flask
from flask.sessions import SecureCookieSessionInterface, SessionInterface

from ..config import Settings, did_you_mean
from ..errors import SettingError
from ..flask_session_settings import FlaskSessionSettings, unwrapped
from ..repository.repository import Repository
from ..stores import Store, StoreOptions, open_store
from ..stores.base import Clock
from ..stores.foreign import ForeignValues, Together
from ..stores.wrappers.breaker import Circuit
from .flask_cookies import FlaskCookieSource
from .flask_session import FlaskSessionSource
from .own_store import OwnStoreSource
from .source import Source
from .takeover import OldCookie, Takeover

_LABELS = ("flask-session", "cookie")
_OF_A_DICT = {"store", "key_prefix"}


def open_imports(
    app: Flask,
    settings: Settings,
    repository: Repository,
    store: Store,
    source: object,
    options: StoreOptions,
    before: SessionInterface,
) -> Takeover:
    """The import of old sessions into ``store``, which was opened from ``source``.

    ``before``: the application's previous session interface. Doesn't connect. Raises
    ``SettingError``.
    """
    opened = _Opened(app, settings, repository, store, source, options, before)

    def at_url(url: str) -> Source:
        other = _Opened(app, settings, repository, store, source, options, before)
        other.stores = opened.stores
        assert settings.flask_session is not None  # the settings were checked
        return other.flask_session_at(settings.flask_session, url)

    until = settings.import_until
    attributes = repository.live.configured_cookie()
    if settings.import_cookie_domain is not None:
        attributes["domain"] = settings.import_cookie_domain
    if settings.import_cookie_path is not None:
        attributes["path"] = settings.import_cookie_path
    sources = [opened.source(name) for name in settings.imports]
    circuit = None
    if settings.breaker_failures:
        circuit = Circuit(
            "old sessions",
            settings.breaker_failures,
            settings.breaker_pause,
            settings.store_timeout,
            repository.events,
        )
    return Takeover(
        sources,
        OldCookie(str(settings.import_cookie_name), attributes),
        circuit=circuit,
        opened=opened.stores,
        knows_users=lambda: hasattr(app, "login_manager"),
        until=None if until is None else int(until * 1000),
        watch=settings.import_watch,
        at_url=at_url,
    )


class _Opened:
    def __init__(
        self,
        app: Flask,
        settings: Settings,
        repository: Repository,
        store: Store,
        source: object,
        options: StoreOptions,
        before: SessionInterface,
    ) -> None:
        self._app = app
        self._settings = settings
        self._repository = repository
        self._store, self._source = store, source
        self._options = options
        self._before = before
        #: the stores that were opened here
        self.stores: list[Store] = []

    def source(self, name: object) -> Source:
        """The source that an item of ``SESSION_IMPORT`` names."""
        if name == "flask-session":
            assert self._settings.flask_session is not None  # the settings were checked
            return self._flask_session(self._settings.flask_session)
        if name == "cookie":
            of_app = self._before
            if not isinstance(of_app, SecureCookieSessionInterface):
                of_app = SecureCookieSessionInterface()
            return FlaskCookieSource(self._app, of_app)
        return self._own(name)

    def _open(self, place: object, options: StoreOptions) -> Store:
        store, owned = open_store(place, options, self._app.instance_path)
        if owned:
            self.stores.append(store)
        return store

    def _own(self, name: object) -> Source:
        prefix = self._settings.key_prefix
        if isinstance(name, Mapping):
            if not name.keys() <= _OF_A_DICT or "store" not in name:
                raise SettingError(
                    f"SESSION_IMPORT has a dict with {sorted(map(str, name))}; allowed: "
                    '"store", and "key_prefix" if it differs'
                )
            prefix, name = name.get("key_prefix", prefix), name["store"]
        try:
            store = self._open(
                unwrapped("SESSION_IMPORT", name),
                replace(self._options, prefix=prefix, logout_replicas=0),
            )
        except SettingError as error:
            text = str(error).replace("SESSION_STORE", "An item of SESSION_IMPORT")
            hint = did_you_mean(name.lower(), _LABELS, cutoff=0.6) if isinstance(name, str) else ""
            if hint:
                text = f"SESSION_IMPORT names {name!r}, which isn't a source of old sessions{hint}"
            else:
                text += '. Or "flask-session", or "cookie" for sessions in Flask\'s own cookies'
            raise SettingError(text) from None
        live = self._repository.live
        old = Repository(
            replace(self._settings, key_prefix=prefix),
            live,
            store,
            self._repository.events,
            self._options.clock,
        )
        return OwnStoreSource(old, str(self._settings.import_cookie_name), live.secret_keys)

    def _flask_session(self, old: FlaskSessionSettings) -> Source:
        store = self._values(old)
        return FlaskSessionSource(
            store,
            prefix=old.prefix,
            id_length=old.id_length,
            secret_keys=self._repository.live.secret_keys if old.use_signer else None,
            pickled=old.type in ("cachelib", "filesystem"),
            together=self._together(store),
        )

    def flask_session_at(self, old: FlaskSessionSettings, url: str) -> Source:
        """Flask-Session's configured source, but at another URL. Raises ``SettingError``."""
        client: Any = url
        if old.type == "sqlalchemy":
            client = _engine_at(url)
        elif old.type not in ("redis", "mongodb"):
            raise SettingError(
                f"SESSION_TYPE is {old.type!r}, whose sessions have no URL; allowed: --url with "
                "redis, mongodb or sqlalchemy"
            )
        try:
            return self._flask_session(replace(old, client=client))
        except SettingError as error:
            raise SettingError(re.sub("SESSION_(REDIS|MONGODB)", "--url", str(error))) from None

    def _together(self, store: ForeignValues) -> Together | None:
        """The old values, if our records are on the same server."""
        if self._store is not self._shared:
            return None
        return store if hasattr(store, "load_both") else None  # type: ignore[return-value]

    _shared: Store | None = None

    def _values(self, old: FlaskSessionSettings) -> ForeignValues:
        clock = self._options.clock
        if old.type == "redis":
            return self._server(old).strings()  # type: ignore[no-any-return]
        if old.type == "mongodb":
            return self._server(old).documents(old.database, old.collection)  # type: ignore[no-any-return]
        if old.type == "sqlalchemy":
            return _table(self._app, old, clock)
        if old.type == "cachelib" and old.client is not None:
            return self._cache(old.client)
        from .cachelib_cache import CacheFiles

        folder = (
            old.folder if old.type == "filesystem" else os.path.join(os.getcwd(), "flask_session")
        )
        return CacheFiles(folder, clock)

    def _server(self, old: FlaskSessionSettings) -> Any:
        """A store on the old server: the application's store, if it is on the same server."""
        place = old.place
        key, part = {
            "redis": ("SESSION_REDIS", "strings"),
            "mongodb": ("SESSION_MONGODB", "documents"),
        }[old.type]
        same = self._source is place or (isinstance(place, str) and self._source == place)
        if same and self._store is not None:
            self._shared = store = self._store
        else:
            try:
                store = self._open(place, replace(self._options, own_connections=True))
            except SettingError as error:
                raise SettingError(str(error).replace("SESSION_STORE", key)) from None
        if not hasattr(store, part):
            raise SettingError(
                f"SESSION_TYPE is {old.type!r}, but {key} leads to a {type(store).__name__}; "
                f"allowed: a client or a URL of {'Redis' if old.type == 'redis' else 'MongoDB'}"
            )
        return store

    def _cache(self, cache: Any) -> ForeignValues:
        """The values in a cache of cachelib, by its type."""
        from .cachelib_cache import CacheFiles, CacheStrings

        for kind in type(cache).__mro__:
            name = f"{kind.__module__}.{kind.__qualname__}"
            if name == "cachelib.file.FileSystemCache":
                return CacheFiles(cache._path, self._options.clock, cache._hash_method)
            if name == "cachelib.redis.RedisCache":
                prefix = cache.key_prefix
                strings: Any = self._open(
                    cache._write_client, replace(self._options, own_connections=True)
                )
                return CacheStrings(
                    strings.strings(), str(prefix() if callable(prefix) else prefix or "")
                )
        raise SettingError(
            f"SESSION_CACHELIB is a {type(cache).__name__}, whose sessions can't be taken over; "
            "allowed: a FileSystemCache or a RedisCache. Set SESSION_IMPORT to [] to import nothing"
        )


def _table(app: Flask, old: FlaskSessionSettings, clock: Clock) -> ForeignValues:
    try:
        from .sqlalchemy_table import SQLAlchemyTable
    except ImportError as error:
        raise SettingError(
            f'SESSION_TYPE is "sqlalchemy", and {error.name} is not installed: install it, or set '
            "SESSION_IMPORT to []"
        ) from None
    return SQLAlchemyTable(_engine_of(app, old), old.table, old.schema, clock)


def _engine_at(url: str) -> Any:
    try:
        import sqlalchemy as sa

        return sa.create_engine(url)
    except ImportError as error:
        raise SettingError(f"{error.name} is not installed: install it to use this URL") from None
    except sa.exc.ArgumentError:
        raise SettingError("--url is not a URL of SQLAlchemy") from None


def _engine_of(app: Flask, old: FlaskSessionSettings) -> Callable[[], Any]:
    def engine() -> Any:
        database = old.client if old.client is not None else app.extensions.get("sqlalchemy")
        if hasattr(database, "connect"):  # an engine
            return database
        if database is None:
            raise SettingError(
                "SESSION_SQLALCHEMY is not set, and the application has no Flask-SQLAlchemy: set "
                "it to the SQLAlchemy object whose database has the sessions"
            )
        database = getattr(database, "db", database)  # before Flask-SQLAlchemy 3
        if hasattr(database, "engines"):
            return database.engines[old.bind_key]
        return database.get_engine(app, bind=old.bind_key)

    return engine
