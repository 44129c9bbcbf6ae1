"""Sessions in Flask's own cookies go on in the store."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from itertools import product
from typing import Any
from uuid import UUID

import pytest
from flask import Flask, session
from flask.sessions import SecureCookieSessionInterface
from freezegun import freeze_time
from markupsafe import Markup

from flask_gsession import Session, StoreUnavailable
from flask_gsession.events import SessionImported
from tests.harness.apps import Site, SiteMaker, Visitor

from .old import KEY, UNTIL, visit

CONFIG: dict[str, Any] = {"SESSION_IMPORT": ["cookie"], "SESSION_IMPORT_UNTIL": UNTIL}
UTC = dt.UTC
VALUES: dict[str, Any] = {
    "tuple": (1, "two", [3]),
    "bytes": b"\x00\xff",
    "markup": Markup("<b>bold</b>"),
    "uuid": UUID(int=7),
    "datetime": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    "dict": {" t": "no tag"},
    "text": "ä" * 600,  # compressed in the cookie
}


def signed(values: dict[str, Any], key: str = KEY, **config: Any) -> str:
    """The cookie that Flask makes of these values."""
    app = Flask("old")
    app.config.update(SECRET_KEY=key, **config)
    serializer = SecureCookieSessionInterface().get_signing_serializer(app)
    assert serializer is not None
    return str(serializer.dumps(values))


@pytest.fixture
def site(make_site: SiteMaker) -> Site:
    return make_site(config=CONFIG)


def test_tagged_types_are_exact(site: Site) -> None:
    visitor = visit(site, signed(VALUES))
    found = visitor.run(dict)
    assert found == VALUES
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in VALUES.items()
    }
    assert visitor.cookie is not None
    assert visitor.get_cookie("session") is not None


def test_the_very_cookie_is_dead_after_a_logout(site: Site) -> None:
    cookie = signed({"_user_id": "7"})
    visitor = visit(site, cookie)
    visitor.run(lambda session: session.destroy())
    assert visitor.get_cookie("session") is None
    late = visit(site, cookie)
    assert late.run(dict) == {}
    assert late.get_cookie("session") is None


def test_visitors_with_the_same_cookie_share_no_session(site: Site) -> None:
    """Flask signs the same values within a second to the same cookie."""
    cookie = signed({"lang": "en"})
    alice, bob = visit(site, cookie), visit(site, cookie)
    assert alice.run(dict) == bob.run(dict) == {"lang": "en"}
    alice.run(lambda session: session.update(user="alice"))
    assert bob.run(dict) == visit(site, cookie).run(dict) == {"lang": "en"}
    assert alice.run(dict) == {"lang": "en", "user": "alice"}
    assert alice.cookie != bob.cookie


@pytest.mark.parametrize("way", ["destroy", "clear"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_logout_from_any_of_them_ends_the_cookie(site: Site, which: int, way: str) -> None:
    cookie = signed({"user": 7})
    visitors = [visit(site, cookie), visit(site, cookie)]
    for visitor in visitors:
        visitor.run(lambda session: session.update(here=1))
    visitors[which].run(lambda session: getattr(session, way)())
    assert visit(site, cookie).run(dict) == {}
    assert visitors[1 - which].run(dict) == {"user": 7, "here": 1}, "another visitor's session"


def test_two_visitors_with_the_same_cookie_at_once(site: Site) -> None:
    cookie = signed({"lang": "en"})
    alice, bob = visit(site, cookie), visit(site, cookie)
    site.before_each("create", lambda: None, lambda: bob.run(dict))
    alice.run(lambda session: session.update(user="alice"))
    assert alice.cookie != bob.cookie
    assert "user" not in bob.run(dict)


def put(session: Any) -> None:
    session["cart"] = [*session["cart"], "pen"]


@pytest.mark.parametrize("beside", ["read", "write", "logout", "sign-in after a read"])
def test_first_requests_of_one_browser_at_once(site: Site, beside: str) -> None:
    """A browser keeps the cookie that comes last: a slow read must not replace another one's."""
    for number, (writes, earlier) in enumerate(product((False, True), repeat=2)):
        cookie = signed({"cart": ["mug"], "number": number})
        if earlier:
            visit(site, cookie).run(dict)
            site.clock.advance(10)
        slow_read_or_write(site, cookie, beside, writes=writes)


def slow_read_or_write(site: Site, cookie: str, beside: str, *, writes: bool) -> None:
    slow, other = visit(site, cookie), visit(site, cookie)

    def meanwhile(session: Any) -> None:
        assert session["cart"] == ["mug"]
        if beside in ("read", "sign-in after a read"):
            other.run(dict)
        if beside == "sign-in after a read":
            site.clock.advance(60)
            other.run(lambda session: session.rotate(grace=0))
        if beside == "write":
            other.run(put)
        if beside == "logout":
            other.run(lambda session: session.destroy())
        if writes:
            put(session)

    slow.run(meanwhile)
    # Of two writes, the later answer wins, as with Flask's own cookies.
    assert (slow.cookie is not None) is (writes and beside != "logout")
    assert (other.cookie is None) is (beside == "logout")
    for waited in (False, True):
        late = visit(site, cookie)
        assert late.run(lambda session: "cart" in session) is (beside != "logout")
        is_late = waited or (beside == "sign-in after a read" and not writes)
        assert (late.cookie is not None) is (is_late and beside != "logout")
        site.clock.advance(10)


def test_a_random_csrf_token_belongs_to_one_browser(make_site: SiteMaker) -> None:
    """Its first requests share a session, as with Flask-Session's ids, so nothing is lost."""
    site = make_site(config={**CONFIG, "WTF_CSRF_FIELD_NAME": "token"})
    for token, shared in ((40 * "a", True), ("constant", False), (40, False)):
        cookie = signed({"token": token, "cart": ["mug"]})
        slow, other = visit(site, cookie), visit(site, cookie)

        def meanwhile(session: Any, other: Visitor = other) -> None:
            dict(session)
            other.run(put)

        slow.run(meanwhile)
        assert (slow.cookie is not None) is shared
        if shared:
            assert slow.run(lambda session: session["cart"]) == ["mug", "pen"]


def test_a_read_that_is_answered_before_the_write(site: Site) -> None:
    cookie = signed({"cart": ["mug"]})
    reader, writer = visit(site, cookie), visit(site, cookie)

    def write(session: Any) -> None:
        put(session)
        reader.run(dict)

    writer.run(write)
    assert reader.cookie is not None
    assert writer.run(lambda session: session["cart"]) == ["mug", "pen"]


def test_an_outage_while_the_requests_are_compared(site: Site) -> None:
    """A read sets no cookie, but a write does, because its values must be found again."""
    cookie = signed({"cart": ["mug"]})
    reader, writer = visit(site, cookie), visit(site, cookie)

    def outage() -> None:
        raise StoreUnavailable("simulated")

    site.before_each("save", outage)
    assert reader.run(dict) == {"cart": ["mug"]}
    assert reader.cookie is None
    site.before_each("save", outage)
    writer.run(put)
    assert writer.run(lambda session: session["cart"]) == ["mug", "pen"]


def test_round_trips_of_a_take_over(site: Site) -> None:
    visit(site, signed({"a": 1})).run(dict)  # Redis learns the scripts
    cookie = signed({"cart": ["mug"]})
    for _ in range(2):  # the first visitor with this cookie, and another one
        visitor = visit(site, cookie)
        with site.counted() as count:
            visitor.run(dict)
        assert count.trips == 4
        with site.counted() as count:
            visitor.run(dict)
        assert count.trips == 1
        site.clock.advance(10)
    user = visit(site, signed({"_user_id": "7"}))
    with site.counted() as count:
        user.run(dict)
    assert count.trips == 3


def test_a_user_has_one_session_for_a_cookie(site: Site) -> None:
    cookie = signed({"_user_id": "7"})
    handles = {visit(site, cookie).run(lambda session: session.handle) for _ in range(3)}
    assert len(handles) == 1


def test_a_dead_cookie_stays_dead_if_the_end_is_moved_back(site: Site) -> None:
    """Until Flask would refuse the cookie itself."""
    repository = site.app.extensions["gsession"][site.ext].repository
    until = repository.now() / 1000 + 3600
    repository.settings = replace(repository.settings, import_until=until)
    cookie = signed({"_user_id": "7"})
    visit(site, cookie).run(lambda session: session.destroy())
    site.clock.advance(3 * 86_400)
    assert visit(site, cookie).run(dict) == {}


@pytest.mark.parametrize("spelled", ["trailing bits", "padding", "quotes"])
def test_another_spelling_is_the_same_cookie(site: Site, spelled: str) -> None:
    """The last character of a signature has bits that don't count."""
    cookie = signed({"_user_id": "7"})
    visit(site, cookie).run(lambda session: session.destroy())
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = {
        "trailing bits": cookie[:-1] + alphabet[alphabet.index(cookie[-1]) ^ 1],
        "padding": cookie + "=",
        "quotes": f'"{cookie}"',
    }[spelled]
    client = site.app.test_client(use_cookies=False)
    with site.visit(dict) as page:
        client.get(page.path, headers={"Cookie": f"session={other}"})
    assert page.result == {}


def test_a_copy_that_was_signed_at_another_time_is_accepted_once(site: Site) -> None:
    """The limit that the documentation states."""
    with freeze_time(dt.datetime.now(UTC) - dt.timedelta(days=1)):
        earlier = signed({"_user_id": "7"})
    cookie = signed({"_user_id": "7"})
    visit(site, cookie).run(lambda session: session.destroy())
    for expected in ({"_user_id": "7"}, {}):
        visitor = visit(site, earlier)
        assert visitor.run(dict) == expected
        visitor.run(lambda session: session.destroy())


@pytest.mark.parametrize(
    "payload", ["", "A", ".AAAA", "eyJhIjp9", "eyJhIjp7IiB1IjoieiJ9fQ", "/w"], ids=repr
)
def test_a_signed_cookie_that_holds_something_else(site: Site, payload: str) -> None:
    """From another application with this key, or with a tag that this one hasn't."""
    serializer = SecureCookieSessionInterface().get_signing_serializer(site.app)
    assert serializer is not None
    visitor = visit(site, serializer.make_signer(serializer.salt).sign(payload).decode())
    assert visitor.run(dict) == {}


def test_age_and_fallback_keys_are_flasks(make_site: SiteMaker) -> None:
    site = make_site(
        config={
            **CONFIG,
            "SECRET_KEY": "a new key",
            "SECRET_KEY_FALLBACKS": [KEY],
            "PERMANENT_SESSION_LIFETIME": dt.timedelta(days=2),
        }
    )
    assert visit(site, signed({"a": 1})).run(dict) == {"a": 1}
    assert visit(site, signed({"a": 1}, "a new key")).run(dict) == {"a": 1}
    with freeze_time(dt.datetime.now(UTC) - dt.timedelta(days=3)):
        old = signed({"a": 1})
    for cookie in (old, signed({"a": 1}, "another key"), "a.b.c", signed({"a": 1}) + "x"):
        visitor = visit(site, cookie)
        with site.counted() as count:
            assert visitor.run(dict) == {}
        assert count.trips == 0
        # A cookie under a changed SECRET_KEY must survive, so that the change can be undone.
        assert (visitor.get_cookie("session") is None) is (cookie == "a.b.c")


def test_an_interface_of_the_applications_own(site: Site) -> None:
    """A salt that an application chose for itself is its own afterwards, too."""

    class Salted(SecureCookieSessionInterface):
        salt = "salted"

    app = Flask("old")
    app.config.update(CONFIG, SECRET_KEY=KEY)
    app.session_interface = Salted()
    serializer = app.session_interface.get_signing_serializer(app)
    assert serializer is not None
    cookie = str(serializer.dumps({"a": 1}))
    assert visit(site, cookie).run(dict) == {}
    Session(app, store=site.store, clock=site.clock)
    app.add_url_rule("/", view_func=lambda: dict(session))
    client = app.test_client()
    client.set_cookie("session", cookie)
    assert client.get("/").json == {"a": 1}


def test_values_that_cannot_be_kept_are_dropped(
    make_site: SiteMaker, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(config=CONFIG, max_depth=3, max_bytes=1000, spill_bytes=None)
    values = {"deep": [[[[["secret"]]]]], "big": "secret" * 300, "a": 1, "surrogate\ud800": "x"}
    visitor = visit(site, signed(values))
    assert visitor.run(dict) == {"a": 1}
    for name in ("deep", "big"):
        assert f"session['{name}'] of an old session can't be kept" in caplog.text
    assert "secret" not in caplog.text
    (event,) = site.happened(SessionImported)
    assert set(event.dropped) == {"'deep'", "'big'", "'surrogate\\ud800'"}


def test_a_cookie_that_holds_no_session_is_refused(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = visit(site, signed(["no", "dict"]))  # type: ignore[arg-type]
    assert visitor.run(dict) == {}
    assert "was not taken over" in caplog.text
    assert "migrate" not in caplog.text, "that command doesn't see cookies"
