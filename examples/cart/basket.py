"""The cart of one visitor, a value of the session. The order will have its number."""

import secrets
from collections.abc import Mapping
from typing import TypedDict

from flask_gsession import session

KEY = "cart"


class Cart(TypedDict):
    """Pieces by SKU."""

    order: str
    lines: dict[str, int]


def _cart(lines: Mapping[str, int]) -> Cart:
    return Cart(order=secrets.token_urlsafe(16), lines=dict(lines))


def current() -> Cart:
    """This visitor's cart."""
    cart: Cart = session.get(KEY) or _cart({})
    return cart


def add(sku: str, pieces: int) -> Cart:
    """Put more pieces into the cart; two quick clicks both count."""

    def change(cart: Cart | None) -> Cart:
        cart = cart or _cart({})
        lines = {**cart["lines"], sku: cart["lines"].get(sku, 0) + pieces}
        return Cart(order=cart["order"], lines=lines)

    changed: Cart = session.update_atomic(KEY, change)
    return changed


def settle(order: str, bought: Mapping[str, int]) -> None:
    """Take out what was bought under this number, once however often it is called.

    The cart goes on under a new number, with what came in while the order was on its way. With
    nothing bought only the number is new: the old one is closed.
    """

    def change(cart: Cart | None) -> Cart:
        cart = cart or _cart({})
        if cart["order"] != order:
            return cart
        left = {sku: pieces - bought.get(sku, 0) for sku, pieces in cart["lines"].items()}
        return _cart({sku: pieces for sku, pieces in left.items() if pieces > 0})

    session.update_atomic(KEY, change)
