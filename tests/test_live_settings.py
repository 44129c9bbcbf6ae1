"""Flask's own settings are read when they are needed, as Flask does: they may change late."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from flask import Flask, has_request_context, request, session

from flask_gsession import Session, SettingError
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor


@pytest.fixture
def one(store_prefix: str, clock: FakeClock) -> Any:
    """An application on the memory store, for code that doesn't depend on the store."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield make()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Take the errors out of the log."""
    found = [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]
    found += [str(each.exc_info[1]) for each in caplog.records if each.exc_info]
    caplog.clear()
    return found


def write(session: Any) -> None:
    session["writes"] = session.get("writes", 0) + 1


# The lifetime of permanent sessions ---------------------------------------------------------------


def enter(session: Any) -> None:
    session.permanent = True
    session["user"] = "ada"


def expiry_in(header: str) -> datetime:
    """The expiry that a `Set-Cookie` header gives."""
    return parsedate_to_datetime(header.partition("Expires=")[2].partition(";")[0])


def lifetime_of_a_new_session(site: Site) -> float:
    """In seconds, without the renew interval; the cookie says the same."""
    visitor = site.visitor()
    expires = expiry_in(visitor.ask(enter).headers["Set-Cookie"])
    stored: datetime = visitor.run(lambda session: session.expires_at)
    assert abs(stored - expires) < timedelta(seconds=1)
    seconds = (stored - datetime.fromtimestamp(site.clock(), UTC)).total_seconds()
    return round(seconds - min(60, seconds / 21))


def test_a_lifetime_that_changes_late(make_site: SiteMaker) -> None:
    site = make_site(config={"PERMANENT_SESSION_LIFETIME": 3600})
    assert lifetime_of_a_new_session(site) == 3600
    site.app.permanent_session_lifetime = timedelta(minutes=5)
    assert lifetime_of_a_new_session(site) == 300
    site.app.config["PERMANENT_SESSION_LIFETIME"] = 600
    assert lifetime_of_a_new_session(site) == 600

    visitor = site.visitor()
    visitor.run(enter)
    site.clock.advance(599)
    assert visitor.run(dict)["user"] == "ada"
    site.app.config["PERMANENT_SESSION_LIFETIME"] = timedelta(days=1)
    visitor.run(write)
    site.clock.advance(86399)
    assert visitor.run(dict)["user"] == "ada"
    site.clock.advance(86400 + 61)
    assert visitor.run(dict) == {}


def test_a_keyword_for_the_lifetime_holds_whatever_the_application_says(
    make_site: SiteMaker,
) -> None:
    site = make_site(permanent_lifetime=3600)
    site.app.permanent_session_lifetime = timedelta(minutes=5)
    assert lifetime_of_a_new_session(site) == 3600


class Tenants(Flask):
    """An application that has a lifetime for each tenant, and none outside a request."""

    @property
    def permanent_session_lifetime(self) -> timedelta:  # type: ignore[override]
        return timedelta(minutes=int(request.headers["Minutes"]))


def test_a_lifetime_that_a_subclass_makes(clock: FakeClock) -> None:
    app = Tenants(__name__)
    app.secret_key = "a key"
    Session(app, store="memory://", clock=clock)
    app.add_url_rule("/", view_func=lambda: enter(session) or "")
    for minutes in (5, 30, 5):
        response = app.test_client().get("/", headers={"Minutes": str(minutes)})
        left = expiry_in(response.headers["Set-Cookie"]).timestamp() - clock()
        assert minutes * 60 <= left + 1 <= minutes * 63 + 2


def test_a_lifetime_of_a_subclass_is_checked_at_the_start() -> None:
    class Wrong(Flask):
        permanent_session_lifetime = 0  # type: ignore[assignment]

    with pytest.raises(SettingError, match=r"^PERMANENT_SESSION_LIFETIME is 0; allowed"):
        Session(Wrong(__name__), store="memory://")


@pytest.mark.parametrize("wrong", ["soon", None, 0, -1, 10**12, timedelta(0), [60]])
def test_a_wrong_lifetime_found_late(
    one: Site, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one.app.config["PERMANENT_SESSION_LIFETIME"] = 300
    assert lifetime_of_a_new_session(one) == 300
    one.app.config["PERMANENT_SESSION_LIFETIME"] = wrong
    assert not errors(caplog)
    for _ in range(2):
        assert lifetime_of_a_new_session(one) == 300
    (message,) = errors(caplog)
    assert message.startswith("PERMANENT_SESSION_LIFETIME is ")
    assert "allowed: seconds as a number, or a timedelta" in message
    one.app.config["PERMANENT_SESSION_LIFETIME"] = 600
    assert lifetime_of_a_new_session(one) == 600
    assert not errors(caplog)


# The cookie ---------------------------------------------------------------------------------------


def set_cookie(visitor: Visitor, base_url: str = "https://localhost") -> str:
    """The `Set-Cookie` header of a first write."""
    return visitor.ask(write, base_url=base_url).headers["Set-Cookie"]


def test_a_cookie_name_that_changes_late(one: Site) -> None:
    visitor = one.visitor()
    assert set_cookie(visitor).startswith("session=")
    one.app.config.update(SESSION_COOKIE_NAME="__Host-sid", SESSION_COOKIE_SECURE=True)
    assert set_cookie(visitor).startswith("__Host-sid=")
    there = {"base_url": "https://localhost"}
    assert visitor.run(dict, **there) == {"writes": 1}
    visitor.run(write, **there)
    assert visitor.run(dict, **there) == {"writes": 2}
    assert one.cookie_name == "__Host-sid"
    response = visitor.ask(lambda session: session.destroy(), **there)
    assert response.headers["Set-Cookie"].startswith("__Host-sid=;")


def test_a_keyword_for_the_cookie_name_holds_whatever_the_application_says(clock: Any) -> None:
    with SiteMaker("memory://", "", clock) as make:
        site = make(cookie_name="sid")
        site.app.config["SESSION_COOKIE_NAME"] = "another"
        assert set_cookie(site.visitor()).startswith("sid=")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("", "SESSION_COOKIE_NAME is ''; allowed: a cookie name"),
        ("a b", "SESSION_COOKIE_NAME is 'a b'; allowed: a cookie name"),
        (None, "SESSION_COOKIE_NAME is None; allowed: a cookie name"),
        (b"session", "SESSION_COOKIE_NAME is b'session'; allowed: a cookie name"),
        ("__Host-session", "__Host-session needs SESSION_COOKIE_SECURE = True"),
        ("second", "another Session of the application has that cookie"),
    ],
)
def test_a_wrong_cookie_name_found_late(
    one: Site, wrong: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    Session(one.app, store="memory://", cookie_name="second")
    visitor = one.visitor()
    visitor.run(write)
    one.app.config["SESSION_COOKIE_NAME"] = wrong
    for writes in (2, 3):
        visitor.run(write)
        assert visitor.run(dict) == {"writes": writes}
    (message,) = errors(caplog)
    assert says in message
    assert "stays in force" in message


def test_two_sessions_never_share_a_cookie_name() -> None:
    app = Flask(__name__)
    app.secret_key = "a key"
    Session(app, store="memory://")
    app.config["SESSION_COOKIE_NAME"] = "another"
    with pytest.raises(SettingError, match="the cookie 'another' already"):
        Session(app, store="memory://")


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"SESSION_COOKIE_SECURE": True}, "Secure"),
    ({"SESSION_COOKIE_PATH": "/do"}, "Path=/do"),
    ({"APPLICATION_ROOT": "/do"}, "Path=/do"),
    ({"SESSION_COOKIE_DOMAIN": "example.com"}, "Domain=example.com"),
    ({"SESSION_COOKIE_SAMESITE": "Lax"}, "SameSite=Lax"),
    ({"SESSION_COOKIE_SECURE": True, "SESSION_COOKIE_PARTITIONED": True}, "Partitioned"),
]


@pytest.mark.parametrize(("config", "attribute"), CHANGES)
def test_cookie_attributes_that_change_late(
    one: Site, config: dict[str, Any], attribute: str
) -> None:
    assert attribute not in set_cookie(one.visitor()).split("; ")
    one.app.config.update(config)
    assert attribute in set_cookie(one.visitor(), "https://example.com").split("; ")
    one.app.config["SESSION_COOKIE_HTTPONLY"] = False
    assert "HttpOnly" not in set_cookie(one.visitor(), "https://example.com")


@pytest.mark.parametrize(
    "wrong",
    [
        {"SESSION_COOKIE_SECURE": "no"},
        {"SESSION_COOKIE_HTTPONLY": 0},
        {"SESSION_COOKIE_PARTITIONED": None},
        {"SESSION_COOKIE_SAMESITE": "strickt"},
        {"SESSION_COOKIE_SAMESITE": 7},
        {"SESSION_COOKIE_DOMAIN": "a;b"},
        {"SESSION_COOKIE_DOMAIN": 7},
        {"SESSION_COOKIE_PATH": "shop"},
        {"SESSION_COOKIE_PATH": 7},
    ],
    ids=str,
)
def test_wrong_cookie_attributes_found_late(
    one: Site, wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The cookie keeps the attributes from before, and the session goes on."""
    one.app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
    expected = set_cookie(one.visitor()).partition(";")[2]
    one.app.config.update(wrong)
    for _ in range(2):
        visitor = one.visitor()
        assert set_cookie(visitor).partition(";")[2] == expected
        assert visitor.run(dict) == {"writes": 1}
    (message,) = errors(caplog)
    assert message.startswith(next(iter(wrong)))
    assert "stays in force" in message


def test_an_attribute_that_a_subclass_of_the_interface_gives(one: Site) -> None:
    interface: Any = one.app.session_interface
    interface.get_cookie_domain = lambda app: "example.com"
    assert "Domain=example.com" in set_cookie(one.visitor(), "https://example.com")


# The secret keys ----------------------------------------------------------------------------------


class ByAttribute(Flask):
    """An application with its key on the class."""

    secret_key = "from the class"


class ByProperty(Flask):
    """An application that asks for its key each time."""

    vault = "from a vault"

    @property
    def secret_key(self) -> str:  # type: ignore[override]
        return self.vault


class ByVault(Flask):
    """An application whose vault cannot be asked before there is a request."""

    @property
    def secret_key(self) -> str:  # type: ignore[override]
        if not has_request_context():
            raise RuntimeError("closed")
        return "from a vault"


def serve(app: Flask) -> None:
    """A page that writes to the session."""
    Session(app, store="memory://")

    @app.get("/")
    def view() -> dict[str, Any]:
        write(session)
        return dict(session)


@pytest.mark.parametrize("kind", [ByAttribute, ByProperty, ByVault])
@pytest.mark.parametrize("fallbacks", [None, ["older"]])
def test_a_secret_key_that_a_subclass_has(
    kind: type[Flask], fallbacks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = kind(__name__)
    app.config["SECRET_KEY_FALLBACKS"] = fallbacks
    serve(app)
    client = app.test_client()
    assert client.get("/").json == {"writes": 1}
    assert client.get("/").json == {"writes": 2}
    assert not caplog.records


def test_a_secret_key_of_a_subclass_may_be_rotated() -> None:
    app = ByProperty(__name__)
    serve(app)
    client = app.test_client()
    client.get("/")
    app.vault, app.config["SECRET_KEY_FALLBACKS"] = "a newer one", ["from a vault"]
    response = client.get("/")
    assert response.json == {"writes": 2}
    assert "Set-Cookie" in response.headers, "signed with the current key"
    app.config["SECRET_KEY_FALLBACKS"] = []
    assert client.get("/").json == {"writes": 3}


def test_a_wrong_secret_key_of_a_subclass_stops_the_application() -> None:
    class Wrong(Flask):
        secret_key = 4711  # type: ignore[assignment]

    with pytest.raises(SettingError, match=r"^SECRET_KEY is of type int; allowed: text, or bytes"):
        Session(Wrong(__name__), store="memory://")


@pytest.mark.parametrize(
    "wrong",
    [
        {"SECRET_KEY": 4711},
        {"SECRET_KEY": ["geheim"]},
        {"SECRET_KEY": "geheim\udcff"},
        {"SECRET_KEY_FALLBACKS": "geheim"},
        {"SECRET_KEY_FALLBACKS": b"geheim"},
        {"SECRET_KEY_FALLBACKS": [4711]},
    ],
    ids=ascii,
)
def test_wrong_secret_keys_found_late(
    one: Site, wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The keys from before are used, so a visitor stays logged in."""
    visitor = one.visitor()
    visitor.run(write)
    one.app.config.update(wrong)
    for writes in (2, 3):
        visitor.run(write)
        assert visitor.run(dict) == {"writes": writes}
    (message,) = errors(caplog)
    assert next(iter(wrong)) in message
    assert "geheim" not in message
    assert "4711" not in message


def test_a_wrong_secret_key_that_is_the_first_one(caplog: pytest.LogCaptureFixture) -> None:
    """No valid key came before it, so requests that need one fail, and the log says why."""
    app = Flask(__name__)
    serve(app)
    app.config["SECRET_KEY"] = 4711
    client = app.test_client()
    assert client.get("/").status_code == 500
    says = "SECRET_KEY is of type int; allowed: text, or bytes"
    assert any(says in each for each in errors(caplog))
    app.config["SECRET_KEY"] = "right"
    assert client.get("/").json == {"writes": 1}
    assert client.get("/").json == {"writes": 2}
