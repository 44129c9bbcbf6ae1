"""`SESSION_TOKEN_HEADER`: the session token in a header, for clients that keep no cookies."""

from __future__ import annotations

from typing import Any

import pytest
from flask import request
from werkzeug.test import TestResponse

from flask_gsession import StoreUnavailable
from flask_gsession.events import SessionRefused
from flask_gsession.testing import FakeClock
from flask_gsession.tokens import TokenSigner, new_token
from tests.harness.apps import Site, SiteMaker, Visitor

HEADER = "X-Session"


class ApiClient:
    """Keeps its token like an API client: it sends the token from the last response with the next.

    :param token: the token to begin with; empty for a new client that asks for one.
    """

    def __init__(self, site: Site, token: str = "") -> None:
        self.token = token
        self._visitor = site.visitor()

    def ask(self, function: Any, **options: Any) -> TestResponse:
        """Send a request whose view calls `function(flask.session)`."""
        headers = {HEADER: self.token, **options.pop("headers", {})}
        response = self._visitor.ask(function, headers=headers, **options)
        self.token = response.headers.get(HEADER, self.token)
        assert not response.headers.getlist("Set-Cookie")
        return response

    def run(self, function: Any) -> Any:
        """The result of `function(flask.session)`."""
        result = []
        response = self.ask(lambda session: result.append(function(session)))
        assert response.status_code == 200, response.get_data(as_text=True)
        return result[0]


@pytest.fixture
def api(make_site: SiteMaker) -> Site:
    """An application with header tokens, on each store in turn."""
    return make_site(token_header=HEADER)


@pytest.fixture
def one(store_prefix: str, clock: FakeClock) -> Any:
    """Like the other fixture, on the memory store, for code that doesn't depend on the store."""
    with SiteMaker("memory://", store_prefix, clock) as make:
        yield make(token_header=HEADER)


def set_user(name: str) -> Any:
    return lambda session: session.update(user=name)


def whole(session: Any) -> dict[str, Any]:
    copy: dict[str, Any] = session.copy()
    return copy


# From the first request to the last ---------------------------------------------------------------


def test_the_life_of_a_header_token(api: Site) -> None:
    client = ApiClient(api)

    # An empty header asks for a token, which comes once the session holds something.
    response = client.ask(whole)
    assert HEADER not in response.headers
    assert client.run(whole) == {}
    assert api.stored() == {}

    response = client.ask(set_user("alice"))
    first = response.headers[HEADER]
    assert first
    assert client.run(whole) == {"user": "alice"}

    # The token does not come again with every response.
    response = client.ask(lambda session: session.update(step=1))
    assert HEADER not in response.headers
    assert client.run(whole) == {"user": "alice", "step": 1}

    response = client.ask(lambda session: session.rotate(grace=0))
    second = response.headers[HEADER]
    assert second
    assert second != first
    assert client.run(whole) == {"user": "alice", "step": 1}
    assert ApiClient(api, first).run(whole) == {}

    response = client.ask(lambda session: session.destroy())
    assert response.headers[HEADER] == ""
    assert api.stored() == {}
    assert ApiClient(api, second).run(whole) == {}

    # With the empty token that the client got, it can begin a new session.
    assert client.token == ""
    client.run(set_user("bob"))
    assert client.token not in ("", first, second)
    assert client.run(whole) == {"user": "bob"}


def test_a_rotated_token_serves_for_its_grace(api: Site) -> None:
    client = ApiClient(api)
    client.run(set_user("alice"))
    late = ApiClient(api, client.token)
    client.ask(lambda session: session.rotate(grace=10))
    assert late.token != client.token
    assert late.run(whole) == {"user": "alice"}
    response = late.ask(lambda session: session.update(late=True))
    assert HEADER not in response.headers, "who has the old token must not be given the new one"
    assert client.run(whole) == {"user": "alice", "late": True}
    api.clock.advance(11)
    assert late.run(whole) == {}
    assert client.run(whole) == {"user": "alice", "late": True}


def log_out(session: Any) -> None:
    session.destroy()


@pytest.mark.parametrize("end", ["logged out", "rotated", "expired", "never issued"])
def test_a_client_learns_that_its_token_leads_nowhere(end: str, api: Site) -> None:
    """By an empty token, at the first look at the session, and at no cost."""
    token = TokenSigner(["a key for tests"], "session").sign(TOKEN)
    client, other = ApiClient(api, token), ApiClient(api)
    if end != "never issued":
        client.run(set_user("alice"))
        other.token = token = client.token
    if end == "logged out":
        other.run(log_out)
    elif end == "rotated":
        other.run(lambda session: session.rotate(grace=0))
    elif end == "expired":
        api.clock.advance(8000)

    untouched = api.visitor().get("/untouched", headers={HEADER: token})
    assert HEADER not in untouched.headers
    with api.counted() as count:
        response = client.ask(whole)
    assert count.calls == ["load"]
    assert response.headers[HEADER] == ""
    assert response.cache_control.no_store
    assert client.token == ""
    with api.counted() as count:
        assert HEADER not in client.ask(whole).headers  # only once: it has no token now
    assert not count.calls

    # A cookie is left alone: the browser may hold a newer one when this response arrives.
    response = api.visitor(token).ask(whole)
    assert not response.headers.getlist("Set-Cookie")
    assert HEADER not in response.headers


@pytest.mark.parametrize("write", [set_user("bob"), whole], ids=["writing", "reading"])
def test_a_client_learns_that_its_session_has_ended(write: Any, api: Site) -> None:
    client, other = ApiClient(api), ApiClient(api)
    client.run(set_user("alice"))
    other.token = client.token

    def view(session: Any) -> None:
        whole(session)
        other.run(log_out)
        write(session)

    response = client.ask(view)
    if write is whole:  # nobody looked again
        assert HEADER not in response.headers
        response = client.ask(view)
    assert response.headers[HEADER] == ""
    assert api.stored() == {}


def fail() -> None:
    raise StoreUnavailable("by the test")


def test_an_outage_says_nothing_of_the_token(api: Site) -> None:
    client = ApiClient(api)
    client.run(set_user("alice"))
    token = client.token
    for operation, view in (("load", whole), ("save", set_user("bob")), ("delete", log_out)):
        api.store.before(operation, fail)
        response = client.ask(view)
        assert response.status_code == 503
        assert client.token == token, operation
    assert client.run(whole) == {"user": "alice"}


def test_a_session_that_another_worker_can_read_is_not_reported_as_ended(
    api: Site, make_site: SiteMaker
) -> None:
    """While encryption is turned on, one worker after the other."""
    sealing = make_site(token_header=HEADER, store=api.store, encryption_keys=[b"k" * 32, "plain"])
    client = ApiClient(sealing)
    client.run(set_user("alice"))
    early = ApiClient(api, client.token)
    assert HEADER not in early.ask(whole).headers
    assert early.run(whole) == {}
    assert client.run(whole) == {"user": "alice"}

    # The same where it is met at the save.
    late = ApiClient(api)
    late.run(set_user("bob"))
    other = ApiClient(sealing, late.token)

    def view(session: Any) -> None:
        session["step"] = 1
        other.run(lambda session: session.update(sealed=True))

    assert HEADER not in late.ask(view).headers
    assert other.run(whole) == {"user": "bob", "sealed": True}


def test_a_permanent_session(api: Site) -> None:
    """It lives by `PERMANENT_SESSION_LIFETIME`, though no header says so."""
    client, other = ApiClient(api), ApiClient(api)
    client.run(lambda session: session.update(user="alice") or setattr(session, "permanent", True))
    other.run(set_user("bob"))
    api.clock.advance(2 * 86400)
    assert client.run(whole) == {"user": "alice", "_permanent": True}
    assert other.run(whole) == {}


def test_destroy_and_write_gives_a_new_token(one: Site) -> None:
    client = ApiClient(one)
    client.run(set_user("alice"))
    old = client.token

    def log_out_and_greet(session: Any) -> None:
        session.destroy()
        session["greeting"] = "bye"

    client.run(log_out_and_greet)
    assert client.token not in ("", old)
    assert client.run(whole) == {"greeting": "bye"}
    assert ApiClient(one, old).run(whole) == {}


def test_clear_ends_the_session(one: Site) -> None:
    client = ApiClient(one)
    client.run(set_user("alice"))
    assert client.ask(lambda session: session.clear()).headers[HEADER] == ""
    assert one.stored() == {}


def test_the_header_holds_no_bare_token(one: Site) -> None:
    """The key in the store can't be computed from anything unsigned."""
    client = ApiClient(one)
    client.run(set_user("alice"))
    token, dot, signature = client.token.partition(".")
    assert dot
    assert len(token) == 43
    assert len(signature) == 22
    assert ApiClient(one, token).run(whole) == {}


def test_a_token_of_a_fallback_key_is_signed_again(store_prefix: str, clock: FakeClock) -> None:
    with SiteMaker("memory://", store_prefix, clock) as make:
        before = make(token_header=HEADER, config={"SECRET_KEY": "old"})
        client = ApiClient(before)
        client.run(set_user("alice"))
        config = {"SECRET_KEY": "new", "SECRET_KEY_FALLBACKS": ["old"]}
        after = make(token_header=HEADER, config=config, store=before.store)
        moved = ApiClient(after, client.token)
        assert moved.run(whole) == {"user": "alice"}
        assert moved.token != client.token
        assert moved.token.partition(".")[0] == client.token.partition(".")[0]
        only_new = make(token_header=HEADER, config={"SECRET_KEY": "new"}, store=before.store)
        assert ApiClient(only_new, moved.token).run(whole) == {"user": "alice"}
        assert ApiClient(only_new, client.token).run(whole) == {}


# Beside cookies -----------------------------------------------------------------------------------


def test_header_tokens_are_off_by_default(make_site: SiteMaker) -> None:
    """The header means nothing then, in either direction."""
    site = make_site()
    with_cookie = site.visitor()
    with_cookie.run(set_user("alice"))
    assert with_cookie.cookie is not None
    visitor = site.visitor()
    response = visitor.ask(set_user("bob"), headers={HEADER: with_cookie.cookie})
    assert HEADER not in response.headers
    assert visitor.cookie not in (None, with_cookie.cookie)
    assert response.vary.as_set() == {"cookie"}
    assert with_cookie.run(whole) == {"user": "alice"}


def test_without_the_header_the_cookie_is_used(one: Site) -> None:
    """Browsers and API clients share one application."""
    visitor, client = one.visitor(), ApiClient(one)
    response = visitor.ask(set_user("alice"))
    assert visitor.cookie is not None
    assert HEADER not in response.headers
    client.run(set_user("bob"))
    assert visitor.run(whole) == {"user": "alice"}
    assert client.run(whole) == {"user": "bob"}


def test_the_header_goes_before_the_cookie(one: Site) -> None:
    visitor, client = one.visitor(), ApiClient(one)
    visitor.run(set_user("alice"))
    client.run(set_user("bob"))
    cookie = visitor.cookie
    seen = []

    def look_and_write(session: Any) -> None:
        seen.append(session["user"])
        session["by"] = "header"

    response = visitor.ask(look_and_write, headers={HEADER: client.token})
    assert seen == ["bob"]
    assert not response.headers.getlist("Set-Cookie")
    assert visitor.cookie == cookie
    assert visitor.run(whole) == {"user": "alice"}
    assert client.run(whole) == {"user": "bob", "by": "header"}


@pytest.mark.parametrize("header", ["", "   ", "nonsense"])
def test_any_header_at_all_goes_before_the_cookie(header: str, one: Site) -> None:
    """Also an empty or a wrong one: falling back to the cookie would mix up two sessions."""
    visitor = one.visitor()
    visitor.run(set_user("alice"))
    cookie = visitor.cookie
    seen = []

    def look_and_write(session: Any) -> None:
        seen.append(session.copy())
        session["user"] = "bob"

    response = visitor.ask(look_and_write, headers={HEADER: header})
    assert seen == [{}]
    assert response.headers[HEADER]
    assert not response.headers.getlist("Set-Cookie")
    assert visitor.cookie == cookie
    assert visitor.run(whole) == {"user": "alice"}
    assert ApiClient(one, response.headers[HEADER]).run(whole) == {"user": "bob"}


def test_a_logout_by_header_leaves_the_cookie_alone(one: Site) -> None:
    visitor, client = one.visitor(), ApiClient(one)
    visitor.run(set_user("alice"))
    client.run(set_user("bob"))
    response = visitor.ask(lambda s: s.destroy(), headers={HEADER: client.token})
    assert response.headers[HEADER] == ""
    assert not response.headers.getlist("Set-Cookie")
    assert visitor.run(whole) == {"user": "alice"}


@pytest.mark.parametrize("name", ["x-session", "X-SESSION", "x-Session"])
def test_the_name_of_the_header_has_no_case(name: str, one: Site) -> None:
    client = ApiClient(one)
    client.run(set_user("alice"))
    seen: list[Any] = []
    one.visitor().ask(lambda s: seen.append(s.copy()), headers={name: client.token})
    assert seen == [{"user": "alice"}]


def test_a_token_is_not_taken_from_the_url_or_a_form(one: Site) -> None:
    client = ApiClient(one)
    client.run(set_user("alice"))
    seen: list[Any] = []

    def look(session: Any) -> None:
        seen.append(session.copy())
        assert HEADER in request.values

    one.visitor().ask(look, query_string={HEADER: client.token, "session": client.token})
    one.visitor().ask(look, method="POST", data={HEADER: client.token, "session": client.token})
    assert seen == [{}, {}]


# Caches -------------------------------------------------------------------------------------------


def test_vary_names_the_source_of_the_token(one: Site) -> None:
    """A cache must distinguish the two kinds of clients, and their sessions."""
    client, visitor = ApiClient(one), one.visitor()
    client.run(set_user("alice"))
    visitor.run(set_user("bob"))
    for response in (client.ask(whole), ApiClient(one).ask(whole)):
        assert HEADER.lower() in response.vary.as_set()
    for response in (visitor.ask(whole), one.visitor().ask(whole)):
        # Also without the header: a client with one would get another answer.
        assert {"cookie", HEADER.lower()} <= response.vary.as_set()


def test_a_request_without_the_session_says_nothing(one: Site) -> None:
    client = ApiClient(one)
    client.run(set_user("alice"))
    with one.counted() as count:
        response = one.visitor().get("/untouched", headers={HEADER: client.token})
    assert count.trips == 0
    assert HEADER not in response.headers
    assert not response.vary
    assert not response.cache_control


def test_no_cache_keeps_a_token(one: Site) -> None:
    client = ApiClient(one)
    for step in (
        set_user("alice"),
        lambda session: session.rotate(),
        lambda session: session.destroy(),
    ):
        response = client.ask(step)
        assert HEADER in response.headers
        assert response.cache_control.no_store
    client.run(set_user("alice"))
    assert not client.ask(whole).cache_control.no_store


def test_round_trips_are_as_with_a_cookie(api: Site) -> None:
    client = ApiClient(api)
    client.run(set_user("alice"))
    steps = [
        (whole, 1),
        (lambda session: session.update(step=1), 2),
        (lambda session: session.rotate(), 2),
        (lambda session: session.destroy(), 1),
    ]
    for step, trips in steps:
        with api.counted() as count:
            client.ask(step)
        assert len(count.calls) == trips, count.calls
    with api.counted() as count:
        client.ask(whole)  # the empty header that `destroy` left
    assert not count.calls


# Bad input ----------------------------------------------------------------------------------------


TOKEN = new_token()
SIGNATURE = TokenSigner(["another key"], "session").sign(TOKEN).partition(".")[2]
BAD = {
    "one character": "x",
    "42 characters": TOKEN[:42],
    "43 characters": TOKEN,
    "44 characters": TOKEN + "A",
    "4 KB": "A" * 4096,
    "200 KB": "A" * 200_000,
    "200 KB of dots": "." * 200_000,
    "NUL": f"{TOKEN}\0.{SIGNATURE}",
    "CR LF": f"{TOKEN}\r\nX-Evil: 1",
    "invalid UTF-8": f"{TOKEN}\xff\xfe",
    "percent-encoded": TOKEN[:-1] + "%41." + SIGNATURE,
    "hash tag": "{" + TOKEN + "}." + SIGNATURE,
    "star": "*",
    "question mark": "?" * 43 + "." + SIGNATURE,
    "lock": f"{TOKEN}:lock.{SIGNATURE}",
    "path": "../../../etc/passwd",
    "unsigned": f"{TOKEN}.",
    "only a signature": f".{SIGNATURE}",
    "cut signature": f"{TOKEN}.{SIGNATURE[:-1]}",
    "signed by another application": f"{TOKEN}.{SIGNATURE}",
    "two": f"{TOKEN}.{SIGNATURE},{TOKEN}.{SIGNATURE}",
    "a bearer": f"Bearer {TOKEN}.{SIGNATURE}",
    "quoted": f'"{TOKEN}.{SIGNATURE}"',
    "digits that are not ASCII": "\u00b2" * 43 + "." + SIGNATURE,
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_token_is_a_new_client(value: str, one: Site) -> None:
    """Never an error, no store call, nothing adopted."""
    visitor = one.visitor()
    # Straight into the environment: some of these do not pass a server, or a test client.
    environ = {"HTTP_X_SESSION": value}
    with one.counted() as count:
        response = visitor.ask(lambda session: session.get("user"), environ_overrides=environ)
    assert response.status_code == 200
    assert not count.calls
    assert response.headers[HEADER] == ""
    (event,) = one.happened(SessionRefused)
    assert event.reason in ("malformed", "bad signature")
    assert event.handle is None

    response = visitor.ask(set_user("bob"), environ_overrides=environ)
    assert response.status_code == 200
    token = response.headers[HEADER]
    assert TOKEN not in token
    assert ApiClient(one, token).run(whole) == {"user": "bob"}


def test_a_flipped_signature(one: Site) -> None:
    client = ApiClient(one)
    client.run(set_user("alice"))
    characters = list(client.token)
    for place in (0, 42, 43, 44, -2, -1):
        flipped = characters.copy()
        flipped[place] = "B" if characters[place] != "B" else "C"
        with one.counted() as count:
            assert ApiClient(one, "".join(flipped)).run(whole) == {}
        assert not count.calls


def test_a_signed_token_that_nobody_holds_is_not_adopted(api: Site) -> None:
    """One look-up, then a session under a token of our own."""
    unknown = TokenSigner(["a key for tests"], "session").sign(TOKEN)
    client = ApiClient(api, unknown)
    with api.counted() as count:
        assert client.run(whole) == {}
    assert count.calls == ["load"]
    client.run(set_user("alice"))
    assert TOKEN not in client.token
    assert ApiClient(api, unknown).run(whole) == {}
    assert client.run(whole) == {"user": "alice"}


def test_spaces_around_a_token_do_not_matter(one: Site) -> None:
    """RFC 9110: they are no part of the value."""
    client = ApiClient(one)
    client.run(set_user("alice"))
    assert ApiClient(one, f" \t{client.token} ").run(whole) == {"user": "alice"}


def test_the_test_clients_session_transaction(one: Site) -> None:
    """It opens the session that the header names."""
    client = ApiClient(one)
    client.run(set_user("alice"))
    visitor: Visitor = one.visitor()
    with visitor.session_transaction(headers={HEADER: client.token}) as session:
        assert session["user"] == "alice"
        session["step"] = 1
    assert visitor.cookie is None
    assert client.run(whole) == {"user": "alice", "step": 1}


@pytest.mark.parametrize("blank", ["\xa0", "\x85", "\x1c", "\x0b", "\0"])
def test_only_space_and_tab_go_around_a_token(one: Site, blank: str) -> None:
    client = ApiClient(one)
    client.run(set_user("alice"))
    for header, expected in (
        (f" \t{client.token}\t ", {"user": "alice"}),
        (f"{blank}{client.token}", {}),
        (f"{client.token}{blank}", {}),
    ):
        seen: list[Any] = []
        one.visitor().ask(
            lambda session, seen=seen: seen.append(whole(session)),
            environ_overrides={"HTTP_X_SESSION": header},
        )
        assert seen == [expected], header
