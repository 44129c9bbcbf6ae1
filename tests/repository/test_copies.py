"""Copies of a repository: for a traced request, for an edge's centre, for the values of a user."""

from __future__ import annotations

from flask_gsession.stores.wrappers import Call, compose
from flask_gsession.tokens import session_key
from flask_gsession.values.references import refers
from tests.harness.apps import Site, SiteMaker


def test_a_copy_through_a_wrapper_leaves_the_original_alone(make_site: SiteMaker) -> None:
    """Otherwise a trace would record what other requests do."""
    site: Site = make_site(spill_bytes=1000)
    repository = site.app.extensions["gsession"][site.ext].repository
    visitor = site.visitor()
    visitor.run(lambda session: session.update(large="x" * 5000))
    calls: list[Call] = []
    traced = repository.through(compose(repository.store, trace=calls))
    key = session_key(visitor.token)
    loaded = repository.find(key)
    assert loaded is not None
    raw = loaded.body.values["large"]
    assert refers(raw)
    assert repository.codec.decode(raw) == "x" * 5000
    assert calls == []
    assert traced.find(key) is not None
    assert traced.codec.decode(raw) == "x" * 5000
    assert traced.rosters.look("ada").record is None
    assert len(calls) == 3, calls
