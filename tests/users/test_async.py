"""Async views, and answers that are streamed while the user's sessions are revoked."""

from __future__ import annotations

import asyncio
from typing import Any

from flask import Response, session, stream_with_context

from flask_gsession import SignInRefused
from tests.harness.apps import Site

from .test_devices import device_id, ids, owner, signed_in


def test_async_views(site: Site) -> None:
    users = site.ext.users

    async def sign_in(revoked: int) -> dict[str, bool]:
        try:
            with users.login("ada"):
                if revoked:
                    await asyncio.get_running_loop().run_in_executor(None, revoke)
                await asyncio.sleep(0)
                session.bind("ada")  # type: ignore[attr-defined]
        except SignInRefused:
            return {"refused": True}
        await asyncio.gather(*(asyncio.to_thread(len, users.devices("ada")) for _ in range(2)))
        return {"refused": False}

    async def only_here() -> dict[str, int]:
        await asyncio.sleep(0)
        return {"ended": users.revoke_others()}

    def revoke() -> None:
        with site.app.app_context():
            users.revoke_all("ada")

    site.app.add_url_rule("/sign-in/<int:revoked>", view_func=sign_in)
    site.app.add_url_rule("/only-here", view_func=only_here)
    first, second = site.visitor(), site.visitor()
    for visitor in (first, second):
        assert visitor.get("/sign-in/0").json == {"refused": False}
    assert second.get("/only-here").json == {"ended": 1}
    assert (owner(first), ids(site)) == (None, [device_id(second)])
    assert first.get("/sign-in/1").json == {"refused": True}
    assert (owner(first), owner(second), ids(site)) == (None, None, [])


def test_a_stream_brings_back_no_revoked_session(site: Site) -> None:
    visitor = signed_in(site)
    visitor.run(lambda session: session.update(a=1))

    def stream(session: Any) -> Response:
        session["a"] = 2

        def chunks() -> Any:
            yield str(session["a"])
            with site.app.app_context():
                assert site.ext.users.revoke_all("ada") == 1
            session["a"] = 3  # too late in any case
            yield str(session["a"])

        return Response(stream_with_context(chunks()))

    assert visitor.ask(stream).get_data(as_text=True) == "23"
    assert (owner(visitor), site.sessions(), ids(site)) == (None, {}, [])
