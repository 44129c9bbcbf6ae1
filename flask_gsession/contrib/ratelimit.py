"""Rate limits on sessions, with the strategies and storages of Flask-Limiter.

A limit per session is no limit: a client that drops its cookie gets a new session. So a request of
a signed-in user counts in the user's bucket; any other request counts in the bucket of its network,
and of its session if it has one. All requests of a network together have a wider limit, the
ceiling. So a session or an account can only make a limit tighter. If a request can't be counted,
it is refused.
"""

from __future__ import annotations

import hmac
import math
from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast
from weakref import WeakSet, WeakValueDictionary

from flask import (
    Blueprint,
    Flask,
    Response,
    after_this_request,
    current_app,
    has_request_context,
    request,
)
from flask import session as flask_session

try:
    from flask_limiter import Limit, RateLimitExceeded
    from limits import RateLimitItem, parse_many
    from limits.storage import MemoryStorage, Storage
    from limits.strategies import STRATEGIES
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.ratelimit needs the package {error.name}: install the extra, "
        "flask-gsession[limits]"
    ) from None

from ..errors import SettingError, StoreUnavailable
from ..events import logger
from ..extension import NAME as EXTENSION
from ..extension import Session
from ..interface import GSessionInterface
from ..request.session import SessionData, lifecycle_of
from ..stores import StoreOptions
from ..stores.wrappers.breaker import Circuit
from .ratelimit_clients import name_of, network_of_client, site_of
from .ratelimit_storages import Backend, storage_at, storage_of

__all__ = ["SessionLimitExceeded", "SessionLimits", "network_of_client", "session_limit"]

NAME = "gsession-limits"

_COUNTED = "flask_gsession.limits"
_ALLOWED = 'allowed: a limit such as "100/minute", or several: "10/second; 1000/day"'
_METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
_CEILING = 10  # times the limit, by default
_VIEW_ATTRIBUTES = ("methods", "required_methods", "provide_automatic_options")  # read by Flask

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V", bound="Callable[..., Any] | Blueprint | Flask")


class SessionLimitExceeded(RateLimitExceeded):
    """HTTP 429 with ``Retry-After``: a limit is exceeded. Handlers for Flask-Limiter's error work.

    ``retry_after`` is in seconds. ``kind`` is the exceeded limit: ``"user"``, ``"session"``,
    ``"key"``, ``"visitors"`` (of a network, not signed in), ``"network"`` (the ceiling) or
    ``"creation"``.
    """

    def __init__(self, kind: str, item: RateLimitItem, wait: float) -> None:
        super().__init__(next(iter(Limit(str(item), lambda: kind, kind))))
        self.kind = kind
        self.retry_after: int = min(max(1, math.ceil(wait)), item.get_expiry())
        self.rate_limit_headers = _headers(item, 0, self.retry_after)

    def get_headers(self, *arguments: Any, **options: Any) -> list[tuple[str, str]]:
        """The headers of the error response."""
        return [*super().get_headers(*arguments, **options), *self.rate_limit_headers.items()]


class session_limit:
    """Limits a view, a blueprint or an application: ``@session_limit("100/minute")``.

    Put it below the decorator of the route.

    ``limit``: in the notation of Flask-Limiter, or a function that returns it in the request.
    ``network``: the ceiling for all requests of a network together; ten times the limit by
    default. Without it, all visitors of a network that aren't signed in share one ``limit``. With
    it, each of their sessions has its own ``limit``, and visitors without a session share one.
    ``key``: a function that returns a name to count by, instead of the user, session or network:
    for example the account in a login form. None and ``""`` mean no name.
    ``deduct_when``: a function of the response that returns whether the request stays counted. It
    counts until then, so that parallel requests can't exceed the limit.
    ``shared``: a name; all limits with the same name count together. By default, each view and
    each blueprint counts separately.
    ``methods``: the HTTP methods to limit, all by default.
    ``per_method``: whether each method counts separately.
    ``cost``: the whole number that a request counts for, or a function that returns it.
    ``exempt_when``: a function that returns whether to skip the request.

    Raises ``SettingError`` for invalid arguments. For results of functions, it does so in the
    request. Costs one round trip to the storage per bucket, usually two per request.
    """

    def __init__(
        self,
        limit: str | Callable[[], str],
        *,
        network: str | Callable[[], str] | None = None,
        key: Callable[[], object] | None = None,
        deduct_when: Callable[[Response], object] | None = None,
        shared: str | None = None,
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
        if shared is not None and not isinstance(shared, str):
            raise SettingError(f"shared is {shared!r}; allowed: a name, as text")
        self._limit, self._network, self._cost = limit, network, cost
        self._key = _checked_function("key", key)
        self._deduct_when = _checked_function("deduct_when", deduct_when)
        self._exempt_when = _checked_function("exempt_when", exempt_when)
        self._methods = None if methods is None else _checked_methods(methods)
        self._per_method = per_method
        self._shared = shared

    def __call__(self, limited: V) -> V:
        if isinstance(limited, Blueprint):
            blueprint = limited
            blueprint.before_request(lambda: self._check(lambda: _scope_of_blueprint(blueprint)))
            return limited
        if isinstance(limited, Flask):
            scope = f"Flask:{limited.name}"
            limited.before_request(lambda: self._check(lambda: scope))
            return limited
        if not callable(limited) or isinstance(limited, type):
            raise SettingError(
                f"session_limit takes a function, a Blueprint or an application, not {limited!r}; "
                "in a class-based view, add it to decorators = [...]"
            )
        return cast(V, self._around(limited))

    def _around(self, view: Callable[..., Any]) -> Callable[..., Any]:
        plain = getattr(view, "func", view)  # inside a functools.partial
        if not hasattr(plain, "__qualname__"):
            plain = type(plain)  # the class of a callable object
        name = f"{plain.__module__}.{plain.__qualname__}:{plain.__name__}"
        _undecorated.add(view)
        if any(view is each for app in list(_apps) for each in app.view_functions.values()):
            _check_view(name, view)

        @wraps(view)
        def limited(*arguments: Any, **options: Any) -> Any:
            self._check(lambda: _scope_of_view(limited, name))
            return current_app.ensure_sync(view)(*arguments, **options)

        if not hasattr(view, "__name__"):
            limited.__name__, limited.__qualname__ = plain.__name__, plain.__qualname__
        for attribute in _VIEW_ATTRIBUTES:
            if hasattr(view, attribute):
                setattr(limited, attribute, getattr(view, attribute))
        return limited

    def _check(self, default_scope: Callable[[], str]) -> None:
        limits: _Limits | None = current_app.extensions.get(NAME)
        if limits is None:
            raise SettingError(
                "session_limit needs SessionLimits on the application: SessionLimits(app, ...)"
            )
        if self._methods is not None and request.method not in self._methods:
            return
        if self._exempt_when is not None and self._exempt_when():
            return
        own = _parsed(_called(self._limit))
        network = None if self._network is None else _parsed(_called(self._network))
        cost = _checked_cost(_called(self._cost))
        if not cost:
            return
        deduct_when = self._deduct_when
        if deduct_when is not None and not limits.can_take_back():
            raise SettingError(
                "deduct_when needs a storage that can undo a count: in memory, Redis or MongoDB"
            )
        scope = self._shared or default_scope()
        if self._per_method:
            scope = f"{scope} {request.method}"
        key = None if self._key is None else name_of(self._key(), "key=")
        hits = limits.count(scope, _Rates(own, network), key, cost)
        if deduct_when is not None:

            @after_this_request
            def settle(response: Response) -> Response:
                if not deduct_when(response):
                    limits.take_back(hits)
                return response


class SessionLimits:
    """The storage and options for all ``session_limit``\\ s of an application.

    ``proxies``: the number of proxies in front of the application that add to ``X-Forwarded-For``.
    The client's address is the one that the outermost proxy added. Use 0 without a proxy, or with
    Werkzeug's ``ProxyFix``.
    ``ext``: the ``Session``, if the application has several.
    ``creation``: how many sessions a network may create; None: any number. All networks of an IPv6
    /48 together may create ten times as many.
    ``user``: a function that returns the id of the signed-in user, or a user with Flask-Login's
    ``get_id()``, or None. By default, Flask-Login's user.
    ``storage``: a storage of limits, or its URL; by default, the server of the session store.
    ``strategy``: of Flask-Limiter. ``"moving-window"`` is exact.
    ``on_storage_error``: ``"fail"`` returns 503 if the storage doesn't answer; ``"local"`` counts
    in this process until it does.
    ``headers``: whether responses show how much of the limit is left. Costs one round trip.
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
            raise SettingError(
                "proxies must be the number of proxies in front of the application: 0, 1, …"
            )
        if strategy not in STRATEGIES:
            raise SettingError(f"strategy must be one of {', '.join(STRATEGIES)}")
        if on_storage_error not in ("fail", "local"):
            raise SettingError('on_storage_error must be "fail" or "local"')
        self._ext, self._proxies = ext, proxies
        self._user = _checked_function("user", user)
        self._creation = None if creation is None else _parsed(creation)
        self._storage, self._strategy = storage, strategy
        self._local = on_storage_error == "local"
        self._headers = headers
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Set up ``app``. Call ``Session(app)`` first. Doesn't connect to a server.

        Raises ``SettingError``, also for a ``session_limit`` above the decorator of its route.
        """
        interfaces: dict[Session, GSessionInterface] = app.extensions.get(EXTENSION, {})
        if NAME in app.extensions or not interfaces:
            raise SettingError(
                "The application has SessionLimits already"
                if interfaces
                else "SessionLimits needs a Session: call Session(app) first"
            )
        ext = self._ext or next(iter(interfaces))
        if ext not in interfaces:
            raise SettingError("The Session given to SessionLimits is not on the application")
        _apps.add(app)
        app.view_functions = _ViewFunctions(app.view_functions)
        repository = interfaces[ext].repository
        settings = repository.settings
        storage: Storage | Callable[[], Storage]
        if self._storage is None:
            storage = storage_of(interfaces[ext].store, settings.key_prefix)
        else:
            options = StoreOptions(
                prefix=settings.key_prefix,
                timeout=settings.store_timeout,
                pool_max=settings.pool_max,
            )
            storage = storage_at(self._storage, options)
        backend = Backend(storage, self._strategy)
        hit, look = backend.hit, backend.look
        probe = look
        if settings.breaker_failures:
            circuit = Circuit(
                "rate limits",
                settings.breaker_failures,
                settings.breaker_pause,
                settings.store_timeout,
                repository.events,
            )
            hit, probe = partial(circuit.call, backend.hit), partial(circuit.call, backend.look)
        limits = _Limits(
            backend=backend,
            hit=hit,
            probe=lambda: probe(_parsed("1/minute")[0], "nobody"),
            local=Backend(MemoryStorage(), self._strategy) if self._local else None,
            session=(lambda: ext.session) if self._ext else (lambda: flask_session),
            user=self._user or (lambda: _flask_logins_user(ext)),
            proxies=self._proxies,
            label=f"{settings.key_prefix} {self._strategy}",
            headers=self._headers,
        )
        app.extensions[NAME] = limits
        app.before_request(_refuse_undecorated)
        app.after_request(limits.add_headers)
        creation = self._creation
        if creation is not None:
            repository.before_create = lambda: limits.count_creation(creation)


class _Rates(NamedTuple):
    """The limit of a bucket, and the ceiling of its network."""

    own: list[RateLimitItem]
    network: list[RateLimitItem] | None = None

    @property
    def ceiling(self) -> list[RateLimitItem]:
        return self.network or [
            type(item)(item.amount * _CEILING, item.multiples, item.namespace) for item in self.own
        ]


class _Bucket(NamedTuple):
    kind: str
    who: str
    items: list[RateLimitItem]


class _Hit(NamedTuple):
    """A request counted in a storage."""

    backend: Backend
    item: RateLimitItem
    key: str
    cost: int


@dataclass(frozen=True, slots=True)
class _Limits:
    """The rate limits of one application."""

    backend: Backend
    hit: Callable[[RateLimitItem, str, int], bool]
    probe: Callable[[], object]  # reads from the storage, for the metrics
    local: Backend | None
    session: Callable[[], Any]
    user: Callable[[], object]
    proxies: int
    label: str
    headers: bool
    scopes: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def can_take_back(self) -> bool:
        return self.backend.can_take_back()

    def count(self, scope: str, rates: _Rates, key: str | None, cost: int) -> list[_Hit]:
        """Count this request. Raises ``SessionLimitExceeded`` and ``StoreUnavailable``."""
        network = network_of_client(self.proxies)
        buckets = [
            *([_Bucket("key", key, rates.own)] if key else self._clients(network, rates)),
            _Bucket("network", site_of(network), rates.ceiling),
        ]
        return self._spend(scope, buckets, cost)

    def count_creation(self, items: list[RateLimitItem]) -> None:
        """Count the session that this request is about to create."""
        if has_request_context():
            network = network_of_client(self.proxies)
            buckets = [_Bucket("creation", network, items)]
            if (site := site_of(network)) != network:
                buckets.append(_Bucket("creation", site, _Rates(items).ceiling))
            self._spend("", buckets, 1, show=False)

    def _clients(self, network: str, rates: _Rates) -> Iterator[_Bucket]:
        """The buckets that have the limit itself."""
        handle, user = self._session_and_user()
        if user is not None:
            yield _Bucket("user", user, rates.own)
            return
        if handle is not None:
            yield _Bucket("session", handle, rates.own)
        if handle is None or rates.network is None:
            yield _Bucket("visitors", network, rates.own)

    def _session_and_user(self) -> tuple[str | None, str | None]:
        """The handle of the request's session and its user, or None."""
        session = self.session()._get_current_object()
        if not isinstance(session, SessionData):
            return None, None
        handle = session.handle  # loads the session
        return handle if lifecycle_of(session).seen.presented else None, name_of(
            self.user(), "user="
        )

    def _spend(
        self, scope: str, buckets: Sequence[_Bucket], cost: int, *, show: bool = True
    ) -> list[_Hit]:
        hits: list[_Hit] = []
        for bucket in buckets:
            key = self._key(scope, bucket)
            for item in sorted(bucket.items):
                backend = self._hit(item, key, cost)
                if backend is None:
                    self.take_back(hits)
                    raise self._exceeded(bucket.kind, item, key)
                hits.append(_Hit(backend, item, key, cost))
        if show:
            request.environ.setdefault(_COUNTED, hits[0])
        return hits

    def _key(self, scope: str, bucket: _Bucket) -> str:
        secret = current_app.secret_key or b""
        text = "\0".join((self.label, scope, bucket.kind, bucket.who)).encode(
            "utf-8", "surrogatepass"
        )
        digest = hmac.digest(secret.encode() if isinstance(secret, str) else secret, text, "sha256")
        return f"{bucket.kind}/{urlsafe_b64encode(digest[:16]).decode().rstrip('=')}"

    def _hit(self, item: RateLimitItem, key: str, cost: int) -> Backend | None:
        """The backend that counted the request; None if the limit is exceeded."""
        try:
            return self.backend if self.hit(item, key, cost) else None
        except StoreUnavailable as error:
            if self.local is None:
                logger.log(error.log_level, "Could not count a request: %s", error)
                request.environ[_COUNTED] = {"Retry-After": str(error.retry_after)}
                raise
        return self.local if self.local.hit(item, key, cost) else None

    def _exceeded(self, kind: str, item: RateLimitItem, key: str) -> SessionLimitExceeded:
        logger.info("Rate limit %s exceeded by %s", item, key)
        wait: float = item.get_expiry()
        for backend in (self.backend, self.local):
            try:
                if backend is not None:
                    wait = backend.look(item, key)[0]
                    break
            except StoreUnavailable:
                continue
        raised = SessionLimitExceeded(kind, item, wait)
        headers = raised.rate_limit_headers if self.headers else {}
        request.environ[_COUNTED] = {**headers, "Retry-After": str(raised.retry_after)}
        return raised

    def take_back(self, hits: Sequence[_Hit]) -> None:
        """Undo hits. If the storage fails or doesn't support it, they stay counted."""
        for hit in hits:
            try:
                hit.backend.take_back(hit.item, hit.key, hit.cost)
            except StoreUnavailable as error:
                logger.warning("Could not take back the count of a request: %s", error)
                return

    def add_headers(self, response: Response) -> Response:
        """Add headers for the first limit, or for the one that was exceeded."""
        counted = request.environ.get(_COUNTED)
        if isinstance(counted, _Hit):
            if not self.headers:
                return response
            try:
                wait, remaining = counted.backend.look(counted.item, counted.key)
            except StoreUnavailable:
                return response  # the request was counted; only the headers are missing
            counted = _headers(counted.item, remaining, math.ceil(wait))
        for name, value in (counted or {}).items():
            # The application's error handler may have answered with a page of its own.
            if name != "Retry-After" or response.status_code >= 300:
                response.headers.setdefault(name, value)
        return response


def _headers(item: RateLimitItem, remaining: int, reset: int) -> dict[str, str]:
    """The headers of draft-ietf-httpapi-ratelimit-headers-06, which clients understand."""
    return {
        "RateLimit-Policy": f"{item.amount};w={item.get_expiry()}",
        "RateLimit-Limit": str(item.amount),
        "RateLimit-Remaining": str(max(0, remaining)),
        "RateLimit-Reset": str(reset),
    }


def _flask_logins_user(ext: Session) -> object:
    return ext.session.get("_user_id")


def _called(value: T | Callable[[], T]) -> T:
    return value() if callable(value) else value


def _checked_function(name: str, given: Callable[P, T] | None) -> Callable[P, T] | None:
    if given is not None and not callable(given):
        raise SettingError(f"{name} is {given!r}; allowed: a function")
    return given


def _parsed(limit: object) -> list[RateLimitItem]:
    if not isinstance(limit, str):
        raise SettingError(f"The rate limit is {limit!r}; {_ALLOWED}")
    return _parsed_text(limit)


@lru_cache
def _parsed_text(limit: str) -> list[RateLimitItem]:
    try:
        items = parse_many(limit)
    except ValueError:
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


def _scope_of_view(limited: Callable[..., Any], name: str) -> str:
    """The scope of a limited view: its name, and its first endpoint.

    So several views made by one factory count separately, and a view with several URLs counts once.
    The scope of a limited function that isn't a view is its name.
    """
    endpoint = request.endpoint or ""
    views = current_app.view_functions
    view = views.get(endpoint)
    known: dict[tuple[str, int, int], str] = current_app.extensions[NAME].scopes
    at = (endpoint, id(view), id(limited))
    if at not in known:
        first = next((each for each, other in views.items() if other is view), "")
        known[at] = f"{name} {first}" if _holds(view, limited) else name
    return known[at]


def _holds(view: object, limited: object) -> bool:
    """Whether this view is ``limited``, wraps it, or is a class with it as a method."""
    kind = getattr(view, "view_class", None)
    methods = [
        getattr(kind, name, None) for name in (*map(str.lower, _METHODS), "dispatch_request")
    ]
    for each in (view, *methods):
        function = each
        while function is not None:
            if function is limited:
                return True
            function = getattr(function, "__wrapped__", None)
    return False


def _scope_of_blueprint(blueprint: Blueprint) -> str:
    names = (name for name, each in current_app.blueprints.items() if each is blueprint)
    return f"Blueprint:{next(names, blueprint.name)}"


class _IdentitySet:
    """A set of objects by identity. Holds weak references if the objects support them."""

    def __init__(self) -> None:
        self._weak: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._kept: dict[int, object] = {}

    def add(self, each: object) -> None:
        try:
            self._weak[id(each)] = each
        except TypeError:
            self._kept[id(each)] = each

    def __contains__(self, each: object) -> bool:
        return self._weak.get(id(each)) is each or id(each) in self._kept


# Views passed to session_limit. If an application registers one of these directly, session_limit is
# above the decorator of the route, and limits nothing.
_undecorated = _IdentitySet()
_apps: WeakSet[Flask] = WeakSet()


class _ViewFunctions(dict[str, Any]):
    """The views of an application; refuses views whose decorators are in the wrong order.

    A blueprint with such a view is refused when you register it.
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
            f"The view of {endpoint!r} is not limited: session_limit is above the decorator of the "
            "route; put it below, next to the function"
        )


def _refuse_undecorated() -> None:
    endpoint = request.endpoint
    if endpoint is not None:
        _check_view(endpoint, current_app.view_functions[endpoint])
