"""Fresh authentication: when users must confirm, which confirmations count, and which don't."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import flask
import flask_login
import pytest
from flask import Blueprint, Flask, Response, redirect, request
from flask.views import MethodView, View
from flask_login import LoginManager, confirm_login, login_fresh, login_user, logout_user
from flask_socketio import SocketIO

from flask_gsession import (
    ConfirmationRequired,
    RotationRefused,
    Session,
    SessionData,
    SettingError,
    StoreUnavailable,
    next_url,
    require_fresh,
    session,
)
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor

DAY = 86_400
PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


class User(flask_login.UserMixin):  # type: ignore[misc]  # it ships no types
    def __init__(self, name: str) -> None:
        self.id = name


def with_vaults(site: Site) -> Site:
    """The site with Flask-Login, a page to confirm on, and pages that require it."""
    app = site.app
    LoginManager(app).user_loader(User)

    @app.route("/vault", methods=["GET", "POST"])
    @require_fresh(minutes=10)
    def vault() -> str:
        return "open"

    @app.get("/safe")
    @require_fresh(minutes=10, method="totp")
    def safe() -> str:
        return "open"

    @app.get("/both")
    @require_fresh(minutes=10, method=["password", "passkey"])
    @require_fresh(minutes=5, method="totp")
    def both() -> str:
        return "open"

    @app.get("/page")
    @require_fresh(view="confirm")
    def page() -> str:
        return "open"

    @app.route("/confirm", methods=["GET", "POST"])
    def confirm() -> Any:
        if request.method == "POST":
            session.confirm()
            return redirect(next_url("/home"))
        return "your password?"

    return site


@pytest.fixture
def vaults(site: Site) -> Site:
    """On each store in turn."""
    return with_vaults(site)


@pytest.fixture
def one(store_prefix: str, clock: FakeClock) -> Iterator[Site]:
    """On the memory store, for code that doesn't depend on the store."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield with_vaults(make())


def signed_in(site: Site, **options: Any) -> Visitor:
    """A visitor who signed in with Flask-Login, with a cart from before."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    visitor.run(lambda session: login_user(User("ada"), **options))
    return visitor


def opens(visitor: Visitor, path: str = "/vault") -> bool:
    answer = visitor.get(path)
    assert answer.status_code in (200, 401), answer.text
    return answer.text == "open"


# Confirmations that count -------------------------------------------------------------------------


def test_a_sign_in_is_fresh_for_its_minutes(vaults: Site) -> None:
    visitor = signed_in(vaults)
    assert opens(visitor)
    vaults.clock.advance(600)
    assert opens(visitor)
    vaults.clock.advance(2)
    assert not opens(visitor)
    assert visitor.run(lambda session: session["cart"]) == ["mug"]
    visitor.run(lambda session: session.confirm())
    vaults.clock.advance(599.5)
    assert opens(visitor)
    vaults.clock.advance(0.6)
    assert not opens(visitor)


def test_a_confirmation_is_fresh_again(vaults: Site) -> None:
    visitor = signed_in(vaults)
    vaults.clock.advance(3600)
    assert not opens(visitor)
    thief, cookie = visitor.another_tab(), visitor.cookie
    with vaults.counted() as count:
        visitor.run(lambda session: session.confirm())
    assert count.calls == ["load", "replace", "load", "save"]  # two for the user's roster
    assert visitor.cookie != cookie
    assert opens(visitor)
    assert not opens(thief)
    assert thief.run(dict) == {}
    with vaults.counted() as count:
        assert opens(visitor)
    assert count.calls == ["load"]


def test_each_method_counts_for_itself(vaults: Site) -> None:
    visitor = signed_in(vaults)
    visitor.run(lambda session: session.confirm(method="password"))
    assert opens(visitor)
    assert not opens(visitor, "/safe")
    assert not opens(visitor, "/both")
    vaults.clock.advance(400)
    visitor.run(lambda session: session.confirm("totp"))
    assert opens(visitor, "/safe")
    assert opens(visitor, "/both")
    vaults.clock.advance(250)
    assert opens(visitor, "/safe")
    assert not opens(visitor, "/both")  # the password was ten minutes ago


def test_confirmed_at(vaults: Site) -> None:
    visitor = vaults.visitor()
    assert visitor.run(lambda session: session.confirmed_at()) is None
    visitor.run(lambda session: session.update(user="ada"))
    visitor.run(lambda session: session.confirm("totp"))
    vaults.clock.advance(60)
    found = visitor.run(
        lambda session: [session.confirmed_at(m) for m in (None, "totp", "password", ["totp", "x"])]
    )
    assert found[0] == found[1] == found[3]
    assert found[2] is None
    assert abs(found[0].timestamp() - vaults.clock() + 60) < 0.01


def test_a_sign_in_by_bind_counts(site: Site) -> None:
    site.app.add_url_rule("/vault", "vault", require_fresh(minutes=1)(lambda: "open"))
    site.app.add_url_rule("/named", "named", require_fresh(method="sign-in")(lambda: "open"))
    for cart in (None, ["mug"]):
        visitor = site.visitor()
        if cart is not None:
            visitor.run(lambda session, cart=cart: session.update(cart=cart))

        def sign_in(session: Any) -> None:
            session.bind("ada")
            assert session.confirmed_at() is not None

        visitor.run(sign_in)
        assert opens(visitor)
        assert opens(visitor, "/named")
        site.clock.advance(62)
        assert not opens(visitor)
        visitor.run(lambda session: session.confirm())
        visitor.run(lambda session: session.rotate(grace=0))
        assert visitor.run(lambda session: session.owner) == "ada"
        assert not opens(visitor)
        visitor.run(lambda session: session.bind("eve"))
        assert opens(visitor)
        visitor.run(lambda session: session.unbind())
        assert not opens(visitor)


def test_a_confirmation_alone_is_not_a_session(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.confirm())
    assert site.stored() == {}
    visitor.run(lambda session: session.update(user="ada"))
    visitor.run(lambda session: session.confirm())
    visitor.run(lambda session: session.pop("user"))
    assert site.stored() == {}
    assert visitor.cookie is None


def test_without_flask_login(site: Site) -> None:
    """The sign-in of an application of its own calls `confirm`, which rotates."""
    guarded = require_fresh(minutes=1)(lambda: "open")
    site.app.add_url_rule("/vault", "vault", guarded)
    visitor = site.visitor()
    assert not opens(visitor)

    def log_in(session: Any) -> None:
        session["user"] = "ada"
        session.confirm("password")

    visitor.run(log_in)
    assert opens(visitor)


def test_confirm_login_counts(vaults: Site) -> None:
    visitor = signed_in(vaults)
    vaults.clock.advance(3600)
    visitor.run(lambda session: confirm_login())
    assert opens(visitor)


def test_a_sign_in_that_is_not_fresh_does_not(vaults: Site) -> None:
    assert not opens(signed_in(vaults, fresh=False))


def test_a_remembered_user_has_confirmed_nothing(vaults: Site) -> None:
    visitor = signed_in(vaults, remember=True)
    visitor.delete_cookie("session")
    assert visitor.run(lambda session: flask_login.current_user.get_id()) == "ada"
    assert not opens(visitor)
    visitor.run(lambda session: session.confirm())
    assert opens(visitor)


@pytest.mark.parametrize("confirms", [True, False])
def test_another_user_does_not_inherit_it(one: Site, confirms: bool) -> None:
    visitor = signed_in(one)
    visitor.run(lambda session: session.confirm("totp"))
    assert opens(visitor, "/safe")
    if confirms:
        visitor.run(lambda session: login_user(User("eve")))
        assert opens(visitor)
    else:
        visitor.run(lambda session: session.rotate(grace=0))
    assert not opens(visitor, "/safe")


def test_nor_after_a_sign_out(one: Site) -> None:
    visitor = signed_in(one)
    visitor.run(lambda session: logout_user())
    assert not opens(visitor)
    assert visitor.run(lambda session: session.confirmed_at()) is None
    assert visitor.run(lambda session: session["cart"]) == ["mug"]


@pytest.mark.parametrize("protection", ["basic", "strong", None])
def test_nor_in_another_browser(one: Site, protection: str | None) -> None:
    """Flask-Login's session protection finds that out, wherever the decorator stands."""
    one.app.config["SESSION_PROTECTION"] = protection
    visitor = signed_in(one)
    visitor.run(lambda session: session.confirm())
    other = {"User-Agent": "other"}
    if protection is None:
        assert visitor.get("/vault", headers=other).text == "open"
        return
    assert visitor.get("/vault", headers=other).status_code == 401
    assert not opens(visitor)
    if protection == "basic":  # a browser that was updated, say
        visitor.post("/confirm", headers=other)
        for _ in range(2):
            assert visitor.get("/vault", headers=other).text == "open"
        assert visitor.run(lambda session: login_fresh(), headers=other)


def test_a_rotation_in_the_request_of_the_confirmation(one: Site) -> None:
    visitor = signed_in(one)
    one.clock.advance(3600)

    def confirm_and_rotate(session: Any) -> None:
        session.confirm()
        session.rotate(grace=0)
        session.rotate(grace=60)

    visitor.run(confirm_and_rotate)
    assert opens(visitor)
    visitor.run(lambda session: session.rotate())
    assert opens(visitor)


def test_signing_in_with_a_second_factor_at_once(one: Site) -> None:
    for order in (1, -1):
        visitor = one.visitor()
        steps: list[Callable[[Any], object]] = [
            lambda session: session.confirm("totp"),
            lambda session: login_user(User("ada")),
        ]

        def log_in(session: Any, steps: Any = steps[::order]) -> None:
            for step in steps:
                step(session)

        visitor.run(lambda session: session.update(cart=[]))
        visitor.run(log_in)
        assert opens(visitor)
        assert opens(visitor, "/safe")


@pytest.mark.parametrize("renews", [True, False])
def test_a_confirmation_renews_the_csrf_token_if_set(make_site: SiteMaker, renews: bool) -> None:
    visitor = make_site(renew_csrf=renews).visitor()
    visitor.run(lambda session: session.update(csrf_token="planted", user="ada"))
    visitor.run(lambda session: session.confirm())
    assert visitor.run(lambda session: "csrf_token" in session) is not renews


# Parallel requests, old tokens --------------------------------------------------------------------


def test_a_parallel_save_does_not_undo_it(vaults: Site) -> None:
    visitor = signed_in(vaults)
    vaults.clock.advance(3600)
    tab = visitor.another_tab()
    vaults.store.before("replace", lambda: tab.run(lambda s: s.update(cart=["mug", "pen"])))
    visitor.run(lambda session: session.confirm())
    assert opens(visitor)
    assert visitor.run(lambda session: session["cart"]) == ["mug", "pen"]


def test_a_request_that_was_running_writes_nothing_into_it(vaults: Site) -> None:
    visitor = signed_in(vaults)
    vaults.clock.advance(3600)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        session["cart"].append("pen")
        visitor.run(lambda session: session.confirm())

    tab.ask(view)
    assert opens(visitor)
    assert visitor.run(lambda session: session["cart"]) == ["mug"]


def test_one_of_two_parallel_confirmations_wins(vaults: Site) -> None:
    """The other's token ended with the first rotation."""
    visitor = signed_in(vaults)
    vaults.clock.advance(3600)
    tab = visitor.another_tab()
    vaults.store.before("replace", lambda: tab.run(lambda session: session.confirm("totp")))
    visitor.run(lambda session: session.confirm("password"))
    assert not opens(visitor)
    assert opens(tab, "/safe")
    assert tab.run(lambda session: session.confirmed_at("password")) is None


def test_an_answer_that_is_lost(vaults: Site) -> None:
    """Nobody has the token of a confirmation whose request failed."""

    def lost() -> None:
        raise StoreUnavailable("drill")

    visitor = signed_in(vaults)
    vaults.clock.advance(3600)
    vaults.store.after("replace", lost)
    assert visitor.ask(lambda session: session.confirm()).status_code == 503
    assert not opens(visitor)


def test_an_old_token_confirms_nothing_for_the_session(vaults: Site) -> None:
    visitor = signed_in(vaults)
    vaults.clock.advance(3600)
    holder = visitor.another_tab()
    visitor.run(lambda session: session.rotate(grace=60))
    assert holder.run(lambda session: session["cart"]) == ["mug"]
    holder.run(lambda session: session.confirm())
    assert not opens(visitor)
    assert not opens(holder)
    holder.run(lambda session: session.update(note=1) or session.confirm())
    assert not opens(visitor)
    assert holder.run(lambda session: flask_login.current_user.get_id()) is None
    assert "cart" not in holder.run(dict)


def test_a_socket_handler_confirms_nothing(one: Site) -> None:
    """It keeps the token, which somebody else may have: so a sign-in there isn't fresh either."""
    socketio = SocketIO(one.app, manage_session=False, async_mode="threading")
    caught: list[type[Exception]] = []

    def confirm() -> None:
        try:
            session.confirm()
        except RotationRefused as error:
            caught.append(type(error))

    socketio.on_event("confirm", confirm)
    socketio.on_event("login", lambda: login_user(User("ada")) and None)
    socketio.on_event("bind", lambda: session.bind("eve"))
    visitor = one.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    cookie = visitor.cookie
    socket = socketio.test_client(one.app, flask_test_client=visitor)
    for event, user in (("login", "ada"), ("bind", "eve")):
        socket.emit(event)
        assert visitor.run(lambda session: session.owner) == user
        assert not opens(visitor)
    socket.emit("confirm")
    assert caught == [RotationRefused]
    assert not opens(visitor)
    assert visitor.cookie == cookie
    visitor.run(lambda session: session.confirm())
    assert opens(visitor)


@pytest.mark.parametrize("block", ["lock", "transaction"])
def test_confirming_inside_a_block(vaults: Site, block: str) -> None:
    visitor = signed_in(vaults)
    vaults.clock.advance(3600)

    def view(session: Any) -> None:
        with getattr(session, block)():
            session.confirm()

    visitor.run(view)
    assert opens(visitor)

    def fail(session: Any) -> None:
        vaults.clock.advance(3600)
        with getattr(session, block)():
            session.confirm()
            raise ValueError("drill")

    assert visitor.ask(fail).status_code == 500
    assert not opens(visitor)


@pytest.mark.parametrize("block", ["lock", "transaction"])
def test_a_sign_in_with_an_old_token_is_fresh_in_its_own_session(one: Site, block: str) -> None:
    visitor = signed_in(one)
    visitor.run(lambda session: session.confirm("totp"))
    holder = visitor.another_tab()
    visitor.run(lambda session: session.rotate(grace=60))

    def sign_in(session: Any) -> None:
        with getattr(session, block)():
            login_user(User("eve"))

    holder.run(sign_in)
    assert holder.run(lambda session: flask_login.current_user.get_id()) == "eve"
    assert opens(holder)
    assert not opens(holder, "/safe")
    assert opens(visitor, "/safe")


def test_junk_under_the_key_is_not_a_confirmation(one: Site) -> None:
    visitor = signed_in(one)
    one.clock.advance(3600)
    wrong: tuple[Any, ...] = (7, [], {"password": "now"}, {"password": True}, {})
    for junk in wrong:
        visitor.run(partial(SessionData.update, _confirmed=junk))
        assert not opens(visitor)


def test_a_clock_that_is_far_ahead_makes_nothing_fresh_for_longer(one: Site) -> None:
    visitor = signed_in(one)
    one.clock.advance(-30)
    assert opens(visitor)
    one.clock.advance(-60)
    assert not opens(visitor)


# The absolute lifetime ----------------------------------------------------------------------------


def lives(visitor: Visitor) -> bool:
    return "cart" in visitor.run(dict)


def keeps_alive(site: Site, visitor: Visitor, days: float) -> None:
    """Pass these days, with the session in use."""
    for _ in range(4):
        site.clock.advance(days * DAY / 4)
        visitor.run(dict)


@pytest.fixture
def short(make_site: SiteMaker) -> Site:
    """Sessions end after two days, however much they are used."""
    return with_vaults(
        make_site(absolute_timeout=2 * DAY, idle_timeout=DAY, encryption_keys=["k" * 43])
    )


def test_the_absolute_lifetime_restarts_at_a_sign_in(short: Site) -> None:
    visitor = short.visitor()
    visitor.run(lambda session: session.update(cart=["mug"], photo=b"x" * 100_000))
    keeps_alive(short, visitor, 1.9)
    created = visitor.run(lambda session: session.created_at)
    visitor.run(lambda session: login_user(User("ada")))
    assert visitor.run(lambda session: session.created_at) - created > timedelta(days=1.8)
    keeps_alive(short, visitor, 1.9)
    assert lives(visitor)
    assert len(visitor.run(lambda session: session["photo"])) == 100_000
    keeps_alive(short, visitor, 0.2)
    assert not lives(visitor)


@pytest.mark.parametrize("block", ["lock", "transaction"])
def test_the_absolute_lifetime_restarts_inside_a_block_and_after_lost_races(
    short: Site, block: str
) -> None:
    visitor = short.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    keeps_alive(short, visitor, 1.9)
    tab = visitor.another_tab()

    def sign_in(session: Any) -> None:
        with getattr(session, block)():
            login_user(User("ada"))

    if block == "transaction":
        visitor.run(sign_in)
    else:
        short.store.before("replace", lambda: tab.run(lambda s: s.update(cart=["pen"])))
        visitor.run(lambda session: login_user(User("ada")))
        visitor.run(sign_in)
    keeps_alive(short, visitor, 1.9)
    assert lives(visitor)


def test_a_sign_in_during_a_lock_is_not_rolled_back_by_another_thread(short: Site) -> None:
    """A sign-in waits for the end of the lock, and another thread's rollback doesn't undo it."""
    visitor = short.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    keeps_alive(short, visitor, 1.9)

    def inside(session: Any) -> None:
        with session.lock():
            login_user(User("ada"))
            with session.transaction():
                session["b"] = 1

    visitor.run(inside)
    keeps_alive(short, visitor, 1.9)

    def beside(session: Any) -> None:
        opened = session._get_current_object()
        sign_in = flask.copy_current_request_context(lambda: login_user(User("ada")))

        def work() -> None:
            opened["signed in"] = True
            sign_in()

        def fail() -> None:
            with session.transaction():
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                raise ValueError("drill")

        with pytest.raises(ValueError, match="drill"):
            fail()

    visitor.run(beside)
    keeps_alive(short, visitor, 1.9)
    assert lives(visitor)


@pytest.mark.parametrize("block", ["lock", "transaction"])
def test_a_sign_in_inside_a_failing_block_is_undone(short: Site, block: str) -> None:
    visitor = short.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    cookie = visitor.cookie

    def view(session: Any) -> None:
        def fail() -> None:
            with getattr(session, block)():
                session.bind("ada")
                raise ValueError("drill")

        with pytest.raises(ValueError, match="drill"):
            fail()
        session["other"] = 1

    visitor.run(view)
    assert visitor.cookie == cookie
    assert visitor.run(lambda session: (session.owner, session.confirmed_at())) == (None, None)


ONWARD: list[Callable[[Any], object]] = [
    lambda session: session.confirm(),
    lambda session: confirm_login(),
    lambda session: session.rotate(),
    lambda session: session.rotate(grace=0),
    lambda session: session.set_lifetime(DAY),
]


@pytest.mark.parametrize("act", ONWARD)
def test_the_absolute_lifetime_restarts_at_nothing_else(
    short: Site, act: Callable[[Any], object]
) -> None:
    visitor = signed_in(short)
    keeps_alive(short, visitor, 1.9)
    visitor.run(act)
    assert lives(visitor)
    keeps_alive(short, visitor, 0.2)
    assert not lives(visitor)


def test_the_same_user_may_sign_in_again(short: Site) -> None:
    visitor = signed_in(short)
    device = visitor.run(lambda session: session.device_id)
    keeps_alive(short, visitor, 1.9)
    visitor.run(lambda session: login_user(User("ada")))
    assert opens(visitor)
    keeps_alive(short, visitor, 1.9)
    assert lives(visitor)
    assert visitor.run(lambda session: session.device_id) == device


def test_a_sign_in_late_in_a_session_is_listed_for_as_long_as_it_lives(short: Site) -> None:
    for sign_in in (
        lambda session: session.bind("ada"),
        lambda session: login_user(User("eve")),
        lambda session: login_user(User("eve")),
    ):
        visitor = short.visitor()
        visitor.run(lambda session: session.update(cart=["mug"]))
        keeps_alive(short, visitor, 1.99)
        visitor.run(sign_in)
        short.clock.advance(DAY - 1)
        with short.app.app_context():
            owner = visitor.run(lambda session: session.owner)
            assert len(short.ext.users.devices(owner)) == 1
        assert lives(visitor)
        visitor.run(lambda session: session.destroy())


# The answer ---------------------------------------------------------------------------------------


def test_the_challenge(vaults: Site) -> None:
    """RFC 9470, 3; without an error code where there is no session (RFC 6750, 3.1)."""
    visitor = vaults.visitor()
    answer = visitor.get("/safe")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer max_age="600", acr_values="totp"'
    visitor = signed_in(vaults)
    answer = visitor.get("/safe")
    assert answer.headers["WWW-Authenticate"] == (
        'Bearer error="insufficient_user_authentication", '
        'error_description="More recent authentication is required", '
        'max_age="600", acr_values="totp"'
    )
    assert "Cookie" in answer.headers["Vary"]
    assert "mug" not in answer.text


def test_an_error_handler_can_answer(one: Site) -> None:
    @one.app.errorhandler(ConfirmationRequired)
    def ask(error: ConfirmationRequired) -> tuple[dict[str, Any], int]:
        return {"confirm": error.methods, "max_age": error.max_age}, 403

    answer = one.visitor().get("/safe")
    assert (answer.status_code, answer.json) == (403, {"confirm": ["totp"], "max_age": 600})


def test_a_browser_is_sent_to_the_page_and_back(vaults: Site) -> None:
    visitor = signed_in(vaults)
    vaults.clock.advance(3600)
    answer = visitor.get("/page?tab=2&name=%C3%A4", headers=PAGE)
    assert answer.status_code == 302
    assert "no-store" in answer.headers["Cache-Control"]
    assert answer.location == "/confirm?next=/page?tab%3D2%26name%3D%C3%A4"
    assert visitor.get(answer.location).text == "your password?"
    answer = visitor.post(answer.location)
    assert answer.location == "/page?tab=2&name=%C3%A4"
    assert visitor.get(answer.location, headers=PAGE).text == "open"


def test_the_setting_names_the_page_for_all(store_prefix: str, clock: FakeClock) -> None:
    with SiteMaker("memory://", store_prefix, clock) as make:
        site = with_vaults(make(confirm_view="confirm"))
        visitor = site.visitor()
        assert visitor.get("/vault", headers=PAGE).location == "/confirm?next=/vault"
        answer = visitor.post("/vault", headers=PAGE)
        assert (answer.status_code, answer.location) == (303, "/confirm")
        for referrer, location in [
            ("http://localhost/account?tab=2#end", "/confirm?next=/account?tab%3D2"),
            ("http://localhost", "/confirm?next=/"),
            ("https://localhost/account", "/confirm"),
            ("http://evil.example/account", "/confirm"),
            ("http://localhost.evil.example/account", "/confirm"),
            ("http://user@localhost/account", "/confirm"),
            ("http://[/account", "/confirm"),
            ("//localhost/account", "/confirm"),
            ("http://localhost/\\evil.example", "/confirm"),
            ("http://localhost//evil.example", "/confirm?next=/evil.example"),
        ]:
            answer = visitor.post("/vault", headers={**PAGE, "Referer": referrer})
            assert answer.location == location, referrer


@pytest.mark.parametrize(
    ("headers", "redirected"),
    [
        (PAGE, True),
        ({**PAGE, "Sec-Fetch-Mode": "navigate"}, True),
        ({**PAGE, "Sec-Fetch-Mode": "cors"}, False),
        ({"Accept": "*/*"}, False),
        ({"Accept": "application/json"}, False),
        ({}, False),
    ],
)
def test_scripts_get_their_401(one: Site, headers: dict[str, str], redirected: bool) -> None:
    answer = one.visitor().get("/page", headers=headers)
    assert answer.status_code == (302 if redirected else 401)


def test_clients_with_a_token_header_get_the_challenge(make_site: SiteMaker) -> None:
    site = with_vaults(make_site(token_header="X-Session", confirm_view="confirm"))
    client = site.app.test_client(use_cookies=False)

    def log_in(session: Any) -> None:
        login_user(User("ada"))

    with site.visit(log_in) as visit:
        token = client.get(visit.path, headers={"X-Session": ""}).headers["X-Session"]
    headers = {**PAGE, "X-Session": token}
    assert client.get("/vault", headers=headers).text == "open"
    site.clock.advance(3600)
    answer = client.get("/vault", headers=headers)
    assert answer.status_code == 401
    assert answer.location is None
    assert 'max_age="600"' in answer.headers["WWW-Authenticate"]
    answer = client.post("/confirm", headers=headers)
    renewed = {**PAGE, "X-Session": answer.headers["X-Session"]}
    assert client.get("/vault", headers=renewed).text == "open"
    assert client.get("/vault", headers=headers).status_code == 401


def test_below_a_prefix_the_way_back_has_it(one: Site) -> None:
    options: Any = {"base_url": "https://shop.example/demo/"}
    answer = one.visitor().get("/page?a=1", headers=PAGE, **options)
    assert answer.location == "/demo/confirm?next=/demo/page?a%3D1"


def test_the_page_itself_is_not_sent_to_itself(store_prefix: str, clock: FakeClock) -> None:
    with SiteMaker("memory://", store_prefix, clock) as make:
        site = make(confirm_view="confirm")
        site.app.add_url_rule("/confirm", "confirm", require_fresh()(lambda: "open"))
        blueprint = Blueprint("b", __name__, url_prefix="/b")
        blueprint.add_url_rule("/own", "own", require_fresh(view=".own")(lambda: "open"))
        blueprint.add_url_rule("/page", "page", require_fresh(view=".own")(lambda: "open"))
        site.app.register_blueprint(blueprint)
        visitor = site.visitor()
        assert visitor.get("/confirm", headers=PAGE).status_code == 401
        assert visitor.get("/b/own", headers=PAGE).status_code == 401
        assert visitor.get("/b/page", headers=PAGE).location == "/b/own?next=/b/page"


EVIL = [
    *("//evil.example", "///evil.example", "/\\evil.example", "\\\\evil.example"),
    *("https://evil.example", "https:evil.example", "javascript:alert(1)", "evil.example"),
    *("/\t/evil.example", "\t//evil.example", "/\n/evil.example", " //evil.example", "/ /a"),
    *("", "?next=/", "@evil.example", "\x00/", "/\x7f", "/a\\..\\b", "\u2028//evil.example"),
]


@pytest.mark.parametrize("wanted", EVIL)
def test_the_way_back_stays_on_this_site(one: Site, wanted: str) -> None:
    answer = one.visitor().post("/confirm", query_string={"next": wanted})
    assert answer.location == "/home"
    answer = one.visitor().post("/confirm", data={"next": wanted})
    assert answer.location == "/home"


@pytest.mark.parametrize("wanted", ["/", "/a?b=c&d=//e", "/a/../b", "/%2F/evil.example", "/ä"])
def test_the_way_back_leads_there(one: Site, wanted: str) -> None:
    answer = one.visitor().post("/confirm", data={"next": wanted})
    assert answer.location == wanted.replace("ä", "%C3%A4")


def test_a_path_that_looks_like_a_host(one: Site) -> None:
    one.app.url_map.merge_slashes = False

    @one.app.get("/<path:rest>")
    @require_fresh(view="confirm")
    def anything(rest: str) -> str:
        return "open"

    for path in ("//evil.example/a", "/\\evil.example", "///evil.example", "/%09/evil.example"):
        answer = one.visitor().get(f"http://localhost{path}", headers=PAGE)
        way = one.visitor().post(answer.location).location
        assert way.startswith("/")
        assert not way.startswith(("//", "/\\", "/\t"))


# Views of each kind -------------------------------------------------------------------------------


def test_views_of_each_kind(one: Site) -> None:
    app = one.app

    @app.get("/async")
    @require_fresh()
    async def in_async() -> str:
        return "open"

    class Page(View):
        decorators = [require_fresh()]  # noqa: RUF012  # as Flask's documentation has it

        def dispatch_request(self) -> str:
            return "open"

    class AsyncPage(View):
        decorators = [require_fresh()]  # noqa: RUF012

        async def dispatch_request(self) -> str:  # type: ignore[override]  # Flask takes both
            return "open"

    class Method(MethodView):
        def get(self) -> str:
            return "public"

        @require_fresh()
        def delete(self, **_: Any) -> str:
            return "open"

    blueprint = Blueprint("admin", __name__, url_prefix="/admin")
    blueprint.before_request(require_fresh()(lambda: None))
    blueprint.add_url_rule("/", "home", lambda: "open")
    app.register_blueprint(blueprint)
    app.add_url_rule("/class", view_func=Page.as_view("class"))
    app.add_url_rule("/async-class", view_func=AsyncPage.as_view("async-class"))
    app.add_url_rule("/method", view_func=Method.as_view("method"))
    visitor = one.visitor()
    paths = ("/async", "/class", "/async-class", "/admin/")
    assert in_async.__name__ == "in_async"
    for path in paths:
        assert visitor.get(path).status_code == 401
    assert visitor.get("/method").text == "public"
    assert visitor.delete("/method").status_code == 401
    visitor.run(lambda session: login_user(User("ada")))
    for path in paths:
        assert visitor.get(path).text == "open"
    assert visitor.delete("/method").text == "open"


def test_the_session_of_a_second_ext(one: Site) -> None:
    admin = Session(one.app, store=one.store, clock=one.clock, cookie_name="admin")
    guarded = require_fresh(session=admin.session)(lambda: "open")
    one.app.add_url_rule("/second", "second", guarded)
    visitor = one.visitor()
    visitor.run(lambda session: session.update(user="ada") or session.confirm())
    assert not opens(visitor, "/second")
    visitor.run(lambda session: admin.session.update(user="ada") or admin.session.confirm())
    assert opens(visitor, "/second")


def test_a_store_that_is_down(vaults: Site) -> None:
    def down() -> None:
        raise StoreUnavailable("drill")

    visitor = signed_in(vaults)
    vaults.store.before("load", down)
    answer = visitor.get("/vault", headers=PAGE)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]


@pytest.mark.parametrize("minutes", [0, -1, "10", None, True, float("nan"), 1e9, timedelta(0)])
def test_wrong_minutes(minutes: Any) -> None:
    with pytest.raises(SettingError, match="minutes"):
        require_fresh(minutes)


@pytest.mark.parametrize("method", ["", "a b", 'a"b', "é", "x" * 41, 7, [], [7], ["a\n"]])
def test_wrong_methods(one: Site, method: Any) -> None:
    with pytest.raises(SettingError, match="method"):
        require_fresh(method=method)
    with one.app.test_request_context():
        with pytest.raises(ValueError, match="method"):
            session.confirm(method)
        with pytest.raises(ValueError, match="method"):
            session.confirmed_at(method)


def test_without_parentheses() -> None:
    wrong: Any = require_fresh
    with pytest.raises(SettingError, match="parentheses"):
        wrong(lambda: "open")


def test_without_our_session() -> None:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    app.add_url_rule("/", "view", require_fresh()(lambda: "open"))
    app.testing = True
    with pytest.raises(SettingError, match="require_fresh needs a Session"):
        app.test_client().get("/")


def test_a_test_client_can_prepare_it(one: Site) -> None:
    visitor = one.visitor()
    with visitor.session_transaction() as prepared:
        prepared["user"] = "ada"
        prepared.confirm("totp")  # type: ignore[attr-defined]  # it is ours
    assert opens(visitor, "/safe")
    assert isinstance(visitor.get("/safe"), Response)
