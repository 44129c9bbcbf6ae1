"""Rate limits on sessions, with the strategies and storages of Flask-Limiter.

A limit that only counts sessions is no limit: a client that drops its cookie has a new one. Here a
request counts in the bucket of its user, if one is signed in; else in a bucket of its network, and
of its session as well, where it has one. All requests of a network together have a wider limit, its
ceiling. So a session or an account can make a limit tighter and never wider. What cannot be counted
is refused.
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
from ..request.session import SessionData, life_of
from ..stores import StoreOptions
from ..stores.wrappers.breaker import Circuit
from .ratelimit_clients import name_of, network_of_client, site_of
from .ratelimit_storages import Backend, storage_at, storage_of

__all__ = ["SessionLimitExceeded", "SessionLimits", "network_of_client", "session_limit"]

NAME = "gsession-limits"

_COUNTED = "flask_gsession.limits"
_ALLOWED = 'allowed: a limit such as "100/minute", or several: "10/second; 1000/day"'
_METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
_CEILING = 10  # of the limit, for all requests of a network, unless said otherwise
_OF_A_VIEW = ("methods", "required_methods", "provide_automatic_options")  # what Flask looks for

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V", bound="Callable[..., Any] | Blueprint | Flask")


class SessionLimitExceeded(RateLimitExceeded):
    """HTTP 429 with ``Retry-After``: a limit is used up. Flask-Limiter's error, for its handlers.

    ``retry_after`` is in seconds. ``kind`` says whose limit it is: ``"user"``, ``"session"``,
    ``"key"``, ``"visitors"`` (of a network, not signed in), ``"network"`` (its ceiling) or
    ``"creation"``.
    """

    def __init__(self, kind: str, item: RateLimitItem, wait: float) -> None:
        super().__init__(next(iter(Limit(str(item), lambda: kind, kind))))
        self.kind = kind
        self.retry_after: int = min(max(1, math.ceil(wait)), item.get_expiry())
        self.rate_limit_headers = _headers(item, 0, self.retry_after)

    def get_headers(self, *arguments: Any, **options: Any) -> list[tuple[str, str]]:
        """The headers of the error page."""
        return [*super().get_headers(*arguments, **options), *self.rate_limit_headers.items()]


class session_limit:
    """Limits a view, a blueprint or an application: ``@session_limit("100/minute")``.

    ``limit``: in the notation of Flask-Limiter; or a function that returns it, called in the
    request. Below the decorator of the route, above the function.
    ``network``: the ceiling for all requests of a network together, signed in or not; ten times the
    limit by default. Without it, all requests of a network that are not signed in have ``limit``
    together; with it, each of their sessions has ``limit``, and so have all without a session.
    ``key``: a function that returns a name to count by, instead of by the user, the session or the
    visitors of the network: such as the account that a login form names. Where it returns None or
    ``""``, these count.
    ``deduct_when``: a function that is given the response; only where it returns true, the request
    stays counted. Until then it is counted, so requests at the same time do not get past the limit.
    ``shared``: a name; all that is limited under one name counts together. By default each view
    and each blueprint counts for itself.
    ``methods``: the HTTP methods that are limited, all of them by default.
    ``per_method``: whether each method counts for itself.
    ``cost``: what a request counts for, a whole number; or a function that returns it.
    ``exempt_when``: a function; where it returns true, the request is not counted.

    Raises ``SettingError`` for arguments that cannot be: here, or, where a function returned it, in
    the request. Costs a round trip to the storage for each bucket, two for a request in general.
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
                f"session_limit is for a function, a Blueprint or an application, not for "
                f"{limited!r}; in a class based view put it into decorators = [...]"
            )
        return cast(V, self._around(limited))

    def _around(self, view: Callable[..., Any]) -> Callable[..., Any]:
        plain = getattr(view, "func", view)  # of a functools.partial
        if not hasattr(plain, "__qualname__"):
            plain = type(plain)  # of an object that is called
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
        for attribute in _OF_A_VIEW:
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
                "deduct_when needs a storage that can take a count back: in memory, Redis or "
                "MongoDB"
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
    """What every ``session_limit`` of an application counts with; or call ``init_app`` later.

    ``proxies``: how many proxies stand before the application, each of which adds to
    ``X-Forwarded-For``. The address of the client is what the outermost of them wrote. 0 where
    there is none, or where Werkzeug's ``ProxyFix`` does this already.
    ``ext``: the ``Session``, where the application has several.
    ``creation``: how many sessions a network may create, None for any number. All networks of an
    IPv6 /48 together may create ten times as many.
    ``user``: a function that returns the id of the user who is signed in, or a user with
    Flask-Login's ``get_id()``; None for nobody. By default Flask-Login's user.
    ``storage``: a storage of limits, or its URL; by default the server of the session store.
    ``strategy``: of Flask-Limiter. ``"moving-window"`` is exact.
    ``on_storage_error``: ``"fail"`` answers 503 where the storage does not; ``"local"`` counts in
    this process until it does.
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
        self._ext, self._proxies = ext, proxies
        self._user = _checked_function("user", user)
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
        app.after_request(limits.tell)
        creation = self._creation
        if creation is not None:
            repository.before_create = lambda: limits.count_creation(creation)


class _Rates(NamedTuple):
    """The limit of a bucket, and that of all requests of a network."""

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
    """What was counted, and where."""

    backend: Backend
    item: RateLimitItem
    key: str
    cost: int


@dataclass(frozen=True, slots=True)
class _Limits:
    """The counting of one application."""

    backend: Backend
    hit: Callable[[RateLimitItem, str, int], bool]
    probe: Callable[[], object]  # asks the storage something, for the metrics
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
            self._spend("", buckets, 1, tell=False)

    def _clients(self, network: str, rates: _Rates) -> Iterator[_Bucket]:
        """The buckets that are no wider than the limit itself."""
        handle, user = self._who()
        if user is not None:
            yield _Bucket("user", user, rates.own)
            return
        if handle is not None:
            yield _Bucket("session", handle, rates.own)
        if handle is None or rates.network is None:
            yield _Bucket("visitors", network, rates.own)

    def _who(self) -> tuple[str | None, str | None]:
        """The session that the request brought and the user in it, where there are such."""
        session = self.session()._get_current_object()
        if not isinstance(session, SessionData):
            return None, None
        handle = session.handle  # loads the session
        return handle if life_of(session).seen.presented else None, name_of(self.user(), "user=")

    def _spend(
        self, scope: str, buckets: Sequence[_Bucket], cost: int, *, tell: bool = True
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
        if tell:
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
        """Where it was counted; None where the limit is used up."""
        try:
            return self.backend if self.hit(item, key, cost) else None
        except StoreUnavailable as error:
            if self.local is None:
                logger.log(error.log_level, "A request could not be counted: %s", error)
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
        told = raised.rate_limit_headers if self.headers else {}
        request.environ[_COUNTED] = {**told, "Retry-After": str(raised.retry_after)}
        return raised

    def take_back(self, hits: Sequence[_Hit]) -> None:
        """Undo what was counted; where the storage fails, or cannot, it stays counted."""
        for hit in hits:
            try:
                hit.backend.take_back(hit.item, hit.key, hit.cost)
            except StoreUnavailable as error:
                logger.warning("A request stays counted that should not: %s", error)
                return

    def tell(self, response: Response) -> Response:
        """Say in the answer what is left of the first limit, or of the one that was exceeded."""
        counted = request.environ.get(_COUNTED)
        if isinstance(counted, _Hit):
            if not self.headers:
                return response
            try:
                wait, remaining = counted.backend.look(counted.item, counted.key)
            except StoreUnavailable:
                return response  # it was counted, and that is what matters
            counted = _headers(counted.item, remaining, math.ceil(wait))
        for name, value in (counted or {}).items():
            if name != "Retry-After" or response.status_code >= 300:  # the application's own page
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
    """What a view counts under: its name, and the first endpoint that has it.

    So the views that one function makes count each for itself, and a view that has several
    addresses counts once. A limited function that is no view, but is called by some, has its name.
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
    """Whether this view is ``limited``, maybe within other decorators, or a class that has it."""
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


class _Known:
    """A set of objects by their identity, which it does not keep alive, where they allow that."""

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


# Views that were given to a session_limit. Where the application has one of them as it is, the
# decorator stands above that of the route, and limits nothing.
_undecorated = _Known()
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
