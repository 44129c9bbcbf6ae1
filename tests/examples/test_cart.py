"""The cart example: few goods, many buyers at once, and faults on the way, on real servers."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from examples.cart import stock as stock_module
from examples.cart import stock_mongodb, stock_redis
from examples.cart.app import PaymentRefused, create_app
from examples.cart.stock import OrderClosed, SoldOut, Stock, TooManyRetries
from examples.cart.stock_mongodb import MongoDBStock
from examples.cart.stock_redis import RedisStock
from flask_gsession import StoreUnavailable, session
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.testing import HookedStore
from tests.harness.apps import until
from tests.harness.gunicorn import GTHREAD, Gunicorn
from tests.harness.topologies import TCPProxy


class Place:
    """A server for sessions and stock, by itself and through a proxy."""

    def __init__(self, kind: str, url: str, prefix: str) -> None:
        self.kind, self.url, self.prefix = kind, url, prefix
        self._opened: list[Stock] = []

    def stock(self, url: str | None = None) -> Stock:
        url = url or self.url
        stock: Stock = RedisStock(url, self.prefix) if self.kind == "redis" else MongoDBStock(url)
        self._opened.append(stock)
        return stock

    def close(self) -> None:
        for stock in self._opened:
            stock.close()


Opener = Callable[..., Flask]


@pytest.fixture(params=["redis", "mongodb"])
def place(request: pytest.FixtureRequest, store_prefix: str) -> Iterator[Place]:
    kind: str = request.param
    place = Place(kind, request.getfixturevalue(f"{kind}_url"), store_prefix)
    yield place
    place.close()


@pytest.fixture
def stock(place: Place) -> Stock:
    stock = place.stock()
    stock.fill({"mug": 20, "lamp": 5})
    return stock


@pytest.fixture
def open_shop(place: Place, stock: Stock) -> Iterator[Opener]:
    """Opens shops with their sessions in that server, and closes them at the test's end."""
    opened: list[Flask] = []

    def opener(**settings: Any) -> Flask:
        settings = {
            "stock": stock,
            "SESSION_KEY_PREFIX": place.prefix,
            "SESSION_STORE_TIMEOUT": 20,
            **settings,
        }
        opened.append(create_app(place.url, **settings))
        return opened[-1]

    yield opener
    for app in opened:
        for ext in app.extensions["gsession"]:
            ext.close(app)


@pytest.fixture
def proxy(place: Place) -> Iterator[TCPProxy]:
    port = int(place.url.split("127.0.0.1:")[1].split("/")[0])
    with TCPProxy(port) as proxy:
        yield proxy
        place.close()  # not after the proxy: MongoDB's client says goodbye


def buyer(app: Flask, **lines: int) -> FlaskClient:
    client = app.test_client()
    for sku, pieces in lines.items():
        assert client.post(f"/cart/{sku}/{pieces}").status_code == 200
    return client


def order(client: FlaskClient) -> TestResponse:
    return client.post("/order")


def all_at_once(clients: list[FlaskClient]) -> list[TestResponse]:
    start = Barrier(len(clients))

    def go(client: FlaskClient) -> TestResponse:
        start.wait()
        return order(client)

    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(go, clients))


def test_fifty_buyers_of_twenty_pieces(open_shop: Opener, stock: Stock) -> None:
    app = open_shop()
    clients = [buyer(app, mug=1) for _ in range(50)]
    answers = all_at_once(clients)
    assert Counter(answer.status_code for answer in answers) == {200: 20, 409: 30}
    assert stock.left() == {"mug": 0, "lamp": 5}
    for client, answer in zip(clients, answers, strict=True):
        lines = client.get("/cart").json
        if answer.status_code == 200:
            assert lines == {"lines": {}}
        else:
            assert answer.json == {"error": "out of stock", "left": {"mug": 0}}
            assert lines == {"lines": {"mug": 1}}


def test_fifty_buyers_of_twenty_pieces_over_several_workers(
    place: Place, stock: Stock, tmp_path: Path
) -> None:
    environment = {
        "CART_STORE": place.url,
        "CART_PREFIX": place.prefix,
        "FLASK_SESSION_KEY_PREFIX": place.prefix,
        "FLASK_SESSION_STORE_TIMEOUT": "20",
    }
    with Gunicorn(
        tmp_path,
        *GTHREAD,
        *("--access-logfile", "-", "--access-logformat", "served by %(p)s"),
        workers=2,
        environment=environment,
        app="examples.cart.app:create_app()",
    ) as server:

        def buy(_: int) -> int:
            cookie = server.post("/cart/mug").cookie
            start.wait()
            return server.ask("POST", "/order", cookie).status

        start = Barrier(50)
        with ThreadPoolExecutor(50) as pool:
            statuses = Counter(pool.map(buy, range(50)))
        assert statuses == {200: 20, 409: 30}, server.log
        until(lambda: server.get("/cart") and len(set(re.findall("served by .*", server.log))) == 2)
        assert stock.left()["mug"] == 0
        assert server.stop() == 0


def test_an_order_takes_all_its_lines_or_none(open_shop: Opener, stock: Stock) -> None:
    app = open_shop()
    answers = all_at_once([buyer(app, mug=1, lamp=1) for _ in range(12)])
    assert Counter(answer.status_code for answer in answers) == {200: 5, 409: 7}
    assert stock.left() == {"mug": 15, "lamp": 0}


def test_a_double_click_orders_once(open_shop: Opener, stock: Stock) -> None:
    charged: list[str] = []
    app = open_shop(pay=lambda number, lines: charged.append(number))
    clients = [buyer(app, mug=2)]
    cookie = clients[0].get_cookie("session")
    assert cookie is not None
    for _ in range(7):
        clients.append(app.test_client())
        clients[-1].set_cookie("session", cookie.value)
    answers = all_at_once(clients)
    # The other requests find the cart empty.
    assert Counter(answer.status_code for answer in answers).keys() <= {200, 422}
    orders = {answer.json["order"] for answer in answers if answer.status_code == 200}
    assert orders == set(charged)
    assert len(orders) == 1
    assert stock.left()["mug"] == 18
    assert clients[0].get("/cart").json == {"lines": {}}


def test_later_additions_to_the_cart_stay(open_shop: Opener, stock: Stock) -> None:
    def pay(number: str, lines: dict[str, int]) -> None:
        assert tab.post("/cart/lamp/2").status_code == 200

    app = open_shop(pay=pay)
    client = buyer(app, mug=1)
    cookie = client.get_cookie("session")
    tab = app.test_client()
    assert cookie is not None
    tab.set_cookie("session", cookie.value)
    assert order(client).json["lines"] == {"mug": 1}
    assert client.get("/cart").json == {"lines": {"lamp": 2}}
    assert stock.left() == {"mug": 19, "lamp": 5}


def test_an_order_is_taken_out_of_the_cart_once(open_shop: Opener) -> None:
    """One of two clicks is served first, and then the cart is filled again."""
    tabs: list[FlaskClient] = []

    def pay(number: str, lines: dict[str, int]) -> None:
        if tabs:
            tab = tabs.pop()
            assert order(tab).status_code == 200
            assert tab.post("/cart/mug").status_code == 200

    app = open_shop(pay=pay)
    client = buyer(app, mug=2)
    cookie = client.get_cookie("session")
    assert cookie is not None
    tabs.append(app.test_client())
    tabs[0].set_cookie("session", cookie.value)
    assert order(client).status_code == 200
    assert client.get("/cart").json == {"lines": {"mug": 1}}


# Halves that fail ------------------------------------------------------------------------------


def test_a_refused_payment_puts_the_goods_back(open_shop: Opener, stock: Stock) -> None:
    def pay(number: str, lines: dict[str, int]) -> None:
        assert stock.left()["mug"] == 17
        raise PaymentRefused

    client = buyer(open_shop(pay=pay), mug=3)
    for _ in range(2):
        assert order(client).status_code == 402
        assert stock.left()["mug"] == 20
    assert client.get("/cart").json == {"lines": {"mug": 3}}


def test_a_payment_that_took_too_long_is_refunded(
    open_shop: Opener, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    refunded: list[str] = []
    client = buyer(open_shop(refund=lambda number, lines: refunded.append(number)), mug=3)
    for module in (stock_redis, stock_mongodb):
        monkeypatch.setattr(module, "HOLD", -1.0)
    answer = order(client)
    assert answer.status_code == 409
    assert "too late" in answer.text
    assert len(refunded) == 1
    monkeypatch.undo()
    assert order(client).status_code == 200
    assert stock.left()["mug"] == 17


def test_the_goods_of_a_dead_request_go_back_after_their_time(
    stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for module in (stock_redis, stock_mongodb):
            patch.setattr(module, "HOLD", -1.0)
        stock.hold("dead", {"mug": 20})
        assert stock.left()["mug"] == 0
    assert not stock.hold("next", {"mug": 20}).sold
    with pytest.raises(OrderClosed):
        stock.sell("dead")
    with pytest.raises(OrderClosed):
        stock.hold("dead", {"mug": 1})
    stock.sell("next")
    assert stock.left()["mug"] == 0


def test_a_session_that_could_not_be_stored_loses_no_sale(
    place: Place, open_shop: Opener, stock: Stock
) -> None:
    charged: list[str] = []
    sessions = HookedStore(open_store(place.url, StoreOptions(place.prefix, timeout=20))[0])
    app = open_shop(SESSION_STORE=sessions, pay=lambda number, lines: charged.append(number))
    client = buyer(app, mug=4)

    def fail() -> None:
        raise StoreUnavailable("for the test")

    sessions.before("save", fail)
    answer = order(client)
    assert answer.status_code == 503
    assert stock.left()["mug"] == 16
    assert client.get("/cart").json == {"lines": {"mug": 4}}
    again = order(client)  # the same order, sold already
    assert again.status_code == 200
    assert again.json["order"] == charged[0]
    assert len(charged) == 1
    assert stock.left()["mug"] == 16
    assert client.get("/cart").json == {"lines": {}}
    sessions.close()


def test_a_request_that_died_after_its_hold_sells_no_other_cart(
    open_shop: Opener, stock: Stock
) -> None:
    died = False

    def pay(number: str, lines: dict[str, int]) -> None:
        nonlocal died
        if not died:
            died = True
            raise RuntimeError("as if the worker were killed")

    client = buyer(open_shop(pay=pay), mug=1)
    assert order(client).status_code == 500
    assert stock.left()["mug"] == 19
    client.post("/cart/mug/2")
    assert order(client).status_code == 409  # one mug is held, three are in the cart
    assert stock.left()["mug"] == 20
    assert order(client).json["lines"] == {"mug": 3}
    assert stock.left()["mug"] == 17


def test_a_parallel_logout_does_not_undo_the_order(open_shop: Opener, stock: Stock) -> None:
    def pay(number: str, lines: dict[str, int]) -> None:
        (ext,) = app.extensions["gsession"]
        assert ext.store().delete(session.handle)

    app = open_shop(pay=pay)
    client = buyer(app, mug=1)
    assert order(client).status_code == 200
    assert stock.left()["mug"] == 19
    assert client.get("/cart").json == {"lines": {}}


# Faults on the way -----------------------------------------------------------------------------

STEPS = {"redis": b"EVALSHA", "mongodb": b"findAndModify"}


@pytest.mark.parametrize("step", ["hold", "sell", "give_up"])
def test_a_lost_reply_takes_nothing_twice(
    place: Place, stock: Stock, proxy: TCPProxy, step: str
) -> None:
    behind = place.stock(proxy.through(place.url))
    behind.hold("first", {"mug": 1})
    behind.sell("first")
    behind.give_up("first")  # no effect any more; the scripts are known to the server now
    match = STEPS[place.kind]
    if step == "hold":
        with proxy.lose_reply(match, times=2):
            held = behind.hold("second", {"mug": 2, "lamp": 1})
        assert held == ("second", {"mug": 2, "lamp": 1}, False)
    else:
        behind.hold("second", {"mug": 2, "lamp": 1})
        with proxy.lose_reply(match, times=2):
            getattr(behind, step)("second")
    assert proxy.cuts == 2
    given_up = step == "give_up"
    assert stock.left() == {"mug": 19 if given_up else 17, "lamp": 5 if given_up else 4}


def test_too_many_retries_are_said_and_the_same_order_goes_through_later(
    place: Place,
    open_shop: Opener,
    stock: Stock,
    proxy: TCPProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stock_module, "ATTEMPTS", 2)
    client = buyer(open_shop(stock=place.stock(proxy.through(place.url))), mug=1)
    with proxy.refuse():
        answer = order(client)
        assert answer.status_code == 503
        assert "too many retries" in answer.text
        assert answer.headers["Retry-After"] == "2"
    assert order(client).status_code == 200
    assert stock.left()["mug"] == 19


def test_the_retries_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(stock_module.time, "sleep", pauses.append)

    def fail() -> None:
        raise ConnectionError

    with pytest.raises(TooManyRetries):
        stock_module.persistently(fail, (ConnectionError,))
    assert len(pauses) == stock_module.ATTEMPTS - 1
    assert all(0 <= pause <= 0.05 * 2**number for number, pause in enumerate(pauses, 1))
    with pytest.raises(SoldOut):
        stock_module.persistently(_sold_out, (ConnectionError,))


def _sold_out() -> None:
    raise SoldOut({})


@pytest.fixture
def mongo_stock(mongodb_url: str) -> Iterator[MongoDBStock]:
    stock = MongoDBStock(mongodb_url)
    stock.fill({"mug": 20, "lamp": 5})
    yield stock
    stock.close()


def test_a_crash_between_two_lines_leaves_nothing_taken(
    mongo_stock: MongoDBStock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stock_mongodb, "HOLD", -1.0)
        patch.setattr(mongo_stock, "_move", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mongo_stock.hold("dead", {"mug": 2, "lamp": 1})
    assert mongo_stock.left() == {"mug": 18, "lamp": 4}
    mongo_stock.hold("next", {"mug": 1})
    assert mongo_stock.left() == {"mug": 19, "lamp": 5}


def test_a_stopped_worker_puts_everything_back(
    mongo_stock: MongoDBStock, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = mongo_stock._take

    def take_late(order: dict[str, Any], sku: str, pieces: int) -> bool:
        mongo_stock.give_up("slow")
        return take(order, sku, pieces)

    monkeypatch.setattr(mongo_stock, "_take", take_late)
    with pytest.raises(OrderClosed):
        mongo_stock.hold("slow", {"mug": 2, "lamp": 1})
    assert mongo_stock.left() == {"mug": 20, "lamp": 5}


def test_a_late_copy_of_a_request_takes_nothing(mongo_stock: MongoDBStock) -> None:
    mongo_stock.hold("one", {"mug": 2})
    taken = mongo_stock._find("one")
    mongo_stock.sell("one")
    assert mongo_stock._take(taken, "mug", 2)
    assert mongo_stock.left()["mug"] == 18


def test_sold_orders_leave_the_shelf_when_no_copy_can_come_any_more(
    mongo_stock: MongoDBStock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mongo_stock.hold("one", {"mug": 2})
    mongo_stock.sell("one")
    monkeypatch.setattr(stock_mongodb, "_now", _in_an_hour)
    mongo_stock.hold("two", {"lamp": 1})
    product: Any = mongo_stock._shelf.find_one({"_id": "mug"})
    assert (product["left"], product["held"]) == (18, [])


def _in_an_hour() -> datetime:
    return datetime.now(UTC) + timedelta(hours=1)
