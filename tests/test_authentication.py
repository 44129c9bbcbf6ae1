"""Each step of authentication gives a new token and ends the old one; a sign-out is for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flask_login
import flask_security
import pytest
from flask import Flask, flash, g, redirect, session
from flask_login import (
    LoginManager,
    confirm_login,
    current_user,
    fresh_login_required,
    login_user,
    logout_user,
)
from flask_security import Security
from flask_security.datastore import UserDatastore
from flask_wtf import CSRFProtect
from flask_wtf.csrf import generate_csrf

from flask_gsession import require_fresh
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor

Act = Callable[[Any], object]


class User(flask_login.UserMixin):  # type: ignore[misc]  # it ships no types
    """A user whose id is the name."""

    def __init__(self, name: str) -> None:
        self.id = name


def with_login(site: Site) -> Site:
    """The site with Flask-Login on it."""
    LoginManager(site.app).user_loader(User)
    vault = fresh_login_required(lambda: "the vault")
    site.app.add_url_rule("/vault", "vault", vault)
    return site


@pytest.fixture
def members(site: Site) -> Site:
    """An application with Flask-Login, on each store in turn."""
    return with_login(site)


@pytest.fixture
def one(store_prefix: str, clock: FakeClock) -> Iterator[Site]:
    """Like the other fixture, on the memory store, for code that doesn't depend on the store."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield with_login(make())


def who(visitor: Visitor) -> str | None:
    name: str | None = visitor.run(lambda session: current_user.get_id())
    return name


def remembered(site: Site) -> Visitor:
    """A visitor who signed in with "remember me"."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    visitor.run(lambda session: login_user(User("ada"), remember=True))
    assert who(visitor) == "ada"
    assert visitor.get_cookie("remember_token")
    return visitor


# Re-authentication --------------------------------------------------------------------------------


def test_confirming_a_password_ends_the_token_of_before(members: Site) -> None:
    """OWASP ASVS 5.0, 7.2.4: an attacker with a copy must not get into the new session."""
    visitor = remembered(members)
    visitor.delete_cookie("session")
    assert who(visitor) == "ada"
    thief = visitor.another_tab()
    assert visitor.get("/vault").status_code == 401
    with members.counted() as count:
        visitor.run(lambda session: confirm_login())
    assert count.calls == ["load", "replace", "load", "save"], "two of them of the user's roster"
    assert visitor.cookie != thief.cookie
    assert visitor.get("/vault").text == "the vault"
    assert thief.get("/vault").status_code == 401
    assert who(thief) is None


def test_a_confirmation_waits_for_no_grace(one: Site) -> None:
    visitor = remembered(one)
    thief = visitor.another_tab()

    def confirm(session: Any) -> None:
        session.rotate(grace=60)
        confirm_login()
        session.rotate(grace=60)

    visitor.run(confirm)
    assert who(visitor) == "ada"
    assert who(thief) is None


def test_a_confirmation_inside_a_lock_or_a_transaction(members: Site) -> None:
    for block in (lambda session: session.lock(), lambda session: session.transaction()):
        visitor = remembered(members)
        thief = visitor.another_tab()

        def confirm(session: Any, block: Any = block) -> None:
            with block(session):
                session["step"] = 2
                confirm_login()

        visitor.run(confirm)
        assert visitor.run(dict)["step"] == 2
        assert who(visitor) == "ada"
        assert who(thief) is None


# Old tokens ---------------------------------------------------------------------------------------


def with_an_old_token(site: Site) -> tuple[Visitor, Visitor]:
    """A remembered visitor, and a tab with the token from before a rotation."""
    visitor = remembered(site)
    tab = visitor.another_tab()
    remember = visitor.get_cookie("remember_token")
    assert remember is not None
    tab.set_cookie("remember_token", remember.value)
    visitor.run(lambda session: session.rotate(grace=60))
    visitor.delete_cookie("remember_token")
    assert who(tab) == "ada"
    return visitor, tab


def test_signing_in_as_the_same_user_with_an_old_token(members: Site) -> None:
    """It sets values that the other session also holds. The new session has them anyway."""
    for block in (None, lambda session: session.lock(), lambda session: session.transaction()):
        visitor, tab = with_an_old_token(members)
        old = tab.cookie

        def log_in(session: Any, block: Any = block) -> None:
            if block is None:
                login_user(User("ada"))
            else:
                with block(session):
                    login_user(User("ada"))

        tab.run(log_in)
        assert tab.cookie not in (old, visitor.cookie)
        tab.delete_cookie("remember_token")
        assert who(tab) == who(visitor) == "ada"
        assert "cart" not in tab.run(dict)
        assert visitor.run(dict)["cart"] == ["mug"]


def test_confirming_with_an_old_token_keeps_nobody_signed_in(members: Site) -> None:
    """Only the other session knows the user."""
    visitor, tab = with_an_old_token(members)
    tab.delete_cookie("remember_token")
    visitor.run(lambda session: session.update(_fresh=False))
    tab.run(lambda session: confirm_login())
    assert who(tab) is None
    assert who(visitor) == "ada"


def pop_all(session: Any) -> None:
    for key in list(session):
        session.pop(key)


def clear_in_a_lock(session: Any) -> None:
    with session.lock():
        session.clear()


@pytest.mark.parametrize("empty", [lambda session: session.clear(), pop_all, clear_in_a_lock])
@pytest.mark.parametrize("asks_before", [False, True])
def test_emptying_with_an_old_token_before_a_sign_out(
    members: Site, empty: Act, asks_before: bool
) -> None:
    """In between, Flask-Login signs in by the remember-me cookie; the sign-out ends it all."""
    visitor, tab = with_an_old_token(members)

    def log_out(session: Any) -> None:
        if asks_before:
            assert current_user.get_id() == "ada"
        empty(session)
        logout_user()

    tab.run(log_out)
    assert tab.cookie is None
    assert tab.get_cookie("remember_token") is None
    assert who(tab) is who(visitor) is None


# Sign-outs ----------------------------------------------------------------------------------------


def in_turn(*steps: Act) -> Act:
    return lambda session: [step(session) for step in steps]


def log_out(_: Any) -> None:
    logout_user()


def destroy(session: Any) -> None:
    session.destroy()


def clear(session: Any) -> None:
    session.clear()


def empty(session: Any) -> None:
    for key in list(session):
        del session[key]


SIGN_OUTS: dict[str, Act] = {
    "logout": log_out,
    "logout, destroy": in_turn(log_out, destroy),
    "destroy, logout": in_turn(destroy, log_out),
    "logout, clear": in_turn(log_out, clear),
    "clear, logout": in_turn(clear, log_out),
    "logout, remove every key": in_turn(log_out, empty),
    "logout, pop the note": in_turn(log_out, lambda session: session.pop("_remember")),
    "logout, destroy, flash": in_turn(log_out, destroy, lambda session: flash("Bye.")),
    "logout, destroy, write": in_turn(log_out, destroy, lambda session: session.update(a=1)),
    "logout, rotate": in_turn(log_out, lambda session: session.rotate(grace=0)),
    "destroy, logout, destroy": in_turn(destroy, log_out, destroy),
    "logout, destroy, look at the user": in_turn(
        log_out, destroy, lambda session: current_user.is_authenticated
    ),
    "logout, logout, destroy": in_turn(log_out, log_out, destroy),
    "look at the user, logout, destroy": in_turn(
        lambda session: current_user.get_id(), log_out, destroy
    ),
    "logout, destroy, redirect": lambda session: (
        in_turn(log_out, destroy)(session) and redirect("/untouched")
    ),
}


@pytest.mark.parametrize("refresh", [False, True], ids=["", "refreshed"])
@pytest.mark.parametrize("sign_out", SIGN_OUTS.values(), ids=SIGN_OUTS)
def test_a_sign_out_is_for_good_in_every_order(one: Site, sign_out: Act, refresh: bool) -> None:
    one.app.config["REMEMBER_COOKIE_REFRESH_EACH_REQUEST"] = refresh
    visitor = remembered(one)
    tab = visitor.another_tab()
    assert visitor.ask(sign_out).status_code in (200, 302)
    assert visitor.get_cookie("remember_token") is None
    assert who(visitor) is None
    assert who(tab) is None
    assert "_remember" not in visitor.run(dict)


@pytest.mark.parametrize("order", ["logout, destroy", "logout, clear", "destroy, logout"])
def test_a_sign_out_is_for_good_on_each_store(members: Site, order: str) -> None:
    visitor = remembered(members)
    with members.counted() as count:
        visitor.run(SIGN_OUTS[order])
    assert len(count.calls) <= 4, "two of them of the user's roster"
    assert who(visitor) is None
    assert members.sessions() == {}


@pytest.mark.parametrize("hook", ["before_request", "after_request"])
def test_a_sign_out_in_a_hook(one: Site, hook: str) -> None:
    wanted: list[bool] = []

    def sign_out(response: Any = None) -> Any:
        if wanted:
            wanted.clear()
            logout_user()
            session.destroy()  # type: ignore[attr-defined]
        return response

    getattr(one.app, hook)(sign_out)
    visitor = remembered(one)
    wanted.append(True)
    visitor.run(lambda session: None)
    assert visitor.get_cookie("remember_token") is None
    assert who(visitor) is None


def test_a_sign_out_whose_view_fails(one: Site) -> None:
    one.app.config["PROPAGATE_EXCEPTIONS"] = False
    visitor = remembered(one)
    fail: Act = lambda session: 1 // 0  # noqa: E731
    assert visitor.ask(in_turn(log_out, destroy, fail)).status_code == 500
    assert who(visitor) is None


def test_the_remember_me_cookie_has_the_attributes_of_its_settings(one: Site) -> None:
    one.app.config.update(
        REMEMBER_COOKIE_NAME="keep",
        REMEMBER_COOKIE_PATH="/do",
        REMEMBER_COOKIE_DOMAIN="localhost",
    )
    visitor = one.visitor()
    visitor.run(lambda session: login_user(User("ada"), remember=True))
    response = visitor.ask(in_turn(log_out, destroy))
    (line,) = [each for each in response.headers.getlist("Set-Cookie") if each.startswith("keep=")]
    assert line.startswith("keep=;")
    assert "Domain=localhost" in line
    assert "Path=/do" in line
    assert who(visitor) is None


@pytest.mark.parametrize("remember", [True, False])
def test_signing_in_as_another_user_after_a_sign_out(one: Site, remember: bool) -> None:
    def switch(session: Any) -> None:
        logout_user()
        session.destroy()
        login_user(User("bob"), remember=remember)

    visitor = remembered(one)
    response = visitor.ask(switch)
    lines = response.headers.getlist("Set-Cookie")
    assert len([line for line in lines if line.startswith("remember_token=")]) == 1
    assert (visitor.get_cookie("remember_token") is not None) is remember
    assert who(visitor) == "bob"
    visitor.delete_cookie("session")
    assert who(visitor) == ("bob" if remember else None)


def test_without_remember_me_no_cookie_of_it_is_deleted(one: Site) -> None:
    visitor = one.visitor()
    visitor.run(lambda session: login_user(User("ada")))
    response = visitor.ask(in_turn(log_out, destroy))
    assert len(response.headers.getlist("Set-Cookie")) == 1


def test_a_session_that_strong_protection_ends_takes_the_remember_me_cookie_along(
    one: Site,
) -> None:
    app: Any = one.app
    app.login_manager.session_protection = "strong"
    browser = {"User-Agent": "of the owner"}
    visitor = one.visitor()
    visitor.run(lambda session: login_user(User("ada"), remember=True), headers=browser)
    thief = {"User-Agent": "of the thief"}
    visitor.run(lambda session: (current_user.get_id(), session.clear()), headers=thief)
    assert visitor.get_cookie("remember_token") is None


# Flask-WTF's token --------------------------------------------------------------------------------


def post(visitor: Visitor, token: str) -> int:
    """The status of a POST with this CSRF token."""
    with visitor.site.visit(lambda session: None) as visit:
        return visitor.post(visit.path, headers={"X-CSRFToken": token}).status_code


def with_forms(site: Site) -> Site:
    CSRFProtect(site.app)
    return site


@pytest.mark.parametrize("field", ["csrf_token", "another_name"])
def test_a_csrf_token_may_end_at_a_sign_in(make_site: SiteMaker, field: str) -> None:
    config = {"WTF_CSRF_FIELD_NAME": field}
    site = with_forms(with_login(make_site(renew_csrf=True, config=config)))
    sign_in: Act = lambda session: login_user(User("ada"))  # noqa: E731
    for step in (sign_in, lambda session: confirm_login()):
        visitor = site.visitor()
        visitor.run(lambda session: login_user(User("ada")))
        planted = visitor.run(lambda session: generate_csrf())
        assert post(visitor, planted) == 200

        def view(session: Any, step: Act = step) -> Any:
            before = generate_csrf()
            step(session)
            assert field not in g
            return before, generate_csrf()

        before, after = visitor.run(view)
        assert post(visitor, planted) == 400
        assert post(visitor, before) == 400
        assert post(visitor, after) == 200


def test_a_csrf_token_outlives_a_sign_in_unless_that_is_set(one: Site) -> None:
    visitor = with_forms(one).visitor()
    token = visitor.run(lambda session: generate_csrf())
    visitor.run(lambda session: login_user(User("ada")))
    assert post(visitor, token) == 200


# Flask-Security -----------------------------------------------------------------------------------


class Account(flask_security.UserMixin):  # type: ignore[misc]  # it ships no types
    """A user of Flask-Security."""

    id = email = password = fs_uniquifier = username = us_phone_number = us_totp_secrets = None
    tf_primary_method = tf_totp_secret = tf_phone_number = None
    active = True

    def __init__(self, **values: Any) -> None:
        self.roles: list[Any] = []
        vars(self).update(values)


class Accounts(UserDatastore):  # type: ignore[misc]  # it ships no types
    """Accounts in memory."""

    def __init__(self) -> None:
        super().__init__(Account, object)
        self.accounts: list[Account] = []

    def put(self, model: Any) -> Any:
        if model not in self.accounts:
            self.accounts.append(model)
        return model

    def commit(self) -> None:
        """Nothing is to be done."""

    def find_user(self, case_insensitive: bool = False, **wanted: Any) -> Any:
        for account in self.accounts:
            if wanted.items() <= vars(account).items():
                return account
        return None


class Mails:
    """Keeps the codes that were sent."""

    codes: ClassVar[list[str]] = []

    def __init__(self, app: Flask) -> None: ...

    def send_mail(self, *_: Any, **values: Any) -> None:
        self.codes.append(values.get("token", ""))

    def validate(self, email: str) -> str:
        return email

    normalize = validate


LEGACY_FORMS = pytest.mark.filterwarnings("ignore:Passing SelectField:DeprecationWarning")
PASSWORD, CHANGED = "lovelace-1815", "lovelace-1852"
ADA = {"email": "ada@example.com", "password": PASSWORD}
HASHES = {"SECURITY_PASSWORD_HASH": "plaintext", "SECURITY_PASSWORD_SCHEMES": ["plaintext"]}
SECURITY = {
    **HASHES,
    "SECURITY_DEPRECATED_PASSWORD_SCHEMES": [],
    "SECURITY_HASHING_SCHEMES": ["hex_md5"],
    "SECURITY_PASSWORD_SALT": "salt",
    "SECURITY_CHANGEABLE": True,
    "SECURITY_SEND_PASSWORD_CHANGE_EMAIL": False,
    "SECURITY_UNIFIED_SIGNIN": True,
    "SECURITY_US_ENABLED_METHODS": ["password", "email"],
    "SECURITY_TWO_FACTOR": True,
    "SECURITY_TWO_FACTOR_ENABLED_METHODS": ["email"],
    "SECURITY_TWO_FACTOR_ALWAYS_VALIDATE": True,
    "SECURITY_TOTP_SECRETS": {"1": "a" * 32},
    "SECURITY_TOTP_ISSUER": "shop",
    "WTF_CSRF_ENABLED": False,
}


@pytest.fixture
def secure(make_site: SiteMaker) -> Site:
    """An application with Flask-Security, on each store in turn."""
    return with_security(make_site(config=SECURITY))


def with_security(site: Site) -> Site:
    """The site with Flask-Security, and an account for Ada."""
    accounts = Accounts()
    app: Any = site.app
    app.security = Security(app, accounts, mail_util_cls=Mails)
    with app.app_context():
        accounts.create_user(email=ADA["email"], password=flask_security.hash_password(PASSWORD))
    return site


def send(visitor: Visitor, path: str, **values: str) -> Any:
    """The answer of Flask-Security, in JSON, to a request that it grants."""
    response = visitor.post(path, json=values)
    assert response.status_code == 200, response.text
    return response.json["response"]  # type: ignore[index]


def rotates(visitor: Visitor, path: str, **values: str) -> Any:
    """The answer to a step of authentication; the token of before is over."""
    thief = visitor.another_tab()
    answer = send(visitor, path, **values)
    assert visitor.cookie != thief.cookie, path
    assert thief.run(dict) == {}, path
    assert visitor.run(dict)["cart"] == ["mug"], path
    return answer


@LEGACY_FORMS
def test_each_step_of_flask_security_ends_the_token_of_before(secure: Site) -> None:
    visitor = secure.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    rotates(visitor, "/login", **ADA)
    rotates(visitor, "/verify", password=PASSWORD)
    rotates(visitor, "/us-verify", passcode=PASSWORD)
    rotates(
        visitor, "/change", password=PASSWORD, new_password=CHANGED, new_password_confirm=CHANGED
    )
    rotates(visitor, "/verify", password=CHANGED)

    state = send(visitor, "/tf-setup", setup="email")["tf_state_token"]
    send(visitor, f"/tf-setup/{state}", code=Mails.codes[-1])
    send(visitor, "/logout")
    assert rotates(visitor, "/login", email=ADA["email"], password=CHANGED)["tf_required"]
    rotates(visitor, "/tf-validate", code=Mails.codes[-1])
    assert visitor.run(lambda session: current_user.email) == ADA["email"]
    send(visitor, "/logout")
    visitor.run(lambda session: session.update(cart=["mug"]))
    assert rotates(visitor, "/us-signin", identity=ADA["email"], passcode=CHANGED)["tf_required"]


@LEGACY_FORMS
def test_a_step_of_flask_security_is_a_confirmation(make_site: SiteMaker) -> None:
    site = make_site(config={**SECURITY, "SECURITY_TWO_FACTOR": False})
    site.app.add_url_rule("/vault", "vault", require_fresh()(lambda: "open"))
    visitor = with_security(site).visitor()
    send(visitor, "/login", **ADA)
    assert visitor.get("/vault").text == "open"
    site.clock.advance(601)
    assert visitor.get("/vault").status_code == 401
    send(visitor, "/verify", password=PASSWORD)
    assert visitor.get("/vault").text == "open"
    visitor.run(lambda session: session.confirm("passkey"))
    send(visitor, "/verify", password=PASSWORD)
    assert visitor.run(lambda session: session.confirmed_at("passkey")) is not None


@LEGACY_FORMS
def test_flask_security_binds_the_session_to_its_user(secure: Site) -> None:
    visitor, other = secure.visitor(), secure.visitor()
    for each in (visitor, other):
        send(each, "/login", **ADA)
    uniquifier, owner, device = visitor.run(
        lambda session: (current_user.fs_uniquifier, session.owner, session.device_id)
    )
    assert owner == uniquifier
    send(visitor, "/verify", password=PASSWORD)
    assert visitor.run(lambda session: session.device_id) == device
    with secure.app.app_context():
        assert len(secure.ext.users.devices(owner)) == 2
    send(visitor, "/logout")
    assert visitor.run(lambda session: session.owner) is None
    with secure.app.app_context():
        assert secure.ext.users.revoke_all(owner) == 1
    assert other.run(lambda session: session.owner) is None


@LEGACY_FORMS
def test_other_requests_of_flask_security_keep_the_token(secure: Site) -> None:
    visitor = secure.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    send(visitor, "/login", **ADA)
    token = visitor.cookie
    assert visitor.post("/verify", json={"password": "wrong"}).status_code == 400
    for path in ("/verify", "/login", "/us-setup"):
        visitor.get(path, headers={"Accept": "application/json"})
    visitor.run(lambda session: session.update(step=1))
    assert visitor.cookie == token
    tab = visitor.another_tab()
    send(visitor, "/logout")
    assert tab.run(dict)["cart"] == ["mug"], "a sign-out that destroys nothing rotates nothing"


@LEGACY_FORMS
def test_a_sign_out_of_flask_security_is_for_good(secure: Site) -> None:
    """With its remember-me cookie, also where the application destroys the session."""
    for end in (lambda session: None, destroy, clear):
        visitor = secure.visitor()
        send(visitor, "/login", **ADA, remember="true")
        assert visitor.get_cookie("remember_token")
        visitor.run(in_turn(lambda session: flask_security.logout_user(), end))
        assert visitor.get_cookie("remember_token") is None
        assert not visitor.run(lambda session: current_user.is_authenticated)
