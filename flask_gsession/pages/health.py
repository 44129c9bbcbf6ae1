"""Health pages for a load balancer."""

from __future__ import annotations

import secrets

from flask import Blueprint, current_app
from flask.typing import ResponseReturnValue

from ..errors import CutOff, SettingError, StoreError, StoreUnavailable
from ..extension import NAME, Session
from ..interface import GSessionInterface


def health_blueprint(url_prefix: str = "/health") -> Blueprint:
    """A blueprint with the pages ``live`` and ``ready`` under ``url_prefix``.

    ``live`` responds 200 as long as the process can respond. ``ready`` responds 200, or 503 with
    ``Retry-After`` while a store of the application doesn't answer. It costs one round trip per
    store, or none while the store's circuit is open. An edge node is ready while it can serve, even
    without its centre: then the status is ``"cut off"``.
    """
    blueprint = Blueprint("gsession_health", __name__, url_prefix=url_prefix)

    @blueprint.get("/live")
    def live() -> ResponseReturnValue:
        return {"status": "alive"}

    @blueprint.get("/ready")
    def ready() -> ResponseReturnValue:
        interfaces: dict[Session, GSessionInterface] = current_app.extensions.get(NAME, {})
        if not interfaces:
            raise SettingError("health_blueprint needs a Session: call Session(app)")
        status = "ready"
        for interface in interfaces.values():
            try:
                interface.repository.store.load(secrets.token_urlsafe(32))
            except CutOff:
                status = "cut off"
            except StoreUnavailable as error:
                return {"status": "store unavailable"}, 503, {"Retry-After": str(error.retry_after)}
            except StoreError:
                return {"status": "store unreadable"}, 503, {"Retry-After": "1"}
        return {"status": status}

    return blueprint
