"""Counts requests against limits, and answers those over a limit."""

from __future__ import annotations

import hmac
import math
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flask import Response, current_app, has_request_context, request
from flask_limiter import Limit, RateLimitExceeded
from limits import RateLimitItem

from ..errors import StoreUnavailable
from ..events import logger
from ..request.session import SessionData, lifecycle_of
from .ratelimit_clients import name_of, network_of_client, site_of
from .ratelimit_storages import Backend

NAME = "gsession-limits"

_COUNTED = "flask_gsession.limits"
_CEILING = 10  # the default ceiling, as a multiple of the limit


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


class Rates(NamedTuple):
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
class Limits:
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

    def can_undo(self) -> bool:
        return self.backend.can_undo()

    def count(self, scope: str, rates: Rates, key: str | None, cost: int) -> list[_Hit]:
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
                buckets.append(_Bucket("creation", site, Rates(items).ceiling))
            self._spend("", buckets, 1, show=False)

    def _clients(self, network: str, rates: Rates) -> Iterator[_Bucket]:
        """The buckets to which the limit itself applies."""
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
                    self.undo(hits)
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

    def undo(self, hits: Sequence[_Hit]) -> None:
        """Undo hits. If the storage fails or doesn't support it, they stay counted."""
        for hit in hits:
            try:
                hit.backend.undo(hit.item, hit.key, hit.cost)
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
            # The application's error handler may have made its own response.
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
