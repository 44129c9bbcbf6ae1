"""G10: cookies done right: Flask's attributes, caches kept out, none set without need."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import flask
import pytest
from flask import Response
from werkzeug.test import TestResponse

from flask_gsession.events import SessionRefused
from tests.harness.apps import Site, SiteMaker, Visitor

Attributes = dict[str, Any]


def visitor_with(site: Site, **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values))
    return visitor


def cookies_of(response: TestResponse) -> list[tuple[str, str, Attributes]]:
    """Name, value and attributes of each cookie that the response sets."""
    found = []
    for line in response.headers.getlist("Set-Cookie"):
        (name, value), *attributes = (part.split("=", 1) for part in line.split("; "))
        found.append(
            (name, value, {key: value for key, *rest in attributes for value in rest or [True]})
        )
    return found


def the_cookie(response: TestResponse) -> tuple[str, Attributes]:
    """The value and the attributes of the one cookie that the response sets."""
    ((name, value, attributes),) = cookies_of(response)
    assert name == "session"
    return value, attributes


# Attributes ----------------------------------------------------------------------------------

ATTRIBUTES: list[tuple[dict[str, Any], Attributes]] = [
    ({}, {"HttpOnly": True, "Path": "/"}),
    ({"SESSION_COOKIE_HTTPONLY": False}, {"Path": "/"}),
    ({"SESSION_COOKIE_SECURE": True}, {"HttpOnly": True, "Path": "/", "Secure": True}),
    ({"SESSION_COOKIE_PATH": "/do"}, {"HttpOnly": True, "Path": "/do"}),
    ({"APPLICATION_ROOT": "/do"}, {"HttpOnly": True, "Path": "/do"}),
    (
        {"SESSION_COOKIE_DOMAIN": "shop.example"},
        {"HttpOnly": True, "Path": "/", "Domain": "shop.example"},
    ),
    ({"SESSION_COOKIE_SAMESITE": "Lax"}, {"HttpOnly": True, "Path": "/", "SameSite": "Lax"}),
    ({"SESSION_COOKIE_SAMESITE": "strict"}, {"HttpOnly": True, "Path": "/", "SameSite": "Strict"}),
    (
        {
            "SESSION_COOKIE_SAMESITE": "None",
            "SESSION_COOKIE_SECURE": True,
            "SESSION_COOKIE_PARTITIONED": True,
        },
        {"HttpOnly": True, "Path": "/", "Secure": True, "SameSite": "None", "Partitioned": True},
    ),
]


def test_every_cookie_carries_the_attributes_of_the_settings(make_site: SiteMaker) -> None:
    for config, expected in ATTRIBUTES:
        site = make_site(config=config)
        base_url = "https://shop.example" if config else "http://localhost"
        visitor = site.visitor()

        def ask(request: Any, visitor: Visitor = visitor, base_url: str = base_url) -> Any:
            return visitor.ask(request, base_url=base_url)

        value, attributes = the_cookie(ask(lambda session: session.update(a=1)))
        assert attributes == expected, config
        rotated, attributes = the_cookie(ask(lambda session: session.rotate()))
        assert attributes == expected, config
        assert rotated not in ("", value)
        for end in (
            lambda session: session.destroy(),
            lambda session: session.clear(),
        ):
            value, attributes = the_cookie(ask(end))
            assert value == ""
            assert parsedate_to_datetime(attributes.pop("Expires")) < datetime.now(UTC)
            assert attributes.pop("Max-Age") == "0"
            assert attributes == expected, config
            assert ask(dict).status_code == 200
            ask(lambda session: session.update(a=1))


def test_the_browser_forgets_the_deleted_cookie(make_site: SiteMaker) -> None:
    site = make_site(
        config={
            "SESSION_COOKIE_DOMAIN": "example.com",
            "SESSION_COOKIE_PATH": "/do",
            "SESSION_COOKIE_SECURE": True,
            "SESSION_COOKIE_SAMESITE": "Lax",
        }
    )
    visitor = site.visitor()
    there = {"base_url": "https://www.example.com"}
    visitor.run(lambda session: session.update(a=1), **there)
    assert visitor.run(dict, **there) == {"a": 1}
    visitor.run(lambda session: session.destroy(), **there)
    assert visitor.get_cookie("session", "example.com", "/do") is None


@pytest.mark.parametrize("name", ["sid", "__Host-session", "__Secure-id"])
def test_the_cookie_may_have_another_name(make_site: SiteMaker, name: str) -> None:
    for site in (
        make_site(config={"SESSION_COOKIE_NAME": name, "SESSION_COOKIE_SECURE": True}),
        make_site(cookie_name=name, config={"SESSION_COOKIE_SECURE": True}),
    ):
        visitor = site.visitor()
        there = {"base_url": "https://localhost"}
        response = visitor.ask(lambda session: session.update(a=1), **there)
        assert [found for found, _, _ in cookies_of(response)] == [name]
        assert visitor.run(dict, **there) == {"a": 1}


# Caches --------------------------------------------------------------------------------------


def test_every_response_that_depends_on_the_session_sets_vary(make_site: SiteMaker) -> None:
    site = make_site(conflict="reject")
    for request in (
        dict,
        lambda session: session.update(a=1),
        lambda session: session.rotate(),
        lambda session: session.handle,
        lambda session: session.destroy(),
        lambda session: session.update(a=object()),
        lambda session: (session.get("a"), flask.abort(404)),
        lambda session: (session.get("a"), 1 // 0),
        lambda session: (session.get("a"), flask.redirect("/untouched"))[1],
        lambda session: (session.get("a"), Response(iter("stream")))[1],
    ):
        for visitor in (site.visitor(), visitor_with(site, a=0)):
            response = visitor.ask(request)
            assert "Cookie" in response.vary
            response.close()


def test_other_vary_headers_of_a_response_stay(site: Site) -> None:
    """Also in several lines, as flask-cors adds one of its own."""

    def look(session: Any) -> Response:
        response = Response(headers=[("Vary", "Accept"), ("vary", "Origin")])
        session.get("a")
        return response

    assert set(site.visitor().ask(look).vary) == {"Accept", "Origin", "Cookie"}


def test_no_cache_keeps_an_answer_with_our_cookie(site: Site) -> None:
    visitor = site.visitor()
    for request in (
        lambda session: session.update(a=1),
        lambda session: session.rotate(),
        lambda session: setattr(session, "permanent", True),
        lambda session: session.destroy(),
    ):
        response = visitor.ask(
            lambda session, request=request: (
                request(session),
                Response("", headers={"Cache-Control": "public, max-age=600"}),
            )[1]
        )
        assert cookies_of(response)
        assert response.cache_control.no_store
    response = visitor_with(site, a=0).ask(dict)
    assert "Cache-Control" not in response.headers


# Two cookies of the name ---------------------------------------------------------------------


def send(site: Site, cookies: str, request: Any) -> TestResponse:
    client = site.app.test_client(use_cookies=False)
    assert isinstance(client, Visitor)
    client.site = site
    return client.ask(request, environ_overrides={"HTTP_COOKIE": cookies})


def test_two_different_cookies_of_ours_are_both_refused(site: Site) -> None:
    """One of them may have been planted from another path or subdomain."""
    mine, theirs = visitor_with(site, who="me").cookie, visitor_with(site, who="them").cookie
    seen: list[Any] = []
    for header in (
        f"session={mine}; session={theirs}",
        f"session={theirs}; session={mine}",
        f"session={mine}; session=x; session={theirs}",
        f"session={mine}; session={mine}; session={theirs}",
    ):
        with site.counted() as count:
            send(site, header, lambda session: seen.append(dict(session)))
        assert not count.calls
        assert seen.pop() == {}
        response = send(site, header, lambda session: session.update(new=True))
        value, _ = the_cookie(response)
        assert value not in (mine, theirs)
        assert site.visitor(value).run(dict) == {"new": True}
    assert {event.reason for event in site.happened(SessionRefused)} == {"two cookies"}
    assert site.visitor(mine).run(dict) == {"who": "me"}


@pytest.mark.parametrize(
    "log_out", [lambda session: session.destroy(), lambda session: session.clear()]
)
def test_a_logout_ends_both_of_two_sessions(site: Site, log_out: Any) -> None:
    """Or it would answer that it had ended one, and a planted cookie would keep it alive."""
    mine, theirs = visitor_with(site, who="me").cookie, visitor_with(site, who="them").cookie
    response = send(site, f"session={mine}; session=x; session={theirs}", log_out)
    assert the_cookie(response)[0] == ""
    assert not site.stored()


def test_a_logout_ends_no_more_than_eight_sessions(site: Site) -> None:
    """Each costs a round trip, and a client can send many cookies."""
    cookies = [visitor_with(site, number=number).cookie for number in range(10)]
    with site.counted() as count:
        header = "; ".join(f"session={cookie}" for cookie in cookies)
        send(site, header, lambda session: session.destroy())
    assert count.calls == ["delete"] * 8


def test_a_cookie_that_we_did_not_sign_locks_nobody_out(make_site: SiteMaker) -> None:
    """Another application on the host may have set it, or a page of a sibling domain."""
    site, other = make_site(), make_site(config={"SECRET_KEY": "of another application"})
    mine, theirs = visitor_with(site, who="me").cookie, visitor_with(other, who="them").cookie
    assert mine is not None
    token, _, signature = mine.partition(".")
    foreign = [
        "session=",
        "session",
        "session=x",
        f"session={theirs}",
        f'session="{mine}"',
        f"session={token}",
        f"session={token}.{signature[::-1]}",
        f"session={'A' * 43}.{signature}",
        "session=\xe4\xa0",
        f"Session={theirs}",
        "; ".join(f"session={number:043}.{signature}" for number in range(180)),
        "; ".join(f"session={number}" for number in range(1000)),
    ]
    seen: list[Any] = []
    for each in foreign:
        for header in (f"session={mine}; {each}", f"{each}; session={mine}"):
            send(site, header, lambda session: seen.append(dict(session)))
            assert seen.pop() == {"who": "me"}, header[:200]
    assert not site.happened(SessionRefused)

    # Without ours there is no session, and the one that is started is found beside them.
    for each in foreign:
        with site.counted() as count:
            value, _ = the_cookie(send(site, each, lambda session: session.update(new=True)))
        assert count.calls == ["create"]
        send(site, f"{each}; session={value}", lambda session: seen.append(dict(session)))
        assert seen.pop() == {"new": True}, each[:200]


def test_an_outdated_signature_beside_the_current_one_is_one_token(make_site: SiteMaker) -> None:
    before = make_site(config={"SECRET_KEY": "old"})
    old = visitor_with(before, who="me").cookie
    config = {"SECRET_KEY": "new", "SECRET_KEY_FALLBACKS": ["old"]}
    site = make_site(config=config, store=before.store)
    new, _ = the_cookie(site.visitor(old).ask(dict))
    for header in (f"session={old}; session={new}", f"session={new}; session={old}"):
        seen: list[Any] = []
        response = send(site, header, lambda session, seen=seen: seen.append(dict(session)))
        assert seen == [{"who": "me"}]
        assert not cookies_of(response)


def test_the_work_for_planted_cookies_is_bounded(site: Site) -> None:
    """Whoever sends thousands that look like ours gets no session, and no store is asked."""
    mine = visitor_with(site, who="me").cookie
    assert mine is not None
    signature = mine.partition(".")[2]
    planted = "; ".join(f"session={number:043}.{signature}" for number in range(5000))
    seen: list[Any] = []
    with site.counted() as count:
        send(site, planted, lambda session: seen.append(dict(session)))
    assert not count.calls
    assert seen == [{}]
    (event,) = site.happened(SessionRefused)
    assert event.reason == "too many cookies"


@pytest.mark.parametrize("lead", ["\xa0", "\x85", "\x1c", "\x1f", "\x0b", "\x0c", "\r", "\n", "\0"])
def test_only_space_and_tab_go_around_a_cookie(make_site: SiteMaker, lead: str) -> None:
    """RFC 6265, 4.2.1. To a browser, other bytes make another name, without ``__Host-``."""
    config = {"SESSION_COOKIE_NAME": "__Host-session", "SESSION_COOKIE_SECURE": True}
    site = make_site(config=config)
    visitor = site.visitor()
    (found,) = cookies_of(
        visitor.ask(lambda session: session.update(who="me"), base_url="https://localhost")
    )
    pair = f"__Host-session={found[1]}"
    seen: list[Any] = []
    for header, expected in (
        (pair, {"who": "me"}),
        (f"a=1;{pair};b=2", {"who": "me"}),
        (f"a=1; \t {pair} \t; b=2", {"who": "me"}),
        (f"{lead}{pair}", {}),
        (f"a=1; {lead}{pair}", {}),
        (f"a=1;{lead} {pair}", {}),
        (f"{pair}{lead}", {}),
        (f"{pair}{lead}; a=1", {}),
    ):
        send(site, header, lambda session: seen.append(dict(session)))
        assert seen.pop() == expected, header


def test_two_equal_cookies_are_one(site: Site) -> None:
    cookie = visitor_with(site, who="me").cookie
    seen: list[Any] = []
    send(
        site,
        f"session={cookie}; a=b; session={cookie}",
        lambda session: seen.append(dict(session)),
    )
    assert seen == [{"who": "me"}]


# When a cookie is set, and when not ----------------------------------------------------------


def test_an_unchanged_cookie_is_not_set_again(site: Site) -> None:
    visitor = visitor_with(site, a=0, items=[])
    tab = visitor.another_tab()
    for request in (
        dict,
        lambda session: session.update(a=1),
        lambda session: session["items"].append(1),
        lambda session: session.pop("a"),
        lambda session: session.update_atomic("a", lambda _: 2),
        lambda session: flask.flash("hello"),
        lambda session: flask.get_flashed_messages(),
        lambda session: setattr(session, "modified", True),
        lambda session: setattr(session, "permanent", False),
        lambda session: session.set_lifetime(7000),
        lambda session: session.reload(),
        lambda session: (session.clear(), session.update(b=1)),
        lambda session: site.before_a_write(
            lambda: tab.run(lambda session: session.update(c=1))
        ) or session.update(d=1),
        lambda session: session.pop("b"),
    ):  # fmt: skip
        site.clock.advance(100)  # a renewal is due
        response = visitor.ask(request)
        assert response.status_code == 200
        assert not cookies_of(response)
    assert visitor.run(dict) == {"c": 1, "d": 1}


def test_one_response_sets_one_cookie(site: Site) -> None:
    for request in (
        lambda session: (session.rotate(), session.update(a=1), session.rotate()),
        lambda session: (session.destroy(), session.update(a=1)),
        lambda session: (session.update(b=1), session.destroy(), session.update(a=1)),
        lambda session: (session.rotate(), session.destroy()),
        lambda session: (session.clear(), session.rotate()),
        lambda session: (setattr(session, "permanent", True), session.rotate()),
        lambda session: (session.destroy(), session.destroy()),
    ):
        visitor = visitor_with(site, start=0)
        before = visitor.cookie
        response = visitor.ask(request)
        value, _ = the_cookie(response)
        assert value != before
        assert visitor.run(lambda session: session.new) is (value == "")
        assert site.visitor(before).run(lambda session: session.get("start")) in (None, 0)


def test_a_cookie_is_deleted_only_where_there_is_one(site: Site) -> None:
    logout = lambda session: session.destroy()  # noqa: E731
    visitor = visitor_with(site, a=0)
    cookie = visitor.cookie
    assert not cookies_of(site.visitor().ask(logout))
    assert the_cookie(visitor.ask(logout))[0] == ""
    assert not cookies_of(visitor.ask(logout))
    for left_over in (cookie, "x" * 66):  # of an ended session, of nobody
        assert the_cookie(site.visitor(left_over).ask(logout))[0] == ""


def test_other_cookies_of_the_view_are_left_alone(site: Site) -> None:
    def view(session: Any) -> Response:
        session["a"] = 1
        response = Response("")
        response.set_cookie("theme", "dark")
        return response

    names = [name for name, _, _ in cookies_of(site.visitor().ask(view))]
    assert sorted(names) == ["session", "theme"]


def test_an_error_page_saves_the_session_as_in_flask(site: Site) -> None:
    for fail, status in (
        (lambda: flask.abort(404), 404),
        (lambda: 1 // 0, 500),
        (lambda: flask.abort(flask.redirect("/untouched")), 302),
    ):
        visitor = site.visitor()
        response = visitor.ask(lambda session, fail=fail: (session.update(a=1), fail()))
        assert response.status_code == status
        assert visitor.run(dict) == {"a": 1}


# Permanent sessions --------------------------------------------------------------------------


def expiry(response: TestResponse) -> datetime | None:
    expires = the_cookie(response)[1].get("Expires")
    return parsedate_to_datetime(expires) if expires else None


def test_a_permanent_cookie_lives_as_long_as_the_session(make_site: SiteMaker) -> None:
    lifetime = timedelta(days=10)
    site = make_site(config={"PERMANENT_SESSION_LIFETIME": lifetime}, renew_interval=60)

    def end(visitor: Visitor) -> datetime:
        expires: datetime = visitor.run(lambda session: session.expires_at)
        return expires.replace(microsecond=0)

    def now() -> datetime:
        return datetime.fromtimestamp(site.clock(), UTC)

    def enter(session: Any) -> None:
        session.permanent = True
        session["a"] = 1

    visitor = site.visitor()
    set_at_first = expiry(visitor.ask(enter))
    assert set_at_first == end(visitor)
    assert set_at_first is not None
    assert lifetime <= set_at_first - now() + timedelta(seconds=1)
    assert set_at_first - now() <= lifetime + timedelta(seconds=60)

    site.clock.advance(59)
    assert not cookies_of(visitor.ask(dict))
    site.clock.advance(2)
    refreshed = expiry(visitor.ask(dict))
    assert refreshed == end(visitor)
    assert refreshed - set_at_first == timedelta(seconds=61)
    assert not cookies_of(visitor.ask(lambda session: session.update(a=2)))
    site.clock.advance(61)
    assert expiry(visitor.ask(lambda session: session.update(a=3))) == end(visitor)

    assert expiry(visitor.ask(lambda session: session.rotate())) == end(visitor)
    site.clock.advance(lifetime.total_seconds() - 1)
    assert visitor.run(dict) == {"_permanent": True, "a": 3}


def test_permanence_may_be_taken_back(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    for permanent in (True, False, True):
        response = visitor.ask(
            lambda session, permanent=permanent: setattr(session, "permanent", permanent)
        )
        assert (expiry(response) is not None) is permanent
        assert visitor.run(lambda session: session.permanent) is permanent
    assert not cookies_of(visitor.ask(lambda session: setattr(session, "permanent", True)))


def test_a_lifetime_moves_a_permanent_cookie(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    visitor.run(lambda session: setattr(session, "permanent", True))
    for seconds in (3600, 86400):
        set_to = expiry(visitor.ask(lambda session, s=seconds: session.set_lifetime(s)))
        assert set_to is not None
        left = set_to - datetime.fromtimestamp(site.clock(), UTC)
        assert timedelta(seconds=-1) <= left - timedelta(seconds=seconds) <= timedelta(seconds=60)


def test_a_session_cookie_has_no_end(site: Site) -> None:
    response = site.visitor().ask(lambda session: (session.update(a=1), session.set_lifetime(60)))
    assert not {"Expires", "Max-Age"} & set(the_cookie(response)[1])


# The token in a header -----------------------------------------------------------------------


def test_a_client_may_ask_for_the_token_in_a_header(make_site: SiteMaker) -> None:
    site = make_site(token_header="X-Session")

    def ask(token: str, request: Any, **options: Any) -> TestResponse:
        response = site.visitor().ask(request, headers={"X-Session": token}, **options)
        assert "Set-Cookie" not in response.headers
        assert response.status_code == 200
        assert {"Cookie", "X-Session"} <= {name for name in response.vary}  # noqa: C416
        return response

    seen: list[Any] = []
    look = lambda session: seen.append(dict(session))  # noqa: E731

    response = ask("", lambda session: session.update(a=1))
    token = response.headers["X-Session"]
    assert response.cache_control.no_store
    assert "X-Session" not in ask(token, look).headers
    assert "X-Session" not in ask(token, lambda session: session.update(b=2)).headers
    rotated = ask(token, lambda session: session.rotate(0)).headers["X-Session"]
    assert rotated not in ("", token)
    ask(token, look)
    ask(rotated, look)
    assert ask(rotated, lambda session: session.destroy()).headers["X-Session"] == ""
    ask(rotated, look)
    assert seen == [{"a": 1}, {}, {"a": 1, "b": 2}, {}]


def test_the_header_goes_before_the_cookie(make_site: SiteMaker) -> None:
    """Otherwise a page of another site could mix its own cookie into an API client's request."""
    site = make_site(token_header="X-Session")
    browser = visitor_with(site, who="browser")
    client = site.visitor().ask(
        lambda session: session.update(who="client"), headers={"X-Session": ""}
    )
    headers = {"X-Session": client.headers["X-Session"]}
    assert browser.run(dict, headers=headers) == {"who": "client"}
    assert browser.run(dict, headers={"X-Session": "nonsense"}) == {}
    assert browser.run(dict, headers={"X-Session": ""}) == {}
    assert browser.run(dict) == {"who": "browser"}


def test_a_header_means_nothing_where_it_is_not_set_up(site: Site) -> None:
    browser = visitor_with(site, who="browser")
    assert browser.cookie is not None
    assert site.visitor().run(dict, headers={"X-Session": browser.cookie}) == {}
    assert site.visitor().run(dict, query_string={"session": browser.cookie}) == {}
