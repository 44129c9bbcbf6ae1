"""Passports: identify visitors to services that don't ask the application."""

from __future__ import annotations

import base64
import hmac
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from flask_gsession.errors import PassportRefused, SettingError, StoreUnavailable
from flask_gsession.sharing.forward_auth import verify_blueprint
from flask_gsession.sharing.passport import PassportReader, Passports, passport_blueprint
from flask_gsession.sharing.verify import Verifier
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, Visitor

ISSUER, AUDIENCE = "https://shop.example", "billing"


def a_key(folder: Path, name: str = "passport.pem", curve: str = "prime256v1") -> str:
    path = folder / name
    command = ["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return str(path)


@pytest.fixture
def passports(tmp_path: Path, clock: FakeClock) -> Passports:
    return Passports(a_key(tmp_path), ISSUER, AUDIENCE, clock=clock)


def a_reader(passports: Passports, clock: FakeClock, **options: Any) -> PassportReader:
    return PassportReader(passports.published(), ISSUER, AUDIENCE, clock=clock, **options)


def signed_in(site: Site, passports: Passports, **values: Any) -> Visitor:
    site.app.register_blueprint(passport_blueprint(site.ext, passports, values=["role", "when"]))
    visitor = site.visitor()
    visitor.run(lambda session: session.update(_user_id="17", **values))
    return visitor


def get(visitor: Visitor) -> str:
    answer = visitor.get("/session/passport")
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in answer.headers
    return str(answer.json["passport"])  # type: ignore[index]  # it is a dict


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(PassportRefused) as caught:
        read()
    return caught.value.reason


def test_a_passport_names_the_user(site: Site, passports: Passports) -> None:
    visitor = signed_in(site, passports, role="editor", when=b"no JSON", secret="hidden")
    reader = a_reader(passports, site.clock)
    text = get(visitor)
    passport = reader.read(text)
    assert passport.user == "17"
    assert passport.values == {"role": "editor"}
    assert passport.expires_at == int(site.clock()) + 60
    header = json.loads(base64.urlsafe_b64decode(text.split(".")[0] + "=="))
    assert header["alg"] == "ES256"
    keys = site.app.test_client().get("/.well-known/jwks.json").json
    assert keys == passports.published()
    assert header["kid"] == keys["keys"][0]["kid"]
    assert "d" not in keys["keys"][0], "the private part"


def test_a_passport_ends_within_the_minute_and_with_the_session(
    site: Site, passports: Passports
) -> None:
    visitor = signed_in(site, passports)
    reader = a_reader(passports, site.clock, leeway=0)
    text = get(visitor)
    site.clock.advance(60)
    assert refusal(lambda: reader.read(text)) == "expired"
    end = visitor.run(lambda session: session.set_lifetime(20)) or 20
    text = get(visitor)
    assert reader.read(text).expires_at <= int(site.clock()) + end + 5


def test_a_replayed_passport_is_refused(site: Site, passports: Passports) -> None:
    visitor = signed_in(site, passports)
    reader = a_reader(passports, site.clock)
    text = get(visitor)
    reader.read(text)
    for _ in range(3):
        assert refusal(lambda: reader.read(text)) == "replayed"
    for _ in range(5):
        reader.read(get(visitor))
        site.clock.advance(30)
    assert len(reader._seen) <= 3, "what has expired need not be remembered"
    assert refusal(lambda: reader.read(text)) == "expired"
    often = a_reader(passports, site.clock, once=False)
    text = get(visitor)
    assert often.read(text) == often.read(text)


def test_nobody_gets_a_passport_without_a_session(site: Site, passports: Passports) -> None:
    visitor = signed_in(site, passports)
    tab = visitor.another_tab()
    visitor.run(lambda session: session.destroy())
    for stranger in (tab, site.visitor()):
        assert stranger.get("/session/passport").status_code == 401


def test_an_outage_is_503(site: Site, passports: Passports) -> None:
    def fail() -> None:
        raise StoreUnavailable("drill", 7)

    visitor = signed_in(site, passports)
    site.store.before("load", fail)
    answer = visitor.get("/session/passport")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")


def test_a_proxy_hands_a_passport_on(site: Site, passports: Passports) -> None:
    page = verify_blueprint(site.ext, values=["role"], passports=passports)
    site.app.register_blueprint(page)
    visitor = signed_in(site, passports, role="editor")
    text = visitor.get("/session/verify").headers["X-Session-Passport"]
    passport = a_reader(passports, site.clock).read(text)
    assert (passport.user, passport.values) == ("17", {"role": "editor"})
    assert site.visitor().get("/session/verify").headers["X-Session-Passport"] == ""


# Invalid passports ------------------------------------------------------------------------------


def encoded(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def test_invalid_passports(tmp_path: Path, passports: Passports, clock: FakeClock) -> None:
    own = ECKey.import_key((tmp_path / "passport.pem").read_bytes())
    own.ensure_kid()
    now = int(clock())
    good = {"iss": ISSUER, "sub": "17", "aud": AUDIENCE, "iat": now, "exp": now + 60, "jti": "a"}

    def signed(key: Any = own, alg: str = "ES256", **changes: Any) -> str:
        claims = {name: value for name, value in {**good, **changes}.items() if value is not None}
        return jwt.encode({"alg": alg, "kid": own.kid}, claims, key, [alg])

    def reason(text: str) -> str:
        return refusal(lambda: a_reader(passports, clock).read(text))

    assert a_reader(passports, clock).read(signed()).user == "17"
    assert a_reader(passports, clock).read(signed(aud=["x", AUDIENCE])).user == "17"
    stranger = "not signed by a known key"
    assert reason(signed(ECKey.generate_key("P-256"))) == stranger
    assert reason("") == stranger
    assert reason("a.b.c") == stranger
    public = own.as_pem(private=False)
    confused = encoded({"alg": "HS256", "kid": own.kid}) + "." + encoded(good)
    mac = hmac.digest(public, confused.encode(), "sha256")  # with public data
    assert reason(f"{confused}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}") == stranger
    assert reason(f"{encoded({'alg': 'none'})}.{encoded(good)}.") == stranger
    head, _, signature = signed().split(".")
    assert reason(f"{head}.{encoded({**good, 'sub': 'admin'})}.{signature}") == stranger
    assert reason(signed(iss="https://evil.example")) == "another issuer"
    assert reason(signed(aud="mail")) == "another audience"
    assert reason(signed(aud=None)) == "another audience"
    assert reason(signed(iat=now + 30, exp=now + 60)) == "from the future"
    assert reason(signed(iat=now - 66, exp=now - 6)) == "expired"
    for changes in (
        {"exp": now + 3600},
        {"exp": None},
        {"iat": None},
        {"iat": True},
        {"jti": None},
        {"sub": None},
        {"sub": 17},
        {"exp": "soon"},
    ):
        assert reason(signed(**changes)) == "not a passport", changes


# Keys -------------------------------------------------------------------------------------------


def test_a_key_is_replaced_while_passports_are_on_their_way(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = a_key(tmp_path, "old.pem"), a_key(tmp_path, "new.pem")
    before = Passports(old, ISSUER, AUDIENCE, clock=site.clock)
    after = Passports([new, old], ISSUER, AUDIENCE, clock=site.clock)
    visitor = signed_in(site, before)
    fetched: list[int] = []
    current = [before]

    def fetch() -> Any:
        fetched.append(1)
        return current[0].published()

    reader = PassportReader(fetch, ISSUER, AUDIENCE, clock=site.clock)
    assert fetched == []
    text = get(visitor)
    reader.read(text)
    assert len(fetched) == 1
    underway = get(visitor)
    current[0] = after
    verifier = Verifier(site.ext)
    with site.app.app_context():
        identity = verifier.identify_token(site.app, str(visitor.cookie))
    assert identity is not None
    fresh = after.issue(identity)
    # Not at once: passports of nobody must not make it fetch for each.
    assert refusal(lambda: reader.read(fresh)) == "not signed by a known key"
    monkeypatch.setattr("flask_gsession.sharing.passport._FETCH_AGAIN", 0.0)
    assert reader.read(fresh).user == "17"
    assert reader.read(underway).user == "17"
    assert len(fetched) == 2


def test_keys_and_times_that_can_not_be_are_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="P-256"):
        Passports(a_key(tmp_path, "big.pem", "secp384r1"), ISSUER, AUDIENCE)
    public = tmp_path / "public.pem"
    key = a_key(tmp_path)
    command = ["openssl", "ec", "-in", key, "-pubout", "-out", str(public)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(SettingError, match="private"):
        Passports(str(public), ISSUER, AUDIENCE)
    junk = tmp_path / "junk.pem"
    junk.write_text("no key")
    for path in (str(junk), str(tmp_path / "nowhere.pem")):
        with pytest.raises(SettingError, match=path):
            Passports(path, ISSUER, AUDIENCE)
    for lifetime in (0, 61, 1.5, True):
        with pytest.raises(SettingError, match="1 to 60"):
            Passports(key, ISSUER, AUDIENCE, lifetime=lifetime)  # type: ignore[arg-type]  # wrong
    with pytest.raises(SettingError, match="path of a key"):
        Passports([], ISSUER, AUDIENCE)
