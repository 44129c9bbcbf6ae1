"""The shop, at the head office and at the branch: the same code with another SESSION_STORE."""

import os

from flask import Flask, redirect, request
from werkzeug.wrappers import Response

from flask_gsession import Session, session
from flask_gsession.errors import CutOff

PRICES = {"mug": 9, "cup": 5, "pot": 24}  # euros
PAGE = """<!doctype html><title>{place}</title><h1>{place}</h1>
<p>{line}</p>
<p>{who}. In the cart: {cart}. Bought: {bought}.</p>
<form method=post action=/add>{buttons}</form>
<form method=post action=/buy><button>Buy</button></form>
<form method=post action=/login><input name=user value=ada><button>Sign in</button></form>
<form method=post action=/logout><button>Log out</button></form>"""
BUTTON = "<button name=good value={good}>{good}, {price} euros</button> "
SWITCH = '<form method=post action="{url}/{do}"><button>{do} the line</button></form>'

app = Flask(__name__)
app.secret_key = os.environ["SHOP_SECRET_KEY"]
app.config["SESSION_STORE"] = os.environ["SHOP_SESSION_STORE"]
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
app.config["SESSION_EDGE_SYNC"] = 1
# Keys that both the branch and the head office may change have a policy.
app.config["SESSION_MERGE_POLICIES"] = {"cart": "dict", "bought": "append"}
ext = Session(app)


@app.get("/")
def home() -> str:
    """The cart, what was bought, and how the branch is doing."""
    cart, bought = session.get("cart", {}), session.get("bought", [])
    return PAGE.format(
        place=os.environ["SHOP_PLACE"],
        line=line(),
        who=session.owner or "Nobody is signed in",
        cart=", ".join(f"{count} x {good}" for good, count in cart.items()) or "nothing",
        bought=", ".join(bought) or "nothing",
        buttons="".join(BUTTON.format(good=good, price=price) for good, price in PRICES.items()),
    )


def line() -> str:
    """The state of the line to the head office; empty at the head office itself."""
    edge = ext.store().edge
    if edge is None:
        return ""
    figures, url = edge.figures(), os.environ["SHOP_LINE"]
    state = "The line is cut." if edge.cut_off else "The line is up."
    waits = f" {figures.changes} changes and {figures.ends} logouts wait for the head office. "
    return state + waits + "".join(SWITCH.format(url=url, do=do) for do in ("cut", "mend"))


@app.post("/add")
def add() -> Response:
    """Put something into the cart."""
    good = request.form["good"]
    if good in PRICES:
        cart = session.setdefault("cart", {})
        cart[good] = cart.get(good, 0) + 1
    return redirect("/")


@app.post("/buy")
def buy() -> Response:
    """Sell what is in the cart, cut off or not."""
    cart = session.get("cart", {})
    bought = [f"{count} x {good}" for good, count in cart.items()]
    if bought:
        session["bought"] = [*session.get("bought", []), *bought]
        session["cart"] = {}
    return redirect("/")


@app.post("/login")
def log_in() -> Response:
    """Sign in, without a password, since this is an example."""
    session.bind(request.form["user"][:40] or "ada")
    return redirect("/")


@app.post("/logout")
def log_out() -> Response:
    """End the session, here at once and at the head office as soon as it can hear of it."""
    session.destroy()
    return redirect("/")


@app.errorhandler(CutOff)
def needs_the_head_office(error: CutOff) -> tuple[str, int]:
    """A page of the shop's own for what the branch can't do alone."""
    return "<p>The line is cut, and this needs the head office. <a href=/>Go on shopping</a>", 503
