"""Back-channel logout, with a real provider from Authlib's server side, on each store."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from authlib.integrations.flask_client import OAuth
from flask import Flask, url_for
from flask_login import LoginManager, UserMixin, current_user, login_user
from flask_oidc import OpenIDConnect
from flask_oidc.signals import after_authorize
from flask_wtf import CSRFProtect
from joserfc import jws
from joserfc.jwk import ECKey, RSAKey
from werkzeug.test import TestResponse

from flask_gsession import SettingError, StoreUnavailable
from flask_gsession.contrib import oidc_tokens
from flask_gsession.contrib.oidc import BackChannelLogout
from flask_gsession.contrib.oidc_records import SignIns
from flask_gsession.events import DeviceRevoked
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.openid import CLIENT, EVENT, SECRET, Provider
from tests.harness.serving import served

URL = "/oidc/backchannel-logout"


class Member(UserMixin):  # type: ignore[misc]  # it ships no types
    """A user of Flask-Login."""

    def __init__(self, id: str) -> None:
        self.id = id


@pytest.fixture(scope="module")
def one_provider() -> Iterator[Provider]:
    provider = Provider()
    with pytest.MonkeyPatch.context() as patch, served(provider.app) as address:
        patch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
        provider.address = address
        yield provider


@pytest.fixture
def provider(one_provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    first = list(one_provider.keys)
    yield one_provider
    one_provider.keys[:] = first
    one_provider.sends_sid, one_provider.down, one_provider.fetches = True, False, 0


def with_provider(site: Site, provider: Provider, **settings: Any) -> BackChannelLogout:
    """Sign-in by the provider with Authlib's client, and its logout."""
    settings.setdefault("keys", f"{provider.address}/jwks")
    logout = BackChannelLogout(provider.address, CLIENT, **settings)
    site.app.register_blueprint(logout.blueprint())
    client = OAuth(site.app).register(
        "provider",
        client_id=CLIENT,
        client_secret=SECRET,
        server_metadata_url=f"{provider.address}/.well-known/openid-configuration",
        client_kwargs={"scope": "openid"},
    )

    @site.app.get("/login")
    def login() -> Any:
        return client.authorize_redirect(url_for("callback", _external=True))

    @site.app.get("/callback")
    def callback() -> str:
        token = client.authorize_access_token()
        logout.bind(token["userinfo"])
        return "in"

    return logout


def sign_in(site: Site, user: str, sid: str, visitor: Visitor | None = None) -> Visitor:
    """By the real flow: the client's redirect, the provider's page, the way back."""
    visitor = visitor or site.visitor()
    asked = visitor.get("/login").location
    answer = requests.get(f"{asked}&user={user}&sid={sid}", allow_redirects=False, timeout=30)
    back = urlsplit(answer.headers["Location"])
    response = visitor.get(f"{back.path}?{back.query}")
    assert response.text == "in", response.text
    return visitor


def owner(visitor: Visitor) -> Any:
    return visitor.run(lambda session: session.owner)


def post(site: Site, token: str) -> TestResponse:
    return site.app.test_client().post(URL, data={"logout_token": token})


def a_token(site: Site, provider: Provider, **claims: Any) -> str:
    return provider.sign(provider.claims(site.clock(), **claims))


# The whole way ------------------------------------------------------------------------------------


def test_the_provider_ends_the_right_sessions(make_site: SiteMaker, provider: Provider) -> None:
    site = make_site()
    CSRFProtect(site.app)
    with_provider(site, provider)
    with served(site.app) as shop:
        desk, tab = sign_in(site, "ada", "s1"), sign_in(site, "ada", "s1")
        phone, bob = sign_in(site, "ada", "s2"), sign_in(site, "bob", "s3")
        answer = provider.log_out(shop + URL, sid="s1", sub="ada")
        assert (answer.status_code, answer.text) == (200, "")
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Set-Cookie" not in answer.headers
        assert [owner(each) for each in (desk, tab, phone, bob)] == [None, None, "ada", "bob"]
        desk = sign_in(site, "ada", "s4")
        assert provider.log_out(shop + URL, sub="ada").status_code == 200
        assert [owner(each) for each in (desk, phone, bob)] == [None, None, "bob"]
        assert provider.log_out(shop + URL, sid="s3").status_code == 200, "without the sub"
        assert owner(bob) is None
        site.clock.advance(1)
        assert owner(sign_in(site, "ada", "s5")) == "ada", "a later sign-in"
        assert provider.log_out(shop + URL, sid="unknown").status_code == 200
    ended = site.happened(DeviceRevoked)
    assert {(event.reason, event.by) for event in ended} == {
        ("back-channel logout", provider.address)
    }
    assert len(ended) == 5


def test_sessions_by_an_id_token_without_sid(make_site: SiteMaker, provider: Provider) -> None:
    provider.sends_sid = False
    site = make_site()
    with_provider(site, provider)
    ada = sign_in(site, "ada", "s1")
    assert post(site, a_token(site, provider, sid="s2", sub="bob")).status_code == 200
    assert owner(ada) == "ada"
    provider.sends_sid = True
    other = sign_in(site, "ada", "s3")
    assert post(site, a_token(site, provider, sid="s1", sub="ada")).status_code == 200
    assert [owner(each) for each in (ada, other)] == [None, "ada"]


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_round_trips(make_site: SiteMaker, provider: Provider) -> None:
    site = make_site()
    logout = with_provider(site, provider)

    def cost(act: Callable[[], object]) -> int:
        site.clock.advance(1)
        with site.counted() as count:
            act()
        return count.trips

    plain, ours = site.visitor(), site.visitor()
    for more, sid in ((5, "s1"), (7, "s2")):
        claims = {"iss": provider.address, "sub": "ada", "sid": sid}
        usual = cost(lambda: plain.run(lambda session: session.bind("eve")))
        assert cost(partial(ours.run, lambda session, it=claims: logout.bind(it))) == usual + more
    assert cost(lambda: post(site, a_token(site, provider, sid="s2"))) == 8 + 1


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_beside_flask_login(make_site: SiteMaker, provider: Provider) -> None:
    site = make_site()
    logout = with_provider(site, provider)
    manager = LoginManager(site.app)
    manager.user_loader(Member)

    def enter(session: Any, sid: str) -> None:
        login_user(Member("17"))
        logout.bind({"iss": provider.address, "sub": "ada", "sid": sid}, "17")

    visitor = site.visitor()
    for sid in ("s1", "s2"):  # the second time, the session is the user's already
        visitor.run(partial(enter, sid=sid))
        assert visitor.run(lambda session: current_user.get_id()) == "17"
    assert post(site, a_token(site, provider, sid="s1")).status_code == 200
    assert owner(visitor) == "17"
    assert post(site, a_token(site, provider, sid="s2")).status_code == 200
    assert visitor.run(lambda session: current_user.get_id()) is None


def test_the_user_id_is_yours(make_site: SiteMaker, provider: Provider) -> None:
    """One session that signs in again, by another session of the provider and as another user."""
    site = make_site()
    logout = with_provider(site, provider)

    def bind(user_id: Any, sid: str) -> Callable[[Any], None]:
        claims = {"iss": provider.address, "sub": "ada", "sid": sid}
        return lambda session: logout.bind(claims, user_id, label="desk", tags=["web"])

    visitor, other = site.visitor(), site.visitor()
    visitor.run(bind(17, "s1"))
    other.run(bind("seventeen", "s9"))
    device = visitor.run(lambda session: session.device_id)
    visitor.run(bind(17, "s2"))
    assert visitor.run(lambda session: session.device_id) == device
    with site.app.app_context():
        (listed,) = site.ext.users.devices(17)
    assert listed.label == "desk"
    assert [tag[:5] for tag in listed.tags] == ["web", "oidc:"]
    assert post(site, a_token(site, provider, sid="s1")).status_code == 200
    assert owner(visitor) == "17", "signed in by another session since"
    assert post(site, a_token(site, provider, sid="s2")).status_code == 200
    assert [owner(each) for each in (visitor, other)] == [None, "seventeen"]
    visitor.run(bind(17, "s3"))
    assert post(site, a_token(site, provider, sub="ada")).status_code == 200
    assert [owner(each) for each in (visitor, other)] == [None, None]


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_flask_oidc_receives_its_logout_signal(make_site: SiteMaker, provider: Provider) -> None:
    """One receiver of its signal. Its own sign-in state ends with the session."""
    secrets = {"client_id": CLIENT, "client_secret": SECRET, "issuer": provider.address}
    site = make_site(
        config={
            "OIDC_CLIENT_SECRETS": {"web": secrets},
            "OIDC_USER_INFO_ENABLED": False,
            "OIDC_SCOPES": "openid",
        }
    )
    oidc = OpenIDConnect(site.app)
    logout = BackChannelLogout(provider.address, CLIENT, f"{provider.address}/jwks")
    site.app.register_blueprint(logout.blueprint())

    def signed_in(sender: Any, token: Any, **_: Any) -> None:
        logout.bind(token["userinfo"])

    with after_authorize.connected_to(signed_in):
        asked = (ada := site.visitor()).get("/login").location
        answer = requests.get(f"{asked}&user=ada&sid=s1", allow_redirects=False, timeout=30)
        back = urlsplit(answer.headers["Location"])
        assert ada.get(f"{back.path}?{back.query}").status_code == 302
    assert ada.run(lambda session: (session.owner, oidc.user_loggedin)) == ("ada", True)
    assert post(site, a_token(site, provider, sid="s1")).status_code == 200
    assert ada.run(lambda session: (session.owner, oidc.user_loggedin)) == (None, False)


# Sign-ins under way -------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["sid", "sub"])
@pytest.mark.parametrize("before", ["noted", "bound", "entered"])
def test_a_sign_in_under_way_does_not_outlive_the_logout(
    before: str, by: str, make_site: SiteMaker, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider logs the user out just before the sign-in takes its next step."""
    site = make_site()
    logout = with_provider(site, provider)
    worker = make_site(store=site.store)  # it gets the call, and its clock may be slow
    with_provider(worker, provider)
    claims = {"iss": provider.address, "sub": "ada", "sid": "s1"}
    statuses = []

    def strike() -> None:
        slow = 0 if before == "noted" else 30
        site.clock.advance(-slow)
        statuses.append(post(worker, a_token(site, provider, **{by: claims[by]})).status_code)
        site.clock.advance(slow)

    def bind(session: Any) -> None:
        if before == "noted":
            strike()
        if before == "bound":
            note = SignIns.note

            def noted(self: Any, kind: str, *arguments: Any) -> None:
                note(self, kind, *arguments)
                if kind == "sub":
                    strike()

            monkeypatch.setattr(SignIns, "note", noted)
        logout.bind(claims)
        if before == "entered":
            strike()

    visitor = site.visitor()
    assert visitor.ask(bind).status_code == 401
    assert statuses == [200]
    assert owner(visitor) is None
    assert site.sessions() == {}


def test_a_second_sign_in_is_refused_and_the_first_stays(
    make_site: SiteMaker, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider logs the second one out just before the session becomes its."""
    site = make_site()
    logout = with_provider(site, provider)
    first, second = ({"iss": provider.address, "sub": "ada", "sid": sid} for sid in ("s1", "s2"))
    visitor = site.visitor()
    visitor.run(lambda session: logout.bind(first))
    note = SignIns.note

    def noted(self: Any, kind: str, *arguments: Any) -> None:
        note(self, kind, *arguments)
        if kind == "sub":
            assert post(site, a_token(site, provider, sid="s2")).status_code == 200

    with monkeypatch.context() as patch:
        patch.setattr(SignIns, "note", noted)
        assert visitor.ask(lambda session: logout.bind(second)).status_code == 401
    assert owner(visitor) == "ada"
    assert post(site, a_token(site, provider, sid="s1")).status_code == 200
    assert owner(visitor) is None


# Tokens -------------------------------------------------------------------------------------------


def forged(site: Site, provider: Provider) -> Iterator[tuple[str, str]]:
    """Invalid tokens, by their fault."""
    now = site.clock()
    good = provider.claims(now, sid="s1")

    def claims(**changed: Any) -> str:
        return provider.sign({k: v for k, v in (good | changed).items() if v is not None})

    stranger, first = RSAKey.generate_key(2048, {"kid": "first"}), provider.keys[0]
    yield "another key", provider.sign(good, stranger)
    yield "no key id, another key", provider.sign(good, stranger, kid=None)
    yield "unknown key id", provider.sign(good, kid="other")
    yield "another algorithm", provider.sign(good, alg="PS256")
    curve = ECKey.generate_key("P-256", {"kid": "first"})
    yield "an elliptic key", provider.sign(good, curve, alg="ES256")
    head, body, signature = provider.sign(good).split(".")
    shared = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"first"}').decode().rstrip("=")
    mac = hmac.digest(first.as_pem(private=False), f"{shared}.{body}".encode(), "sha256")
    yield (
        "the public key as a secret",
        f"{shared}.{body}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}",
    )
    none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"first"}').decode().rstrip("=")
    yield "no signature", f"{none}.{body}."
    yield "an empty signature", f"{head}.{body}."
    other = base64.urlsafe_b64encode(json.dumps({**good, "sid": "s2"}).encode()).decode()
    yield "another body", f"{head}.{other.rstrip('=')}.{signature}"
    yield "an ID token's type", provider.sign(good, typ="at+jwt")
    yield "a critical header", provider.sign(good, crit=["kid"])
    for text in ("", ".", "..", "a.b.c", head, "é.é.é", "x" * 20_000, f"{head}.{body}", "\0"):
        yield f"not a token: {text[:10]!r}", text
    for name in ("jti", "sub", "sid"):
        content = json.dumps({**good, name: "\ud800"}).encode()
        header = {"alg": "RS256", "kid": first.kid}
        yield f"half a character in {name}", jws.serialize_compact(header, content, first)
    deep = base64.urlsafe_b64encode(b'{"a":' + b"[" * 5000).decode()
    yield "a deep header", f"{deep}.{body}.{signature}"
    for wrong in (None, "https://evil.example", [provider.address], 7):
        yield f"iss {wrong}", claims(iss=wrong)
    for wrong in (None, "bank", ["bank"], [], {"shop": 1}):
        yield f"aud {wrong}", claims(aud=wrong)
    for wrong in (None, "now", True, int(now) + 120, int(now) - 4000, -1, 1e300):
        yield f"iat {wrong}", claims(iat=wrong)
    for wrong in (None, "later", int(now) - 61, 0):
        yield f"exp {wrong}", claims(exp=wrong)
    for wrong in (None, [], "x", {}, [EVENT], {EVENT: None}, {EVENT: "x"}, {"other": {}}):
        yield f"events {wrong}", claims(events=wrong)
    for wrong in ("n", "", 0):
        yield f"nonce {wrong!r}", claims(nonce=wrong)
    for wrong in (None, "", 7, "x" * 256, ["x"]):
        yield f"jti {wrong!r}"[:20], claims(jti=wrong)
    for wrong in ("", 7, ["s1"], "x" * 256):
        yield f"sid {wrong!r}"[:20], claims(sid=wrong)
        yield f"sub {wrong!r}"[:20], claims(sub=wrong)
    yield "neither sid nor sub", claims(sid=None)


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_forged_tokens_end_nothing_and_cost_nothing(
    make_site: SiteMaker, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    with_provider(site, provider)
    ada = sign_in(site, "ada", "s1")
    cases = list(forged(site, provider))
    with site.counted() as count:
        for what, token in cases:
            answer = post(site, token)
            assert answer.status_code == 400, what
            assert answer.json["error"] == "invalid_request", what  # type: ignore[index]
            assert answer.headers["Cache-Control"] == "no-store"
            assert len(token) < 100 or token not in caplog.text
    assert count.calls == []
    client = site.app.test_client()
    good = a_token(site, provider, sid="s1")
    for options in (
        {},
        {"data": {"logout_token": [good, good]}},
        {"data": {"token": good}},
        {"json": {"logout_token": good}},
        {"data": good, "content_type": "application/logout+jwt"},
        {"query_string": {"logout_token": good}, "data": {"x": "y"}},
        {"data": {"logout_token": good}, "content_type": "multipart/form-data"},
    ):
        assert client.post(URL, **options).status_code == 400, options  # type: ignore[arg-type]
    assert client.get(URL, query_string={"logout_token": good}).status_code == 405
    assert owner(ada) == "ada"
    assert post(site, good).status_code == 200
    assert owner(ada) is None


def test_a_token_works_once_for_all_workers(make_site: SiteMaker, provider: Provider) -> None:
    site = make_site()
    worker = make_site(store=site.store)
    for each in (site, worker):
        with_provider(each, provider)
    sign_in(site, "ada", "s1")
    token = a_token(site, provider, sub="ada")
    assert post(site, token).status_code == 200
    site.clock.advance(1)
    ada = sign_in(site, "ada", "s2")
    for each in (site, worker):
        answer = post(each, token)
        assert (answer.status_code, "used before" in answer.text) == (400, True)
    site.clock.advance(181)
    assert "expired" in post(worker, token).text
    assert owner(ada) == "ada"
    assert post(worker, a_token(site, provider, sub="ada")).status_code == 200
    assert owner(ada) is None


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
@pytest.mark.parametrize("operation", ["load", "save", "create", "delete"])
def test_an_outage_is_tried_again(
    operation: str, make_site: SiteMaker, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(breaker_failures=0)
    with_provider(site, provider)
    ada = sign_in(site, "ada", "s1")
    token = a_token(site, provider, sid="s1")

    def down(*arguments: Any, **more: Any) -> Any:
        raise StoreUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(site.store, operation, down)
        answer = post(site, token)
    assert (answer.status_code, answer.headers["Cache-Control"]) == (503, "no-store")
    assert int(answer.headers["Retry-After"]) >= 1
    assert post(site, token).status_code == 200, "the same token"
    assert owner(ada) is None
    assert post(site, token).status_code == 400


# Keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_keys_are_kept_and_rotated(
    make_site: SiteMaker, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(oidc_tokens.time, "monotonic", lambda: now[0])
    site = make_site()
    with_provider(site, provider)

    def answers(**header: Any) -> int:
        claims = provider.claims(site.clock(), sid="nobody's")
        return post(site, provider.sign(claims, **header)).status_code

    provider.down = True
    assert answers() == 503, "no keys yet"
    assert answers() == 503
    assert provider.fetches == 1, "not at each request"
    elsewhere = make_site()
    with_provider(elsewhere, provider, keys=f"{provider.address}/moved")
    assert post(elsewhere, a_token(site, provider, sid="s")).status_code == 503, "a redirect"
    provider.down = False
    now[0] += 11
    assert [answers(), answers(), answers(kid=None)] == [200, 200, 200]
    assert provider.fetches == 2
    provider.keys.insert(0, RSAKey.generate_key(2048, {"kid": "second", "use": "sig"}))
    assert answers() == 400, "a flood of unknown keys is no flood of fetches"
    now[0] += 11
    assert [answers(), answers(kid="unknown"), answers(kid="unknown")] == [200, 400, 400]
    assert provider.fetches == 3
    old = provider.keys.pop()
    now[0] += 3601
    claims = provider.claims(site.clock(), sid="nobody's")
    assert post(site, provider.sign(claims, old)).status_code == 400, "withdrawn"
    provider.down = True
    now[0] += 3601
    assert answers() == 200, "the last known keys serve while the provider is down"


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_given_keys_and_other_algorithms(make_site: SiteMaker, provider: Provider) -> None:
    site = make_site()
    key = ECKey.generate_key("P-256", {"kid": "ec"})
    published = {"keys": [key.as_dict(private=False), {"kty": "oct", "k": "AAAA"}, {"kty": "?"}]}
    logout = BackChannelLogout(provider.address, CLIENT, lambda: published, algorithms=["ES256"])
    site.app.register_blueprint(logout.blueprint())
    claims = provider.claims(site.clock(), sid="s", aud=["other", CLIENT])
    assert post(site, provider.sign(claims, key, alg="ES256", typ=None)).status_code == 200
    claims["jti"] = "another"
    assert post(site, provider.sign(claims)).status_code == 400, "RS256"


def test_wrong_settings() -> None:
    jwks = RSAKey.generate_key(2048).as_dict(private=False)
    good = {"issuer": "https://id.example", "client_id": "shop", "keys": {"keys": [jwks]}}
    BackChannelLogout(**good)  # type: ignore[arg-type]
    for wrong in (
        {"issuer": ""},
        {"client_id": None},
        {"keys": "http://id.example/jwks"},
        {"keys": "file:///etc/passwd"},
        {"keys": {}},
        {"keys": {"keys": []}},
        {"keys": {"keys": [{"kty": "oct", "k": "AAAA"}]}},
        {"algorithms": ["none"]},
        {"algorithms": ["HS256"]},
        {"algorithms": "RS256"},
        {"algorithms": []},
    ):
        with pytest.raises(SettingError, match=r"; allowed|is not a JWK set|must be the text"):
            BackChannelLogout(**(good | wrong))  # type: ignore[arg-type]
    bare = Flask("bare")
    bare.testing = True
    logout = BackChannelLogout(**good)  # type: ignore[arg-type]
    bare.register_blueprint(logout.blueprint())
    with pytest.raises(SettingError, match=r"needs a Session: call Session\(app\)"):
        bare.test_client().post(URL, data={"logout_token": "x"})


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_flask_wtf_lets_the_provider_through(make_site: SiteMaker, provider: Provider) -> None:
    """Whichever of the two is set up first; other pages stay protected."""
    for first in ("csrf", "logout"):
        site = make_site()
        if first == "csrf":
            CSRFProtect(site.app)
        with_provider(site, provider)
        if first == "logout":
            CSRFProtect(site.app)
        site.app.add_url_rule("/form", "form", lambda: "", methods=["POST"])
        assert post(site, a_token(site, provider, sid="s1")).status_code == 200, first
        assert site.visitor().post("/form").status_code == 400


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_bind_refuses_wrong_claims(make_site: SiteMaker, provider: Provider) -> None:
    site = make_site()
    logout = with_provider(site, provider)
    good = {"iss": provider.address, "sub": "ada", "sid": "s1"}
    visitor = site.visitor()
    for wrong in ({"iss": "https://evil.example"}, {"sub": None}, {"sub": ""}, {"sid": 7}):

        def bind(session: Any, wrong: dict[str, Any] = wrong) -> None:
            with pytest.raises(ValueError, match="the claims"):
                logout.bind(good | wrong)

        visitor.run(bind)
    assert owner(visitor) is None
    assert site.stored() == {}
    with site.app.app_context(), pytest.raises(ValueError, match="allowed: a list of str"):
        site.ext.users.revoke_all("ada", tags="web")
