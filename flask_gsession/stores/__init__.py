"""Opens the store that ``SESSION_STORE`` names. Imports only the driver that it needs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from ..errors import SettingError
from .base import Deleted, Record, Replaced, Store, is_store
from .parts import Blobs, Checks, Counts, Leases, Scans, Upkeep, has_blob_methods, parts_of
from .support import StoreOptions
from .urls import without_hosts

__all__ = [
    "Blobs",
    "Checks",
    "Counts",
    "Deleted",
    "Leases",
    "Record",
    "Replaced",
    "Scans",
    "Store",
    "StoreOptions",
    "Upkeep",
    "open_blobs",
    "open_store",
]

T = TypeVar("T")

_REDIS = {  # the path that a URL of each kind may have, and an example
    "redis": (r"(/[0-9]*)?", "redis://localhost:6379/0, with the number of the database"),
    "unix": (r".+", "unix:///run/redis.sock, with the path of the socket"),
    "sentinel": (
        r"/[^/]+(/[0-9]*)?",
        "redis+sentinel://host1,host2,host3/service/0, with the name by which the sentinels know "
        "the service, and the number of the database",
    ),
    "cluster": (r"/?0?", "redis+cluster://host1,host2, without a database: a cluster has only one"),
}

_REDIS_SCHEMES = [
    *("redis", "rediss", "unix"),
    *("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
]

_IMITATIONS = ("fakeredis", "mongomock", "mockredis", "birdisle")

_SCHEME = re.compile("[a-z][a-z0-9+.-]*", re.ASCII)  # RFC 3986

_ALLOWED = (
    "allowed are sqlite:///path, memory://, redis://host:port/db, rediss://, unix:///socket, "
    "redis+sentinel://host,host/service/db, redis+cluster://host, "
    "mongodb://host:port/db, mongodb+srv://, grpcs://host:port, "
    "grpc:///socket, edge+sqlite:///path, "
    "a client (redis.Redis, redis.cluster.RedisCluster, pymongo.MongoClient), or a store object"
)

_BLOBS_ALLOWED = (
    "allowed are an fsspec URL such as file:///var/lib/shop/large or s3://bucket/folder, or an "
    "object with the methods of Blobs"
)


def open_store(source: object, options: StoreOptions, base_path: str = ".") -> tuple[Store, bool]:
    """The store that ``source`` names, and whether we must close it.

    A relative ``sqlite:`` path is relative to ``base_path``. Raises ``SettingError``, never showing
    more of a URL than its scheme.
    """
    if isinstance(source, str):
        return _from_url(source, options, base_path), True
    _refuse_imitation(source)
    for kind in type(source).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name == "redis.client.Redis":
            from .redis import RedisStore

            return RedisStore(source, options), True  # type: ignore[arg-type]  # known by its name
        if name == "redis.cluster.RedisCluster":
            from .redis import RedisClusterStore

            return RedisClusterStore(source, options), True  # type: ignore[arg-type]  # as above
        if name == "pymongo.synchronous.mongo_client.MongoClient":
            from .mongodb import MongoDBStore

            return MongoDBStore(source, options), True  # type: ignore[arg-type]  # known by its name
        if kind.__module__.partition(".")[0] in ("pymongo", "motor"):
            # A pymongo Database has every attribute, so it would pass for a store.
            break
    else:
        if is_store(source):
            return source, False  # type: ignore[return-value]  # it has the verbs
    raise SettingError(f"SESSION_STORE is {_kind_of(source)}; {_ALLOWED}")


def _kind_of(source: object) -> str:
    if isinstance(source, type):
        return f"the class {source.__qualname__}, not an object of it"
    return f"of type {type(source).__qualname__}"


def _refuse_imitation(source: object) -> None:
    """Refuse a client that looks like a driver's, but lacks methods that the stores need."""
    pool = getattr(source, "connection_pool", None)
    for kind in (*type(source).__mro__, getattr(pool, "connection_class", None)):
        package = str(getattr(kind, "__module__", "")).partition(".")[0]
        if package in _IMITATIONS:
            raise SettingError(
                f"SESSION_STORE is a client of {package}, which is not supported: it can't give "
                "the guarantees that a real server gives. In tests use memory://, which gives "
                "all of them, or a real server"
            )


def open_blobs(source: object, entries: Store, options: StoreOptions) -> Blobs:
    """The storage for large values that ``source`` names. The store ``entries`` records which of
    its files are live.

    Raises ``SettingError``, never showing more of a URL than its scheme.
    """
    if not isinstance(source, str):
        if has_blob_methods(source):
            return source  # type: ignore[return-value]  # it has the methods
        raise SettingError(f"SESSION_SPILL_STORE is {_kind_of(source)}; {_BLOBS_ALLOWED}")
    places = parts_of(entries).blobs
    if places is None:
        raise SettingError(
            "SESSION_SPILL_STORE needs a SESSION_STORE with the part `blobs`, which records the "
            "files in use: use a built-in store, or add that part to yours"
        )
    scheme = source.partition(":")[0]
    named = "://" in source and _SCHEME.fullmatch(scheme)
    shown = f"a URL with the scheme {scheme!r}" if named else "no URL"
    try:
        from .files import FileBlobs, check_url, is_relative
    except ImportError as error:
        raise SettingError(
            f"SESSION_SPILL_STORE is {shown}, and {error.name} is not installed: install the "
            "fsspec extra, flask-gsession[fsspec]"
        ) from None
    try:
        check_url(source)
    except ImportError as error:
        raise SettingError(
            f"SESSION_SPILL_STORE is {shown}, whose file system is not installed: {error}"
        ) from None
    except ValueError:
        raise SettingError(f"SESSION_SPILL_STORE is {shown}; {_BLOBS_ALLOWED}") from None
    if is_relative(source):
        raise SettingError(
            "SESSION_SPILL_STORE is a file URL with a relative path, which would depend on the "
            "folder in which each process starts: write three slashes and an absolute path, such "
            "as file:///var/lib/shop/large"
        )
    return FileBlobs(source, places, options)


def _from_url(url: str, options: StoreOptions, base_path: str) -> Store:
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower() if colon else ""
    url = f"{scheme}:{rest}" if colon else url  # drivers know only small letters
    if scheme == "memory" and url in ("memory:", "memory://"):
        from .memory import MemoryStore

        return MemoryStore(options)
    if scheme == "sqlite":
        from .sqlite import SQLiteStore

        return SQLiteStore(_sqlite_path(url, base_path), options)
    if scheme in _REDIS_SCHEMES:
        return _redis(url, scheme, options)
    if scheme in ("mongodb", "mongodb+srv"):
        try:
            from .mongodb import MongoDBStore, check_url
        except ImportError as error:
            raise _missing("mongodb", scheme, error) from None
        _checked(scheme, lambda: check_url(url))
        return MongoDBStore(url, options)
    if scheme in ("grpc", "grpcs"):
        try:
            from .remote import RemoteStore
        except ImportError as error:
            raise _missing("grpc", scheme, error) from None
        return RemoteStore(url, options)
    if scheme == "edge+sqlite":
        return _edge(url, options, base_path)
    named = rest.startswith("//") and _SCHEME.fullmatch(scheme)
    shown = f"a URL with the scheme {scheme!r}" if named else "no URL"
    raise SettingError(f"SESSION_STORE is {shown}; {_ALLOWED}")


def _edge(url: str, options: StoreOptions, base_path: str) -> Store:
    from .edge import EdgeAddress, EdgeStore

    address = EdgeAddress.of(url)
    try:
        centre = _from_url(address.remote, options, base_path)
    except SettingError as error:
        text = str(error).replace("SESSION_STORE is", "the remote of SESSION_STORE is", 1)
        raise SettingError(text) from None
    return EdgeStore(
        _sqlite_path(address.file, base_path),
        centre,
        options,
        offline_for=address.offline_for,
        outbox=address.outbox,
        fresh_for=address.fresh_for,
    )


def _redis(url: str, scheme: str, options: StoreOptions) -> Store:
    kind = scheme.partition("+")[2] or scheme.replace("rediss", "redis")
    try:
        from .redis import RedisClusterStore, RedisStore
    except ImportError as error:
        raise _missing("redis", scheme, error) from None
    path, example = _REDIS[kind]
    if not re.fullmatch(path, without_hosts(url)[0].path, re.ASCII):
        raise SettingError(f"SESSION_STORE: a {kind} URL is written as {example}")
    store = RedisClusterStore if kind == "cluster" else RedisStore
    return _checked(scheme, lambda: store(url, options))


def _checked(scheme: str, build: Callable[[], T]) -> T:
    """Call ``build``, and report a driver's error about the URL without showing the URL."""
    try:
        return build()
    except Exception as error:
        # Quote nothing else from the driver's message: the rest may hold a password.
        option = re.search(r"unexpected keyword argument '([a-z_]{1,40})'$", str(error))
        what = (
            f"the option {option[1]}"
            if option
            else "host, port, database and options, and that @ : / # % and similar characters in "
            "a user or password are percent-encoded"
        )
        raise SettingError(
            f"SESSION_STORE is a {scheme} URL that the driver refuses "
            f"({type(error).__name__}); check {what}"
        ) from None


def _missing(extra: str, scheme: str, error: ImportError) -> SettingError:
    return SettingError(
        f"SESSION_STORE is a {scheme} URL, and its driver is not installed ({error.name}): "
        f"install the {extra} extra, flask-gsession[{extra}]"
    )


def _sqlite_path(url: str, base_path: str) -> str:
    parts = _checked("sqlite", lambda: urlsplit(url))
    path = unquote(parts.path)
    if (
        ":memory:" in unquote(url)
        or "mode=memory" in parts.query
        or url in ("sqlite:", "sqlite://")
    ):
        raise SettingError(
            "SESSION_STORE is an sqlite URL for a database in memory, which workers can't "
            "share: write memory:// for sessions in the memory of this process, or "
            "sqlite:///sessions.sqlite3 for a file in the instance folder"
        )
    usable = url[len("sqlite:") :].startswith("///") and not (parts.query or parts.fragment)
    if not usable or not path.strip("/") or "\0" in path:
        raise SettingError(
            "SESSION_STORE is an sqlite URL without a usable path: write "
            "sqlite:///sessions.sqlite3 for a file in the instance folder, or "
            "sqlite:////var/lib/app/sessions.sqlite3 for one elsewhere"
        )
    return os.path.join(base_path, path[1:])
