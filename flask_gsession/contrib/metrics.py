"""Metrics for Prometheus: store calls with their durations, and the events of sessions.

All labels have a fixed set of values, so the number of series doesn't grow with your sessions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from os import getpid
from time import perf_counter
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import is_running_from_reloader

try:
    from prometheus_client import CollectorRegistry
    from prometheus_flask_exporter import (  # type: ignore[import-untyped]  # it ships no types
        PrometheusMetrics,
    )
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.metrics needs the package {error.name}: install the extra, "
        "flask-gsession[metrics]"
    ) from None

from ..errors import (
    CutOff,
    Gone,
    KeyTaken,
    LeaseLost,
    LogoutUnconfirmed,
    QueueFull,
    SettingError,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
)
from ..events import Event, Events, logger
from ..extension import NAME as EXTENSION
from ..extension import Session
from ..interface import GSessionInterface
from ..stores.parts import parts_of
from ..stores.wrappers import compose
from .metrics_edge import EdgeWatch
from .metrics_figures import SECONDS, Figures, figures_of
from .metrics_journal import JournalWatch
from .metrics_near import NearWatch
from .metrics_watch import StoreWatch

NAME = "gsession-metrics"
_PAGE = "gsession_metrics"  # our page's endpoint, and the key of its registry in app.extensions

_TIMED = (
    *("create", "load", "save", "renew", "replace", "delete"),
    *("write_frame", "read_frame", "renew_blobs", "discard_blobs"),
    *("acquire", "extend", "release"),
)
_STATUSES: dict[type[BaseException], str] = {
    Gone: "gone",
    Stale: "stale",
    KeyTaken: "taken",
    LeaseLost: "lease lost",
    QueueFull: "queue full",
    UnreadableRecord: "unreadable",
    LogoutUnconfirmed: "error",  # the store answered
    StoreUnavailable: "unavailable",
    CutOff: "cut off",
}
_MAX_INTERVAL = 86_400 * 24  # seconds; on Windows, threads can't wait longer than 49 days

# Bypasses the proxy, whose attributes take half a microsecond each.
_current_request: Callable[[], Any] = request._get_current_object  # type: ignore[attr-defined]


class SessionMetrics:
    """Adds metrics of sessions and their store to prometheus-flask-exporter.

    ``metrics``: the application's own ``PrometheusMetrics``, whose page then includes our metrics.
    Without it, and without a ``registry`` of prometheus-client, you get a page at ``path``.
    ``ext``: the ``Session``, if the application has several.
    ``count_every``: the interval in seconds for counting live sessions, in a thread that starts
    with the first request, less than 24 days; None: never. Needs a store with a ``counts`` part.

    Applications that share a registry share the metrics.
    """

    def __init__(
        self,
        app: Flask | None = None,
        metrics: Any = None,
        *,
        registry: CollectorRegistry | None = None,
        ext: Session | None = None,
        path: str = "/metrics",
        count_every: float | None = 60.0,
    ) -> None:
        if count_every is not None and not 0 < count_every < _MAX_INTERVAL:
            raise SettingError(
                "count_every must be a number of seconds above 0 and below 24 days, or None"
            )
        if registry is not None and (metrics is not None or not _is_registry(registry)):
            raise SettingError(
                "registry must be a CollectorRegistry of prometheus-client; don't combine it with "
                "metrics="
            )
        if metrics is not None and not _is_registry(getattr(metrics, "registry", None)):
            raise SettingError(f"metrics is a {type(metrics).__name__}; allowed: PrometheusMetrics")
        if not (isinstance(path, str) and path.startswith("/")):
            raise SettingError(f"path is {path!r}; allowed: a URL path such as /metrics")
        self._metrics, self._registry, self._ext, self._path = metrics, registry, ext, path
        self._count_every = count_every
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Add the metrics to ``app``. Call ``Session(app)`` first.

        Raises ``SettingError`` if there is no ``Session``, if it has metrics already, or if our
        page would conflict with a ``PrometheusMetrics`` or a view at ``path``.
        """
        interfaces: dict[Session, GSessionInterface] = app.extensions.get(EXTENSION, {})
        ext = self._ext or next(iter(interfaces), None)
        if ext is None or ext not in interfaces:
            raise SettingError("SessionMetrics needs a Session: call Session(app) first")
        counted: dict[Session, StoreWatch] = app.extensions.setdefault(NAME, {})
        if ext in counted:
            raise SettingError(
                "The application has SessionMetrics for this Session already: create it once"
            )
        figures = figures_of(self._registry_for(app))
        interface = interfaces[ext]
        repository = interface.repository
        watch = self._watch(app, interface, figures)
        repository.use_store(compose(repository.store, timer=Timer(figures, watch).call))
        repository.use_events(_CountedEvents(repository.events, figures))
        watch.listen(ext.on)
        if repository.near is not None:
            cookie = repository.live.cookie_name()
            app.teardown_request(NearWatch(figures, repository.near, cookie).observe)
        if repository.edge is not None:
            cookie = repository.live.cookie_name()
            app.teardown_request(EdgeWatch(figures, repository.edge, cookie).observe)
        if repository.journaling is not None:
            cookie = repository.live.cookie_name()
            journal = repository.journaling.journal
            app.teardown_request(JournalWatch(figures, journal, cookie).observe)
        if not counted:
            app.teardown_request(figures.observe_request)
        counted[ext] = watch

    def _watch(self, app: Flask, interface: GSessionInterface, figures: Figures) -> StoreWatch:
        cookie = interface.repository.live.cookie_name()
        every = self._count_every
        counts = None if every is None else parts_of(interface.store).counts
        return StoreWatch(
            app,
            interface.repository.store,
            up=figures.up.labels(cookie),
            peers=figures.stores[cookie],
            circuits=figures.circuits,
            counts=counts,
            live=partial(figures.live.labels, cookie),  # no series before the first count
            every=every or 0,
        )

    def _registry_for(self, app: Flask) -> CollectorRegistry:
        if self._registry is not None:
            return self._registry
        if self._metrics is None:
            registry = app.extensions.get(_PAGE) or _make_page(app, self._path)
        else:
            registry = self._metrics.registry
        if _without_page():
            logger.warning(
                "prometheus-flask-exporter serves no metrics under the reloader of the development "
                "server: set DEBUG_METRICS=1, or run without the reloader"
            )
        return registry


def _is_registry(registry: object) -> bool:
    return isinstance(registry, CollectorRegistry)


def _without_page() -> bool:
    return is_running_from_reloader() and not os.environ.get("DEBUG_METRICS")


def _make_page(app: Flask, path: str) -> CollectorRegistry:
    """Add an exporter with a page at ``path``. Returns its registry."""
    if _exporter_hooks(app) or "prometheus_metrics" in app.view_functions:
        raise SettingError(
            "The application has a PrometheusMetrics already: call SessionMetrics(app, metrics), "
            "and its page includes the sessions"
        )
    if others := _views_at(app, path):
        raise SettingError(
            f"The application has a view at {path!r} already ({others[0]!r}): pass another path= "
            "to SessionMetrics, or the registry= of your view"
        )
    registry = CollectorRegistry()
    exporter = PrometheusMetrics(app, path=None, group_by="url_rule", registry=registry)
    hooks = len(_exporter_hooks(app))

    def page() -> Response:
        if len(_exporter_hooks(app)) > hooks:
            raise SettingError(
                "The application created a PrometheusMetrics after SessionMetrics, so one of them "
                "counts no requests: create it first, and call SessionMetrics(app, metrics)"
            )
        if others := [name for name in _views_at(app, path) if name != _PAGE]:
            raise SettingError(
                f"The view {others[0]!r} at {path!r} is never reached, since SessionMetrics has "
                "its page there: pass another path= or a registry= to SessionMetrics"
            )
        watches: dict[Session, StoreWatch] = app.extensions[NAME]
        for watch in watches.values():
            watch.before_page()
        in_files = "PROMETHEUS_MULTIPROC_DIR" in os.environ  # the exporter then ignores name[]
        names = None if in_files else request.args.getlist("name[]") or None
        text, kind = exporter.generate_metrics(request.headers.get("Accept"), names)
        return Response(text, content_type=kind)

    if not _without_page():
        app.add_url_rule(path, _PAGE, exporter.do_not_track()(page))
    app.extensions[_PAGE] = registry
    return registry


def _exporter_hooks(app: Flask) -> list[object]:
    exporter = PrometheusMetrics.__module__
    hooks = app.after_request_funcs.get(None, [])
    return [hook for hook in hooks if getattr(hook, "__module__", "").startswith(exporter)]


def _views_at(app: Flask, path: str) -> list[str]:
    rules = app.url_map.iter_rules()
    return [rule.endpoint for rule in rules if rule.rule == path and "GET" in (rule.methods or ())]


class _CountedEvents(Events):
    """Counts events, and forwards them to all subscribers."""

    def __init__(self, events: Events, figures: Figures) -> None:
        self._events = events
        self._receivers = figures.receivers

    def emit(self, event: type[Event], *details: object) -> None:
        for receiver in self._receivers.get(event, ()):
            receiver(*details)
        self._events.emit(event, *details)


class Timer:
    """Runs the calls of a store, and records their durations and results."""

    def __init__(self, figures: Figures, watch: StoreWatch) -> None:
        self._figures = figures
        self._watch = watch
        self._ok = {operation: figures.timing(operation, "ok") for operation in _TIMED}
        self._absent = figures.timing("load", "absent")
        for operation in _TIMED:
            figures.operations.labels(operation, "unavailable")  # starts at 0, as rate() needs

    def call(self, operation: str, method: Callable[..., Any], *arguments: Any) -> Any:
        watch = self._watch
        start = perf_counter()
        try:
            answer = method(*arguments)
        except BaseException as error:
            kinds = type(error).__mro__
            status = next((_STATUSES[kind] for kind in kinds if kind in _STATUSES), "error")
            _spent(self._figures.timing(operation, status), start)
            if not getattr(error, "contention", False):
                watch.answered(status != "unavailable")
            raise
        absent = answer is None and operation == "load"
        _spent(self._absent if absent else self._ok[operation], start)
        if not watch.is_up or watch.pid != getpid():
            watch.answered(True)
        return answer


def _spent(add: Callable[[float, float], object], start: float) -> None:
    end = perf_counter()
    seconds = end - start
    add(seconds, end)
    try:
        environ = _current_request().environ
    except RuntimeError:  # outside a request
        return
    environ[SECONDS] = environ.get(SECONDS, 0.0) + seconds
