"""The cart: a visitor's is in the session, and joins the user's at the sign-in.

Several requests may change it at the same moment. Each change goes through `update_atomic`, which
reruns it on what is stored until it lands. Two quick clicks on "Add to cart" both count.
"""

import secrets
from collections.abc import Mapping
from typing import Any, TypedDict

from marshmallow import Schema, fields

from flask_gsession.typed import SessionKey

KEY = "cart"
MOST = 20  # pieces of one product in a cart


class Cart(TypedDict):
    """Quantities by SKU. `token` stands for the order that the cart will become."""

    token: str
    lines: dict[str, int]


class CartError(ValueError):
    """A quantity that a cart cannot take; the text is for the customer."""


class CartSchema(Schema):
    """A cart as the session stores it."""

    token = fields.Str(required=True)
    lines = fields.Dict(fields.Str(), fields.Int(strict=True), required=True)


def _both(base: Any, theirs: Any, mine: Any) -> Cart:
    """The user's cart with what a visitor put into another one since it joined."""
    before = base["lines"] if base else {}
    lines = dict(theirs["lines"]) if theirs else {}
    for sku in {**before, **mine["lines"]}:
        pieces = lines.get(sku, 0) + mine["lines"].get(sku, 0) - before.get(sku, 0)
        lines[sku] = min(pieces, max(MOST, lines.get(sku, 0)))
    lines = {sku: pieces for sku, pieces in lines.items() if pieces > 0}
    return Cart(token=(theirs or mine)["token"], lines=lines)


key = SessionKey(KEY, CartSchema, merge=_both, scope="user", at_login="merge")


def _empty() -> Cart:
    return Cart(token=secrets.token_urlsafe(16), lines={})


def current() -> Cart:
    """This visitor's cart. An empty one is not kept until something is in it."""
    cart: Any = key.get(None)
    return cart or _empty()


def count() -> int:
    """How many pieces are in the cart."""
    return sum(current()["lines"].values())


def quantity(text: str, least: int = 1) -> int:
    """The whole number in a form field. Raises `CartError` if it isn't one, or is below `least`."""
    text = text.strip()
    # isdecimal() alone would let other scripts' digits through.
    if not (text.isascii() and text.isdecimal()):
        raise CartError("Give the quantity as a whole number.")
    number = int(
        text.lstrip("0")[:9] or 0
    )  # nine digits are too many in any case, and int() stays short
    if number < least:
        raise CartError(f"Choose a quantity of {least} or more.")
    return number


def room(inside: int, stock: int) -> int:
    """How many more pieces of a product the cart may take, which holds `inside` already."""
    return max(0, min(stock, MOST) - inside)


def limit(inside: int, stock: int) -> str:
    """Says which limit there is to a quantity, and what is in the cart already."""
    if not stock:
        return "This is sold out at the moment."
    text = f"Only {stock} left in stock" if stock < MOST else f"We sell at most {MOST} per order"
    if inside:
        text += f", and {inside} {'is' if inside == 1 else 'are'} in your cart already"
    return f"{text}."


def add(sku: str, pieces: int, stock: int) -> None:
    """Put more pieces of a product into the cart.

    Raises `CartError`, and changes nothing, when the cart would hold more than `stock` or `MOST`.
    """

    def change(cart: Cart | None) -> Cart:
        cart = cart or _empty()
        inside = cart["lines"].get(sku, 0)
        if pieces > room(inside, stock):
            raise CartError(limit(inside, stock))
        return Cart(token=cart["token"], lines={**cart["lines"], sku: inside + pieces})

    key.session.update_atomic(KEY, change)


def change_quantity(sku: str, pieces: int, stock: int) -> None:
    """Have exactly this many pieces of a product in the cart; 0 takes it out.

    Raises `CartError`, and changes nothing, when that is more than `stock` or `MOST`.
    """
    if pieces > room(0, stock):
        raise CartError(limit(0, stock))

    def change(cart: Cart | None) -> Cart:
        cart = cart or _empty()
        lines = {**cart["lines"], sku: pieces}
        if not pieces:
            del lines[sku]
        return Cart(token=cart["token"], lines=lines)

    key.session.update_atomic(KEY, change)


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

    key.session.update_atomic(KEY, change)
