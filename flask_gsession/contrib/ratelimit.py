"""Rate limits on sessions, with the strategies and storages of Flask-Limiter.

A limit per session alone doesn't limit anything: a client that drops its cookie gets a new session.
So a signed-in user's request counts in the user's bucket; any other request counts in the bucket of
its network, and of its session if it has one. All requests of a network together have a higher
limit, the ceiling. So a session or an account can only make a limit tighter. A request that can't
be counted is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial, wraps
from typing import Any, TypeVar, cast

from flask import (
    Blueprint,
    Flask,
    Response,
    after_this_request,
    current_app,
    request,
)
from flask import session as flask_session

try:
    from limits.storage import MemoryStorage, Storage
    from limits.strategies import STRATEGIES

    from .ratelimit_counting import NAME, Limits, Rates, SessionLimitExceeded
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.ratelimit needs the package {error.name}: install the extra, "
        "flask-gsession[limits]"
    ) from None

from ..errors import SettingError
from ..extension import NAME as EXTENSION
from ..extension import Session
from ..interface import GSessionInterface
from ..stores import StoreOptions
from ..stores.wrappers.breaker import Circuit
from .ratelimit_arguments import called, checked_cost, checked_function, checked_methods, parsed
from .ratelimit_clients import name_of, network_of_client
from .ratelimit_storages import Backend, storage_at, storage_of
from .ratelimit_views import (
    ViewFunctions,
    apps,
    check_view,
    refuse_undecorated,
    scope_of_blueprint,
    scope_of_view,
    undecorated,
)

__all__ = ["SessionLimitExceeded", "SessionLimits", "network_of_client", "session_limit"]

_VIEW_ATTRIBUTES = ("methods", "required_methods", "provide_automatic_options")  # read by Flask

V = TypeVar("V", bound="Callable[..., Any] | Blueprint | Flask")


class session_limit:
    """Limits a view, a blueprint or an application: ``@session_limit("100/minute")``.

    Put it below the decorator of the route.

    ``limit``
        In the notation of Flask-Limiter, or a function that returns it in the request.
    ``network``
        The ceiling for all requests of a network together; ten times the limit by default. Without
        it, all visitors of a network that aren't signed in share one ``limit``. With it, each of
        their sessions has its own ``limit``, and visitors without a session share one.
    ``key``
        A function that returns a name to count by, instead of the user, session or network: for
        example, the account in a login form. None and ``""`` mean no name.
    ``deduct_when``
        A function that takes the response and returns whether the request stays counted. It counts
        until then, so that parallel requests can't exceed the limit.
    ``shared``
        A name; all limits with the same name count together. By default, each view and each
        blueprint counts separately.
    ``methods``
        The HTTP methods to limit, all by default.
    ``per_method``
        Whether each method counts separately.
    ``cost``
        The whole number that a request counts for, or a function that returns it.
    ``exempt_when``
        A function that returns whether to skip the request.

    Raises ``SettingError`` for invalid arguments. If a function returns an invalid result, raises
    it in the request. Costs one round trip to the storage per bucket, usually two per request.
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
                parsed(given)
        if not callable(cost):
            checked_cost(cost)
        if shared is not None and not isinstance(shared, str):
            raise SettingError(f"shared is {shared!r}; allowed: a name as a str")
        self._limit, self._network, self._cost = limit, network, cost
        self._key = checked_function("key", key)
        self._deduct_when = checked_function("deduct_when", deduct_when)
        self._exempt_when = checked_function("exempt_when", exempt_when)
        self._methods = None if methods is None else checked_methods(methods)
        self._per_method = per_method
        self._shared = shared

    def __call__(self, limited: V) -> V:
        if isinstance(limited, Blueprint):
            blueprint = limited
            blueprint.before_request(lambda: self._check(lambda: scope_of_blueprint(blueprint)))
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
        undecorated.add(view)
        if any(view is each for app in apps for each in app.view_functions.values()):
            check_view(name, view)

        @wraps(view)
        def limited(*arguments: Any, **options: Any) -> Any:
            self._check(lambda: scope_of_view(limited, name))
            return current_app.ensure_sync(view)(*arguments, **options)

        if not hasattr(view, "__name__"):
            limited.__name__, limited.__qualname__ = plain.__name__, plain.__qualname__
        for attribute in _VIEW_ATTRIBUTES:
            if hasattr(view, attribute):
                setattr(limited, attribute, getattr(view, attribute))
        return limited

    def _check(self, default_scope: Callable[[], str]) -> None:
        limits: Limits | None = current_app.extensions.get(NAME)
        if limits is None:
            raise SettingError(
                "session_limit needs SessionLimits on the application: SessionLimits(app, ...)"
            )
        if self._methods is not None and request.method not in self._methods:
            return
        if self._exempt_when is not None and self._exempt_when():
            return
        own = parsed(called(self._limit))
        network = None if self._network is None else parsed(called(self._network))
        cost = checked_cost(called(self._cost))
        if not cost:
            return
        deduct_when = self._deduct_when
        if deduct_when is not None and not limits.can_undo():
            raise SettingError(
                "deduct_when needs a storage that can undo a count: in memory, Redis or MongoDB"
            )
        scope = self._shared or default_scope()
        if self._per_method:
            scope = f"{scope} {request.method}"
        key = None if self._key is None else name_of(self._key(), "key=")
        hits = limits.count(scope, Rates(own, network), key, cost)
        if deduct_when is not None:

            @after_this_request
            def settle(response: Response) -> Response:
                if not deduct_when(response):
                    limits.undo(hits)
                return response


class SessionLimits:
    """The storage and options for all ``session_limit``\\ s of an application.

    ``proxies``
        The number of proxies in front of the application that add to ``X-Forwarded-For``. The
        client's address is the one that the outermost proxy added. Use 0 without a proxy, or with
        Werkzeug's ``ProxyFix``.
    ``ext``
        The ``Session``, if the application has several.
    ``creation``
        How many sessions a network may create; None: any number. All networks of an IPv6 /48
        together may create ten times as many.
    ``user``
        A function that returns the id of the signed-in user, or a user with Flask-Login's
        ``get_id()``, or None. By default, Flask-Login's user.
    ``storage``
        A storage of limits, or its URL; by default, the server of the session store.
    ``strategy``
        The name of a strategy of Flask-Limiter. ``"moving-window"`` is exact.
    ``on_storage_error``
        ``"fail"`` answers 503 if the storage doesn't answer; ``"local"`` counts in this process
        until it does.
    ``headers``
        Whether responses show how much of the limit is left. Costs one round trip.
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
        self._user = checked_function("user", user)
        self._creation = None if creation is None else parsed(creation)
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
                "The application has SessionLimits already: create it once"
                if interfaces
                else "SessionLimits needs a Session: call Session(app) first"
            )
        ext = self._ext or next(iter(interfaces))
        if ext not in interfaces:
            raise SettingError(
                "The Session given to SessionLimits is not on the application: call "
                "its init_app(app) first"
            )
        apps.add(app)
        app.view_functions = ViewFunctions(app.view_functions)
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
        limits = Limits(
            backend=backend,
            hit=hit,
            probe=lambda: probe(parsed("1/minute")[0], "nobody"),
            local=Backend(MemoryStorage(), self._strategy) if self._local else None,
            session=(lambda: ext.session) if self._ext else (lambda: flask_session),
            user=self._user or (lambda: _flask_login_user(ext)),
            proxies=self._proxies,
            label=f"{settings.key_prefix} {self._strategy}",
            headers=self._headers,
        )
        app.extensions[NAME] = limits
        app.before_request(refuse_undecorated)
        app.after_request(limits.add_headers)
        creation = self._creation
        if creation is not None:
            repository.before_create = lambda: limits.count_creation(creation)


def _flask_login_user(ext: Session) -> object:
    return ext.session.get("_user_id")
