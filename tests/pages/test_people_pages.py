"""The pages of users and administrators: the sessions each may see and end, on each store."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, abort, session
from flask_login import LoginManager, UserMixin
from flask_wtf import CSRFProtect
from jinja2 import DictLoader
from werkzeug.test import TestResponse

from flask_gsession import Session, SettingError
from flask_gsession.events import DeviceRevoked
from flask_gsession.pages.admin import admin_blueprint
from flask_gsession.pages.devices import devices_blueprint
from flask_gsession.stores.memory import MemoryStore
from tests.harness.apps import Site, SiteMaker, Visitor

NAMES = {"ada": "Firefox on Windows", "iPhone": "Safari on iPhone"}
FIREFOX = "Mozilla/5.0 (Windows NT 10.0; rv:128.0) Gecko/20100101 Firefox/128.0"
HTML = {"Accept": "text/html"}


def with_pages(site: Site, **settings: Any) -> Site:
    """The site with both sets of pages; eve is the administrator."""
    site.app.register_blueprint(devices_blueprint(site.ext, **settings))
    site.app.register_blueprint(admin_blueprint(lambda: session.get("staff") is True, site.ext))
    return site


@pytest.fixture
def pages(site: Site) -> Site:
    return with_pages(site)


@pytest.fixture
def one(store_prefix: str, clock: Any) -> Any:
    """Like the other fixture, on the memory store, for code that doesn't depend on the store."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield make


def signed_in(site: Site, user: str = "ada", agent: str = FIREFOX, **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.environ_base["HTTP_USER_AGENT"] = agent
    visitor.run(lambda session: (session.update(values), session.bind(user)))
    return visitor


def device_of(visitor: Visitor) -> str:
    return str(visitor.run(lambda session: session.device_id))


def owner(visitor: Visitor) -> Any:
    return visitor.run(lambda session: session.owner)


def hidden(page: TestResponse) -> dict[str, str]:
    assert page.status_code == 200, page.text
    fields = re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', page.text)
    return {name: unescape(value) for name, value in fields}


def send(visitor: Visitor, path: str, **values: str) -> TestResponse:
    """Open a page that asks, and answer its form."""
    return visitor.post(path.partition("?")[0], data=hidden(visitor.get(path)) | values)


# Your devices -------------------------------------------------------------------------------------


def test_a_user_sees_and_ends_devices(pages: Site) -> None:
    desk, phone, tablet = (signed_in(pages) for _ in range(3))
    bob = signed_in(pages, "bob")
    with pages.counted() as count:
        page = desk.get("/devices")
    assert count.calls == ["load", "load"], "the session, and the list"
    assert page.text.count("Firefox on Windows") == 5
    assert page.text.count("This device") == 1
    assert "127.0.0.0/24" in page.text
    assert device_of(bob) not in page.text
    assert page.headers["Cache-Control"] == "no-store"
    assert page.headers["X-Frame-Options"] == "DENY"
    answer = send(desk, f"/devices/{device_of(phone)}/end")
    assert (answer.status_code, answer.location) == (303, "/devices")
    assert "Firefox on Windows is signed out." in desk.get("/devices").text
    assert [owner(each) for each in (desk, phone, tablet)] == ["ada", None, "ada"]
    assert send(desk, "/devices/end-others").status_code == 303
    assert [owner(each) for each in (desk, tablet, bob)] == ["ada", None, "bob"]
    assert "You aren't signed in anywhere else." in desk.get("/devices").text
    ended = pages.happened(DeviceRevoked)
    assert [(each.user_id, each.by, each.reason) for each in ended] == [
        ("ada", "ada", "by the user")
    ] * 2


def test_nothing_ends_without_the_form_of_this_session(pages: Site) -> None:
    desk, phone, bob = signed_in(pages), signed_in(pages), signed_in(pages, "bob")
    end, others = f"/devices/{device_of(phone)}/end", "/devices/end-others"
    form = hidden(desk.get(others))
    theirs = hidden(bob.get(others))
    salt, _, signature = form["gsession_token"].partition(".")
    wrong = [
        {"gsession_token": ""},
        {"gsession_token": "ä.\x00"},
        {"gsession_token": f"x{salt}.{signature}"},
        {"gsession_token": f"{salt}."},
        {"gsession_token": "x" * 100_000},
        theirs,
    ]
    for path in (end, others):
        for fields in wrong:
            page = desk.post(path, data=fields)
            assert (page.status_code, "out of date" in page.text) == (400, True)
        for options in ({"json": form}, {"data": "x", "content_type": "text/plain"}, {}):
            assert desk.post(path, **options).status_code == 415  # type: ignore[arg-type]
    foreign, unknown = f"/devices/{device_of(bob)}/end", "/devices/nobody's/end"
    for path in (foreign, unknown):
        for page in (desk.get(path), desk.post(path, data=form)):
            assert (page.status_code, "not signed in to your account" in page.text) == (404, True)
    own = f"/devices/{device_of(desk)}/end"
    assert desk.get(own).status_code == desk.post(own, data=form).status_code == 409
    assert desk.get(f"/devices/{device_of(phone)}").status_code == 404
    assert [owner(each) for each in (desk, phone, bob)] == ["ada", "ada", "bob"]
    # Rotations keep the forms of open pages, a new key does too while the old one is a fallback.
    desk.run(lambda session: session.rotate(grace=0))
    pages.app.secret_key, old = "another key", pages.app.secret_key
    pages.app.config["SECRET_KEY_FALLBACKS"] = [old]
    assert desk.post(end, data=form).status_code == 303
    pages.app.config["SECRET_KEY_FALLBACKS"] = []
    desk.set_cookie("session", str(signed_in(pages).cookie))
    assert desk.post(others, data=form).status_code == 400, "of a session that has another device"


def test_a_stale_user_confirms_first(make_site: SiteMaker) -> None:
    site = make_site(confirm_view="ask")
    site.app.add_url_rule("/ask", "ask", lambda: "password?")
    with_pages(site, minutes=5)
    desk, phone = signed_in(site), signed_in(site)
    end = f"/devices/{device_of(phone)}/end"
    form = hidden(desk.get(end))
    site.clock.advance(301)
    assert desk.get("/devices").status_code == 200
    for path in (end, "/devices/end-others"):
        assert desk.get(path, headers=HTML).location == f"/ask?next={path}"
        back = {**HTML, "Referer": f"http://localhost{path}"}
        assert desk.post(path, data=form, headers=back).location == f"/ask?next={path}"
        assert desk.post(path, data=form).status_code == 401, "a script"
    assert owner(phone) == "ada"
    desk.run(lambda session: session.confirm())
    assert desk.post(end, data=form).status_code == 303
    assert owner(phone) is None


def test_visitors_are_sent_to_the_sign_in(one: SiteMaker) -> None:
    site = with_pages(one())
    assert site.visitor().get("/devices").status_code == 401
    assert site.visitor().post("/devices/end-others").status_code == 401
    with site.visitor().get("/devices/static/pages.css") as style:
        assert (style.status_code, "Vary" in style.headers) == (200, False)
    site = with_pages(one(), sign_in_view="enter")
    site.app.add_url_rule("/enter", "enter", lambda: "")
    assert site.visitor().get("/devices?a=b").location == "/enter?next=/devices?a%3Db"
    assert site.visitor().post("/devices/x/end").location == "/enter?next=/devices"
    site = with_pages(one())
    manager = LoginManager(site.app)
    manager.user_loader(lambda name: UserMixin())
    manager.unauthorized_handler(lambda: Response("sign in", 401))
    assert site.visitor().get("/devices").text == "sign in"


def test_below_a_prefix_and_another_blueprint(one: SiteMaker) -> None:
    site = one()
    parent = Blueprint("parent", __name__, url_prefix="/account")
    parent.register_blueprint(devices_blueprint(site.ext, sign_in_view="enter"))
    site.app.register_blueprint(parent)
    site.app.add_url_rule("/enter", "enter", lambda: "")
    below = {"base_url": "http://localhost/shop"}
    assert site.visitor().get("/account/devices", **below).location == (  # type: ignore[arg-type]
        "/shop/enter?next=/shop/account/devices"
    )
    desk, phone = signed_in(site, "a/b?c&d=<e>"), signed_in(site, "a/b?c&d=<e>")
    assert "/account/devices/static/pages.css" in desk.get("/account/devices").text
    with desk.get("/account/devices/static/pages.css") as style:
        assert "no-store" not in style.headers["Cache-Control"]
    assert send(desk, f"/account/devices/{device_of(phone)}/end").location == "/account/devices"
    assert owner(phone) is None


def test_beside_flask_wtf(one: SiteMaker) -> None:
    site = one(config={"WTF_CSRF_FIELD_NAME": "wtf"})
    CSRFProtect(site.app)
    with_pages(site)
    desk, phone = signed_in(site), signed_in(site)
    end = f"/devices/{device_of(phone)}/end"
    form = hidden(desk.get(end))
    assert form.keys() == {"gsession_token", "wtf"}
    for missing in form:
        assert desk.post(end, data={missing: form[missing]}).status_code == 400
    assert desk.post(end, data=form).status_code == 303
    assert owner(phone) is None


def test_an_outage_ends_nothing_by_halves(one: SiteMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    from flask_gsession import StoreUnavailable

    site = with_pages(one(breaker_failures=0))
    desk, phone = signed_in(site), signed_in(site)
    end = f"/devices/{device_of(phone)}/end"
    form = hidden(desk.get(end))

    def down(*arguments: Any, **more: Any) -> Any:
        raise StoreUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(site.store, "delete", down)
        page = desk.post(end, data=form)
    assert page.status_code == 503
    assert "Retry-After" in page.headers
    assert device_of(phone) not in desk.get("/devices").text, "marked as ending"
    assert desk.post(end, data=form).status_code == 303, "safe to repeat"
    assert owner(phone) is None
    assert desk.post(end, data=form).status_code == 404


def test_a_further_session_and_a_layout_of_your_own(one: SiteMaker) -> None:
    site = one()
    other = Session(site.app, cookie_name="staff", store=MemoryStore(), clock=site.clock)
    loader: Any = site.app.jinja_env
    layout = "<title>{% block title %}{% endblock %}</title>{% block content %}{% endblock %} ours"
    loader.globals["layout"] = loader.from_string(layout)
    site.app.register_blueprint(devices_blueprint(other, base=loader.globals["layout"]))
    visitor = site.visitor()
    visitor.run(lambda session: other.session.bind("eve"))
    own = {"gsession/facts.html": "known here: {{ device.network }}"}
    site.app.jinja_loader = DictLoader(own)
    page = visitor.get("/devices")
    assert page.text.endswith("ours")
    assert "known here: 127.0.0.0/24" in page.text
    assert "pages.css" not in page.text
    assert page.text.count("This device") == 1
    assert site.visitor().get("/devices").status_code == 401


# Administrators -----------------------------------------------------------------------------------


def test_an_administrator_finds_and_ends_sessions(
    pages: Site, caplog: pytest.LogCaptureFixture
) -> None:
    eve = signed_in(pages, "eve", staff=True)
    desk, phone, bob = signed_in(pages), signed_in(pages), signed_in(pages, "bob")
    assert "2 sessions of" in eve.get("/admin/sessions?user=ada").text
    strange = signed_in(pages, "a/b?c&d=<e>")
    found = eve.get("/admin/sessions", query_string={"user": "a/b?c&d=<e>"})
    (end,) = re.findall(r'href="(/admin/sessions/end\?[^"]+)"', found.text)
    assert send(eve, unescape(end)).status_code == 303
    assert owner(strange) is None
    assert "Nobody is signed in" in eve.get("/admin/sessions?user=nobody").text
    with caplog.at_level("INFO", "flask_gsession.audit"):
        path = f"/admin/sessions/end?user=ada&device={device_of(phone)}"
        answer = send(eve, path, reason=" lost\n phone ")
        assert answer.location == "/admin/sessions?id=ada"
        assert 'reason="lost phone" by="eve"' in caplog.text
        assert [owner(each) for each in (desk, phone, bob)] == ["ada", None, "bob"]
        assert send(eve, "/admin/sessions/end-all?user=ada").status_code == 303
        assert 'reason="by an administrator" by="eve"' in caplog.text
    assert "1 session has ended." in eve.get("/admin/sessions").text
    assert [owner(each) for each in (desk, bob, eve)] == [None, "bob", "eve"]


def test_others_see_and_end_nothing(pages: Site) -> None:
    eve, ada, bob = signed_in(pages, "eve", staff=True), signed_in(pages), signed_in(pages, "bob")
    end = f"/admin/sessions/end?user=bob&device={device_of(bob)}"
    form = hidden(eve.get(end))
    for visitor in (ada, pages.visitor()):
        for path in ("/admin/sessions?user=bob", end, "/admin/sessions/end-all?user=bob"):
            page = visitor.get(path)
            assert (page.status_code, "127.0.0" in page.text) == (403, False)
            if "end" in path:
                assert visitor.post(path.partition("?")[0], data=form).status_code == 403
    token = form.pop("gsession_token")
    assert eve.post("/admin/sessions/end", data=form).status_code == 400
    good = {"gsession_token": token}
    for wrong, status in (
        ({}, 400),
        ({"user": ""}, 400),
        ({"user": "x" * 257, "device": "y"}, 400),
        ({"user": "b\0b", "device": "y"}, 400),
        ({"user": "bob"}, 404),
        ({"user": "nobody", "device": form["device"]}, 404),
        ({"user": "ada", "device": form["device"]}, 404),
    ):
        assert eve.get("/admin/sessions/end", query_string=wrong).status_code == status
        assert eve.post("/admin/sessions/end", data=good | wrong).status_code == status
    assert eve.get("/admin/sessions?user=" + "x" * 257).status_code == 400
    assert eve.get("/admin/sessions?id=").status_code == 400
    assert eve.get("/admin/sessions?user=").status_code == 200
    assert owner(bob) == "bob"


def test_admin_pages_refuse_to_start_without_allow() -> None:
    for allow in (None, True, "staff"):
        with pytest.raises(SettingError, match="admin_blueprint needs allow="):
            admin_blueprint(allow)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        admin_blueprint()  # type: ignore[call-arg]
    for url_prefix in ("", "/", "devices", "/devices/"):
        with pytest.raises(SettingError, match="url_prefix is"):
            devices_blueprint(url_prefix=url_prefix)
    with pytest.raises(SettingError, match="minutes is 0"):
        devices_blueprint(minutes=0)
    app = Flask("bare")
    app.testing = True
    app.register_blueprint(devices_blueprint())
    with pytest.raises(SettingError, match=r"needs a Session: call Session\(app\)"):
        app.test_client().get("/devices")


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_results_of_allow_find_and_by(one: SiteMaker, kind: str) -> None:
    given: dict[str, Any] = {"allow": True, "by": "the night shift"}

    def answer() -> Any:
        return given["allow"]

    async def answer_later() -> Any:
        return answer()

    site = one(config={"TESTING": True})
    blueprint: Blueprint = admin_blueprint(
        answer if kind == "plain" else answer_later,
        find=lambda text: {"ada@example.com": "ada"}.get(text),
        by=lambda: given["by"],
        minutes=None,
    )
    site.app.register_blueprint(blueprint)
    ada, admin = signed_in(site), site.visitor()
    assert "1 session of" in admin.get("/admin/sessions?user=ada@example.com").text
    assert admin.get("/admin/sessions?user=ada").status_code == 404
    path = f"/admin/sessions/end?user=ada&device={device_of(ada)}"
    form = hidden(admin.get(path))
    stranger = site.visitor()
    assert stranger.post("/admin/sessions/end", data=form).status_code == 400, "another session"
    for given["allow"] in (1, "yes", None, abort):
        with pytest.raises(SettingError, match="it must return True or False"):
            admin.post("/admin/sessions/end", data=form)
    given["allow"] = True
    for given["by"] in (None, "", " ", True, object()):
        with pytest.raises(SettingError, match="pass by="):
            admin.get("/admin/sessions")
    given["by"] = "the night shift"
    assert owner(ada) == "ada"
    assert admin.post("/admin/sessions/end", data=form).status_code == 303
    assert site.happened(DeviceRevoked)[-1].by == "the night shift"
