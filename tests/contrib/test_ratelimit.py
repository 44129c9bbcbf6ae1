"""Rate limits: allowed and refused requests, whatever clients do with cookies; failing closed."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from flask import Blueprint, Flask, Response, abort, request, session
from flask.testing import FlaskClient
from flask.views import MethodView
from flask_limiter import Limiter
from limits.aio.storage import MemoryStorage as AsyncStorage
from limits.storage import MemoryStorage
from pymongo import MongoClient
from redis import Redis
from werkzeug.local import LocalProxy

from flask_gsession import Session, SettingError
from flask_gsession.contrib.ratelimit import (
    SessionLimitExceeded,
    SessionLimits,
    network_of_client,
    session_limit,
)
from flask_gsession.contrib.ratelimit_storages import storage_of
from flask_gsession.stores import Record
from flask_gsession.stores.base import Clock
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import FakeClock
from tests.harness.apps import until
from tests.harness.servers import RedisServer, free_port

HOUR = 3600
Maker = Callable[..., Flask]


@pytest.fixture
def make_app(store_prefix: str) -> Iterator[Maker]:
    """Makes applications with limits; `make_app(store, config, **options of SessionLimits)`."""
    made: list[tuple[Session, Flask]] = []

    def make(
        store: object = "memory://",
        config: Any = None,
        breaker: int = 0,
        clock: Clock = time.time,
        **options: Any,
    ) -> Flask:
        app = Flask(__name__)
        app.config.update(SECRET_KEY="a key for tests", **(config or {}))
        ext = Session(
            app, store=store, key_prefix=store_prefix, breaker_failures=breaker, clock=clock
        )
        made.append((ext, app))
        SessionLimits(app, **{"proxies": 0, "creation": None, **options})

        @app.get("/login/<user>")
        def login(user: str) -> str:
            session["_user_id"] = user
            return ""

        @app.get("/visit")
        def visit() -> str:
            session["visits"] = session.get("visits", 0) + 1
            return ""

        @app.get("/logout")
        def logout() -> str:
            session.destroy()
            return ""

        @app.get("/rotate")
        def rotate() -> str:
            session.rotate(grace=0)
            return ""

        return app

    yield make
    for ext, app in made:
        ext.close(app)


def limited(app: Flask, *arguments: Any, **options: Any) -> None:
    """Give the application a limited page at `/`."""

    @app.get("/")
    @session_limit(*arguments, **options)
    def page() -> str:
        return "here"


def through(app: Flask, times: int, client: Any = None, **options: Any) -> int:
    """How many of so many requests were served; all others were refused for the limit."""
    client = client or app.test_client()
    statuses = [client.get("/", **options).status_code for _ in range(times)]
    assert set(statuses) <= {200, 429}
    return statuses.count(200)


def from_address(address: str) -> dict[str, Any]:
    return {"environ_base": {"REMOTE_ADDR": address}}


# -- allowed requests


def on(store_url: str, make_app: Maker, **options: Any) -> Flask:
    """An application on this store, which on SQLite warns."""
    if store_url.startswith("sqlite"):
        with pytest.warns(UserWarning, match="in each process separately"):
            return make_app(store_url, **options)
    return make_app(store_url, **options)


@pytest.fixture
def app(make_app: Maker, store_url: str) -> Flask:
    return on(store_url, make_app)


def test_a_limit_on_each_store(app: Flask) -> None:
    limited(app, "3/hour")
    assert through(app, 5) == 3


def test_no_trick_gets_more_than_the_limit_through(app: Flask, store_url: str) -> None:
    times = 1000 if store_url == "memory://" else 250
    limited(app, "40/hour")
    random.seed(5)
    jars = [app.test_client() for _ in range(5)]
    for jar in jars:
        jar.get("/visit")
    served = 0
    for number in range(times):
        jar = random.choice(jars)
        trick = number % 5
        if trick == 0:  # drops the cookie
            jar = app.test_client()
        elif trick == 1:  # garbles it
            jar = app.test_client()
            jar.set_cookie("session", secrets.token_urlsafe(random.randint(1, 80)))
        elif trick == 2:  # gets another token
            jar.get("/rotate")
        elif trick == 3:  # gets another session
            jar = app.test_client()
            jar.get("/visit")
        served += jar.get("/").status_code == 200
    assert served == 40


def test_no_session_is_worth_a_bucket_of_its_own_unless_it_was_there(
    make_app: Maker, store_url: str, clock: FakeClock
) -> None:
    app = on(store_url, make_app, clock=clock)
    limited(app, "1/hour", network="1000/hour")
    (interface,) = app.extensions["gsession"].values()
    sign = interface.tokens.signing(app).signer.sign

    def came_with(token: str) -> FlaskClient:
        client = app.test_client()
        client.set_cookie("session", token)
        return client

    def stored(end: str = "/visit") -> FlaskClient:
        client = app.test_client()
        client.get("/visit")
        cookie = client.get_cookie("session")
        assert cookie is not None
        client.get(end)
        return came_with(cookie.value)

    assert through(app, 1) == 1  # which uses up the limit that all visitors without a session share
    expired, ended, rotated = stored(), stored("/logout"), stored("/rotate")
    clock.advance(3 * HOUR)
    for client in (
        app.test_client(),  # none, or a new one
        came_with(secrets.token_urlsafe(32)),  # forged
        came_with(sign(secrets.token_urlsafe(32))),  # unknown
        *(expired, ended, rotated),
    ):
        assert through(app, 1, client) == 0
    assert through(app, 2, stored()) == 1


def test_requests_at_the_same_time(app: Flask) -> None:
    limited(app, "20/hour")
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: through(app, 5), range(8))) == 20


def test_a_session_that_moves_is_limited_too(make_app: Maker) -> None:
    app = make_app()
    limited(app, "3/hour")
    client = app.test_client()
    client.get("/visit")
    assert sum(through(app, 1, client, **from_address(f"10.0.0.{n}")) for n in range(9)) == 3


def test_users_behind_one_address_have_a_limit_each(make_app: Maker) -> None:
    app = make_app()
    limited(app, "3/hour")
    for user in ("ada", "bob", "cyd"):
        client = app.test_client()
        client.get(f"/login/{user}")
        assert through(app, 5, client) == 3
    assert through(app, 5) == 3  # they didn't use up the limit of others there


def test_a_user_has_one_limit_for_all_sessions(make_app: Maker) -> None:
    app = make_app()
    limited(app, "4/hour")
    served = 0
    for _ in range(3):
        client = app.test_client()
        client.get("/login/ada")
        served += through(app, 3, client)
    assert served == 4


def test_users_of_another_kind(make_app: Maker) -> None:
    app = make_app(user=lambda: session.get("customer"))
    limited(app, "1/hour")

    @app.get("/become/<int:number>")
    def become(number: int) -> str:
        session["customer"] = number
        return ""

    for number in (1, 2):
        client = app.test_client()
        client.get(f"/become/{number}")
        assert through(app, 2, client) == 1


class Customer:
    def __init__(self, name: object) -> None:
        self.name = name

    def get_id(self) -> object:
        return self.name


@pytest.mark.parametrize(
    "user",
    [
        *("ada", 7, uuid4(), b"ada", Customer("ada"), Customer(7)),
        LocalProxy(lambda: Customer("ada")),
        LocalProxy(lambda: "ada"),
    ],
)
def test_a_user_is_known_by_an_id(make_app: Maker, user: object) -> None:
    app = make_app(user=lambda: user)
    limited(app, "2/hour", network="100/hour")
    for number in range(2):  # wherever the requests come from
        assert through(app, 2, **from_address(f"10.0.0.{number}")) == (2 if number == 0 else 0)


@pytest.mark.parametrize(
    "nobody", [None, "", 0, False, Customer(None), LocalProxy(lambda: Customer(None))]
)
def test_anonymous_visitors_share_no_user_bucket(make_app: Maker, nobody: object) -> None:
    app = make_app(user=lambda: nobody)
    limited(app, "2/hour")
    for number in range(2):
        assert through(app, 3, **from_address(f"10.0.0.{number}")) == 2


@pytest.mark.parametrize("user", [object(), True, 1.5, ["ada"], {"id": 7}, Customer(object())])
def test_a_user_without_an_id_is_refused(
    make_app: Maker, user: object, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(user=lambda: user)
    limited(app, "2/hour")
    assert app.test_client().get("/").status_code == 500
    assert "user= of the rate limits returned a " in caplog.text


def test_accounts_of_a_network_have_a_ceiling(app: Flask) -> None:
    limited(app, "2/hour", network="5/hour")
    served = []
    for user in range(4):
        client = app.test_client()
        client.get(f"/login/{user}")
        served.append(through(app, 3, client))
    assert served == [2, 2, 1, 0]
    assert through(app, 2) == 0
    assert through(app, 2, **from_address("10.0.0.7")) == 2
    assert through(app, 2, client, **from_address("10.0.0.7")) == 2  # refused requests don't count


def test_the_ceiling_is_ten_times_the_limit_by_default(make_app: Maker) -> None:
    app = make_app()
    limited(app, "2/hour")
    served = 0
    for user in range(12):
        client = app.test_client()
        client.get(f"/login/{user}")
        served += through(app, 3, client)
    assert served == 20


def test_all_networks_of_an_ipv6_site_have_a_ceiling(make_app: Maker) -> None:
    app = make_app(creation="1/hour")
    limited(app, "2/hour")

    def of_site(number: int, site: str = "2001:db8:1") -> dict[str, Any]:
        return from_address(f"{site}:{number:x}::1")

    assert sum(through(app, 1, **of_site(number)) for number in range(30)) == 20
    assert through(app, 3, **of_site(1, "2001:db8:2")) == 2
    made = [app.test_client().get("/visit", **of_site(number)) for number in range(30)]
    assert [answer.status_code for answer in made].count(200) == 10


def test_a_wider_limit_for_the_network(make_app: Maker) -> None:
    app = make_app()
    limited(app, "2/hour", network="7/hour")
    assert through(app, 9) == 2  # those without a session share one
    for expected in (2, 2, 1, 0):
        client = app.test_client()
        client.get("/visit")
        assert through(app, 3, client) == expected


def test_a_session_made_in_this_request_is_nobodys(make_app: Maker) -> None:
    app = make_app()

    @app.before_request
    def make_one() -> None:
        if "visits" not in session:
            with session.transaction():
                session["visits"] = 1

    limited(app, "2/hour", network="50/hour")
    assert sum(through(app, 1) for _ in range(6)) == 2


def test_sessions_per_network(make_app: Maker, store_url: str) -> None:
    app = on(store_url, make_app, creation="3/hour")
    codes = [app.test_client().get("/visit").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    refused = app.test_client().get("/visit")
    assert 0 < int(refused.headers["Retry-After"]) <= HOUR
    assert "Set-Cookie" not in refused.headers
    assert app.test_client().get("/visit", **from_address("10.0.0.7")).status_code == 200


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("", "/run/socket", True),
    ],
)
def test_networks(make_app: Maker, first: str, second: str, same: bool) -> None:
    app = make_app()
    limited(app, "1/hour")
    assert through(app, 1, **from_address(first)) == 1
    assert through(app, 1, **from_address(second)) == (0 if same else 1)


@pytest.mark.parametrize(
    ("proxies", "header", "network"),
    [
        (0, "192.0.2.1", "127.0.0.1"),
        (1, "192.0.2.1", "192.0.2.1"),
        (1, "203.0.113.9, 192.0.2.1", "192.0.2.1"),  # the address that the client claims
        (2, "203.0.113.9, 192.0.2.1, 10.0.0.2", "192.0.2.1"),
        (2, "192.0.2.1", "127.0.0.1"),  # not through both
        (1, "nonsense", "127.0.0.1"),
        (1, "192.0.2.1:4711", "192.0.2.1"),
        (1, "[2001:db8::1]:4711", "2001:db8::/64"),
    ],
)
def test_proxies(make_app: Maker, proxies: int, header: str, network: str) -> None:
    headers = {"X-Forwarded-For": header}
    with make_app().test_request_context(headers=headers, **from_address("127.0.0.1")):
        assert network_of_client(proxies) == network


# -- arguments of a limit


def test_the_answer_shows_the_rest_of_the_limit(app: Flask) -> None:
    limited(app, "3/hour")
    first, _, _, refused = (app.test_client().get("/") for _ in range(4))
    assert first.headers["RateLimit-Limit"] == "3"
    assert first.headers["RateLimit-Remaining"] == "2"
    assert first.headers["RateLimit-Policy"] == "3;w=3600"
    assert "Retry-After" not in first.headers
    assert refused.status_code == 429
    assert refused.headers.getlist("RateLimit-Remaining") == ["0"]
    assert HOUR - 60 < int(refused.headers["Retry-After"]) <= HOUR
    assert refused.headers["RateLimit-Reset"] == refused.headers["Retry-After"]


def test_the_applications_own_page(make_app: Maker) -> None:
    app = make_app()
    limited(app, "1/hour")

    @app.errorhandler(SessionLimitExceeded)
    def slowly(error: SessionLimitExceeded) -> tuple[str, int]:
        return f"{error.kind} {error.retry_after > 0} {error.limit.limit}", 429

    assert through(app, 1) == 1
    refused = app.test_client().get("/")
    assert refused.text == "visitors True 1 per 1 hour"
    assert refused.headers["RateLimit-Remaining"] == "0"
    assert HOUR - 60 < int(refused.headers["Retry-After"]) <= HOUR


def test_several_limits_in_one(make_app: Maker) -> None:
    app = make_app()
    limited(app, "100/day; 2/hour")
    assert through(app, 3) == 2


def test_a_cost_and_an_exemption(make_app: Maker) -> None:
    app = make_app()
    limited(app, "10/hour", cost=lambda: 4, exempt_when=lambda: "visits" in session)
    assert through(app, 4) == 2
    friend = app.test_client()
    friend.get("/visit")
    assert through(app, 4, friend) == 4


def test_some_methods_only(make_app: Maker) -> None:
    app = make_app()
    app.add_url_rule(
        "/", "page", session_limit("2/hour", methods=["POST"])(lambda: ""), methods=["GET", "POST"]
    )
    client = app.test_client()
    assert [client.post("/").status_code for _ in range(3)] == [200, 200, 429]
    assert [client.get("/").status_code for _ in range(3)] == [200] * 3


def test_a_limit_on_get_holds_for_head(make_app: Maker) -> None:
    app = make_app()
    limited(app, "1/hour", methods=["GET"])
    client = app.test_client()
    assert [client.head("/").status_code, client.get("/").status_code] == [200, 429]


def test_each_method_for_itself(make_app: Maker) -> None:
    app = make_app()
    app.add_url_rule(
        "/", "page", session_limit("1/hour", per_method=True)(lambda: ""), methods=["GET", "POST"]
    )
    client = app.test_client()
    calls = [client.get, client.post, client.get, client.post]
    assert [call("/").status_code for call in calls] == [200, 200, 429, 429]


@pytest.mark.parametrize("methods", ["GET", ["get"], ["FETCH"]])
def test_wrong_methods_stop_the_import(methods: Any) -> None:
    with pytest.raises(SettingError, match="methods is "):
        session_limit("1/hour", methods=methods)


def test_a_limit_that_is_looked_up(make_app: Maker) -> None:
    app = make_app()
    rates = iter(["1/hour", "1/hour", "nonsense", "", None])
    limited(app, lambda: next(rates))
    client = app.test_client()
    assert [client.get("/").status_code for _ in range(5)] == [200, 429, 500, 500, 500]


def test_views_count_for_themselves_and_shared_ones_together(make_app: Maker) -> None:
    app = make_app()
    shared = session_limit("2/hour", shared="api")
    for number, decorate in enumerate([session_limit("2/hour"), shared, shared]):

        def view() -> str:
            return ""

        view.__name__ = f"view{number}"
        app.add_url_rule(f"/{number}", view_func=decorate(view))
    get = app.test_client().get
    assert [get(f"/{n}").status_code for n in (0, 1, 2, 1, 0)] == [200, 200, 200, 429, 200]


def test_blueprints_applications_and_classes(make_app: Maker) -> None:
    app = make_app()

    class Page(MethodView):
        decorators = (session_limit("1/hour"),)

        def get(self) -> str:
            return ""

    blueprint = session_limit("2/hour")(Blueprint("api", __name__, url_prefix="/api"))
    blueprint.add_url_rule("/a", view_func=lambda: "", endpoint="a")
    blueprint.add_url_rule("/b", view_func=lambda: "", endpoint="b")
    app.register_blueprint(blueprint)
    app.add_url_rule("/class", view_func=Page.as_view("class"))
    get = app.test_client().get
    assert [get(f"/api/{name}").status_code for name in "aba"] == [200, 200, 429]
    assert [get("/class").status_code for _ in range(2)] == [200, 429]


def test_a_limit_for_all_of_an_application(make_app: Maker) -> None:
    app = make_app()
    session_limit("3/hour")(app)
    assert [app.test_client().get(f"/{n}").status_code for n in range(4)] == [404, 404, 404, 429]


def test_async_views(make_app: Maker) -> None:
    app = make_app()

    @app.get("/")
    @session_limit("1/hour")
    async def page() -> str:
        return "here"

    assert through(app, 2) == 1


def test_each_view_of_a_factory_counts_for_itself(make_app: Maker) -> None:
    app = make_app()

    def add(name: str) -> None:
        @session_limit("1/hour")
        def index() -> str:
            return name

        app.add_url_rule(f"/{name}", name, index)
        app.add_url_rule(f"/{name}/again", f"{name}-again", index)  # the same view

        class Page(MethodView):
            @session_limit("1/hour")
            def get(self) -> str:
                return name

        app.add_url_rule(f"/{name}/class", f"{name}-class", Page.as_view(name))
        blueprint = Blueprint("part", __name__, url_prefix=f"/{name}/part")
        outer = Blueprint(f"{name}-outer", __name__)
        session_limit("1/hour")(blueprint).add_url_rule("/", "part", lambda: name)
        outer.register_blueprint(blueprint)
        app.register_blueprint(outer)

    for name in ("users", "orders"):
        add(name)
    get = app.test_client().get
    for name in ("users", "orders"):
        for path in ("", "/class", "/part/"):
            answers = [get(f"/{name}{path}").status_code for _ in range(2)]
            assert answers == [200, 429], (name, path)
        assert get(f"/{name}/again").status_code == 429


def test_a_class_has_a_count_for_each_of_its_views(make_app: Maker) -> None:
    app = make_app()

    class Page(MethodView):
        @session_limit("1/hour")
        def get(self) -> str:
            return ""

    class Further(Page):
        pass

    for name, kind in (("one", Page), ("two", Page), ("three", Further)):
        app.add_url_rule(f"/{name}", view_func=kind.as_view(name))
    get = app.test_client().get
    for name in ("one", "two", "three"):
        assert [get(f"/{name}").status_code for _ in range(2)] == [200, 429]


def test_a_function_that_views_call_counts_once(make_app: Maker) -> None:
    app = make_app()

    @session_limit("2/hour")
    def search() -> str:
        return ""

    app.add_url_rule("/a", "a", lambda: search())
    app.add_url_rule("/b", "b", lambda: search())
    get = app.test_client().get
    assert [get(path).status_code for path in ("/a", "/b", "/a")] == [200, 200, 429]


class Answer:
    """A view that is an object; it has no hash, and nothing can refer to it weakly."""

    __slots__ = ("text",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self) -> str:
        return self.text


def say(text: str) -> str:
    return text


async def say_later(text: str) -> str:
    return text


def test_whatever_can_be_a_view_can_be_limited(make_app: Maker) -> None:
    app = make_app()
    views = {
        "partial": partial(say, "partial"),
        "further": partial(say, "further"),
        "later": partial(say_later, "later"),
        "object": Answer("object"),
        "method": Answer("method").__call__,
        "function": staticmethod(partial(say, "function")),
    }
    for name, view in views.items():
        app.add_url_rule(f"/{name}", name, session_limit("1/hour")(view))
    app.add_url_rule("/free", "free", Answer("free"))
    get = app.test_client().get
    for name in views:
        answers = [get(f"/{name}") for _ in range(2)]
        assert answers[0].text == name
        assert [answer.status_code for answer in answers] == [200, 429]
    assert get("/free").text == "free"


@pytest.mark.parametrize("view", ["index", 5, MethodView, classmethod(say)])
def test_an_object_that_is_not_a_view_is_refused(view: Any) -> None:
    with pytest.raises(SettingError, match="session_limit takes a function"):
        session_limit("1/hour")(view)


def test_an_object_in_the_wrong_order_stops_the_start(make_app: Maker) -> None:
    for view in (Answer("here"), partial(say, "here")):
        session_limit("1/hour")(view)
        with pytest.raises(SettingError, match="'page' is not limited"):
            make_app().add_url_rule("/", "page", view)


# -- signing in: an account and a network, of which only failures count


@pytest.fixture
def sign_in(make_app: Maker, store_url: str) -> Callable[..., int]:
    """Signs in on an application with the limits that docs/how-to/rate-limits.md gives."""
    app = on(store_url, make_app)

    @app.post("/sign-in")
    @session_limit(
        "3/hour",
        key=lambda: request.form["name"].strip().casefold(),
        network="8/hour",
        deduct_when=lambda response: response.status_code == 401,
    )
    def sign_in() -> str:
        if request.form["password"] != "right":
            abort(401)
        session["_user_id"] = request.form["name"]
        return ""

    def ask(name: str, password: str, address: str = "192.0.2.1") -> int:
        form = {"name": name, "password": password}
        answer = app.test_client().post("/sign-in", data=form, **from_address(address))
        return int(answer.status_code)

    return ask


def test_an_office_of_six_signs_in(sign_in: Callable[..., int]) -> None:
    for person in range(6):
        assert sign_in(f"user{person}", "mistyped") == 401
        for _ in range(4):
            assert sign_in(f"user{person}", "right") == 200


def test_guesses_for_an_account_from_everywhere(sign_in: Callable[..., int]) -> None:
    answers = [sign_in("Ada ", "guess", f"192.0.2.{number}") for number in range(5)]
    assert answers == [401, 401, 401, 429, 429]
    assert sign_in("ada", "right", "192.0.2.77") == 429
    assert sign_in("bob", "right", "192.0.2.1") == 200


def test_guesses_of_a_network_for_many_accounts(sign_in: Callable[..., int]) -> None:
    answers = [sign_in(f"user{number}", "guess") for number in range(10)]
    assert answers == [401] * 8 + [429] * 2
    assert sign_in("mallory", "right") == 429  # a success gives nothing back either
    assert sign_in("ada", "right", "192.0.2.77") == 200


def test_refused_requests_count_for_neither_account_nor_network(
    sign_in: Callable[..., int],
) -> None:
    for _ in range(9):
        sign_in("ada", "guess")
    assert [sign_in("bob", "guess") for _ in range(3)] == [401] * 3  # of the network: 3 and 3
    assert [sign_in("cyd", "guess") for _ in range(3)] == [401, 401, 429]
    assert [sign_in("dan", "guess") for _ in range(3)] == [429] * 3
    assert [sign_in("dan", "guess", "192.0.2.7") for _ in range(4)] == [401, 401, 401, 429]


def test_guesses_at_the_same_time(sign_in: Callable[..., int]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: sign_in("ada", "guess"), range(24)))
    assert answers.count(401) == 3


def test_a_request_without_a_key_counts_as_any_other(make_app: Maker) -> None:
    app = make_app()
    limited(app, "2/hour", key=lambda: request.args.get("name"))
    assert through(app, 3) == 2
    assert through(app, 3, query_string={"name": ""}) == 0
    assert through(app, 3, query_string={"name": "ada"}) == 2
    app = make_app()
    limited(app, "2/hour", key=object)
    assert app.test_client().get("/").status_code == 500


def test_a_blueprint_of_which_failures_count(make_app: Maker) -> None:
    app = make_app()
    blueprint = Blueprint("api", __name__)
    blueprint.add_url_rule("/<int:status>", view_func=lambda status: ("", status), endpoint="page")
    session_limit("2/hour", deduct_when=lambda response: response.status_code >= 400)(blueprint)
    app.register_blueprint(blueprint)
    get = app.test_client().get
    statuses = [get(f"/{status}").status_code for status in (200, 404, 200, 400, 200)]
    assert statuses == [200, 404, 200, 400, 429]


def test_a_view_that_breaks_counts_as_its_answer(make_app: Maker) -> None:
    for counts, expected in ((500, [500, 500, 429]), (401, [500, 500, 500])):
        app = make_app()

        @app.get("/")
        @session_limit("2/hour", deduct_when=lambda response, of=counts: response.status_code == of)
        def page() -> str:
            raise LookupError

        assert [app.test_client().get("/").status_code for _ in range(3)] == expected


def test_a_name_may_be_any_text(make_app: Maker) -> None:
    app = make_app()
    limited(app, "1/hour", key=lambda: "\ud800\0" * 10_000)
    assert through(app, 2) == 1


def test_the_headers_know_of_undone_counts(make_app: Maker) -> None:
    app = make_app()
    limited(app, "3/hour", deduct_when=lambda response: False)
    for _ in range(5):
        assert app.test_client().get("/").headers["RateLimit-Remaining"] == "3"


@pytest.mark.parametrize("name", ["key", "deduct_when", "exempt_when"])
def test_an_argument_that_is_not_a_function_is_refused(name: str) -> None:
    arguments: Any = {name: "ada"}
    with pytest.raises(SettingError, match=f"{name} is 'ada'; allowed: a function"):
        session_limit("1/hour", **arguments)


# -- the application's own pages


def test_retry_after_stays_with_a_page_of_the_applications_own(make_app: Maker) -> None:
    for headers in (True, False):
        app = make_app(creation="1/hour", headers=headers)
        limited(app, "1/hour")
        app.register_error_handler(429, lambda error: ("slowly", 429))
        app.register_error_handler(503, lambda error: ("later", 503))
        assert through(app, 1) == 1
        app.test_client().get("/visit")
        for path in ("/", "/visit"):
            refused = app.test_client().get(path)
            assert HOUR - 60 < int(refused.headers["Retry-After"]) <= HOUR
        assert ("RateLimit-Limit" in app.test_client().get("/").headers) is headers


def test_an_answer_of_the_applications_own(make_app: Maker, dead_redis: str) -> None:
    app = make_app()
    limited(app, "1/hour")
    answers = iter([("", 429, {"Retry-After": "7"}), ("never mind", 200), ("elsewhere", 302)])
    app.register_error_handler(SessionLimitExceeded, lambda error: next(answers))
    get = app.test_client().get
    get("/")
    assert get("/").headers.getlist("Retry-After") == ["7"]
    assert "Retry-After" not in get("/").headers
    assert "Retry-After" in get("/").headers
    down = make_app(storage=dead_redis)
    limited(down, "1/hour")
    down.register_error_handler(503, lambda error: ("later", 503))
    answer = down.test_client().get("/")
    assert (answer.text, answer.headers["Retry-After"]) == ("later", "1")


# -- failing closed


@pytest.mark.parametrize("limit", ["", "100", "100/fortnight", "0/minute", 7, ["1/hour"]])
def test_a_wrong_limit_stops_the_import(limit: Any) -> None:
    with pytest.raises(SettingError, match=r"The rate limit is .*100/minute"):
        session_limit(limit)
    with pytest.raises(SettingError, match="The rate limit is"):
        session_limit("1/hour", network=limit)


@pytest.mark.parametrize("cost", [-1, True, 1.5, "2"])
def test_a_wrong_cost_stops_the_import_or_the_request(make_app: Maker, cost: Any) -> None:
    with pytest.raises(SettingError, match="The cost of a request"):
        session_limit("1/hour", cost=cost)
    app = make_app()
    limited(app, "100/hour", cost=lambda: cost)
    assert app.test_client().get("/").status_code == 500


def test_the_wrong_order_stops_the_import(make_app: Maker) -> None:
    app = make_app()
    with pytest.raises(SettingError, match="session_limit is above"):

        @session_limit("1/hour")
        @app.get("/")
        def page() -> str:
            return ""


def test_the_wrong_order_stops_the_start() -> None:
    app = Flask(__name__)
    app.secret_key = "a key for tests"

    @session_limit("1/hour")
    @app.get("/")
    def page() -> str:
        return ""

    Session(app, store="memory://")
    with pytest.raises(SettingError, match="'page' is not limited"):
        SessionLimits(app, proxies=0)


@pytest.fixture
def misordered() -> Blueprint:
    """A blueprint with a page at `/` whose limit stands above its route."""
    blueprint = Blueprint("api", __name__)

    @session_limit("1/hour")
    @blueprint.get("/")
    def page() -> str:
        return ""

    return blueprint


def test_the_wrong_order_in_a_blueprint_stops_the_start(
    make_app: Maker, misordered: Blueprint
) -> None:
    outer = Blueprint("outer", __name__)
    outer.register_blueprint(misordered)
    for blueprint in (misordered, outer):
        with pytest.raises(SettingError, match=r"api\.page' is not limited"):
            make_app().register_blueprint(blueprint)
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    app.register_blueprint(misordered)
    Session(app, store="memory://")
    with pytest.raises(SettingError, match=r"'api\.page' is not limited"):
        SessionLimits(app, proxies=0)


def test_the_wrong_order_by_whatever_way_is_not_served(make_app: Maker) -> None:
    app = make_app()

    def page() -> str:
        return ""

    session_limit("1/hour")(page)
    app.add_url_rule("/", "page")
    app.view_functions.update(page=page)
    assert app.test_client().get("/").status_code == 500


def test_a_limit_without_anybody_to_count_is_not_served() -> None:
    app = Flask(__name__)
    limited(app, "1/hour")
    assert app.test_client().get("/").status_code == 500


def test_settings_that_cannot_be(make_app: Maker) -> None:
    app = Flask(__name__)
    with pytest.raises(SettingError, match="needs a Session"):
        SessionLimits(app, proxies=0)
    for options in (
        {"proxies": -1},
        {"strategy": "guess"},
        {"on_storage_error": "ignore"},
        {"creation": "few"},
        {"creation": 60},
        {"user": "ada"},
        {"storage": MemoryStorage},
        {"storage": 5},
        {"storage": AsyncStorage()},
        {"storage": "async+memory://"},
        {"storage": "memcached://localhost:11211"},
        {"storage": "redis+cluster://user:secret@localhost"},
        {"storage": "mongodb://user:secret@"},
        {"storage": ""},
        {"storage": "carrier-pigeon://user:secret@host"},
    ):
        with pytest.raises(SettingError) as refused:
            make_app(**options)
        assert "secret" not in str(refused.value)
        assert str(refused.value)
    with pytest.raises(SettingError, match="already"):
        SessionLimits(make_app(), proxies=0).init_app(make_app())
    with pytest.raises(SettingError, match="not on the application: call its init_app"):
        make_app(ext=Session())

    class Wrapped:
        def __getattr__(self, name: str) -> Any:
            return getattr(MemoryStore(), name)

        def load(self, key: str) -> Record | None:
            return None

        create = save = renew = replace = delete = close = load

    for store in (Wrapped(), "redis+sentinel://localhost/main/0", "redis+cluster://localhost"):
        with pytest.raises(SettingError, match="can't count in this session store"):
            make_app(store)


# -- storages


def test_the_connections_of_a_client_are_used(make_app: Maker, redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        app = make_app(client)
        limited(app, "100/hour")
        made: list[Any] = []
        pool: Any = client.connection_pool
        make_connection = pool.make_connection

        def counting() -> Any:
            made.append(make_connection())
            return made[-1]

        pool.make_connection = counting
        visitor = app.test_client()
        visitor.get("/visit")
        assert through(app, 5, visitor) == 5
        assert len(made) == 1


def test_the_client_of_mongodb_is_used_and_stays_open(make_app: Maker, mongodb_url: str) -> None:
    with MongoClient[dict[str, Any]](mongodb_url, timeoutMS=10_000) as client:
        app = make_app(client)
        limited(app, "2/hour")
        assert through(app, 3) == 2
        (interface,) = app.extensions["gsession"].values()
        storage = storage_of(interface.store, "")
        storage.get("nothing")
        storage.__del__()
        database = client.get_default_database()
        assert database["gsession_limits"].count_documents({}) == 2
        assert "expireAt_1" in database["gsession_limits"].index_information()


def test_several_processes_count_together(make_app: Maker, redis_url: str) -> None:
    first, second = make_app(redis_url), make_app(redis_url)
    for app in (first, second):
        limited(app, "4/hour")
    assert through(first, 3) + through(second, 3) == 4


@pytest.fixture
def dead_redis() -> str:
    return f"redis://127.0.0.1:{free_port()}/0"


def test_storage_that_is_down_refuses(make_app: Maker, dead_redis: str) -> None:
    app = make_app(storage=dead_redis)
    limited(app, "3/hour")
    answer = app.test_client().get("/")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"


def test_storage_that_is_down_may_be_replaced(make_app: Maker, dead_redis: str) -> None:
    app = make_app(storage=dead_redis, on_storage_error="local")
    limited(app, "3/hour")
    assert through(app, 5) == 3


@pytest.mark.parametrize("kind", ["redis", "mongodb"])
def test_storage_on_the_server_of_the_sessions_that_is_down(make_app: Maker, kind: str) -> None:
    url, config = f"{kind}://127.0.0.1:{free_port()}/0", {"SESSION_STORE_TIMEOUT": 0.2}
    refusing = make_app(url, config)
    limited(refusing, "1/hour")
    answer = refusing.test_client().get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    counting = make_app(url, config, on_storage_error="local")
    limited(counting, "1/hour")
    assert through(counting, 2) == 1


def test_requests_get_503_while_the_session_store_is_down(make_app: Maker, dead_redis: str) -> None:
    app = make_app(dead_redis, storage="memory://", on_storage_error="local")
    limited(app, "3/hour")
    client = app.test_client()
    (interface,) = app.extensions["gsession"].values()
    client.set_cookie(
        "session", interface.tokens.signing(app).signer.sign(secrets.token_urlsafe(32))
    )
    assert client.get("/").status_code == 503


def test_a_frozen_server_costs_a_bounded_time(make_app: Maker, own_redis: RedisServer) -> None:
    app = make_app(own_redis.url, {"SESSION_STORE_TIMEOUT": 1})
    limited(app, "100/hour")
    until(lambda: app.test_client().get("/").status_code == 200)
    with own_redis.paused():
        assert app.test_client().get("/").status_code == 503
    until(lambda: app.test_client().get("/").status_code == 200)


def test_a_frozen_server_is_left_alone_after_a_while(
    make_app: Maker, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"SESSION_STORE_TIMEOUT": 1, "SESSION_BREAKER_PAUSE": 60}
    app = make_app(own_redis.url, config, breaker=1)
    limited(app, "3/hour")
    with own_redis.paused(), caplog.at_level(logging.INFO, "flask_gsession"):
        assert [app.test_client().get("/").status_code for _ in range(2)] == [503, 503]
    assert "not asked: rate limits have failed" in caplog.text


# -- secrets, and other packages


@pytest.mark.parametrize("store_url", ["redis", "mongodb"], indirect=True)
def test_no_token_and_no_name_in_keys_or_logs(
    make_app: Maker,
    store_url: str,
    redis_client: Redis,
    mongo_client: MongoClient[dict[str, Any]],
    store_prefix: str,
    caplog: Any,
) -> None:
    caplog.set_level(logging.DEBUG)
    app = make_app(store_url)
    limited(app, "1/hour")
    client = app.test_client()
    client.get("/visit")
    anonymous = client.get_cookie("session")
    assert anonymous is not None
    through(app, 2, client, **from_address("192.0.2.77"))
    client.get("/login/canary-user")
    through(app, 2, client, **from_address("192.0.2.77"))
    if store_url.startswith("redis"):
        names = list(redis_client.scan_iter(f"{store_prefix}limits*"))
        keys = [name.decode() for name in names]
        assert all(redis_client.ttl(name) > 0 for name in names)
    else:
        database = mongo_client[urlsplit(store_url).path.strip("/")]
        counted = list(database["gsession_limits"].find())
        keys = [str(document) for document in counted]
        assert all(document["expireAt"] for document in counted)
    assert len(keys) == 4
    token = anonymous.value.partition(".")[0]
    for text in (*keys, caplog.text):
        assert token not in text
        assert "canary-user" not in text
        assert "192.0.2.77" not in text


def test_a_limiter_of_the_applications_own_is_not_disturbed(make_app: Maker) -> None:
    app = make_app(config={"RATELIMIT_DEFAULT": "2/hour", "RATELIMIT_HEADERS_ENABLED": True})
    limited(app, "100/hour")
    Limiter(lambda: "all", app=app, storage_uri="memory://")
    client = app.test_client()
    answers: list[Response] = [client.get("/") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers.getlist("X-RateLimit-Limit") == ["2"]
    assert answers[0].headers.getlist("RateLimit-Limit") == ["100"]


def test_several_applications(make_app: Maker) -> None:
    limits = SessionLimits(proxies=0)
    apps = []
    for _ in range(2):
        app = Flask(__name__)
        app.secret_key = "a key for tests"
        Session(app, store="memory://")
        limits.init_app(app)
        limited(app, "2/hour")
        apps.append(app)
    assert [through(app, 3) for app in apps] == [2, 2]
