"""Watches on stores that hear of changes in other ways, or not at all."""

from __future__ import annotations

import pytest

from flask_gsession.live import hints
from flask_gsession.sharing.store_service import StoreService
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, until
from tests.harness.sharing import serving


def test_a_service_gets_changes_over_grpc(
    redis_url: str, store_prefix: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "POLL", 600)
    far, _ = open_store(redis_url, StoreOptions(prefix=store_prefix, clock=clock))
    with (
        serving(StoreService(far), threads=4) as address,
        Site(f"grpc://{address}", store_prefix, clock, near_cache=1) as service,
        Site(redis_url, store_prefix, clock) as shop,
    ):
        visitor = shop.visitor()
        visitor.run(lambda session: session.update(cart=["a"]))
        with service.app.app_context():
            service.ext.live.hints().heartbeat = 600
            watch = service.ext.live.watch(visitor.run(lambda session: session.handle))
        state = watch.state
        visitor.run(lambda session: session["cart"].append("b"))
        until(lambda: watch.state != state)
        visitor.run(lambda session: session.destroy())
        until(lambda: watch.state.session is None)
        service.ext.close(service.app)
    far.close()


@pytest.mark.parametrize("store_url", ["memory://"])
def test_a_store_that_reports_nothing_is_polled(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "POLL", 0.05)
    site = make_site()
    site.store.changes = None
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["a"]))
    with site.app.app_context():
        watch = site.ext.live.watch(visitor.run(lambda session: session.handle))
    state = watch.state
    visitor.run(lambda session: session["cart"].append("b"))
    until(lambda: watch.state != state)
    site.ext.close(site.app)
    assert watch.closed
