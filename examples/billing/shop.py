"""The shop: a Flask application whose sessions are kept by the server of the sessions."""

import os

from flask import Flask, redirect, request
from werkzeug.wrappers import Response

from flask_gsession import Session, session

PRICES = {"mug": 9, "cup": 5, "pot": 24}  # euros
PAGE = """<!doctype html><title>Shop</title><h1>Shop</h1>
<p>In your cart: {cart}. Invoice: {invoice}.</p>
<form method=post action=/add>{buttons}</form>
<form method=post action="{billing}/pay"><button>Pay</button></form>
<form method=post action=/logout><button>Log out</button></form>"""
BUTTON = "<button name=good value={good}>{good}, {price} euros</button> "

app = Flask(__name__)
app.secret_key = os.environ["SHOP_SECRET_KEY"]
app.config["SESSION_STORE"] = os.environ["SHOP_SESSION_STORE"]
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
Session(app)


@app.get("/")
def home() -> str:
    """The cart, and the invoice that the billing wrote into the session."""
    cart = session.get("cart", [])
    return PAGE.format(
        cart=", ".join(cart) or "nothing",
        invoice=session.get("invoice", "none"),
        billing=os.environ["BILLING_URL"],
        buttons="".join(BUTTON.format(good=good, price=price) for good, price in PRICES.items()),
    )


@app.post("/add")
def add() -> Response:
    """Put something into the cart."""
    good = request.form["good"]
    if good in PRICES:
        session.setdefault("cart", []).append(good)
        session["total"] = sum(PRICES[each] for each in session["cart"])
    return redirect("/")


@app.post("/logout")
def log_out() -> Response:
    """End the session, for the billing as well."""
    session.destroy()
    return redirect("/")
