"""G7: the token is secret, and tokens that we did not sign never reach the store."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session
from itsdangerous import URLSafeTimedSerializer
from werkzeug.test import TestResponse

from flask_gsession import Session, SettingError, StoreError
from flask_gsession.errors import StoreUnavailable
from flask_gsession.events import SessionRefused
from flask_gsession.request.session import lifecycle_of
from flask_gsession.tokens import session_key
from tests.harness.apps import Site, SiteMaker, Visitor

SIGNED = re.compile(r"[A-Za-z0-9_-]{43}\.[A-Za-z0-9_-]{22}")


def visitor_with(site: Site, **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values))
    return visitor


def send(site: Site, cookies: str, function: Callable[[Any], object]) -> TestResponse:
    """A request with this very `Cookie` header, in the form a WSGI server passes on."""
    client = site.app.test_client(use_cookies=False)
    assert isinstance(client, Visitor)
    client.site = site
    return client.ask(function, environ_overrides={"HTTP_COOKIE": cookies})


def look(session: Any) -> None:
    assert dict(session) == {}
    assert session.new
    assert session.handle is None


def altered(text: str) -> Iterator[str]:
    """The text with each of its characters exchanged for another one."""
    for index, char in enumerate(text):
        yield f"{text[:index]}{'B' if char == 'A' else 'A'}{text[index + 1 :]}"


def bad_cookies(good: str, foreign: dict[str, str]) -> dict[str, str]:
    """Cookies that hold no token of ours, by name. `good` is a right one."""
    token, _, signature = good.partition(".")
    bad = {
        "empty": "",
        "empty quoted": '""',
        "1 character": "x",
        "42 characters": "x" * 42,
        "43 characters": "x" * 43,
        "44 characters": "x" * 44,
        "66 characters": "x" * 66,
        "4 KB": "x" * 4096,
        "200 KB": "x" * 200_000,
        "4 KB with a signature": "x" * 4096 + "." + signature,
        "NUL by quoted octal": rf'"{token}\000.{signature}"',
        "line ends by quoted octal": rf'"{good}\015\012Set-Cookie: a=b"',
        "quoted octal of the token": '"' + "".join(f"\\{ord(char):03o}" for char in good) + '"',
        "raw NUL": f"{good}\0",
        "invalid UTF-8": f"{token}\xff.{signature}",
        "UTF-8": "größe".encode().decode("latin-1") + "." + signature,
        "percent-encoded": good.replace(".", "%2E"),
        "tag": "{tag}",
        "glob": "*",
        "question mark": "?" * 43 + "." + signature,
        "lock": f"{token}:lock.{signature}",
        "path": f"../../{token}.{signature}",
        "Redis key": f"gsession:{{{session_key(token)}}}",
        "handle": session_key(token),
        "handle with a signature": f"{session_key(token)}.{signature}",
        "operator": '{"$gt": ""}',
        "SQL": "' OR '1'='1",
        "space inside": f"{token} .{signature}",
        "unsigned": token,
        "no token": f".{signature}",
        "no signature": f"{token}.",
        "signature cut": good[:-1],
        "signature longer": f"{good}A",
        "two signatures": f"{good}.{signature}",
        "two points": f"{token}..{signature}",
        "signature first": f"{signature}.{token}",
        "signature of another": f"{signature}{token[22:]}.{signature}",
        **foreign,
    }
    bad |= {f"flipped {number}": text for number, text in enumerate(altered(good))}
    return bad


def test_tokens_we_did_not_sign_never_reach_the_store(make_site: SiteMaker) -> None:
    site = make_site(token_header="X-Session")
    good = visitor_with(site, a=1).cookie
    assert good is not None
    assert SIGNED.fullmatch(good)
    foreign = {
        "another app's": visitor_with(make_site(config={"SECRET_KEY": "theirs"}), a=1).cookie,
        "another cookie's": visitor_with(make_site(cookie_name="other"), a=1).cookie,
        "Flask's own": URLSafeTimedSerializer("a key for tests", "cookie-session").dumps({"a": 1}),
    }
    stored = site.stored()
    for name, value in bad_cookies(good, foreign).items():  # type: ignore[arg-type]
        with site.counted() as count:
            response = send(site, f"session={value}", look)
        assert response.status_code == 200, name
        assert (count.calls, count.trips) == ([], 0), name
        assert "Set-Cookie" not in response.headers, name
        if value.isprintable() and value.isascii():
            with site.counted() as count:
                response = site.visitor().ask(look, headers={"X-Session": value})
            assert response.status_code == 200, name
            assert (count.calls, count.trips) == ([], 0), name
    assert site.stored() == stored
    assert site.visitor(good).run(dict) == {"a": 1}


def test_tokens_we_did_not_sign_are_not_adopted(site: Site) -> None:
    good = visitor_with(site, a=1).cookie
    assert good is not None
    for name, value in bad_cookies(good, {}).items():
        if name.startswith("flipped") and name not in ("flipped 0", "flipped 65"):
            continue
        response = send(site, f"session={value}", lambda session: session.update(b=2))
        assert response.status_code == 200, name
        cookie = response.headers["Set-Cookie"].partition(";")[0].removeprefix("session=")
        assert SIGNED.fullmatch(cookie), name
        assert cookie.partition(".")[0] not in value, name
        assert site.visitor(cookie).run(dict) == {"b": 2}, name
        assert site.visitor(good).run(dict) == {"a": 1}, name


def test_refusals_are_counted_without_the_token(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    assert visitor.cookie is not None
    send(site, "session=x", look)
    send(site, f"session={next(altered(visitor.cookie))}", look)
    assert site.happened(SessionRefused) == [
        SessionRefused("malformed"),
        SessionRefused("bad signature"),
    ]


def test_other_cookies_are_none_of_our_business(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    for header in (
        f"a=b; session={visitor.cookie}",
        f"session={visitor.cookie}; sessions=x; my-session=y",
        f"session={visitor.cookie};a=b;;=;c",
        f' a="\\000";session={visitor.cookie} ; session2="',
    ):
        assert send(site, header, lambda session: session["a"]).status_code == 200
    for header in (
        f"Session={visitor.cookie}",
        f"xsession={visitor.cookie}",
        "session",
        "; ;=",
        "",
    ):
        assert send(site, header, look).status_code == 200


def test_an_unknown_token_is_looked_up_once_and_not_adopted(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    cookie, handle = visitor.cookie, visitor.run(lambda session: session.handle)
    visitor.run(lambda session: session.destroy())
    again = site.visitor(cookie)
    with site.counted() as count:
        again.run(lambda session: (look(session), look(session)))
    assert count.calls == ["load"]
    assert site.happened(SessionRefused) == [SessionRefused("unknown", handle)]
    with site.counted() as count:
        again.run(lambda session: session.update(b=2))
    assert count.calls == ["load", "create"]
    assert again.cookie != cookie
    assert again.run(dict) == {"b": 2}
    assert site.visitor(cookie).run(dict) == {}


def test_an_expired_token_is_counted_apart_and_treated_as_unknown(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    visitors = {reason: visitor_with(site, a=1) for reason in ("expired", "unknown")}
    handles = {reason: session_key(each.token) for reason, each in visitors.items()}
    cookies = {reason: each.cookie for reason, each in visitors.items()}
    site.store.store.delete(handles["unknown"])
    site.clock.advance(32 * 86400)
    caplog.clear()
    headers = []
    for reason, visitor in visitors.items():
        site.events.clear()
        with site.counted() as count:
            headers.append(visitor.ask(look).headers)
        assert count.calls == ["load"]
        assert site.happened(SessionRefused) == [SessionRefused(reason, handles[reason])]
        with site.counted() as count:
            visitor.run(lambda session: session.update(b=2))
        assert count.calls == ["load", "create"]
        assert visitor.cookie != cookies[reason]
        assert visitor.run(dict) == {"b": 2}
        assert site.visitor(cookies[reason]).run(dict) == {}
    assert headers[0] == headers[1]
    assert not [line for line in caplog.records if line.levelno >= logging.WARNING]


def test_tokens_are_256_random_bits(make_site: SiteMaker) -> None:
    for length, characters in ((None, 43), (16, 22), (64, 86)):
        site = make_site(**({} if length is None else {"id_length": length}))
        tokens = {visitor_with(site, a=1).token for _ in range(20)}
        assert len(tokens) == 20
        assert {len(token) for token in tokens} == {characters}
        for position in range(characters - 1):
            assert len({token[position] for token in tokens}) > 1


def test_the_store_holds_the_digest_only(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    (key,) = site.stored()
    assert session_key(visitor.token) in key
    assert visitor.run(lambda session: session.handle) == session_key(visitor.token)


def test_the_handle_is_not_a_token(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    handle = visitor.run(lambda session: session.handle)
    assert visitor.cookie is not None
    signature = visitor.cookie.partition(".")[2]
    for cookie in (handle, f"{handle}.{signature}"):
        send(site, f"session={cookie}", look)


def test_an_application_may_make_its_own_tokens(make_site: SiteMaker) -> None:
    numbers = iter(range(1000))
    site = make_site(token_factory=lambda: f"own-{next(numbers):040}")
    visitor = visitor_with(site, a=1)
    assert visitor.token == f"own-{0:040}"
    visitor.run(lambda session: session.rotate())
    assert visitor.token == f"own-{1:040}"
    assert visitor.run(dict) == {"a": 1}


def test_a_token_factory_that_returns_no_token_is_named(make_site: SiteMaker) -> None:
    for factory in (
        lambda: "short",
        lambda: "x" * 300,
        lambda: b"x" * 43,
        lambda: "with a point." + "x" * 30,
    ):
        site = make_site(token_factory=factory, config={"TESTING": True})
        with pytest.raises(SettingError, match="SESSION_TOKEN_FACTORY") as caught:
            visitor_with(site, a=2)
        assert str(factory()) not in str(caught.value)


def test_a_token_factory_that_repeats_itself_is_named(make_site: SiteMaker) -> None:
    site = make_site(token_factory=lambda: "always-the-very-same-token", config={"TESTING": True})
    first = visitor_with(site, a=1)
    with pytest.raises(StoreError, match="SESSION_TOKEN_FACTORY"):
        visitor_with(site, a=2)
    assert first.run(dict) == {"a": 1}


# Secret keys ---------------------------------------------------------------------------------


def test_a_fallback_key_is_accepted_and_replaced(make_site: SiteMaker) -> None:
    before = make_site(config={"SECRET_KEY": "old"})
    during = make_site(
        config={"SECRET_KEY": "new", "SECRET_KEY_FALLBACKS": ["older", "old"]}, store=before.store
    )
    after = make_site(config={"SECRET_KEY": "new"}, store=before.store)
    old = visitor_with(before, a=1)

    visitor = during.visitor(old.cookie)
    assert "Set-Cookie" not in visitor.get("/untouched").headers
    for request in (dict, lambda session: session.update(b=2)):
        visitor = during.visitor(old.cookie)
        response = visitor.ask(request)
        assert "no-store" in response.headers["Cache-Control"]
        assert visitor.token == old.token
        assert visitor.cookie != old.cookie
        assert "Set-Cookie" not in visitor.ask(dict).headers
    assert after.visitor(visitor.cookie).run(dict) == {"a": 1, "b": 2}

    with after.counted() as count:
        assert after.visitor(old.cookie).run(dict) == {}
    assert not count.calls
    stored = during.stored()
    assert [len(stored), len(before.stored())] == [1, 1]


def test_the_secret_key_may_change_while_the_application_runs(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    old = site.app.secret_key
    site.app.secret_key = b"bytes are fine"
    assert visitor.another_tab().run(dict) == {}
    site.app.config["SECRET_KEY_FALLBACKS"] = [old]
    assert visitor.run(dict) == {"a": 1}
    site.app.config["SECRET_KEY_FALLBACKS"] = None
    assert visitor.run(dict) == {"a": 1}


@pytest.mark.parametrize("key", [None, "", b""])
def test_without_a_secret_key_the_session_reads_as_empty_and_refuses_writes(
    make_site: SiteMaker, key: Any
) -> None:
    """As Flask documents it."""
    cookie = visitor_with(make_site(), a=1).cookie
    site = make_site(config={"SECRET_KEY": key, "SECRET_KEY_FALLBACKS": ["a key for tests"]})
    visitor = site.visitor(cookie)

    def view(session: Any) -> None:
        assert dict(session) == {}
        assert session.get("a") is None
        assert "a" not in session
        for write in (
            lambda: session.update(a=1),
            lambda: session.setdefault("a", 1),
            lambda: session.pop("a", None),
            lambda: session.clear(),
            lambda: session.__setitem__("a", 1),
        ):
            with pytest.raises(RuntimeError, match="secret_key"):
                write()

    with site.counted() as count:
        response = visitor.ask(view)
    assert response.status_code == 200
    assert "Set-Cookie" not in response.headers
    assert (count.calls, count.trips) == ([], 0)


def test_a_further_session_needs_the_secret_key_too() -> None:
    app = Flask(__name__)
    Session(app, store="memory://")
    second = Session(app, store="memory://", cookie_name="second")
    with app.test_request_context("/"):
        assert dict(second.session) == {}
        with pytest.raises(RuntimeError, match="secret_key"):
            second.session["a"] = 1
        with pytest.raises(RuntimeError, match="secret_key"):
            session["a"] = 1


# The secret stays secret ---------------------------------------------------------------------


def test_the_token_is_nowhere_but_in_the_cookie(
    make_site: SiteMaker, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A scan of logs at DEBUG, of `repr`, events, errors, tracebacks and everything stored."""
    caplog.set_level(logging.DEBUG)
    site = make_site(conflict="reject")
    seen: list[str] = []
    secrets: set[str] = set()
    value = "a-stored-value-for-nobody-else"

    @site.app.errorhandler(Exception)
    def failed(error: Exception) -> tuple[str, int]:
        frames = traceback.TracebackException.from_exception(error, capture_locals=True)
        for line in frames.format():
            # Flask's own frames hold the request, and with it the cookie.
            if "flask_gsession" in line:
                seen.append(line)
        seen.extend((str(error), repr(error), repr(vars(error))))
        return "failed", 500

    def outage() -> None:
        raise StoreUnavailable("the store is down")

    def visit(visitor: Visitor, request: Callable[[Any], object]) -> None:
        known = visitor.cookie

        def view(session: Any) -> None:
            seen.append(repr(session) + str(session) + format(session))
            request(session)
            seen.append(
                repr(session) + repr(session.handle) + repr(lifecycle_of(session).presented())
            )
            seen.append(
                repr(site.ext) + repr(site.app.extensions) + repr(site.app.session_interface)
            )

        response = visitor.ask(view)
        seen.append(response.text)
        for cookie in (known, visitor.cookie):
            secrets.update(cookie.split(".") if cookie else ())

    visitor = site.visitor()
    visit(visitor, lambda session: session.update(a=0, secret=value))
    tab = visitor.another_tab()
    for request in (
        dict,
        lambda session: session.update(a=1, secret=value),
        lambda session: session.update_atomic("a", lambda a: a + 1),
        lambda session: session.update(b=object(), secret=value),
        lambda session: session.rotate(60),
        lambda session: setattr(session, "permanent", True),
        lambda session: 1 // 0,
    ):
        visit(visitor, request)
        visit(tab, request)
    for operation in ("load", "create", "save", "replace", "delete", "renew"):
        site.store.before(operation, outage)
    site.clock.advance(10)
    visit(visitor, dict)
    visit(site.visitor(), lambda session: session.update(a=1))
    visit(visitor, lambda session: session.update(a=7))
    visit(visitor, lambda session: session.rotate())
    visit(visitor, lambda session: session.destroy())
    visit(visitor, dict)
    site.before_a_write(lambda: tab.run(lambda session: session.update(a=5)))
    visit(visitor, lambda session: session.update(a=6))
    corrupt = visitor.another_tab()
    site.store.after("load", lambda: site.app.logger.info("loaded"))
    visit(corrupt, dict)
    visit(visitor, lambda session: session.destroy())
    visit(tab, lambda session: session.update(a=1))
    send(site, f"session={tab.cookie}x", look)
    send(site, f"session={tab.cookie}; session={corrupt.cookie}", look)

    assert len(secrets) >= 6
    assert any("the store is down" in text for text in seen)
    texts = [*seen, caplog.text, repr(site.events), repr(site.stored())]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*.sqlite3*")]
    for text in texts:
        for secret in secrets:
            at = text.find(secret)
            assert at < 0, text[max(0, at - 300) : at + 20]
    ours = [record.getMessage() for record in caplog.records if "gsession" in record.name]
    assert ours
    assert not any(value in text for text in (*ours, repr(site.events)))
