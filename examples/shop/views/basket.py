"""The cart, the checkout and the orders."""

from collections.abc import Mapping

from flask import Blueprint, abort, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from flask_gsession import session

from .. import cart
from ..accounts import sign_in_needed
from ..orders import Line, Order, SoldOut
from ..services import shop
from .goods import product_or_404, product_page

pages = Blueprint("basket", __name__)


def _lines(quantities: Mapping[str, int]) -> list[Line]:
    """The lines of a cart at today's prices, without goods that are no longer sold."""
    goods = shop().catalogue.known(quantities)
    return [Line(good.sku, good.name, good.price, quantities[good.sku]) for good in goods]


def _to_cart() -> ResponseReturnValue:
    return redirect(url_for("basket.show"), 303)


@pages.get("/cart")
def show() -> ResponseReturnValue:
    """The cart."""
    return _cart_page({})


@pages.get("/cart/count")
def count() -> ResponseReturnValue:
    """How many pieces are in the cart, for an open page. Nobody is using the shop by that."""
    session.skip_renewal()
    return {"pieces": cart.count()}


def _cart_page(errors: Mapping[str, str], typed: Mapping[str, str] | None = None) -> str:
    """The cart, with what is wrong with its lines, and what was typed there."""
    lines = _lines(cart.current()["lines"])
    return render_template(
        "cart.html",
        lines=lines,
        total=sum(line.total for line in lines),
        stock=shop().orders.stock(),
        products=shop().catalogue.products,
        most=cart.MOST,
        errors=errors,
        typed=typed or {},
    )


@pages.post("/cart/<sku>/add")
def add(sku: str) -> ResponseReturnValue:
    """Put pieces of a product into the cart."""
    product = product_or_404(sku)
    typed = request.form.get("quantity", "")
    try:
        cart.add(sku, cart.quantity(typed), shop().orders.stock().get(sku, 0))
    except cart.CartError as error:
        return product_page(product, typed, str(error)), 422
    flash(f"{product.name} is in your cart.", "success")
    return _to_cart()


@pages.post("/cart/<sku>")
def change(sku: str) -> ResponseReturnValue:
    """Change the quantity of one line; 0, or the button "Remove", takes it out."""
    product = product_or_404(sku)
    typed = "0" if "remove" in request.form else request.form.get("quantity", "")
    try:
        pieces = cart.quantity(typed, least=0)
        cart.change_quantity(sku, pieces, shop().orders.stock().get(sku, 0))
    except cart.CartError as error:
        return _cart_page({sku: str(error)}, {sku: typed}), 422
    if not pieces:
        flash(f"{product.name} is out of your cart.", "info")
    return _to_cart()


@pages.get("/checkout")
@sign_in_needed
def checkout() -> ResponseReturnValue:
    """The page with the order to come, and the button that places it."""
    wanted = cart.current()
    lines = _lines(wanted["lines"])
    if not lines:
        return _to_cart()
    total = sum(line.total for line in lines)
    return render_template("checkout.html", lines=lines, total=total, token=wanted["token"])


@pages.post("/checkout")
@sign_in_needed
def place() -> ResponseReturnValue:
    """Order what is in the cart. The same form again leads to the order that it placed."""
    buyer, token = session["user"], request.form.get("order", "")
    order = shop().orders.by_token(buyer, token)
    if order is None:
        wanted = cart.current()
        lines = _lines(wanted["lines"])
        total = sum(line.total for line in lines)
        if not lines or (token, request.form.get("total")) != (wanted["token"], str(total)):
            flash("Your cart has changed in the meantime. Please check it again.", "warning")
            return _to_cart()
        try:
            order = shop().orders.place(buyer, token, {line.sku: line.quantity for line in lines})
        except SoldOut as short:
            return _cart_page({sku: _too_late(left) for sku, left in short.left.items()}), 409
        flash("Thank you. Your order is placed.", "success")
    return _placed(order)


def _placed(order: Order) -> ResponseReturnValue:
    cart.settle(order.token, {line.sku: line.quantity for line in order.lines})
    return redirect(url_for("basket.order", number=order.number), 303)


def _too_late(left: int) -> str:
    stock = f"only {left} left" if left else "sold out"
    return f"Someone was faster: {stock}. Nothing has been ordered."


@pages.get("/orders")
@sign_in_needed
def orders() -> ResponseReturnValue:
    """The orders of whoever is signed in."""
    return render_template("orders.html", orders=shop().orders.placed_by(session["user"]))


@pages.get("/orders/<int(max=999999999):number>")
@sign_in_needed
def order(number: int) -> ResponseReturnValue:
    """One order; someone else's does not exist as far as this page is concerned."""
    found = shop().orders.by_number(session["user"], number)
    if found is None:
        abort(404, "You have no order with that number.")
    return render_template("order.html", order=found)
