"""The shop window: the catalogue, its categories and the page of one product."""

from flask import Blueprint, abort, render_template
from flask.typing import ResponseReturnValue

from flask_gsession import session

from .. import cart
from ..catalogue import Product
from ..services import shop

pages = Blueprint("goods", __name__)

REMEMBERED = 5  # products under "Seen recently", the one on the page included


def product_or_404(sku: str) -> Product:
    """The product with this SKU."""
    product = shop().catalogue.products.get(sku)
    if product is None:
        abort(404, "We sell nothing under that number.")
    return product


# These two pages have no form and only look at the session. Visitors who just look around get no
# cookie, and cost the session store nothing.


@pages.get("/")
def catalogue() -> ResponseReturnValue:
    """All goods, by category."""
    return render_template("catalogue.html", category=None, stock=shop().orders.stock())


@pages.get("/category/<slug>")
def category(slug: str) -> ResponseReturnValue:
    """The goods of one category."""
    chosen = shop().catalogue.categories.get(slug)
    if chosen is None:
        abort(404, "There is no such category in this shop.")
    return render_template("catalogue.html", category=chosen, stock=shop().orders.stock())


@pages.get("/product/<sku>")
def product(sku: str) -> ResponseReturnValue:
    """One product, with the form that puts it into the cart."""
    return product_page(product_or_404(sku))


def product_page(product: Product, quantity: str = "1", error: str | None = None) -> str:
    """The page of `product`, with what was typed and what is wrong with it."""
    # A change inside a list. The session notices by itself, and writes nothing when the visitor
    # only reloads the page.
    seen: list[str] = session.setdefault("seen", [])
    if product.sku in seen:
        seen.remove(product.sku)
    seen.insert(0, product.sku)
    del seen[REMEMBERED:]
    stock = shop().orders.stock().get(product.sku, 0)
    inside = cart.current()["lines"].get(product.sku, 0)
    return render_template(
        "product.html",
        product=product,
        stock=stock,
        seen=shop().catalogue.known(seen[1:]),
        quantity=quantity,
        inside=inside,
        room=cart.room(inside, stock),
        limit=cart.limit(inside, stock),
        error=error,
    )
