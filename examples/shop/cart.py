"""The cart, a value of the session that several requests may change at the same moment.

Each change goes through `session.update_atomic`, which reruns it on what is stored until it
lands. Two quick clicks on "Add to cart" both count.
"""

import secrets
from collections.abc import Mapping
from typing import TypedDict

from flask_gsession import session

KEY = "cart"
MOST = 20  # pieces of one product in a cart


class Cart(TypedDict):
    """Quantities by SKU. `token` stands for the order that the cart will become."""

    token: str
    lines: dict[str, int]


class CartError(ValueError):
    """A quantity that a cart cannot take; the text is for the customer."""


def _empty() -> Cart:
    return Cart(token=secrets.token_urlsafe(16), lines={})


def current() -> Cart:
    """This visitor's cart. An empty one is not kept until something is in it."""
    cart: Cart = session.get(KEY) or _empty()
    return cart


def count() -> int:
    """How many pieces are in the cart."""
    return sum(current()["lines"].values())


def quantity(text: str, least: int = 1) -> int:
    """The whole number in a form field. Raises `CartError` when it is none, or out of range."""
    text = text.strip()
    # isdecimal() alone would let other scripts' digits through; the length keeps int() short.
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise CartError("Give the quantity as a whole number.")
    number = int(text)
    if not least <= number <= MOST:
        raise CartError(f"Choose a quantity from {least} to {MOST}.")
    return number


def add(sku: str, pieces: int, stock: int) -> None:
    """Put more pieces of a product into the cart.

    Raises `CartError`, and changes nothing, when the cart would hold more than `stock` or `MOST`.
    """

    def change(cart: Cart | None) -> Cart:
        cart = cart or _empty()
        wanted = cart["lines"].get(sku, 0) + pieces
        if wanted > stock:
            raise CartError(_shortage(stock))
        if wanted > MOST:
            raise CartError(f"We sell at most {MOST} of one product per order.")
        return Cart(token=cart["token"], lines={**cart["lines"], sku: wanted})

    session.update_atomic(KEY, change)


def change_quantity(sku: str, pieces: int, stock: int) -> None:
    """Have exactly this many pieces of a product in the cart; 0 takes it out.

    Raises `CartError`, and changes nothing, when there are not that many.
    """
    if pieces > stock:
        raise CartError(_shortage(stock))

    def change(cart: Cart | None) -> Cart:
        cart = cart or _empty()
        lines = {**cart["lines"], sku: pieces}
        if not pieces:
            del lines[sku]
        return Cart(token=cart["token"], lines=lines)

    session.update_atomic(KEY, change)


def settle(token: str, bought: Mapping[str, int]) -> None:
    """Take out what was bought by the order of this token, once however often it is called.

    What came into the cart while the order was on its way stays, under a new token.
    """

    def change(cart: Cart | None) -> Cart:
        cart = cart or _empty()
        if cart["token"] != token:
            return cart
        left = {sku: pieces - bought.get(sku, 0) for sku, pieces in cart["lines"].items()}
        return {**_empty(), "lines": {sku: pieces for sku, pieces in left.items() if pieces > 0}}

    session.update_atomic(KEY, change)


def _shortage(stock: int) -> str:
    return f"Only {stock} left in stock." if stock else "This is sold out at the moment."
