"""Flask-Security with ``ActiveSessions``: its own flows end sessions in the store."""

from __future__ import annotations

from typing import Any

import flask_security
import pytest
from flask import Flask
from flask_login import current_user
from flask_security.changeable import admin_change_password

from flask_gsession import Session, SettingError, StoreUnavailable, require_fresh
from flask_gsession.contrib.flask_security import ActiveSessions
from flask_gsession.events import DeviceRevoked
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.test_authentication import (
    ADA,
    CHANGED,
    LEGACY_FORMS,
    PASSWORD,
    SECURITY,
    Mails,
    rotates,
    send,
    with_security,
)

pytestmark = LEGACY_FORMS
RESET = {
    "SECURITY_RECOVERABLE": True,
    "SECURITY_SEND_PASSWORD_RESET_EMAIL": False,
    "SECURITY_SEND_PASSWORD_RESET_NOTICE_EMAIL": False,
}
PLAIN = {**SECURITY, **RESET, "SECURITY_TWO_FACTOR": False}
NEW = {"password": CHANGED, "password_confirm": CHANGED}


def with_sessions(site: Site, **how: Any) -> Site:
    ActiveSessions(with_security(site).app, **how)
    return site


def signed_in(site: Site) -> Visitor:
    visitor = site.visitor()
    send(visitor, "/login", **ADA)
    return visitor


def who(visitor: Visitor) -> Any:
    return visitor.run(lambda session: (session.owner, current_user.is_authenticated))


def account(site: Site) -> tuple[Any, Any]:
    datastore = site.app.extensions["security"].datastore
    return datastore, datastore.find_user(email=ADA["email"])


def reasons(site: Site) -> list[str | None]:
    return [event.reason for event in site.happened(DeviceRevoked)]


def test_a_new_password_ends_the_other_sessions(make_site: SiteMaker) -> None:
    site = with_sessions(make_site(config=PLAIN))
    desk, phone = signed_in(site), signed_in(site)
    phone.run(lambda session: session.update(cart=["mug"]))
    desk.run(lambda session: session.update(cart=["cup"]))
    with site.app.app_context():
        first = account(site)[1].fs_uniquifier
        assert [device.tags for device in site.ext.users.devices(first)] == [("password",)] * 2
    new = {"new_password": CHANGED, "new_password_confirm": CHANGED}
    rotates_not = desk.cookie
    send(desk, "/change", password=PASSWORD, **new)
    with site.app.app_context():
        second = account(site)[1].fs_uniquifier
        assert second != first
        assert site.ext.users.devices(first) == []
        (device,) = site.ext.users.devices(second)
    assert desk.cookie != rotates_not
    assert who(desk) == (second, True)
    assert desk.run(lambda session: (session["cart"], session.device_id)) == (["cup"], device.id)
    assert who(phone) == (None, False)
    assert phone.run(dict) == {}, "its values too"
    assert reasons(site) == ["fs_uniquifier changed"]


def test_a_reset_password_ends_all_sessions(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = with_sessions(make_site(config=PLAIN))
    desk, phone = signed_in(site), signed_in(site)
    with site.app.test_request_context():
        token = flask_security.recoverable.generate_reset_password_token(account(site)[1])
    stranger = site.visitor()
    assert stranger.post("/reset/forged", json=NEW).status_code == 400
    assert who(desk)[1], "a forged link ends nothing"
    send(stranger, f"/reset/{token}", **NEW)
    assert [who(each) for each in (desk, phone)] == [(None, False)] * 2
    assert len(site.sessions()) <= 1, "at most that of the visitor with the link"
    desk = site.visitor()
    send(desk, "/login", email=ADA["email"], password=CHANGED)
    assert who(desk)[1]


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
@pytest.mark.parametrize(
    "act", ["set_uniquifier", "reset_user_access", "deactivate_user", "toggle_active", "password"]
)
def test_account_changes_that_end_access_end_sessions(act: str, make_site: SiteMaker) -> None:
    """Outside a request too, as by Flask-Security's commands."""
    site = with_sessions(make_site(config=PLAIN))
    desk = signed_in(site)
    datastore, user = account(site)
    with site.app.test_request_context():
        if act == "password":
            admin_change_password(user, CHANGED, notify=False)
    with site.app.app_context():
        if act != "password":
            getattr(datastore, act)(user)
            getattr(datastore, "activate_user", None)(user)  # type: ignore[misc]
    assert site.sessions() == {}
    assert who(desk) == (None, False)
    site.visitor().run(lambda session: flask_security.logout_user())


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_an_outage_leaves_no_old_session_valid(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = with_sessions(make_site(config=PLAIN, breaker_failures=0))
    desk, phone = signed_in(site), signed_in(site)
    old = who(phone)[0]

    def down(*arguments: Any, **more: Any) -> Any:
        raise StoreUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(site.store, "delete", down)
        new = {"new_password": CHANGED, "new_password_confirm": CHANGED}
        assert desk.post("/change", json={"password": PASSWORD, **new}).status_code == 503
    assert not who(phone)[1]
    with site.app.app_context():
        site.ext.users.revoke_all(old)
    assert who(phone)[0] is None


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_each_step_rotates_and_factors_may_end_others(make_site: SiteMaker) -> None:
    site = with_sessions(make_site(config=SECURITY), factors=True)
    desk = site.visitor()
    desk.run(lambda session: session.update(cart=["mug"]))
    rotates(desk, "/login", **ADA)
    phone = signed_in(site)
    state = send(desk, "/tf-setup", setup="email")["tf_state_token"]
    send(desk, f"/tf-setup/{state}", code=Mails.codes[-1])
    assert (who(desk)[1], who(phone)[1]) == (True, False)
    assert reasons(site) == ["second factor changed"]
    send(desk, "/logout")
    desk.run(lambda session: session.update(cart=["mug"]))
    assert rotates(desk, "/login", **ADA)["tf_required"]
    rotates(desk, "/tf-validate", code=Mails.codes[-1])
    assert who(desk)[1]


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_freshness_is_shared(make_site: SiteMaker) -> None:
    """Its page for the password again answers ``require_fresh``, and leads back."""
    site = with_sessions(make_site(config=PLAIN, confirm_view="security.verify"))
    site.app.add_url_rule("/vault", "vault", require_fresh()(lambda: "open"))
    desk = signed_in(site)
    assert desk.get("/vault").text == "open"
    site.clock.advance(601)
    asked = desk.get("/vault", headers={"Accept": "text/html"})
    assert asked.location == "/verify?next=/vault"
    answer = desk.post(asked.location, data={"password": PASSWORD})
    assert (answer.status_code, answer.location) == (302, "/vault")
    assert desk.get("/vault").text == "open"


def test_setup_needs_session_and_security() -> None:
    app = Flask("bare")
    app.secret_key = "a key"
    Session(app, store="memory://")
    with pytest.raises(SettingError, match="needs Session\\(app\\) and Security"):
        ActiveSessions(app)


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_second_setup_is_refused(make_site: SiteMaker) -> None:
    site = with_sessions(make_site(config=PLAIN))
    with pytest.raises(SettingError, match="has ActiveSessions already: create it once"):
        ActiveSessions(site.app)
