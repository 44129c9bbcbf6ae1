"""Libraries on top of `flask.session`: Flask-Login, Flask-WTF, flash, Authlib."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from flask import (
    flash,
    get_flashed_messages,
    redirect,
    render_template_string,
    url_for,
)
from flask import session as flask_session
from flask_login import (
    FlaskLoginClient,
    LoginManager,
    UserMixin,
    confirm_login,
    current_user,
    fresh_login_required,
    login_required,
    login_user,
    logout_user,
)
from flask_wtf import CSRFProtect, FlaskForm
from flask_wtf.csrf import generate_csrf
from markupsafe import Markup
from wtforms import StringField
from wtforms.validators import DataRequired

from flask_gsession.events import SessionRotated
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor


def whole(session: Any) -> dict[str, Any]:
    copy: dict[str, Any] = session.copy()
    return copy


@pytest.fixture
def one(store_prefix: str, clock: FakeClock) -> Any:
    """An application on the memory store, for code that doesn't depend on the store."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield make()


# Flask-Login --------------------------------------------------------------------------------------


class User(UserMixin):
    """A user whose id is the name."""

    def __init__(self, name: str) -> None:
        self.id = name


def with_login(site: Site) -> Site:
    """The site with Flask-Login on it."""
    manager = LoginManager(site.app)
    manager.user_loader(User)

    @site.app.get("/members")
    @login_required
    def members() -> Any:
        return current_user.id

    @site.app.get("/vault")
    @fresh_login_required
    def vault() -> Any:
        return current_user.id

    return site


@pytest.fixture
def members(site: Site) -> Site:
    """An application with Flask-Login, on each store in turn."""
    return with_login(site)


@pytest.fixture
def one_with_login(one: Site) -> Site:
    """An application with Flask-Login, on the memory store."""
    return with_login(one)


def who(visitor: Visitor, **options: Any) -> str | None:
    """The name of the user whom Flask-Login sees."""
    name: str | None = visitor.run(lambda session: current_user.get_id(), **options)
    return name


def log_in(visitor: Visitor, name: str, **options: Any) -> None:
    visitor.run(lambda session: login_user(User(name), **options))


def test_a_login_ends_the_token_of_before_at_once(members: Site) -> None:
    """Whoever planted the token must not share the session of the user: session fixation."""
    visitor = members.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    planted, old = visitor.another_tab(), visitor.cookie
    log_in(visitor, "alice")
    assert visitor.cookie not in (None, old)
    assert who(visitor) == "alice"
    assert visitor.run(whole)["cart"] == ["mug"]
    assert who(planted) is None
    assert planted.run(whole) == {}
    assert len(members.sessions()) == 1, "not even a pointer is left"


def test_a_login_costs_four_round_trips(members: Site) -> None:
    visitor = members.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    with members.counted() as count:
        log_in(visitor, "alice")
    assert count.calls == ["load", "load", "replace", "create"], "two of them of the user's roster"
    assert len(members.happened(SessionRotated)) == 1


def test_a_login_without_a_session_starts_one(members: Site) -> None:
    visitor = members.visitor()
    assert visitor.get("/members").status_code == 401
    with members.counted() as count:
        log_in(visitor, "alice")
    assert count.calls == ["load", "create", "create"]
    assert visitor.get("/members").text == "alice"
    assert visitor.get("/vault").text == "alice"


def test_a_login_waits_for_no_grace(store_prefix: str, clock: FakeClock) -> None:
    """Whatever the setting is, or a rotation earlier in the request asked for."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        site = with_login(make(rotation_grace=60))
        visitor = site.visitor()
        visitor.run(lambda session: session.update(cart=["mug"]))
        planted = visitor.another_tab()

        def rotate_and_log_in(session: Any) -> None:
            session.rotate(grace=60)
            login_user(User("alice"))
            session.rotate(grace=60)

        visitor.run(rotate_and_log_in)
        assert who(visitor) == "alice"
        assert planted.run(whole) == {}


def test_a_second_user_gets_a_token_of_their_own(members: Site) -> None:
    visitor = members.visitor()
    log_in(visitor, "alice")
    alice = visitor.another_tab()
    log_in(visitor, "bob")
    assert who(visitor) == "bob"
    assert who(alice) is None
    assert alice.get("/members").status_code == 401


def test_logout_keeps_values_of_the_visitor(members: Site) -> None:
    """Flask-Login removes its own keys; the cart is the application's business."""
    visitor = members.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    log_in(visitor, "alice")
    tab = visitor.another_tab()
    visitor.run(lambda session: logout_user())
    for each in (visitor, tab):
        assert who(each) is None
        assert each.run(lambda session: session["cart"]) == ["mug"]
        assert each.get("/members").status_code == 401


def test_logout_with_destroy_ends_everything(members: Site) -> None:
    visitor = members.visitor()
    visitor.run(lambda session: session.update(cart=["mug"]))
    log_in(visitor, "alice")
    tab = visitor.another_tab()
    visitor.run(lambda session: (logout_user(), session.destroy()))
    assert visitor.cookie is None
    assert who(tab) is None
    assert members.sessions() == {}


def test_remember_me_starts_a_new_session(members: Site) -> None:
    visitor = members.visitor()
    log_in(visitor, "alice", remember=True)
    assert visitor.get("/vault").text == "alice"
    before = visitor.cookie
    visitor.delete_cookie("session")  # the browser was closed
    assert visitor.get("/members").text == "alice"
    assert visitor.cookie not in (None, before)
    assert visitor.run(whole)["_user_id"] == "alice"
    with members.counted() as count:
        visitor.get("/members")
    assert count.calls == ["load"], "from now on, the session says who it is"

    # Remembered is not fresh.
    assert visitor.get("/vault").status_code == 401
    visitor.run(lambda session: confirm_login())
    assert visitor.get("/vault").text == "alice"

    visitor.run(lambda session: logout_user())
    assert visitor.get_cookie("remember_token") is None
    visitor.delete_cookie("session")
    assert who(visitor) is None


def test_remember_me_ends_the_token_of_before_at_once(members: Site) -> None:
    """It is a login as well: an anonymous session becomes a user's."""
    visitor = members.visitor()
    log_in(visitor, "alice", remember=True)
    remember = visitor.get_cookie("remember_token")
    assert remember is not None
    stranger = members.visitor()
    stranger.run(lambda session: session.update(cart=["planted"]))
    planted = stranger.another_tab()
    stranger.set_cookie("remember_token", remember.value)
    assert who(stranger) == "alice"
    assert who(planted) is None
    assert planted.run(whole) == {}


def test_a_login_inside_a_transaction(members: Site) -> None:
    """As by the remember-me cookie, where a view that is one looks at its user."""
    visitor = members.visitor()
    log_in(visitor, "alice", remember=True)
    remember = visitor.get_cookie("remember_token")
    assert remember is not None

    def view(session: Any) -> Any:
        with session.transaction():
            session["seen"] = current_user.get_id()
        return session["seen"]

    fresh = members.visitor()
    known = members.visitor()
    known.run(lambda session: session.update(cart=[]))
    planted = known.another_tab()
    for visitor in (fresh, known):
        visitor.set_cookie("remember_token", remember.value)
        assert visitor.run(view) == "alice"
        visitor.delete_cookie("remember_token")
        assert who(visitor) == "alice"
    assert planted.run(whole) == {}


def test_a_login_inside_a_transaction_that_fails(members: Site) -> None:
    visitor = members.visitor()
    visitor.run(lambda session: session.update(a=1))
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        with suppress(ZeroDivisionError), session.transaction():
            login_user(User("alice"))
            session["a"] = 1 // 0

    visitor.run(view)
    assert tab.run(dict) == visitor.run(dict)
    assert visitor.run(dict)["a"] == 1
    assert visitor.cookie == tab.cookie


def test_a_stolen_cookie_in_another_browser(one_with_login: Site) -> None:
    """Flask-Login's strong session protection."""
    app: Any = one_with_login.app
    app.login_manager.session_protection = "strong"
    visitor = one_with_login.visitor()
    browser = {"User-Agent": "of the owner"}
    visitor.run(lambda session: login_user(User("alice")), headers=browser)
    assert who(visitor, headers=browser) == "alice"
    assert who(visitor.another_tab(), headers={"User-Agent": "of the thief"}) is None


def test_a_password_change_rotates(one_with_login: Site) -> None:
    """Flask-Login has no signal for it; the application says so itself."""
    visitor = one_with_login.visitor()
    log_in(visitor, "alice")
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate(grace=0))
    assert who(visitor) == "alice"
    assert who(tab) is None


def test_the_login_signal_of_one_application_is_not_for_another(
    store_prefix: str, clock: FakeClock
) -> None:
    with SiteMaker("memory://", store_prefix, clock) as make:
        here, there = with_login(make()), with_login(make())
        visitor = here.visitor()
        visitor.run(lambda session: session.update(cart=["mug"]))
        other = there.visitor()
        other.run(lambda session: session.update(cart=["cup"]))
        cookie = other.cookie
        log_in(visitor, "alice")
        assert len(here.happened(SessionRotated)) == 1
        assert not there.happened(SessionRotated)
        assert other.cookie == cookie
        assert other.run(whole) == {"cart": ["cup"]}


def test_flask_logins_own_test_client(one_with_login: Site) -> None:
    """It writes the login into the session by `session_transaction`."""
    app: Any = one_with_login.app
    app.login_manager.session_protection = None  # with it, no such login is ever fresh
    app.test_client_class = FlaskLoginClient
    assert app.test_client(user=User("alice")).get("/vault").text == "alice"
    stale = app.test_client(user=User("alice"), fresh_login=False)
    assert stale.get("/members").text == "alice"
    assert stale.get("/vault").status_code == 401
    assert app.test_client().get("/members").status_code == 401


def test_session_transaction_sees_and_makes_a_login(members: Site) -> None:
    visitor = members.visitor()
    with visitor.session_transaction() as session:
        session["_user_id"] = "alice"
        session["_fresh"] = True
    assert visitor.get("/members").text == "alice"
    with visitor.session_transaction() as session:
        assert session["_user_id"] == "alice"
        del session["_user_id"]
    assert visitor.get("/members").status_code == 401


# Flask-WTF ----------------------------------------------------------------------------------------


class NameForm(FlaskForm):
    """A form with one field, and the hidden one of Flask-WTF."""

    name = StringField(validators=[DataRequired()])


def with_forms(site: Site) -> Site:
    """The site with a form that validates itself, and with every POST protected."""
    CSRFProtect(site.app)

    @site.app.route("/form", methods=["GET", "POST"])
    def form() -> Any:
        form = NameForm()
        if form.validate_on_submit():
            flask_session["name"] = form.name.data
            return "saved"
        return (form.errors, 422) if form.is_submitted() else form.csrf_token.current_token

    @site.app.get("/token")
    def token() -> Any:
        return generate_csrf()

    @site.app.post("/post")
    def post() -> str:
        return "done"

    return site


@pytest.fixture
def forms(site: Site) -> Site:
    """An application with Flask-WTF, on each store in turn."""
    return with_forms(site)


@pytest.fixture
def one_with_forms(one: Site) -> Site:
    """An application with Flask-WTF, on the memory store."""
    return with_forms(one)


def post(visitor: Visitor, token: str | None) -> int:
    """The status of a POST with this token in the header."""
    headers = {} if token is None else {"X-CSRFToken": token}
    return visitor.post("/post", headers=headers).status_code


def test_a_form_with_its_token(forms: Site) -> None:
    visitor = forms.visitor()
    token = visitor.get("/form").text
    assert visitor.cookie is not None, "the token alone is worth a session"
    response = visitor.post("/form", data={"csrf_token": token, "name": "alice"})
    assert response.text == "saved"
    assert visitor.run(whole)["name"] == "alice"
    # The token stays the same for the session: several tabs, the back button.
    assert visitor.post("/form", data={"csrf_token": token, "name": "bob"}).text == "saved"
    assert visitor.post("/form", data={"csrf_token": token, "name": ""}).status_code == 422


def test_csrf_protection_of_every_post(forms: Site) -> None:
    visitor = forms.visitor()
    token = visitor.get("/token").text
    assert post(visitor, token) == 200
    assert post(visitor, None) == 400
    assert post(visitor, token[:-1]) == 400
    assert visitor.post("/form", data={"name": "alice"}).status_code == 400
    stranger = forms.visitor()
    assert post(stranger, token) == 400
    stranger.get("/token")
    assert post(stranger, token) == 400


def test_a_csrf_token_outlives_a_rotation_but_not_the_session(one_with_forms: Site) -> None:
    visitor = one_with_forms.visitor()
    token = visitor.get("/token").text
    visitor.run(lambda session: session.rotate())
    assert post(visitor, token) == 200
    visitor.run(lambda session: session.destroy())
    assert post(visitor, token) == 400
    assert post(visitor, visitor.get("/token").text) == 200


def test_a_csrf_token_outlives_a_login(one_with_forms: Site) -> None:
    """A form that was open in another tab still works."""
    visitor = with_login(one_with_forms).visitor()
    token = visitor.get("/token").text
    old = visitor.cookie
    log_in(visitor, "alice")
    assert visitor.cookie != old
    assert post(visitor, token) == 200


def test_a_csrf_token_put_in_by_session_transaction(one_with_forms: Site) -> None:
    """As tests of applications do."""
    visitor = one_with_forms.visitor()
    token = visitor.get("/token").text
    with visitor.session_transaction() as session:
        raw = session["csrf_token"]
    other = one_with_forms.visitor()
    with other.session_transaction() as session:
        session["csrf_token"] = raw
    assert post(other, token) == 200


def test_forms_opened_in_parallel_share_one_token(forms: Site) -> None:
    """Two tabs ask for their first form at once: the later token wins, and both see the same."""
    visitor = forms.visitor()
    visitor.run(lambda session: session.update(user="alice"))
    tab = visitor.another_tab()
    forms.before_a_write(lambda: tab.get("/token"))
    visitor.get("/token")
    assert post(tab, visitor.get("/token").text) == 200
    assert post(visitor, tab.get("/token").text) == 200


# flash --------------------------------------------------------------------------------------------


def test_a_message_across_a_redirect(site: Site) -> None:
    def save(session: Any) -> Any:
        flash("Saved.")
        return redirect("/")

    visitor = site.visitor()
    assert visitor.ask(save).status_code == 302
    assert visitor.run(lambda session: get_flashed_messages()) == ["Saved."]
    assert visitor.run(lambda session: get_flashed_messages()) == []


def test_categories(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: (flash("Saved."), flash("No stock.", "error")))
    visitor.run(lambda session: flash("Hello.", "info"))
    expected = [("message", "Saved."), ("error", "No stock."), ("info", "Hello.")]
    messages = visitor.run(lambda session: get_flashed_messages(with_categories=True))
    assert messages == expected
    assert all(type(message) is tuple for message in messages)

    visitor.run(lambda session: [flash(text, category) for category, text in expected])
    only = visitor.run(lambda session: get_flashed_messages(category_filter=["error", "info"]))
    assert only == ["No stock.", "Hello."]
    # Flask takes all of them out, whatever the filter.
    assert visitor.run(lambda session: get_flashed_messages()) == []


def test_a_message_of_markup_stays_markup(site: Site) -> None:
    """A message of plain text is escaped, as it was before it went through the session."""
    visitor = site.visitor()
    visitor.run(lambda session: (flash(Markup("<b>Saved</b>")), flash("<script>")))
    page = "{% for message in get_flashed_messages() %}{{ message }} {% endfor %}"
    text = visitor.run(lambda session: render_template_string(page))
    assert text == "<b>Saved</b> &lt;script&gt; "


def test_a_message_after_a_logout(site: Site) -> None:
    """It starts a new session that holds nothing else."""
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="alice"))
    tab, old = visitor.another_tab(), visitor.cookie

    def log_out(session: Any) -> None:
        session.destroy()
        flash("See you.", "info")

    visitor.run(log_out)
    assert visitor.cookie not in (None, old)
    assert visitor.run(whole) == {"_flashes": [("info", "See you.")]}
    assert visitor.run(lambda session: get_flashed_messages()) == ["See you."]
    assert tab.run(whole) == {}


def test_messages_of_parallel_requests_can_all_survive(make_site: SiteMaker) -> None:
    """With the policy for lists that only grow."""
    site = make_site(merge_policies={"_flashes": "append"})
    visitor = site.visitor()
    visitor.run(lambda session: flash("first"))
    tab = visitor.another_tab()
    site.before_a_write(lambda: tab.run(lambda session: flash("of the tab")))
    visitor.run(lambda session: flash("mine"))
    messages = visitor.run(lambda session: get_flashed_messages())
    assert messages == ["first", "of the tab", "mine"]


def test_messages_by_session_transaction(one: Site) -> None:
    visitor = one.visitor()
    with visitor.session_transaction() as session:
        session["_flashes"] = [("info", "from a test")]
    assert visitor.run(lambda session: get_flashed_messages()) == ["from a test"]
    visitor.run(lambda session: flash("from the application"))
    with visitor.session_transaction() as session:
        assert session["_flashes"] == [("message", "from the application")]


# All of them in one application -------------------------------------------------------------------


def test_log_in_by_a_form_with_a_message(forms: Site) -> None:
    """The way through a login page: token, rotation, message, logout."""
    visitor = with_login(forms).visitor()
    token = visitor.get("/form").text
    anonymous = visitor.another_tab()

    def log_in_and_greet(session: Any) -> Any:
        form = NameForm()
        assert form.validate_on_submit()
        login_user(User(form.name.data))
        flash(f"Welcome, {form.name.data}.", "info")
        return redirect("/members")

    data = {"csrf_token": token, "name": "alice"}
    options: dict[str, Any] = {"method": "POST", "data": data, "follow_redirects": True}
    assert visitor.ask(log_in_and_greet, **options).text == "alice"
    assert visitor.run(lambda session: get_flashed_messages()) == ["Welcome, alice."]
    assert who(anonymous) is None
    assert post(anonymous, token) == 400, "the old token leads to no session, so to no CSRF token"
    assert post(visitor, token) == 200
    visitor.run(lambda session: (logout_user(), session.destroy(), flash("Bye.")))
    assert visitor.run(whole) == {"_flashes": [("message", "Bye.")]}
    assert visitor.get("/members").status_code == 401


# Authlib ------------------------------------------------------------------------------------------


def with_oauth(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put an OAuth 2 login with PKCE on the site. Returns the requests to its token page."""
    flask_client = pytest.importorskip("authlib.integrations.flask_client")
    requests = pytest.importorskip("requests")
    sent: list[dict[str, Any]] = []

    def answer(self: Any, method: str, url: str, **options: Any) -> Any:
        body = options["data"]
        sent.append(
            body if isinstance(body, dict) else {k: v[0] for k, v in parse_qs(body).items()}
        )
        response = requests.Response()
        response.status_code = 200
        response._content = b'{"access_token": "secret", "token_type": "Bearer"}'
        return response

    monkeypatch.setattr(requests.Session, "request", answer)
    client = flask_client.OAuth(site.app).register(
        "provider",
        client_id="shop",
        client_secret="shop's",
        authorize_url="https://provider.example/authorize",
        access_token_url="https://provider.example/token",
        client_kwargs={"code_challenge_method": "S256"},
    )

    @site.app.get("/leave")
    def leave() -> Any:
        return client.authorize_redirect(url_for("come_back", _external=True))

    @site.app.get("/come-back")
    def come_back() -> str:
        flask_session["access"] = client.authorize_access_token()["access_token"]
        return "in"

    return sent


def test_an_oauth_login_with_authlib(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds its login state again when the user comes back, once."""
    sent = with_oauth(site, monkeypatch)
    visitor = site.visitor()
    query = parse_qs(urlsplit(visitor.get("/leave").location).query)
    (state,) = query["state"]
    (key,) = visitor.run(whole)
    assert state in key

    stranger = site.visitor()
    stranger.run(lambda session: session.update(user="mallory"))
    coming_back = {"state": state, "code": "of the provider"}
    site.app.testing = False
    assert stranger.get("/come-back", query_string=coming_back).status_code == 500
    assert not sent

    assert visitor.get("/come-back", query_string=coming_back).text == "in"
    assert sent[0]["code_verifier"]
    assert visitor.run(whole) == {"access": "secret"}
    assert visitor.get("/come-back", query_string=coming_back).status_code == 500
    assert len(sent) == 1
