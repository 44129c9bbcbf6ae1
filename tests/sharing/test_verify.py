"""Identifying visitors by HTTP: the page for proxies, and token introspection (RFC 7662)."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
from flask_wtf import CSRFProtect
from msgspec.structs import replace
from werkzeug.test import TestResponse

from flask_gsession.errors import SettingError, StoreUnavailable
from flask_gsession.events import AccessDenied, SessionRefused
from flask_gsession.sharing.forward_auth import verify_blueprint
from flask_gsession.sharing.grants import Grant, Grants
from flask_gsession.sharing.introspection import introspection_blueprint
from flask_gsession.sharing.verify import header_names
from flask_gsession.tokens import session_key
from flask_gsession.users.roster import drop
from tests.harness.apps import Site, SiteMaker, Visitor

KEYS = ["role", "tenant", "limits"]
SENT_BY_CLIENT = {"X-Session-User": "admin", "X-Session-Role": "root"}


def fail() -> None:
    raise StoreUnavailable("drill: the store is down", 7)


def verifying(site: Site, **options: Any) -> Site:
    site.app.register_blueprint(verify_blueprint(site.ext, values=KEYS, **options))
    return site


def signed_in(site: Site, user: object = "17", **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(_user_id=user, **values))
    return visitor


def ask(visitor: Visitor, path: str = "/session/verify", **options: Any) -> TestResponse:
    return visitor.open(path, headers=SENT_BY_CLIENT, **options)


def told(response: TestResponse) -> dict[str, str]:
    return {name: text for name, text in response.headers if name.startswith("X-Session-")}


def test_a_signed_in_visitor(site: Site) -> None:
    visitor = signed_in(verifying(site), role="editor", secret="hidden")
    calls = len(site.store.calls)
    response = ask(visitor)
    assert response.status_code == 200
    assert told(response) == {
        "X-Session-User": "17",
        "X-Session-Role": "editor",
        "X-Session-Tenant": "",
        "X-Session-Limits": "",
    }
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Vary"] == "Cookie"
    assert "Set-Cookie" not in response.headers
    assert response.data == b""
    assert site.store.calls[calls:] == ["load"]


def test_any_method_and_path_is_asked_about(site: Site) -> None:
    """Envoy keeps the method, and puts the path behind: Flask must not answer OPTIONS by itself."""
    visitor = signed_in(verifying(site))
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        for path in ("/session/verify", "/session/verify/orders/1"):
            assert ask(site.visitor(), path, method=method).status_code == 401, (method, path)
            assert ask(visitor, path, method=method).status_code == 200, (method, path)


AS_THEY_SEND_IT = {
    "Traefik": {
        "X-Forwarded-Method": "OPTIONS",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "shop.example",
        "X-Forwarded-Uri": "/orders/1?a=b",
        "X-Forwarded-For": "203.0.113.9",
    },
    "Caddy": {"X-Forwarded-Method": "DELETE", "X-Forwarded-Uri": "/orders/1", "Via": "1.1 Caddy"},
    "Envoy": {"X-Envoy-Original-Path": "/orders/1", "X-Envoy-Internal": "true"},
}


def test_a_proxy_asks_as_it_does(site: Site) -> None:
    """Traefik and Caddy ask with GET, Envoy with the method and the path of the request."""
    visitor = signed_in(verifying(site), role="editor")
    for proxy, headers in AS_THEY_SEND_IT.items():
        path, method = "/session/verify", "GET"
        if proxy == "Envoy":
            path, method = "/session/verify/orders/1?a=b", "POST"
        headers = {**SENT_BY_CLIENT, **headers}
        response = visitor.open(path, method=method, headers=headers, data="a body")
        assert response.status_code == 200, proxy
        assert told(response)["X-Session-User"] == "17"
        stranger = site.visitor().open(path, method=method, headers=headers)
        assert stranger.status_code == 401
        assert set(told(stranger).values()) == {""}


def test_with_csrf_protection(make_site: SiteMaker) -> None:
    site = make_site()
    csrf = CSRFProtect(site.app)
    blueprint = verify_blueprint(site.ext)
    csrf.exempt(blueprint)
    site.app.register_blueprint(blueprint)
    visitor = signed_in(site)
    assert ask(visitor, "/session/verify/orders", method="POST").status_code == 200


def test_nobody_is_signed_in(site: Site) -> None:
    verifying(site)
    stranger, anonymous, gone = site.visitor(), site.visitor(), signed_in(site)
    anonymous.run(lambda session: session.update(cart=["mug"]))
    tab = gone.another_tab()
    gone.run(lambda session: session.destroy())
    forged = site.visitor(f"{str(tab.cookie)[:-4]}AAAA")
    for visitor in (stranger, anonymous, tab, forged):
        response = ask(visitor)
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Cookie"
        assert set(told(response).values()) == {""}
        assert "Set-Cookie" not in response.headers
    assert [event.reason for event in site.events if isinstance(event, SessionRefused)] == [
        "unknown",
        "bad signature",
    ]


def test_an_expired_session_is_nobody(site: Site) -> None:
    visitor = signed_in(verifying(site))
    site.clock.advance(site.ext._interface(site.app).repository.settings.idle_timeout + 400)
    assert ask(visitor).status_code == 401


def test_an_outage_is_503_and_never_401(site: Site) -> None:
    visitor = signed_in(verifying(site))
    site.store.before("load", fail)
    response = ask(visitor)
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "7"
    assert set(told(response).values()) == {""}
    assert ask(visitor).status_code == 200


def test_a_check_does_not_count_as_use_unless_requested(make_site: SiteMaker) -> None:
    for renew in (False, True):
        site = verifying(make_site(idle_timeout=100, renew_interval=10), renew=renew)
        visitor = signed_in(site)
        for _ in range(3):
            site.clock.advance(60)
            status = ask(visitor).status_code
        assert status == (200 if renew else 401)


def test_a_renewal_that_fails_is_not_an_outage(make_site: SiteMaker) -> None:
    site = verifying(make_site(idle_timeout=100, renew_interval=10), renew=True)
    visitor = signed_in(site)
    site.clock.advance(60)
    site.store.before("renew", fail)
    assert ask(visitor).status_code == 200


def test_only_our_cookie_is_read(make_site: SiteMaker) -> None:
    site = verifying(make_site(token_header="X-Token"))
    visitor = signed_in(site)
    header = {"X-Token": str(visitor.cookie)}
    assert site.visitor().get("/session/verify", headers=header).status_code == 401
    crowd = f"a=1; session=planted; session={visitor.cookie}; b=2"
    client = site.app.test_client(use_cookies=False)
    assert client.get("/session/verify", headers={"Cookie": crowd}).status_code == 200


TEXTS = [
    ("plain", "plain"),
    ("a b", "a%20b"),
    ("100%", "100%25"),
    ("Zoë", "Zo%C3%AB"),
    ("a\r\nX-Session-User: admin", "a%0D%0AX-Session-User:%20admin"),
    ("\ud800", "%ED%A0%80"),
    (7, "7"),
    (True, "true"),
    (None, ""),
    ([1, "ü"], '[1,"%C3%BC"]'),
    ({"a": {"b": 1}}, '{"a":{"b":1}}'),
    ("x" * 2000, ""),
]


def test_a_value_in_a_header(site: Site) -> None:
    verifying(site)
    for value, text in TEXTS:
        assert told(ask(signed_in(site, role=value)))["X-Session-Role"] == text, value
    user = "a\r\nX-Session-Role: root"
    headers = told(ask(signed_in(site, user)))
    assert headers["X-Session-User"] == "a%0D%0AX-Session-Role:%20root"
    assert headers["X-Session-Role"] == ""


@pytest.mark.parametrize("keys", [["user"], ["_USER"], ["passport"], ["--"], ["a b", "a-b"]])
def test_keys_whose_headers_would_be_mistaken(keys: list[str]) -> None:
    with pytest.raises(SettingError, match=r"Use another key|pass only one of them"):
        header_names(keys)


# Introspection ----------------------------------------------------------------------------------

TOKENS = {"billing": "billing-token", "weak": "weak-token"}
GRANTS = Grants(
    by_token={
        hashlib.sha256(b"billing-token").digest(): Grant(
            "billing", verify=True, read=frozenset({"role"})
        ),
        hashlib.sha256(b"weak-token").digest(): Grant("weak", store=True),
    }
)


def introspecting(site: Site) -> Site:
    site.app.register_blueprint(introspection_blueprint(site.ext, GRANTS))
    return site


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def introspect(site: Site, token: object, authorization: str | None = None) -> TestResponse:
    client = site.app.test_client(use_cookies=False)
    authorization = basic("billing", "billing-token") if authorization is None else authorization
    headers = {"Authorization": authorization} if authorization else {}
    return client.post("/session/introspect", data={"token": token}, headers=headers)


def test_introspection(site: Site) -> None:
    visitor = signed_in(introspecting(site), role="editor", secret="hidden")
    response = introspect(site, visitor.cookie)
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    answer = response.json
    assert answer is not None
    expires = answer.pop("exp")
    assert expires > answer.pop("iat")
    assert answer == {
        "active": True,
        "sub": "17",
        "token_type": "session",
        "values": {"role": "editor"},
    }
    assert introspect(site, visitor.cookie, "Bearer billing-token").json == response.json


def test_introspection_says_when_the_user_confirmed(site: Site) -> None:
    """RFC 9470, 6.2."""
    visitor = introspecting(site).visitor()
    visitor.run(lambda session: session.bind("17"))
    times: list[Any] = [introspect(site, visitor.cookie).json]
    site.clock.advance(3600)
    visitor.run(lambda session: session.confirm())
    times.append(introspect(site, visitor.cookie).json)
    assert 3599 <= times[1]["auth_time"] - times[0]["auth_time"] <= 3601
    assert times[1]["auth_time"] == int(site.clock())


def test_introspection_without_a_session(site: Site) -> None:
    visitor = signed_in(introspecting(site))
    anonymous = site.visitor()
    anonymous.run(lambda session: session.update(cart=1))
    cookie = visitor.cookie
    visitor.run(lambda session: session.destroy())
    for token in (cookie, anonymous.cookie, "junk", "a.b", f"x; session={anonymous.cookie}"):
        response = introspect(site, token)
        assert (response.status_code, response.json) == (200, {"active": False})
    for token in ("", ["a", "b"]):
        assert introspect(site, token).status_code == 400


def test_introspection_while_the_store_is_down(site: Site) -> None:
    visitor = signed_in(introspecting(site))
    site.store.before("load", fail)
    response = introspect(site, visitor.cookie)
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "7"
    assert "active" not in response.text


def test_introspection_needs_a_service_that_is_granted_it(
    make_site: SiteMaker, caplog: pytest.LogCaptureFixture
) -> None:
    site = introspecting(make_site())
    visitor = signed_in(site)
    calls = len(site.store.calls)
    strangers = ("", "Bearer x", basic("billing", "x"), basic("weak", "billing-token"), "Digest x")
    for authorization in strangers:
        response = introspect(site, visitor.cookie, authorization)
        assert response.status_code == 401, authorization
        assert response.headers["WWW-Authenticate"].startswith("Basic")
    assert introspect(site, visitor.cookie, "Bearer weak-token").status_code == 403
    assert site.store.calls[calls:] == []
    denied = [event for event in site.events if isinstance(event, AccessDenied)]
    assert [event.service for event in denied] == [""] * len(strangers) + ["weak"]
    assert "weak-token" not in caplog.text


def test_introspection_that_nobody_could_use_is_named_at_start(
    tmp_path: Path, make_site: SiteMaker
) -> None:
    site = make_site()
    file = tmp_path / "grants.toml"
    file.write_text("[shop]\ncertificate = 'shop.internal'\nverify = true\n")
    with pytest.raises(SettingError, match="verify = true and a token"):
        introspection_blueprint(site.ext, str(file))


# Users ------------------------------------------------------------------------------------------


def test_the_user_that_a_session_is_bound_to(site: Site) -> None:
    visitor = verifying(site).visitor()
    visitor.run(lambda session: session.bind("17"))
    visitor.run(lambda session: session.update(role="editor"))
    assert told(ask(visitor))["X-Session-User"] == "17"
    with site.app.app_context():
        site.ext.users.revoke_all("17")
    assert ask(visitor).status_code == 401


def test_a_key_that_is_named_counts_alone(site: Site) -> None:
    site.app.register_blueprint(verify_blueprint(site.ext, user="account"))
    visitor = signed_in(site)
    assert ask(visitor).status_code == 401
    visitor.run(lambda session: session.update(account=5))
    assert told(ask(visitor))["X-Session-User"] == "5"


def test_a_session_that_its_roster_does_not_know_is_nobodys(site: Site) -> None:
    """G11: stored by a sign-in that never got as far as the roster, because it was interrupted."""
    visitor = verifying(site).visitor()
    visitor.run(lambda session: session.bind("17"))
    repository = site.app.extensions["gsession"][site.ext].repository
    loaded = repository.find(session_key(visitor.token))
    unseen = replace(loaded.body.owner, seen=0)
    repository.store.save(
        repository.records.with_owner(loaded.record, loaded.body, unseen),
        loaded.record.version,
    )
    assert ask(visitor).status_code == 200, "it is in the roster"
    repository.rosters.change("17", lambda roster: (drop(roster, [loaded.record.key]), None))
    assert ask(visitor).status_code == 401
