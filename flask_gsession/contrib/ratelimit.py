"""Rate limits on sessions, with the strategies and storages of Flask-Limiter.

A limit that only counts sessions is no limit: who drops his cookie has a new one. Here a request
counts in the bucket of its user, if somebody is signed in; else in that of its network, and in
that of its session as well, where it has one. So a session can make a limit tighter and never
wider. What cannot be counted is refused.
"""

from __future__ import annotations

import hmac
import math
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, wraps
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, TypeVar, cast
from weakref import WeakSet

from flask import Blueprint, Flask, Response, current_app, has_request_context, request
from flask import session as flask_session

try:
    from flask_limiter import Limit, RateLimitExceeded
    from limits import RateLimitItem, parse_many
    from limits.errors import ConfigurationError
    from limits.storage import (
        MemoryStorage,
        MongoDBStorageBase,
        RedisStorage,
        Storage,
        storage_from_string,
    )
    from limits.strategies import STRATEGIES
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.ratelimit needs the package {error.name}: install the extra, "
        "flask-gsession[limits]"
    ) from None

from ..breaker import Circuit
from ..config import warn
from ..data import SessionData
from ..errors import SettingError, StoreUnavailable
from ..events import logger
from ..extension import NAME as EXTENSION
from ..extension import Session
from ..interface import GSessionInterface
from ..stores import Store

NAME = "gsession-limits"

_COUNTED = "flask_gsession.limits"
_ALLOWED = 'allowed: a limit such as "100/minute", or several: "10/second; 1000/day"'
_METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
_NETWORK_V6 = 64  # bits: what one customer of a provider has

T = TypeVar("T")
V = TypeVar("V", bound="Callable[..., Any] | Blueprint | Flask")


class SessionLimitExceeded(RateLimitExceeded):
    """HTTP 429 with ``Retry-After``: a limit is used up. Flask-Limiter's error, for its handlers.

    ``retry_after`` is in seconds. ``kind`` says whose limit it is: ``"user"``, ``"session"``,
    ``"visitors"`` (those of a network that have no session), ``"network"`` or ``"creation"``.
    """

    def __init__(self, kind: str, item: RateLimitItem, reset: float) -> None:
        super().__init__(next(iter(Limit(str(item), lambda: kind, kind))))
        self.kind = kind
        wait = math.ceil(reset - time.time())
        self.retry_after: int = min(max(1, wait), item.get_expiry())
        self.rate_limit_headers = _headers(item, 0, self.retry_after)

    def get_headers(self, *arguments: Any, **options: Any) -> list[tuple[str, str]]:
        """The headers of the error page."""
        return [*super().get_headers(*arguments, **options), *self.rate_limit_headers.items()]


class session_limit:
    """Limits a view, a blueprint or an application: ``@session_limit("100/minute")``.

    ``limit``: in the notation of Flask-Limiter; or a function that returns it, called in the
    request. Below the decorator of the route, above the function.
    ``shared``: a name; all that is limited under one name counts together. By default each view
    and each blueprint counts for itself.
    ``network``: a wider limit for everybody of a network together who is not signed in. By default
    ``limit`` holds for them together.
    ``methods``: the HTTP methods that are limited, all of them by default.
    ``per_method``: whether each method counts for itself.
    ``cost``: what a request counts for, a whole number; or a function that returns it.
    ``exempt_when``: a function; where it returns true, the request is not counted.

    Raises ``SettingError`` for a limit or a cost that cannot be: here, or, where a function
    returned it, in the request. Costs a round trip to the storage for each bucket.
    """

    def __init__(
        self,
        limit: str | Callable[[], str],
        *,
        shared: str | None = None,
        network: str | Callable[[], str] | None = None,
        methods: Collection[str] | None = None,
        per_method: bool = False,
        cost: int | Callable[[], int] = 1,
        exempt_when: Callable[[], object] | None = None,
    ) -> None:
        for given in (limit, network):
            if given is not None and not callable(given):
                _parsed(given)
        if not callable(cost):
            _checked_cost(cost)
        self._limit, self._network, self._cost = limit, network, cost
        self._methods = None if methods is None else _checked_methods(methods)
        self._per_method = per_method
        self._exempt_when = exempt_when
        self._shared = shared

    def __call__(self, limited: V) -> V:
        if isinstance(limited, (Blueprint, Flask)):
            scope = self._shared or f"{type(limited).__name__}:{limited.name}"
            limited.before_request(lambda: self._check(scope))
            return limited
        return cast(V, self._around(limited))

    def _around(self, view: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{view.__module__}.{view.__qualname__}:{view.__name__}"
        scope = self._shared or name
        _undecorated.add(view)
        if any(view in app.view_functions.values() for app in list(_apps)):
            _check_view(name, view)

        @wraps(view)
        def limited(*arguments: Any, **options: Any) -> Any:
            self._check(scope)
            return current_app.ensure_sync(view)(*arguments, **options)

        return limited

    def _check(self, scope: str) -> None:
        limits = current_app.extensions.get(NAME)
        if limits is None:
            raise SettingError(
                "session_limit needs SessionLimits on the application: SessionLimits(app, ...)"
            )
        if self._methods is not None and request.method not in self._methods:
            return
        if self._exempt_when is not None and self._exempt_when():
            return
        if self._per_method:
            scope = f"{scope} {request.method}"
        own = _parsed(_called(self._limit))
        network = None if self._network is None else _parsed(_called(self._network))
        cost = _checked_cost(_called(self._cost))
        if cost:
            limits.count(scope, own, network, cost)


class SessionLimits:
    """What every ``session_limit`` of an application counts with; or call ``init_app`` later.

    ``proxies``: how many proxies stand before the application, each of which adds to
    ``X-Forwarded-For``. The address of the client is what the outermost of them wrote. 0 where
    there is none, or where Werkzeug's ``ProxyFix`` does this already.
    ``ext``: the ``Session``, where the application has several.
    ``creation``: how many sessions a network may create, None for any number.
    ``user``: a function that returns who is signed in, None for nobody; by default
    Flask-Login's user.
    ``storage``: a storage of limits, or its URL; by default the server of the session store.
    ``strategy``: of Flask-Limiter. ``"moving-window"`` is exact.
    ``on_storage_error``: ``"fail"`` answers 503 where the storage does not; ``"local"`` counts in
    this process meanwhile.
    ``headers``: whether answers say how much of a limit is left. One more round trip.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        proxies: int,
        ext: Session | None = None,
        creation: str | None = "60/minute",
        user: Callable[[], object] | None = None,
        storage: str | Storage | None = None,
        strategy: str = "moving-window",
        on_storage_error: str = "fail",
        headers: bool = True,
    ) -> None:
        if type(proxies) is not int or proxies < 0:
            raise SettingError("proxies is how many proxies stand before the application: 0, 1, …")
        if strategy not in STRATEGIES:
            raise SettingError(f"strategy is one of {', '.join(STRATEGIES)}")
        if on_storage_error not in ("fail", "local"):
            raise SettingError('on_storage_error is "fail" or "local"')
        self._ext, self._proxies, self._user = ext, proxies, user
        self._creation = None if creation is None else _parsed(creation)
        self._storage, self._strategy = storage, strategy
        self._local = on_storage_error == "local"
        self._headers = headers
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Begin to count on ``app``, which has its ``Session`` already. Asks no server.

        Raises ``SettingError``, also for a ``session_limit`` that stands above its route.
        """
        interfaces: dict[Session, GSessionInterface] = app.extensions.get(EXTENSION, {})
        if NAME in app.extensions or not interfaces:
            raise SettingError(
                "The application has SessionLimits already"
                if interfaces
                else "SessionLimits comes after Session: call Session(app) first"
            )
        ext = self._ext or next(iter(interfaces))
        if ext not in interfaces:
            raise SettingError("The Session given to SessionLimits is not on the application")
        _apps.add(app)
        app.view_functions = _ViewFunctions(app.view_functions)
        keeper = interfaces[ext].keeper
        storage = self._storage
        settings = keeper.settings
        if storage is None:
            storage = _storage_of(interfaces[ext].store, settings.key_prefix)
        elif isinstance(storage, str):
            storage = _storage_at(storage)
        backend = _Backend(storage, self._strategy)
        hit: Callable[[RateLimitItem, str, int], bool] = backend.hit
        if settings.breaker_failures:
            circuit = Circuit(
                "rate limits",
                settings.breaker_failures,
                settings.breaker_pause,
                settings.store_timeout,
                keeper.events,
            )
            hit = circuit.guard(backend, "hit")
        limits = _Limits(
            hit=hit,
            look=backend.look,
            local=_Backend(MemoryStorage(), self._strategy) if self._local else None,
            session=(lambda: ext.session) if self._ext else (lambda: flask_session),
            user=self._user or (lambda: _flask_logins_user(ext)),
            proxies=self._proxies,
            label=f"{settings.key_prefix} {self._strategy}",
        )
        app.extensions[NAME] = limits
        app.before_request(_refuse_undecorated)
        if self._headers:
            app.after_request(limits.tell)
        creation = self._creation
        if creation is not None:
            keeper.before_create = lambda: limits.count_creation(creation)


class _Backend:
    """A strategy on a storage, whose failures are outages."""

    def __init__(self, storage: Storage, strategy: str) -> None:
        self._limiter = STRATEGIES[strategy](storage)
        errors = storage.base_exceptions
        drivers = errors if isinstance(errors, tuple) else (errors,)
        self._errors: tuple[type[Exception], ...] = (*drivers, OSError)
        self._budget: Callable[[], AbstractContextManager[object]] = getattr(
            storage, "budget", nullcontext
        )

    def hit(self, item: RateLimitItem, key: str, cost: int) -> bool:
        """Count ``cost``; False, and nothing counted, where that is more than is left."""
        try:
            with self._budget():
                return self._limiter.hit(item, key, cost=cost)
        except self._errors as error:
            raise _unavailable(error) from error

    def look(self, item: RateLimitItem, key: str) -> tuple[float, int]:
        """When the limit is next wider, in seconds since 1970, and what is left of it."""
        try:
            with self._budget():
                reset, remaining = self._limiter.get_window_stats(item, key)
        except self._errors as error:
            raise _unavailable(error) from error
        return reset, remaining


def _unavailable(error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"rate limits: {type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class _Limits:
    """The counting of one application."""

    hit: Callable[[RateLimitItem, str, int], bool]
    look: Callable[[RateLimitItem, str], tuple[float, int]]
    local: _Backend | None
    session: Callable[[], Any]
    user: Callable[[], object]
    proxies: int
    label: str

    def count(
        self,
        scope: str,
        own: list[RateLimitItem],
        network: list[RateLimitItem] | None,
        cost: int,
    ) -> None:
        """Count this request. Raises ``SessionLimitExceeded`` and ``StoreUnavailable``."""
        handle, user = self._who()
        if user is not None:
            self._spend(scope, "user", str(user), own, cost)
            return
        where = network_of_client(self.proxies)
        if handle is not None:
            self._spend(scope, "session", handle, own, cost)
        elif network is not None:
            self._spend(scope, "visitors", where, own, cost)
        self._spend(scope, "network", where, network or own, cost)

    def count_creation(self, items: list[RateLimitItem]) -> None:
        """Count the session that this request is about to create."""
        if has_request_context():
            self._spend("", "creation", network_of_client(self.proxies), items, 1, tell=False)

    def _who(self) -> tuple[str | None, object]:
        """The session that the request brought and the user in it, where there are such."""
        session = self.session()._get_current_object()
        if not isinstance(session, SessionData):
            return None, None
        handle = session.handle  # loads the session
        return handle if session._found else None, self.user()

    def _spend(
        self,
        scope: str,
        kind: str,
        who: str,
        items: list[RateLimitItem],
        cost: int,
        *,
        tell: bool = True,
    ) -> None:
        secret = current_app.secret_key or b""
        text = "\0".join((self.label, scope, kind, who)).encode()
        digest = hmac.digest(secret.encode() if isinstance(secret, str) else secret, text, "sha256")
        key = f"{kind}/{urlsafe_b64encode(digest[:16]).decode().rstrip('=')}"
        for item in sorted(items):
            try:
                allowed, look = self.hit(item, key, cost), self.look
            except StoreUnavailable as error:
                if self.local is None:
                    logger.log(error.log_level, "A request could not be counted: %s", error)
                    raise
                allowed, look = self.local.hit(item, key, cost), self.local.look
            if not allowed:
                logger.info("Rate limit %s exceeded by %s", item, key)
                try:
                    reset, _ = look(item, key)
                except StoreUnavailable:
                    reset = math.inf
                raised = SessionLimitExceeded(kind, item, reset)
                request.environ[_COUNTED] = raised.rate_limit_headers
                raise raised
            if tell:
                request.environ.setdefault(_COUNTED, (look, item, key))

    def tell(self, response: Response) -> Response:
        """Say in the answer what is left of the first limit, or of the one that was exceeded."""
        counted = request.environ.get(_COUNTED)
        if isinstance(counted, tuple):
            look, item, key = counted
            try:
                reset, remaining = look(item, key)
            except StoreUnavailable:
                return response  # it was counted, and that is what matters
            counted = _headers(item, remaining, max(0, math.ceil(reset - time.time())))
        for name, value in (counted or {}).items():
            response.headers.setdefault(name, value)
        return response


def _headers(item: RateLimitItem, remaining: int, reset: int) -> dict[str, str]:
    """As in the IETF's draft-ietf-httpapi-ratelimit-headers-06, the form that clients know."""
    return {
        "RateLimit-Policy": f"{item.amount};w={item.get_expiry()}",
        "RateLimit-Limit": str(item.amount),
        "RateLimit-Remaining": str(max(0, remaining)),
        "RateLimit-Reset": str(reset),
    }


def network_of_client(proxies: int) -> str:
    """The network that the current request comes from: an IPv4 address, or an IPv6 /64.

    ``proxies``: as for ``SessionLimits``. A request that did not come through all of them counts
    for the address that it came from. What is no address, as of a socket, is one network.
    """
    address = request.remote_addr or ""
    if proxies:
        hops = ",".join(request.headers.getlist("X-Forwarded-For")).split(",")
        if len(hops) >= proxies and _network(hops[-proxies]):
            address = hops[-proxies]
    return _network(address) or "unknown"


def _network(text: str) -> str | None:
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address, _NETWORK_V6), strict=False))


def _flask_logins_user(ext: Session) -> object:
    return ext.session.get("_user_id")


def _called(value: T | Callable[[], T]) -> T:
    return value() if callable(value) else value


@lru_cache
def _parsed(limit: str) -> list[RateLimitItem]:
    try:
        items = parse_many(limit)
    except (ValueError, TypeError):
        items = []
    if not items or not all(item.amount and item.get_expiry() for item in items):
        raise SettingError(f"The rate limit is {limit!r}; {_ALLOWED}")
    return items


def _checked_cost(cost: object) -> int:
    if type(cost) is not int or cost < 0:
        raise SettingError(f"The cost of a request is {cost!r}; allowed: a whole number, from 0")
    return cost


def _checked_methods(methods: Collection[str]) -> frozenset[str]:
    named = frozenset(methods)
    if isinstance(methods, str) or not named <= _METHODS:
        raise SettingError(
            f"methods is {methods!r}; allowed: a list of {', '.join(sorted(_METHODS))}"
        )
    return named | {"HEAD"} if "GET" in named else named


# Views that were given to a session_limit. Where the application has one of them as it is, the
# decorator stands above that of the route, and limits nothing.
_undecorated: WeakSet[Callable[..., Any]] = WeakSet()
_apps: WeakSet[Flask] = WeakSet()


class _ViewFunctions(dict[str, Any]):
    """The views of an application; refuses one that is not limited although it is to be.

    So a blueprint whose decorators stand in the wrong order is refused when it is registered.
    """

    def __init__(self, views: dict[str, Any]) -> None:
        super().__init__()
        for endpoint, view in views.items():
            self[endpoint] = view

    def __setitem__(self, endpoint: str, view: Any) -> None:
        _check_view(endpoint, view)
        super().__setitem__(endpoint, view)


def _check_view(endpoint: str, view: Callable[..., Any]) -> None:
    if view in _undecorated:
        raise SettingError(
            f"The view of {endpoint!r} is not limited: session_limit stands above the decorator of "
            "the route; put it below, next to the function"
        )


def _refuse_undecorated() -> None:
    endpoint = request.endpoint
    if endpoint is not None:
        _check_view(endpoint, current_app.view_functions[endpoint])


def _storage_of(store: Store, prefix: str) -> Storage:
    """A storage on the server of the session store."""
    pool = store.lend_pool() if hasattr(store, "lend_pool") else None
    if pool is not None:
        return RedisStorage("redis://", connection_pool=pool, key_prefix=f"{prefix}limits")
    if hasattr(store, "lend_collection"):
        return _MongoDBStorage(lambda: store.lend_collection("count"))
    if type(store).__name__ not in ("SQLiteStore", "MemoryStore"):
        raise SettingError(
            "SessionLimits cannot count in this session store; give it a storage, as in "
            'storage="redis://localhost:6379/1"'
        )
    if type(store).__name__ == "SQLiteStore":
        warn(
            "Rate limits count in each process for itself where sessions are in SQLite: several "
            "workers let through several times as much. Give SessionLimits a storage, or say "
            'storage="memory://"'
        )
    return MemoryStorage()


def _storage_at(url: str) -> Storage:
    try:
        return cast(Storage, storage_from_string(url))
    except (ConfigurationError, ValueError, TypeError) as error:
        scheme = url.partition(":")[0]
        raise SettingError(
            f"SessionLimits: the storage, a {scheme} URL, is refused ({type(error).__name__})"
        ) from None


class _MongoDBStorage(MongoDBStorageBase):
    """On the client of the session store, within its time budget; never closes it."""

    def __init__(self, lend: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__(
            "mongodb://",
            counter_collection_name="gsession_limit_counters",
            window_collection_name="gsession_limits",
        )
        self.budget = lend
        self._prepared: object = None

    @property
    def _database(self) -> Any:
        with self.budget() as collection:
            database = collection.database
            if database.client is not self._prepared:
                for name in self._collection_mapping.values():
                    database[name].create_index("expireAt", expireAfterSeconds=0)
                self._prepared = database.client
            return database

    def _init_mongo_client(self, uri: str | None, **options: Any) -> Any:
        raise NotImplementedError  # the store has one

    def __del__(self) -> None:
        """Nothing: the client is not ours to close."""
