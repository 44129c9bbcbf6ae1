"""Near cache, then the server of the sessions, then 503: one line of configuration each."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from flask_gsession.sharing.forward_auth import verify_blueprint
from flask_gsession.sharing.store_service import StoreService
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.testing import HookedStore
from tests.harness.apps import Site, until
from tests.harness.sharing import serving
from tests.live.test_listener import proven

BOUND = 0.5  # seconds


def test_local_first(redis_url: str, store_prefix: str) -> None:
    far = HookedStore(open_store(redis_url, StoreOptions(store_prefix))[0])
    with ExitStack() as stack:
        stack.callback(far.close)
        server = stack.enter_context(ExitStack())
        address = server.enter_context(serving(StoreService(far)))
        store = open_store(f"grpc://{address}", StoreOptions(timeout=2.0))[0]
        site = stack.enter_context(
            Site("grpc://", "", time.time, store=HookedStore(store), near_cache=BOUND)
        )
        site.app.register_blueprint(verify_blueprint(site.ext))
        changes: Any = store.changes
        visitor = site.visitor()
        visitor.run(lambda session: session.update(_user_id="17", cart=["mug"]))

        def near() -> bool:
            """Whether a read and a check ask nobody."""
            before = far.calls.count("load")
            assert visitor.run(dict)["cart"] == ["mug"]
            assert visitor.get("/session/verify").status_code == 200
            return far.calls.count("load") == before

        proven(changes)
        until(near)
        # A write by another service ends that.
        other = site.visitor(visitor.cookie)
        other.run(lambda session: session.update(cart=["mug"], other=1))
        assert visitor.run(dict)["other"] == 1
        server.close()
        until(lambda: changes.feed("k") is None)
        for path in ("/session/verify",):
            response = visitor.get(path)
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
        assert visitor.ask(dict).status_code == 503
