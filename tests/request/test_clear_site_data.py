"""``session.destroy(clear=...)``: the browser deletes the site's data."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Response

from flask_gsession import Session, StoreUnavailable
from flask_gsession.errors import LogoutUnconfirmed
from flask_gsession.stores.memory import MemoryStore
from tests.harness.apps import Site, SiteMaker

HEADER = "Clear-Site-Data"


def test_a_logout_clears_the_named_data(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    thief = visitor.another_tab()
    response = visitor.ask(lambda session: session.destroy(clear=("cache", "storage")))
    assert response.headers[HEADER] == '"cache", "storage"'
    assert visitor.cookie is None
    assert thief.run(dict) == {}, "it has ended"
    assert HEADER not in visitor.ask(dict).headers

    def twice(session: Any) -> Response:
        session.destroy(clear="cookies")
        session.destroy(clear=["storage", "cookies"])
        return Response(headers={HEADER: '"cache", "cookies"'})

    assert visitor.ask(twice).headers[HEADER] == '"cache", "cookies", "storage"'
    assert HEADER not in visitor.ask(lambda session: session.destroy()).headers


def test_invalid_directives_are_refused_before_the_session_ends(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    for wrong in ("*", ("cache", 'x"'), "Cache", ("cache", 7), ["storage\r\nSet-Cookie: a=b"]):

        def end(session: Any, wrong: Any = wrong) -> None:
            with pytest.raises(ValueError, match="allowed: cache, clientHints, cookies"):
                session.destroy(clear=wrong)

        assert HEADER not in visitor.ask(end).headers
    handle = visitor.run(lambda session: session.handle)
    with (
        site.app.app_context(),
        site.ext.open(handle) as session,
        pytest.raises(ValueError, match="clear is sent with a response"),
    ):
        session.destroy(clear="cache")
    assert visitor.run(dict) == {"cart": ["mug"]}


def test_only_a_session_that_ended_clears_anything(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(breaker_failures=0)
    visitor = site.visitor()

    def end(session: Any) -> None:
        session.destroy(clear="storage")

    for error, cleared in ((StoreUnavailable("down"), False), (LogoutUnconfirmed("one"), True)):
        visitor.run(lambda session: session.update(cart=["mug"]))
        delete = site.store.delete

        def fail(*arguments: Any, delete: Any = delete, error: Any = error, **more: Any) -> Any:
            if isinstance(error, LogoutUnconfirmed):
                delete(*arguments, **more)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(site.store, "delete", fail)
            response = visitor.ask(end)
        assert response.status_code == 503
        assert (HEADER in response.headers) is cleared


def test_each_session_of_an_application_clears(make_site: SiteMaker) -> None:
    site = make_site()
    other = Session(site.app, cookie_name="other", store=MemoryStore())
    visitor = site.visitor()
    visitor.run(lambda session: (session.update(a=1), other.session.update(b=1)))
    ended = visitor.ask(lambda session: other.session.destroy(clear="cache"))
    assert ended.headers[HEADER] == '"cache"'
    assert visitor.run(lambda session: (dict(session), dict(other.session))) == ({"a": 1}, {})
