"""A minimal shop for many buyers at once. Run it from the root of the repository:

    CART_STORE=redis://localhost:6379/0 python -m flask --app examples.cart.app run

`CART_STORE` may be a `mongodb://` URL as well. Sessions and stock are in that server.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flask import Flask

from flask_gsession import Session, SessionConflict, SessionEnded, StoreUnavailable

from . import basket
from .stock import OrderClosed, SoldOut, Stock, TooManyRetries
from .stock_mongodb import MongoDBStock
from .stock_redis import RedisStock

GOODS = {"mug": 20, "lamp": 5}
MOST = 20  # pieces in one step

Answer = dict[str, Any]


class PaymentRefused(Exception):
    """There was no money."""


def pay_nothing(number: str, lines: dict[str, int]) -> None:
    """Stands for the call to a payment service, which is slow and outside.

    It gets the number of the order, so that one that is sent twice is charged once.
    """


def open_stock(url: str, prefix: str = "cart:") -> Stock:
    """The stock in the server at `url`."""
    return RedisStock(url, prefix) if url.startswith("redis") else MongoDBStock(url)


def create_app(
    store: str | None = None,
    *,
    stock: Stock | None = None,
    pay: Callable[[str, dict[str, int]], None] = pay_nothing,
    refund: Callable[[str, dict[str, int]], None] = pay_nothing,
    **settings: object,
) -> Flask:
    """Open the shop; settings also come from the environment, as `FLASK_SESSION_STORE_TIMEOUT`.

    :param store: where sessions are; `CART_STORE` by default.
    :param stock: by default in the same server.
    """
    store = store or os.environ["CART_STORE"]
    app = Flask(__name__)
    app.config.from_mapping(SECRET_KEY="change me", SESSION_STORE=store)
    app.config.from_prefixed_env()
    app.config.update(settings)
    Session(app)
    shelf = open_stock(store, os.environ.get("CART_PREFIX", "cart:")) if stock is None else stock
    shelf.fill(GOODS)

    @app.get("/stock")
    def stock_left() -> Answer:
        return shelf.left()

    @app.get("/cart")
    def show() -> Answer:
        return {"lines": basket.current()["lines"]}

    @app.post("/cart/<sku>")
    @app.post("/cart/<sku>/<int:pieces>")
    def add(sku: str, pieces: int = 1) -> Answer | tuple[Answer, int]:
        if sku not in GOODS or not 1 <= pieces <= MOST:
            return {"error": "no such thing, or too much of it"}, 422
        return {"lines": basket.add(sku, pieces)["lines"]}

    @app.post("/order")
    def order() -> Answer | tuple[Answer, int]:
        cart = basket.current()
        number, lines = cart["order"], cart["lines"]
        if not lines:
            return {"error": "the cart is empty"}, 422
        try:
            held = shelf.hold(number, lines)
        except (SoldOut, OrderClosed):
            basket.settle(number, {})
            raise
        if not held.sold:
            if held.lines != lines:  # held by a request that died, and the cart has changed since
                shelf.give_up(number)
                basket.settle(number, {})
                raise OrderClosed
            try:
                pay(number, lines)
            except PaymentRefused:
                shelf.give_up(number)
                basket.settle(number, {})
                return {"error": "payment refused; nothing was ordered"}, 402
            try:
                shelf.sell(number)
            except OrderClosed:
                refund(number, lines)
                basket.settle(number, {})
                raise
        with suppress(SessionEnded):  # logged out in another tab: the order stands
            basket.settle(number, held.lines)
        return {"order": number, "lines": held.lines}

    @app.errorhandler(SoldOut)
    def sold_out(error: SoldOut) -> tuple[Answer, int]:
        return {"error": "out of stock", "left": dict(error.left)}, 409

    @app.errorhandler(OrderClosed)
    def closed(error: OrderClosed) -> tuple[Answer, int]:
        return {"error": "too late: the goods went back to the shelf; order again"}, 409

    @app.errorhandler(TooManyRetries)
    @app.errorhandler(SessionConflict)
    @app.errorhandler(StoreUnavailable)
    def too_many_retries(error: Exception) -> tuple[Answer, int, dict[str, str]]:
        text = "too many retries: send the order again, it is the same one and taken once"
        return {"error": text}, 503, {"Retry-After": "2"}

    return app
