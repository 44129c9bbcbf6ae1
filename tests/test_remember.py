"""Flask-Login's remember-me as a permanent session, and the conversion of its old cookies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import flask
import flask_login
import pytest
from flask import Flask
from flask_login import (
    LoginManager,
    current_user,
    fresh_login_required,
    login_required,
    login_user,
    logout_user,
)
from flask_login.utils import encode_cookie
from flask_socketio import SocketIO

from flask_gsession import Session, SessionData, SettingError, StoreUnavailable
from flask_gsession.stores.base import is_session_key
from flask_gsession.stores.parts import parts_of
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor, at_once
from tests.test_authentication import ADA, LEGACY_FORMS, SECURITY, with_security

DAY = 86_400
COOKIE = "remember_token"


class User(flask_login.UserMixin):  # type: ignore[misc]  # it ships no types
    def __init__(self, name: str) -> None:
        self.id = name


def load(name: str) -> User | None:
    return None if name == "deleted" else User(name)


def with_login(site: Site) -> Site:
    LoginManager(site.app).user_loader(load)
    site.app.add_url_rule("/me", "me", login_required(lambda: current_user.get_id()))
    site.app.add_url_rule("/vault", "vault", fresh_login_required(lambda: "open"))
    site.app.add_url_rule("/page", "page", lambda: "nobody is looked for")
    return site


def until(clock: FakeClock, days: float) -> datetime:
    return datetime.fromtimestamp(clock() + days * DAY, UTC)


@pytest.fixture
def site(make_site: SiteMaker, clock: FakeClock) -> Site:
    """On each store in turn; old cookies are converted for thirty days."""
    return with_login(make_site(remember="session", remember_until=until(clock, 30)))


@pytest.fixture
def one(store_prefix: str, clock: FakeClock) -> Iterator[Site]:
    """On the memory store."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield with_login(make(remember="session", remember_until=until(clock, 30)))


def sign_in(**how: Any) -> Callable[[Any], object]:
    return lambda session: login_user(User("ada"), **how)


def browser_is_closed(visitor: Visitor) -> None:
    """Cookies without a date go."""
    cookie = visitor.get_cookie("session")
    assert cookie is not None
    if cookie.expires is None:
        visitor.delete_cookie("session")


def with_old_cookie(site: Site, name: str = "ada", session: str | None = None) -> Visitor:
    """A browser with a cookie of Flask-Login from before."""
    visitor = site.visitor(session)
    with site.app.app_context():
        visitor.set_cookie(COOKIE, encode_cookie(name))
    return visitor


# Signing in ---------------------------------------------------------------------------------------


def test_one_cookie_that_ends_with_its_session(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    response = visitor.ask(sign_in(remember=True))
    assert len(response.headers.getlist("Set-Cookie")) == 1
    browser_is_closed(visitor)
    site.clock.advance(20 * DAY)
    assert visitor.get("/me").text == "ada"
    assert visitor.run(lambda session: session["cart"]) == ["mug"]
    copy = visitor.another_tab()
    visitor.run(lambda session: session.destroy())
    assert copy.get("/me").status_code == visitor.get("/me").status_code == 401
    assert site.inside.blobs() == {}


def test_without_it_the_session_ends_with_the_browser(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(sign_in())
    cookie = visitor.get_cookie("session")
    assert cookie is not None
    assert cookie.expires is None
    site.clock.advance(3 * 3600)
    assert visitor.get("/me").status_code == 401


def test_a_revoked_session_stays_revoked(site: Site) -> None:
    """With Flask-Login's own cookie, the user would be back."""
    visitor = site.visitor()
    visitor.run(sign_in(remember=True))
    with site.app.app_context():
        (device,) = site.ext.users.devices("ada")
        assert device.remembered
        site.ext.users.revoke_all("ada")
    assert visitor.get("/me").status_code == 401
    assert visitor.get_cookie(COOKIE) is None


def test_a_duration_of_its_own(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(sign_in(remember=True, duration=timedelta(days=3)))
    for _ in range(2):
        site.clock.advance(2.9 * DAY)
        assert visitor.get("/me").text == "ada"
    site.clock.advance(3.1 * DAY)
    assert visitor.get("/me").status_code == 401
    visitor.run(sign_in(remember=True, duration=timedelta(days=1000)))  # no session lasts as long
    site.clock.advance(30 * DAY)
    assert visitor.get("/me").text == "ada"
    site.clock.advance(2 * DAY)
    assert visitor.get("/me").status_code == 401


@pytest.mark.parametrize("again", [False, True])
def test_after_a_sign_out_the_session_is_an_ordinary_one(site: Site, again: bool) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    visitor.run(sign_in(remember=True, duration=timedelta(days=3)))
    if again:  # or signs in without it
        visitor.run(sign_in())
    else:
        visitor.run(lambda session: logout_user())
    cookie = visitor.get_cookie("session")
    assert cookie is not None
    assert cookie.expires is None
    assert visitor.run(lambda session: (session["cart"], session.permanent)) == (["mug"], False)
    site.clock.advance(3 * 3600)
    assert visitor.run(dict) == {}


def test_flask_login_sends_no_cookie_even_where_it_refreshes_it(one: Site) -> None:
    one.app.config["REMEMBER_COOKIE_REFRESH_EACH_REQUEST"] = True
    visitor = one.visitor()
    visitor.run(sign_in(remember=True))
    assert visitor.get("/me").text == "ada"
    assert visitor.get_cookie(COOKIE) is None
    assert visitor.run(lambda session: "_remember" in session) is False


def test_cookies_of_the_application_are_left_alone(one: Site) -> None:
    def view(session: Any) -> flask.Response:
        login_user(User("ada"), remember=True)
        response = flask.make_response("")
        response.set_cookie("theme", "dark")
        response.set_cookie("remember_token_2", "x")
        return response

    lines = one.visitor().ask(view).headers.getlist("Set-Cookie")
    assert [line.partition("=")[0] for line in lines] == ["theme", "remember_token_2", "session"]


def test_a_sign_in_is_fresh_until_the_user_was_away(one: Site) -> None:
    """As with a cookie, which signs the user in to a new session after that."""
    visitor = one.visitor()
    visitor.run(sign_in(remember=True))
    for _ in range(30):
        one.clock.advance(3600)
        assert visitor.get("/vault").text == "open"
    visitor.run(lambda session: session.confirm())
    one.clock.advance(3 * 3600)
    assert visitor.get("/me").text == "ada"
    assert visitor.get("/vault").status_code == 401
    assert visitor.run(lambda session: session.confirmed_at()) is None
    visitor.run(lambda session: session.confirm())
    one.clock.advance(3600)
    assert visitor.get("/vault").text == "open"


def test_a_failed_sign_in_leaves_nothing_behind(one: Site) -> None:
    visitor = one.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))

    def down() -> None:
        raise StoreUnavailable("drill")

    one.store.before("replace", down)
    assert visitor.ask(sign_in(remember=True)).status_code == 503
    assert visitor.get("/me").status_code == 401
    assert visitor.run(lambda session: session.permanent) is False


# Cookies from before ------------------------------------------------------------------------------


def test_an_old_cookie_becomes_a_session(site: Site) -> None:
    visitor = with_old_cookie(site)
    copy = with_old_cookie(site)
    assert visitor.get("/me").text == "ada"
    assert visitor.get_cookie(COOKIE) is None
    cookie = visitor.get_cookie("session")
    assert cookie is not None
    assert cookie.expires is not None
    assert visitor.get("/vault").status_code == 401
    browser_is_closed(visitor)
    site.clock.advance(20 * DAY)
    assert visitor.get("/me").text == "ada"
    assert copy.get("/me").status_code == 401  # it was converted before
    assert copy.get_cookie(COOKIE) is None
    with site.app.app_context():
        assert [device.remembered for device in site.ext.users.devices("ada")] == [True]


def test_the_cart_comes_along(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    before = visitor.cookie
    visitor = with_old_cookie(site, session=before)
    assert visitor.get("/me").text == "ada"
    assert visitor.run(lambda session: session["cart"]) == ["mug"]
    assert site.visitor(before).run(dict) == {}


def test_round_trips(site: Site) -> None:
    visitor = with_old_cookie(site)
    with site.counted() as count:
        visitor.get("/me")
    # The roster, the mark; then the sign-in: the roster, the session, the roster.
    assert count.calls == ["load", "create", "load", "create", "create"]
    with site.counted() as count:
        assert visitor.get("/me").text == "ada"
    assert count.calls == ["load"]
    with site.counted() as count:
        visitor.get("/page")  # Flask-Login looks at the session after each request
    assert count.calls == ["load"]


def test_never_for_a_user_whose_sessions_were_revoked(site: Site) -> None:
    with site.app.app_context():
        site.ext.users.revoke_all("ada")
    visitor = with_old_cookie(site)
    assert visitor.get("/me").status_code == 401
    assert visitor.get_cookie(COOKIE) is None
    assert with_old_cookie(site, "eve").get("/me").text == "eve"


def test_a_cookie_stays_refused_long_after_the_revocation(
    make_site: SiteMaker, clock: FakeClock
) -> None:
    """The roster remembers it for as long as cookies are converted."""
    site = with_login(
        make_site(
            remember="session", remember_until=until(clock, 300), absolute_timeout=timedelta(days=2)
        )
    )
    with site.app.app_context():
        site.ext.users.revoke_all("ada")
    clock.advance(299 * DAY)
    assert with_old_cookie(site).get("/me").status_code == 401
    assert with_old_cookie(site, "eve").get("/me").text == "eve"
    clock.advance(0.9 * DAY)
    assert with_old_cookie(site, "eve").get("/me").status_code == 401
    clock.advance(0.2 * DAY)
    assert with_old_cookie(site, "zoe").get("/me").status_code == 401


def test_a_revocation_while_it_is_converted(site: Site) -> None:
    """It comes between the look at the roster and the sign-in."""
    visitor = with_old_cookie(site)

    def elsewhere() -> None:
        with site.app.app_context():
            site.ext.users.revoke_all("ada")

    def revoke() -> None:
        site.clock.advance(10)
        at_once(elsewhere)

    site.store.after("create", revoke)
    assert visitor.get("/me").status_code == 401
    assert visitor.get_cookie(COOKIE) is None
    assert visitor.get("/me").status_code == 401
    with site.app.app_context():
        assert site.ext.users.devices("ada") == []


def test_a_cookie_in_parallel_browsers_is_converted_once(site: Site) -> None:
    visitors = [with_old_cookie(site) for _ in range(4)]
    found: list[int] = []
    at_once(*(lambda v=v: found.append(v.get("/me").status_code) for v in visitors))
    assert sorted(found) == [200, 401, 401, 401]
    with site.app.app_context():
        assert len(site.ext.users.devices("ada")) == 1


@pytest.mark.parametrize("value", ["ada|" + "0" * 128, "ada", "", "|", "x" * 5000, "ada|\xe9"])
def test_a_forged_cookie(one: Site, value: str) -> None:
    visitor = one.visitor()
    with one.counted() as count:
        assert visitor.get("/me", headers={"Cookie": f"{COOKIE}={value}"}).status_code == 401
    assert count.calls == []
    assert one.stored() == {}


def test_a_session_of_a_deleted_user(one: Site) -> None:
    visitor = with_old_cookie(one, "deleted")
    assert visitor.get("/me").status_code == 401
    assert visitor.get_cookie(COOKIE) is None
    visitor = with_old_cookie(one, "eve")
    with visitor.session_transaction() as prepared:
        prepared["_user_id"] = "deleted"
    assert visitor.get("/me").status_code == 401  # the session has a user already


def test_beside_a_session_of_its_user_it_only_goes(one: Site) -> None:
    visitor = one.visitor()
    visitor.run(sign_in())
    visitor = with_old_cookie(one, session=visitor.cookie)
    assert visitor.get("/me").text == "ada"
    assert visitor.get_cookie(COOKIE) is None
    assert with_old_cookie(one).get("/me").text == "ada"  # it wasn't converted yet


def test_a_page_that_asks_for_no_user_leaves_it_alone(one: Site) -> None:
    visitor = with_old_cookie(one)
    assert visitor.get("/page").status_code == 200
    assert visitor.get_cookie(COOKIE)
    assert visitor.get("/me").text == "ada"


def test_a_conversion_waits_for_a_response_that_can_carry_the_token(one: Site) -> None:
    """A socket handler, a page for a wrong address and a streamed body have none."""

    def late() -> flask.Response:
        def body() -> Iterator[str]:
            yield str(current_user.get_id())

        return flask.Response(flask.stream_with_context(body()))

    one.app.add_url_rule("/late", "late", late)
    one.app.register_error_handler(404, lambda error: str(current_user.get_id()))
    socketio = SocketIO(one.app, manage_session=False, async_mode="threading")
    users: list[str | None] = []
    socketio.on_event("connect", lambda: users.append(current_user.get_id()))
    visitor = with_old_cookie(one)
    assert visitor.get("/late").text == "None"
    assert visitor.get("/nowhere").text == "None"
    socketio.test_client(one.app, flask_test_client=visitor)
    assert users == [None]
    assert visitor.get_cookie(COOKIE)
    assert visitor.get("/me").text == "ada"
    assert visitor.get("/nowhere").text == "ada"


@LEGACY_FORMS
def test_with_flask_security(make_site: SiteMaker, clock: FakeClock) -> None:
    site = make_site(
        config={**SECURITY, "SECURITY_TWO_FACTOR": False},
        remember="session",
        remember_until=until(clock, 30),
    )
    visitor = with_security(site).visitor()
    assert visitor.post("/login", json={**ADA, "remember": True}).status_code == 200
    assert visitor.get_cookie(COOKIE) is None
    browser_is_closed(visitor)
    clock.advance(20 * DAY)
    assert visitor.run(lambda session: current_user.email) == ADA["email"]
    assert visitor.post("/logout", json={}).status_code == 200
    assert visitor.run(lambda session: session.permanent) is False


def test_a_cookie_of_another_name(one: Site) -> None:
    one.app.config.update(REMEMBER_COOKIE_NAME="stay", REMEMBER_COOKIE_PATH="/me")
    visitor = one.visitor()
    with one.app.app_context():
        visitor.set_cookie("stay", encode_cookie("ada"), path="/me")
    assert visitor.get("/me").text == "ada"
    assert visitor.get_cookie("stay", path="/me") is None
    visitor.run(sign_in(remember=True))
    assert visitor.get_cookie("stay", path="/me") is None


def test_after_the_date_none_is_converted(one: Site) -> None:
    one.clock.advance(31 * DAY)
    visitor = with_old_cookie(one)
    with one.counted() as count:
        assert visitor.get("/me").status_code == 401
    assert count.calls == []
    assert visitor.get_cookie(COOKIE) is None


def test_without_a_date_none_is_converted(make_site: SiteMaker) -> None:
    visitor = with_old_cookie(with_login(make_site(remember="session")))
    assert visitor.get("/me").status_code == 401
    assert visitor.get_cookie(COOKIE) is None


def test_an_outage_converts_nothing(site: Site) -> None:
    def down() -> None:
        raise StoreUnavailable("drill")

    visitor = with_old_cookie(site)
    site.store.before("load", down)
    answer = visitor.get("/me")
    assert answer.status_code == 503
    assert visitor.get_cookie(COOKIE)
    assert visitor.get("/me").text == "ada"


def test_the_mark_is_not_a_session(site: Site) -> None:
    visitor = with_old_cookie(site)
    visitor.get("/me")
    visitor.run(lambda session: session.destroy())
    assert site.stored()  # the mark
    parts: Any = parts_of(site.store)
    assert not any(is_session_key(record.key) for record in parts.scans.scan().records)
    assert "ada" not in repr(site.stored().keys())


# Where Flask-Login's own cookie stays in use ------------------------------------------------------


def test_revoking_warns(make_site: SiteMaker, caplog: pytest.LogCaptureFixture) -> None:
    site = with_login(make_site())
    visitor = site.visitor()
    visitor.run(sign_in(remember=True))
    assert visitor.get_cookie(COOKIE)
    caplog.clear()
    with site.app.app_context():
        site.ext.users.revoke_all("ada")
    assert "SESSION_REMEMBER" in caplog.text
    assert "ada" not in caplog.text
    assert visitor.get("/me").text == "ada"  # which it warned of


def test_revoking_does_not_warn_without_flask_login_or_cookie(
    make_site: SiteMaker, caplog: pytest.LogCaptureFixture
) -> None:
    for user, site in (
        ("ada", make_site()),
        ("eve", with_login(make_site(remember="session"))),
    ):
        site.visitor().run(partial(SessionData.bind, user_id=user))
        with site.app.app_context():
            site.ext.users.revoke_all(user)
    assert "SESSION_REMEMBER" not in caplog.text


def app_with(**config: Any) -> Flask:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    app.config.update(SESSION_STORE="memory://", **config)
    return app


@pytest.mark.parametrize("duration", [timedelta(days=365), 400 * DAY])
def test_a_cookie_that_outlives_the_sessions_warns_at_the_start(duration: Any) -> None:
    with pytest.warns(UserWarning, match="REMEMBER_COOKIE_DURATION is .* longer than"):
        Session(app_with(REMEMBER_COOKIE_DURATION=duration))


def test_the_default_duration_of_flask_login_warns() -> None:
    app = app_with()
    LoginManager(app)
    with pytest.warns(UserWarning, match="REMEMBER_COOKIE_DURATION is 365 days"):
        Session(app)


def test_or_at_the_first_such_sign_in(
    make_site: SiteMaker, caplog: pytest.LogCaptureFixture
) -> None:
    site = with_login(make_site())
    for _ in range(2):
        site.visitor().run(sign_in(remember=True))
    assert caplog.text.count("REMEMBER_COOKIE_DURATION") == 1


def test_nothing_warns_where_nothing_is_wrong() -> None:
    Session(app_with())
    Session(app_with(REMEMBER_COOKIE_DURATION=timedelta(days=31)))
    Session(app_with(REMEMBER_COOKIE_DURATION=timedelta(days=365), SESSION_REMEMBER="session"))


def test_a_date_in_the_past_warns() -> None:
    with pytest.warns(UserWarning, match="SESSION_REMEMBER_UNTIL has passed"):
        Session(app_with(SESSION_REMEMBER="session", SESSION_REMEMBER_UNTIL="2020-01-01"))


def test_a_date_for_nothing_is_refused() -> None:
    with pytest.raises(
        SettingError, match=r"without SESSION_REMEMBER = .*remove SESSION_REMEMBER_UNTIL"
    ):
        Session(app_with(SESSION_REMEMBER_UNTIL="2999-01-01"))


def test_flask_login_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match="Flask-Login is not installed"):
        Session(app_with(SESSION_REMEMBER="session"))
