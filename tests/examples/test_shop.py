"""The demo shop, page by page, with good and bad input."""

import ast
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from html.parser import HTMLParser
from http.cookies import SimpleCookie
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from flask import Flask
from jinja2.bccache import Bucket, BytecodeCache
from werkzeug.security import generate_password_hash
from werkzeug.test import TestResponse

import examples.shop
from examples.shop import accounts, formats, preferences
from examples.shop.accounts import DEMO_PASSWORD
from examples.shop.app import create_app
from examples.shop.catalogue import Catalogue, Category, Product
from examples.shop.database import Database
from examples.shop.instance import create_once
from examples.shop.orders import Orders
from examples.shop.services import Shop
from tests.harness.shop_buyer import open_and_buy

HERE = Path(examples.shop.__file__).parent

Opener = Callable[..., Flask]


@pytest.fixture(autouse=True)
def quick_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow hashes are there to be slow; the tests sign in hundreds of times."""
    quick = partial(generate_password_hash, method="pbkdf2:sha256:1")
    monkeypatch.setattr("examples.shop.accounts.generate_password_hash", quick)


class CompiledTemplates(BytecodeCache):
    """Each template is compiled once for all the shops of these tests."""

    def __init__(self) -> None:
        self._code: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self._code:
            bucket.bytecode_from_string(self._code[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._code[bucket.key] = bucket.bytecode_to_string()


TEMPLATES = CompiledTemplates()


@pytest.fixture
def open_shop(tmp_path: Path, store_prefix: str) -> Iterator[Opener]:
    """Opens shops in a folder of the test's own, and closes them at its end."""
    opened = []

    def opener(store: str = "memory://", **settings: object) -> Flask:
        settings = {"TESTING": True, "SESSION_KEY_PREFIX": store_prefix, **settings}
        app = create_app(store, instance_path=tmp_path / "instance", **settings)
        app.jinja_env.bytecode_cache = TEMPLATES
        opened.append(app)
        return app

    yield opener
    for app in opened:
        shop_of(app).sessions.close(app)


@pytest.fixture
def app(open_shop: Opener) -> Flask:
    return open_shop()


def shop_of(app: Flask) -> Shop:
    shop: Shop = app.extensions["shop"]
    return shop


def stock_of(app: Flask, sku: str) -> int:
    return shop_of(app).orders.stock()[sku]


def set_stock(app: Flask, sku: str, stock: int) -> None:
    with Database(Path(app.instance_path) / "shop.sqlite3").writing() as connection:
        connection.execute("UPDATE stock SET stock = ? WHERE sku = ?", (stock, sku))


def order_count(app: Flask) -> int:
    with Database(Path(app.instance_path) / "shop.sqlite3").reading() as connection:
        count: int = connection.execute("SELECT count(*) FROM orders").fetchone()[0]
    return count


def hidden(page: str) -> dict[str, str]:
    """The hidden fields of a page."""
    return dict(re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', page))


class Visitor:
    """A browser: keeps its cookie, and sends the forms' token along."""

    def __init__(self, app: Flask, cookie: str | None = None) -> None:
        self.app = app
        self.client = app.test_client()
        if cookie is not None:
            self.client.set_cookie("session", cookie)

    @property
    def cookie(self) -> str | None:
        found = self.client.get_cookie("session")
        return found.value if found else None

    def get(self, path: str) -> TestResponse:
        return self.client.get(path)

    def token(self) -> str:
        return field(self.get("/preferences"), "csrf_token")

    def post(self, path: str, **fields: str) -> TestResponse:
        return self.client.post(path, data={"csrf_token": self.token(), **fields})

    def send(self, path: str) -> TestResponse:
        """Send the form of a page that asks whether to go on."""
        return self.client.post(path, data=hidden(self.get(path).text))

    def add(self, sku: str, quantity: str = "1") -> TestResponse:
        return self.post(f"/cart/{sku}/add", quantity=quantity)

    def sign_in(self, name: str = "mira", password: str = DEMO_PASSWORD) -> TestResponse:
        return self.post("/sign-in", name=name, password=password)

    def checkout_form(self) -> dict[str, str]:
        page = self.get("/checkout")
        assert page.status_code == 200
        return {name: field(page, name) for name in ("csrf_token", "order", "total")}

    def order(self) -> TestResponse:
        return self.client.post("/checkout", data=self.checkout_form())

    def cart(self) -> dict[str, int]:
        page = self.get("/cart").text
        lines = re.findall(r'id="pieces-([\w-]+)".*?value="(\d+)"', page)
        return {sku: int(pieces) for sku, pieces in lines}

    def session(self) -> Any:
        return self.get("/api/session").json


def field(page: TestResponse, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page.text)
    assert found, f"no field {name} in {page.request.path}"
    return found[1]


def set_cookie(response: TestResponse) -> str | None:
    """The `Set-Cookie` of the session, when there is one."""
    headers = [h for h in response.headers.getlist("Set-Cookie") if h.startswith("session=")]
    assert len(headers) <= 1
    return headers[0] if headers else None


def test_a_visit_from_the_first_look_to_the_last(
    open_shop: Opener, store_url: str, store_prefix: str
) -> None:
    app = open_shop(store_url)
    visitor = Visitor(app)
    assert "Gooseneck kettle" in visitor.get("/").text
    assert "Choose" not in visitor.get("/product/KIT-101").text
    before = visitor.cookie
    handle = visitor.session()["handle"]
    added = visitor.add("KIT-101", "2")
    assert (added.status_code, added.location) == (303, "/cart")
    assert visitor.add("DSK-201", "3").status_code == 303
    assert "Dot-grid notebook A5 is in your cart." in visitor.get("/cart").text
    assert visitor.cart() == {"KIT-101": 2, "DSK-201": 3}

    asked = visitor.get("/checkout")
    assert asked.location == "/sign-in?next=checkout"
    signed_in = visitor.post("/sign-in", name="Mira", password=DEMO_PASSWORD, next="checkout")
    assert signed_in.location == "/checkout"
    assert visitor.cookie != before
    assert visitor.session()["handle"] != handle
    assert Visitor(app, before).session()["handle"] is None  # no grace at sign-in
    assert visitor.cart() == {"KIT-101": 2, "DSK-201": 3}

    placed = visitor.order()
    assert re.fullmatch(r"/orders/\d+", placed.location or "")
    receipt = visitor.get(placed.location or "").text
    assert "€174.50" in receipt
    assert visitor.cart() == {}
    assert stock_of(app, "KIT-101") == 12
    assert stock_of(app, "DSK-201") == 57
    assert f'href="{placed.location}"' in visitor.get("/orders").text

    saved = visitor.post("/preferences", theme="dark", language="de", notifications="on")
    assert saved.status_code == 303
    page = visitor.get("/")
    assert 'data-theme="dark"' in page.text
    assert "64,90" in page.text

    facts = visitor.session()
    page = visitor.get("/session")
    assert facts["handle"] in page.text
    assert visitor.cookie
    assert visitor.cookie.partition(".")[0] not in page.text
    assert facts["keys"]["signed_in_at"] == "datetime"
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(facts["created_at"])
    assert datetime.fromisoformat(facts["expires_at"]) > datetime.now(UTC) + timedelta(hours=1)

    assert visitor.post("/session/rotate").status_code == 303
    rotated = visitor.session()
    assert rotated["handle"] not in (None, facts["handle"])
    assert rotated["created_at"] == facts["created_at"]
    assert "user" in rotated["keys"]

    last = visitor.cookie
    assert visitor.post("/sign-out").status_code == 303
    assert Visitor(app, last).session()["handle"] is None
    assert set(visitor.session()["keys"]) == {"_flashes", "preferences"}
    assert "You are signed out." in visitor.get("/").text


# Each page


class Page(HTMLParser):
    """Checks a page while reading it: tags close, ids are unique, each field has a label."""

    EMPTY = frozenset({"meta", "link", "input", "br", "path", "rect", "circle", "ellipse"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.fields: list[str | None] = []
        self.labelled: list[str | None] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack
        assert len(set(self.ids)) == len(self.ids)
        assert set(self.fields) <= set(self.labelled)
        assert set(self.references) <= set(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag != "style", "everything comes from files"
        assert tag != "script" or given.get("src")
        assert not any(name == "style" or name.startswith("on") for name in given)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        hidden = given.get("type") == "hidden" or "label" in self.stack
        if tag in ("input", "select") and not hidden:
            self.fields.append(given.get("id"))
        if tag == "label":
            self.labelled.append(given.get("for"))
        for name in ("aria-describedby", "aria-labelledby"):
            self.references += (given.get(name) or "").split()
        if tag not in self.EMPTY:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.EMPTY

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/category/outdoors", 200),
        ("/product/KIT-104", 200),
        ("/product/HOM-403", 200),
        ("/cart", 200),
        ("/checkout", 200),
        ("/orders", 200),
        ("/orders/1", 200),
        ("/preferences", 200),
        ("/session", 200),
        ("/devices", 200),
        ("/devices/end-others", 200),
        ("/admin/sessions", 403),
        ("/confirm", 200),
        ("/nowhere", 404),
    ],
)
def test_each_page_is_well_formed(app: Flask, path: str, status: int) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    visitor.add("KIT-101")
    visitor.order()
    visitor.add("DSK-203", "2")
    page = visitor.get(path)
    assert page.status_code == status
    Page(page.text)
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.mimetype == "text/html"


@pytest.mark.parametrize("path", ["/", "/category/desk", "/cart", "/session", "/sign-in"])
def test_each_page_is_well_formed_for_a_stranger(app: Flask, path: str) -> None:
    Page(Visitor(app).get(path).text)


@pytest.mark.parametrize("path", ["/", "/category/desk", "/cart", "/session", "/nowhere"])
def test_looking_around_leaves_no_session(app: Flask, path: str) -> None:
    page = Visitor(app).get(path)
    assert set_cookie(page) is None


def test_a_static_file_does_not_touch_the_session(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.add("KIT-101")
    styles = visitor.get("/static/shop.css")
    assert styles.mimetype == "text/css"
    assert "Vary" not in styles.headers
    styles.close()


def test_the_page_remembers_seen_products(app: Flask) -> None:
    visitor = Visitor(app)
    for sku in ("KIT-101", "KIT-102", "KIT-101", "DSK-202"):
        visitor.get(f"/product/{sku}")
    seen = visitor.get("/product/DSK-202").text.partition("Seen recently")[2]
    assert re.findall(r'href="/product/([\w-]+)"', seen) == ["KIT-101", "KIT-102"]


def test_the_cookie_is_lax_and_out_of_reach_of_scripts(app: Flask) -> None:
    header = set_cookie(Visitor(app).get("/product/KIT-101"))
    cookie = SimpleCookie(header or "")["session"]
    assert cookie["samesite"] == "Lax"
    assert cookie["httponly"]


# The cart


BAD_QUANTITIES = [
    "",
    "0",
    "-1",
    "1.5",
    "1e1",
    "two",
    "21",
    "999999999999999999999999999999",
    "٣",
    "²",
    "0x2",
    "1_0",
    "NaN",
    "1\x00",
    "9" * 10_000,
    "'; DROP TABLE stock; --",
]


@pytest.mark.parametrize("quantity", BAD_QUANTITIES)
def test_a_bad_quantity_is_refused_beside_its_field(app: Flask, quantity: str) -> None:
    visitor = Visitor(app)
    page = visitor.add("KIT-101", quantity)
    assert page.status_code == 422
    assert 'aria-invalid="true"' in page.text
    Page(page.text)
    assert visitor.cart() == {}


def test_a_quantity_that_is_missing_is_refused(app: Flask) -> None:
    assert Visitor(app).post("/cart/KIT-101/add").status_code == 422


@pytest.mark.parametrize("quantity", [q for q in BAD_QUANTITIES if q != "0"])
def test_a_bad_quantity_in_the_cart_leaves_it_as_it_was(app: Flask, quantity: str) -> None:
    visitor = Visitor(app)
    visitor.add("KIT-101", "2")
    page = visitor.post("/cart/KIT-101", quantity=quantity)
    assert page.status_code == 422
    Page(page.text)
    assert visitor.cart() == {"KIT-101": 2}


def test_the_cart_can_be_changed(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.add("KIT-101", "2")
    visitor.add("KIT-101", " 3 ")
    visitor.add("DSK-201")
    visitor.add("DSK-202")
    assert visitor.cart() == {"KIT-101": 5, "DSK-201": 1, "DSK-202": 1}
    visitor.post("/cart/KIT-101", quantity="4")
    visitor.post("/cart/DSK-201", quantity="0")
    visitor.post("/cart/DSK-202", quantity="7", remove="yes")
    assert visitor.cart() == {"KIT-101": 4}
    assert "€259.60" in visitor.get("/cart").text
    again = visitor.post("/cart/DSK-202", quantity="1", remove="yes")
    assert again.status_code == 303  # removed twice, by two tabs


def test_the_cart_takes_no_more_than_there_is(app: Flask) -> None:
    visitor = Visitor(app)
    assert visitor.add("DSK-203", "2").status_code == 303
    page = visitor.add("DSK-203", "1")
    assert page.status_code == 422
    assert "Only 2 left in stock, and 2 are in your cart already." in page.text
    page = visitor.post("/cart/DSK-203", quantity="3")
    assert page.status_code == 422
    assert "Only 2 left in stock." in page.text
    assert visitor.add("HOM-403").status_code == 422
    assert visitor.cart() == {"DSK-203": 2}


def test_the_cart_takes_no_more_than_we_sell_at_once(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.add("DSK-201", "20")
    full = visitor.add("DSK-201", "1").text
    assert "We sell at most 20 per order, and 20 are in your cart already." in full
    assert visitor.cart() == {"DSK-201": 20}


@pytest.mark.parametrize(
    ("inside", "wanted", "message"),
    [
        (0, "15", "Only 14 left in stock."),
        (0, "99", "Only 14 left in stock."),
        (0, "9" * 10_000, "Only 14 left in stock."),
        (5, "10", "Only 14 left in stock, and 5 are in your cart already."),
        (1, "99", "Only 14 left in stock, and 1 is in your cart already."),
        (0, "0", "Choose a quantity of 1 or more."),
        (0, "-1", "Give the quantity as a whole number."),
    ],
    ids=["one", "many", "absurd", "with 5", "with 1", "none", "less"],
)
def test_a_refused_quantity_names_the_limit_that_the_field_has(
    inside: int, wanted: str, message: str, app: Flask
) -> None:
    visitor = Visitor(app)
    if inside:
        visitor.add("KIT-101", str(inside))
    page = visitor.add("KIT-101", wanted)
    assert page.status_code == 422
    assert f'min="1" max="{14 - inside}"' in page.text
    assert message in page.text
    assert visitor.add("KIT-101", str(14 - inside)).status_code == 303
    full = visitor.get("/product/KIT-101").text
    assert "Only 14 left in stock, and 14 are in your cart already." in full
    assert 'name="quantity"' not in full


def test_the_field_in_the_cart_ends_at_the_stock(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.add("DSK-203", "1")
    assert 'min="0" max="2"' in visitor.get("/cart").text
    visitor.add("DSK-201", "1")
    assert 'min="0" max="20"' in visitor.get("/cart").text


def test_quick_clicks_all_count(open_shop: Opener, store_url: str) -> None:
    app = open_shop(store_url)
    visitor = Visitor(app)
    visitor.add("KIT-105")
    cookie, token = visitor.cookie, visitor.token()

    def click(sku: str) -> int:
        client = Visitor(app, cookie).client
        form = {"csrf_token": token, "quantity": "1"}
        return client.post(f"/cart/{sku}/add", data=form).status_code

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(click, ["KIT-105", "DSK-201"] * 8))
    assert answers == [303] * 16
    assert visitor.cart() == {"KIT-105": 9, "DSK-201": 8}


# Addresses that lead nowhere


@pytest.mark.parametrize(
    "path",
    [
        "/product/NO-1",
        "/product/kit-101",
        "/product/%00",
        "/product/..%2f..%2fetc%2fpasswd",
        "/category/nothing",
        "/orders/0",
        "/orders/-1",
        "/orders/999999999",
        "/orders/99999999999999999999",
        "/orders/x",
        "/static/../app.py",
    ],
)
def test_an_unknown_address_is_a_404_in_the_shops_style(app: Flask, path: str) -> None:
    visitor = Visitor(app)
    visitor.post("/preferences", theme="dark", language="en")
    visitor.sign_in()
    page = visitor.get(path)
    assert page.status_code == 404
    assert "This shelf is empty" in page.text
    assert 'data-theme="dark"' in page.text


@pytest.mark.parametrize("path", ["/cart/NO-1/add", "/cart/NO-1"])
def test_an_unknown_product_is_a_404_for_the_cart(app: Flask, path: str) -> None:
    visitor = Visitor(app)
    assert visitor.post(path, quantity="1").status_code == 404
    assert visitor.cart() == {}


def test_an_order_is_nobody_elses_business(app: Flask) -> None:
    mira, jonas = Visitor(app), Visitor(app)
    mira.sign_in("mira")
    mira.add("KIT-101")
    order = mira.order().location or ""
    jonas.sign_in("jonas")
    assert mira.get(order).status_code == 200
    assert jonas.get(order).status_code == 404
    assert Visitor(app).get(order).status_code == 303
    assert order not in jonas.get("/orders").text


def test_a_form_beyond_measure_is_refused(app: Flask) -> None:
    visitor = Visitor(app)
    assert visitor.post("/preferences", theme="x" * 200_000).status_code == 413


def test_a_wrong_method_is_refused_in_the_shops_style(app: Flask) -> None:
    page = Visitor(app).get("/sign-out")
    assert page.status_code == 405
    assert "POST" in page.headers["Allow"]
    assert "Larch" in page.text


# Forms from elsewhere


def every_form(app: Flask) -> list[str]:
    rules = (rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ()))
    return [rule.rule.replace("<sku>", "KIT-101").replace("<device_id>", "x") for rule in rules]


@pytest.mark.parametrize("token", [None, "", "wrong", "ä\x00", "x" * 10_000, "another visitor's"])
def test_no_form_goes_through_without_its_token(app: Flask, token: str | None) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    visitor.add("KIT-101")
    form = visitor.checkout_form() | {"quantity": "2", "name": "jonas", "password": DEMO_PASSWORD}
    del form["csrf_token"]
    if token is not None:
        form["csrf_token"] = Visitor(app).token() if token.startswith("another") else token
    before = visitor.session()
    forms = every_form(app)
    assert len(forms) == 13
    for path in forms:
        page = visitor.client.post(path, data=form)
        assert page.status_code == 400, path
        assert "That form did not come through" in page.text
    assert visitor.session() == before
    assert order_count(app) == 0


def test_a_stranger_without_a_session_posts_nothing(app: Flask) -> None:
    for path in every_form(app):
        page = app.test_client().post(path, data={"csrf_token": ""})
        assert page.status_code == 400
        assert set_cookie(page) is None


# Signing in and out


@pytest.mark.parametrize(
    ("name", "password", "message"),
    [
        ("mira", "wrong", "Wrong name or password."),
        ("nobody", DEMO_PASSWORD, "Wrong name or password."),
        ("mira", "", "Give your password."),
        ("", DEMO_PASSWORD, "Give your name."),
        ("mira' OR 1=1 --", "not-mine", "Wrong name or password."),
        ("<b>mira</b>", "x" * 5_000, "&lt;b&gt;mira"),
        ("mira\x00", DEMO_PASSWORD, "Wrong name or password."),
    ],
)
def test_a_wrong_sign_in_changes_nothing(
    app: Flask, name: str, password: str, message: str
) -> None:
    visitor = Visitor(app)
    visitor.token()
    before = visitor.session()
    page = visitor.sign_in(name, password)
    assert page.status_code == (401 if message.startswith("Wrong") or "&lt;" in message else 422)
    assert message in page.text
    assert password == "" or password not in page.text or password == DEMO_PASSWORD
    Page(page.text)
    assert visitor.session() == before


@pytest.mark.parametrize("wanted", ["//evil.example", "https://evil", "/\\evil", "", "x"])
def test_the_way_back_never_leads_outside(app: Flask, wanted: str) -> None:
    form = {"name": "mira", "password": DEMO_PASSWORD, "next": wanted}
    assert Visitor(app).post("/sign-in", **form).location == "/"


def test_a_signed_in_user_is_not_asked_again(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    assert visitor.get("/sign-in").location == "/orders"


def test_a_planted_token_is_not_signed_in(app: Flask) -> None:
    attacker = Visitor(app)
    attacker.get("/product/KIT-101")
    victim = Visitor(app, attacker.cookie)
    victim.sign_in()
    assert "user" in victim.session()["keys"]
    assert "user" not in attacker.session()["keys"]


def test_form_tokens_end_with_the_sign_in(app: Flask) -> None:
    visitor = Visitor(app)
    before = visitor.token()
    visitor.sign_in()
    late = visitor.client.post("/cart/KIT-101/add", data={"csrf_token": before, "quantity": "1"})
    assert late.status_code == 400


def test_signing_out_ends_the_session_for_good(open_shop: Opener, store_url: str) -> None:
    app = open_shop(store_url)
    visitor = Visitor(app)
    visitor.post("/preferences", theme="dark", language="fr")
    visitor.sign_in()
    visitor.add("KIT-101")
    stolen = visitor.cookie
    assert visitor.post("/sign-out").location == "/"
    page = visitor.get("/")
    assert "You are signed out." in page.text
    assert 'data-theme="dark"' in page.text
    thief = Visitor(app, stolen)
    assert thief.get("/orders").location == "/sign-in?next=orders"
    assert thief.session()["handle"] is None
    assert thief.cart() == {}


def test_devices_are_listed_and_ended(open_shop: Opener, store_url: str) -> None:
    app = open_shop(store_url)
    desk, phone, tablet, other = (Visitor(app) for _ in range(4))
    agent = "Mozilla/5.0 (iPhone) AppleWebKit/605 Version/18.0 Safari/604.1"
    phone.client.environ_base["HTTP_USER_AGENT"] = agent
    for visitor in (desk, phone, tablet):
        visitor.sign_in()
    other.sign_in("jonas")
    page = desk.get("/devices")
    Page(page.text)
    assert page.text.count("This device") == 1
    (end,) = re.findall(r'href="(/devices/[^"]+/end)">[^/]*Safari on iPhone', page.text)
    Page(desk.get(end).text)
    assert other.get(end).status_code == 404, "the device of somebody else"
    assert desk.send(end).location == "/devices"
    assert "Safari on iPhone is signed out." in desk.get("/devices").text
    assert "user" not in phone.session()["keys"]
    assert desk.send("/devices/end-others").location == "/devices"
    assert "user" not in tablet.session()["keys"]
    assert "user" in desk.session()["keys"]
    assert "user" in other.session()["keys"]
    stranger = Visitor(app)
    assert stranger.get("/devices").location == "/sign-in?next=/devices"
    form = {"name": "mira", "password": DEMO_PASSWORD, "next": "/devices"}
    assert stranger.post("/sign-in", **form).location == "/devices"


def test_the_staff_ends_sessions_of_others(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    mira, sofia = Visitor(app), Visitor(app)
    mira.sign_in()
    assert mira.get("/admin/sessions").status_code == 403
    sofia.sign_in("sofia")
    assert "See a customer" in sofia.get("/").text
    found = sofia.get("/admin/sessions?user=mira")
    Page(found.text)
    (end,) = re.findall(r'href="(/admin/sessions/end\?[^"]+)"', found.text)
    page = sofia.get(end.replace("&amp;", "&"))
    Page(page.text)
    with caplog.at_level("INFO", "flask_gsession.audit"):
        sofia.client.post("/admin/sessions/end", data=hidden(page.text) | {"reason": "a call"})
    assert 'reason="a call" by="sofia"' in caplog.text
    assert "user" not in mira.session()["keys"]


def test_ending_devices_needs_a_fresh_password(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    desk, phone = Visitor(app), Visitor(app)
    for visitor in (desk, phone):
        visitor.sign_in()
    form = hidden(desk.get("/devices/end-others").text)
    headers = {"Accept": "text/html", "Referer": "http://localhost/devices/end-others"}
    with monkeypatch.context() as later:
        later.setattr("flask_gsession.freshness.confirmed_at", lambda *arguments: None)
        asked = desk.client.post("/devices/end-others", data=form, headers=headers)
    assert asked.location == "/confirm?next=/devices/end-others"
    assert "user" in phone.session()["keys"]
    page = desk.get(asked.location)
    assert 'name="next" value="/devices/end-others"' in page.text
    wrong = desk.post("/confirm", password="wrong", next="/devices")
    assert (wrong.status_code, "Wrong password." in wrong.text) == (401, True)
    Page(wrong.text)
    before = desk.cookie
    right = desk.post("/confirm", password=DEMO_PASSWORD, next="//evil.example")
    assert right.location == "/devices"
    assert desk.cookie != before


def test_forgetting_leaves_nothing(open_shop: Opener, store_url: str) -> None:
    app = open_shop(store_url)
    visitor = Visitor(app)
    visitor.post("/preferences", theme="dark", language="fr")
    visitor.add("KIT-101")
    old = visitor.cookie
    page = visitor.post("/session/forget")
    assert page.status_code == 200
    assert 'data-theme="system"' in page.text
    Page(page.text)
    assert visitor.cookie is None
    assert Visitor(app, old).session()["handle"] is None


# Preferences


@pytest.mark.parametrize(
    ("wrong", "field_name"),
    [
        ({"theme": "pink"}, "theme"),
        ({"theme": ""}, "theme"),
        ({"theme": '"><script>'}, "theme"),
        ({"language": "xx"}, "language"),
        ({"language": "EN"}, "language"),
        ({"notifications": "maybe"}, "notifications"),
    ],
)
def test_a_wrong_preference_is_refused_beside_its_field(
    app: Flask, wrong: dict[str, str], field_name: str
) -> None:
    visitor = Visitor(app)
    visitor.post("/preferences", theme="light", language="fr", notifications="on")
    page = visitor.post("/preferences", **{"theme": "dark", "language": "de", **wrong})
    assert page.status_code == 422
    assert f'id="{field_name}-problem"' in page.text
    assert page.text.count('class="problem"') == 1
    Page(page.text)
    assert 'value="light" checked' in visitor.get("/preferences").text


def test_every_missing_preference_is_named(app: Flask) -> None:
    page = Visitor(app).post("/preferences")
    assert page.status_code == 422
    assert page.text.count('class="problem"') == 2


def test_an_empty_box_turns_notifications_off(app: Flask) -> None:
    visitor = Visitor(app)
    assert 'value="on" checked' in visitor.get("/preferences").text
    visitor.post("/preferences", theme="light", language="en")
    assert 'value="on" checked' not in visitor.get("/preferences").text


# Orders


def test_an_order_takes_all_or_nothing(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    visitor.add("KIT-101", "2")
    visitor.add("OUT-303", "3")
    form = visitor.checkout_form()
    set_stock(app, "OUT-303", 1)
    page = visitor.client.post("/checkout", data=form)
    assert page.status_code == 409
    assert "Someone was faster: only 1 left. Nothing has been ordered." in page.text
    Page(page.text)
    assert stock_of(app, "KIT-101") == 14
    assert stock_of(app, "OUT-303") == 1
    assert order_count(app) == 0
    assert visitor.cart() == {"KIT-101": 2, "OUT-303": 3}
    visitor.post("/cart/OUT-303", quantity="1")
    assert visitor.order().status_code == 303


def test_the_same_form_twice_is_one_order(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    visitor.add("KIT-101", "2")
    form = visitor.checkout_form()
    first = visitor.client.post("/checkout", data=form)
    visitor.add("KIT-101", "1")
    second = visitor.client.post("/checkout", data=form)
    assert first.location == second.location
    assert stock_of(app, "KIT-101") == 12
    assert visitor.cart() == {"KIT-101": 1}
    assert visitor.order().location != first.location


def test_the_same_form_many_times_at_once_is_one_order(open_shop: Opener, store_url: str) -> None:
    app = open_shop(store_url)
    visitor = Visitor(app)
    visitor.sign_in()
    visitor.add("KIT-101", "2")
    form, cookie = visitor.checkout_form(), visitor.cookie
    barrier = Barrier(6)

    def press(_: int) -> str | None:
        client = Visitor(app, cookie).client
        barrier.wait()
        return client.post("/checkout", data=form).location

    with ThreadPoolExecutor(6) as threads:
        answers = set(threads.map(press, range(6)))
    assert stock_of(app, "KIT-101") == 12
    assert order_count(app) == 1
    # A press that comes after the order finds an empty cart.
    assert {"/orders/1"} <= answers <= {"/orders/1", "/cart"}
    assert visitor.cart() == {}


def test_an_order_cut_short_is_settled_by_trying_again(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    visitor.add("KIT-101", "2")
    form = visitor.checkout_form()

    def crash(*_: object) -> None:
        raise RuntimeError("the worker was killed here")

    with monkeypatch.context() as patch:
        patch.setattr("examples.shop.cart.settle", crash)
        with pytest.raises(RuntimeError):
            visitor.client.post("/checkout", data=form)
    visitor.add("KIT-101", "1")
    assert visitor.client.post("/checkout", data=form).location == "/orders/1"
    assert stock_of(app, "KIT-101") == 12
    assert visitor.cart() == {"KIT-101": 1}


@pytest.mark.parametrize("change", [{"order": "other"}, {"order": ""}, {"total": "1"}])
def test_an_order_of_something_else_than_was_shown_is_not_placed(
    app: Flask, change: dict[str, str]
) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    visitor.add("KIT-101")
    form = visitor.checkout_form()
    page = visitor.client.post("/checkout", data=form | change)
    assert page.location == "/cart"
    assert "Your cart has changed in the meantime." in visitor.get("/cart").text
    assert order_count(app) == 0


def test_a_cart_changed_in_another_tab_is_shown_again(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    visitor.add("KIT-101")
    form = visitor.checkout_form()
    visitor.add("KIT-102")
    assert visitor.client.post("/checkout", data=form).location == "/cart"
    assert order_count(app) == 0


def test_an_empty_cart_cannot_be_ordered(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.sign_in()
    assert visitor.get("/checkout").location == "/cart"
    assert visitor.post("/checkout", order="x", total="0").location == "/cart"
    assert order_count(app) == 0


def test_cart_and_preferences_follow_the_user(app: Flask) -> None:
    phone, laptop = Visitor(app), Visitor(app)
    phone.add("DSK-201", "2")
    phone.post("/preferences", theme="dark", language="de")
    phone.sign_in("mira")
    laptop.add("DSK-201", "19")
    laptop.add("KIT-101", "1")
    assert laptop.cart() == {"DSK-201": 19, "KIT-101": 1}, "a visitor's"
    laptop.sign_in("mira")
    assert laptop.cart() == phone.cart() == {"DSK-201": 20, "KIT-101": 1}, "20 at most"
    assert 'data-theme="dark"' in laptop.get("/").text
    laptop.post("/cart/KIT-101", quantity="0")
    assert phone.cart() == {"DSK-201": 20}
    laptop.post("/sign-out")
    assert laptop.cart() == {}
    assert 'data-theme="dark"' in laptop.get("/").text, "how it looks is not personal"
    order = phone.client.post("/checkout", data=phone.checkout_form())
    assert order.status_code == 303
    laptop.sign_in("mira")
    assert laptop.cart() == {}


def test_forty_buyers_of_twenty_goods(
    open_shop: Opener, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = {f"buyer{number}": f"Buyer {number}" for number in range(40)}
    monkeypatch.setattr(accounts, "DEMO_PEOPLE", people)
    app = open_shop(sqlite_url)
    set_stock(app, "DSK-201", 20)
    barrier = Barrier(40)

    def buy(number: int) -> int:
        visitor = Visitor(app)
        visitor.sign_in(f"buyer{number}")
        visitor.add("DSK-201")
        form = visitor.checkout_form()
        barrier.wait(60)
        return visitor.client.post("/checkout", data=form).status_code

    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(buy, range(40)))
    assert sorted(answers) == [303] * 20 + [409] * 20
    assert stock_of(app, "DSK-201") == 0
    assert order_count(app) == 20


def test_the_first_worker_makes_a_file_and_the_others_use_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"

    def fill_while_another_does(draft: Path) -> None:
        draft.write_text("half")
        assert not path.exists()
        create_once(path, lambda other: other.write_text("first"))
        draft.write_text("second")

    create_once(path, fill_while_another_does)
    create_once(path, lambda draft: draft.write_text("third"))
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_could_not_be_filled_is_not_there(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        create_once(tmp_path / "file", fail)
    assert list(tmp_path.iterdir()) == []


def test_several_workers_open_one_shop(tmp_path: Path) -> None:
    folder = str(tmp_path / "instance")
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as workers:
        results = list(workers.map(open_and_buy, [folder] * 4, range(4)))
    keys, sold = zip(*results, strict=True)
    assert len(set(keys)) == 1
    assert sum(sold) == 26
    app = create_app("memory://", instance_path=folder)
    assert stock_of(app, "OUT-302") == 0
    assert stock_of(app, "KIT-105") == 14
    left = {path.name for path in Path(folder).iterdir()}
    assert left <= {"secret_key", "shop.sqlite3", "gsession.sqlite3"} | {
        f"{name}.sqlite3-{end}" for name in ("shop", "gsession") for end in ("wal", "shm")
    }


# When the session's store fails


def test_an_outage_is_a_503_in_the_shops_style(
    open_shop: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = Visitor(open_shop(SECRET_KEY="k"))
    visitor.sign_in()
    away = open_shop("redis://127.0.0.1:1/0", SECRET_KEY="k", SESSION_STORE_TIMEOUT=0.2)
    caller = Visitor(away, visitor.cookie)
    for path in ("/category/desk",):
        page = caller.get(path)
        assert page.status_code == 200, path
        assert "reach carts and accounts at the moment" in page.text
        assert "data-count" not in page.text
        Page(page.text)
    for path in ("/cart", "/orders", "/session"):
        caplog.clear()
        page = caller.get(path)
        assert page.status_code == 503, path
        assert f'href="{path}">Try again' in page.text
        assert 'aria-label="Categories"' in page.text
        assert caplog.text.count("Connection refused") == 1  # said once, and why
        assert "We will be right back" in page.text
        assert int(page.headers["Retry-After"]) > 0
        assert set_cookie(page) is None
        Page(page.text)
    assert caller.client.post("/cart/KIT-101/add").status_code == 503
    missing = caller.get("/nowhere")
    assert missing.status_code == 404
    assert 'aria-label="Categories"' in missing.text
    assert Visitor(away).get("/").status_code == 200  # asks for no session
    assert Visitor(away).get("/product/KIT-101").status_code == 503  # wants to begin one


def test_wrong_passwords_are_limited_by_account(app: Flask) -> None:
    visitor = Visitor(app)
    statuses = [visitor.sign_in("mira", "wrong").status_code for _ in range(11)]
    assert statuses == [401] * 10 + [429]
    refused = visitor.sign_in()
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert visitor.sign_in("jonas").status_code == 303


def test_a_user_can_stay_signed_in(app: Flask) -> None:
    visitor = Visitor(app)
    kept = visitor.post("/sign-in", name="mira", password=DEMO_PASSWORD, keep="on")
    assert "Expires=" in (set_cookie(kept) or "")
    assert "Expires=" not in (set_cookie(Visitor(app).sign_in()) or "")


def test_signing_in_says_why(app: Flask) -> None:
    assert "To order, please sign in." in Visitor(app).get("/sign-in?next=checkout").text
    assert 'id="reason"' not in Visitor(app).get("/sign-in").text


def test_a_refused_quantity_in_the_cart_is_kept(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.add("KIT-101")
    assert 'value="999"' in visitor.post("/cart/KIT-101", quantity="999").text


def test_forgetting_asks_first(app: Flask) -> None:
    visitor = Visitor(app)
    assert visitor.get("/session/forget").status_code == 303
    visitor.add("KIT-101")
    assert "You can't undo this." in visitor.get("/session/forget").text
    assert visitor.cookie is not None


def test_a_conflict_is_a_409_in_the_shops_style(
    open_shop: Opener, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_shop(store_url, SESSION_MERGE_POLICIES={"preferences": "reject"})
    visitor = Visitor(app)
    visitor.post("/preferences", theme="light", language="en")
    form = {"csrf_token": visitor.token(), "language": "en"}
    keep = preferences.keep

    def keep_while_another_tab_does(wanted: preferences.Preferences) -> None:
        keep(wanted)
        monkeypatch.undo()
        other = Visitor(app, visitor.cookie).client
        assert other.post("/preferences", data=form | {"theme": "system"}).status_code == 303

    monkeypatch.setattr(preferences, "keep", keep_while_another_tab_does)
    page = visitor.client.post("/preferences", data=form | {"theme": "dark"})
    assert page.status_code == 409
    assert "Two things happened at once" in page.text
    Page(page.text)
    assert 'value="system" checked' in visitor.get("/preferences").text


def test_a_defect_is_a_500_in_the_shops_style(
    open_shop: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_shop(TESTING=False)
    monkeypatch.setattr(Orders, "stock", lambda self: 1 / 0)
    page = Visitor(app).get("/")
    assert page.status_code == 500
    assert "Something broke on our side" in page.text
    assert "ZeroDivisionError" not in page.text


# How the shop is set up


def test_the_store_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_STORE", "memory://")
    app = create_app(instance_path=tmp_path)
    assert "sessions in memory" in Visitor(app).get("/").text
    assert not (tmp_path / "gsession.sqlite3").exists()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run `make demo STORE=... PORT=...`, without make. Returns its output up to a line."""
    running = []

    def run(store: str, port: int, until: str = "never said") -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.shop", f"--port={port}", f"--instance={tmp_path}"],
            env={"PYTHONPATH": ":".join(sys.path), "SHOP_STORE": store},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if until in line:
                break
        return said

    yield run
    for process in running:
        process.kill()
        process.communicate(timeout=30)


def test_the_demo_reports_a_wrong_store_in_one_line(demo: Callable[..., str]) -> None:
    said = demo("foo://bar", 0)
    assert said.startswith("SESSION_STORE is a URL with the scheme 'foo'; allowed are ")
    assert "make demo STORE=" in said
    assert "Traceback" not in said


def test_the_demo_says_that_its_store_is_not_there_yet(demo: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said = demo(f"redis://:geheim@127.0.0.1:{port}", 0, until="Running on")
    assert "Sessions are kept in Redis\n * It does not answer yet: redis: " in said
    assert "geheim" not in said
    assert said.rstrip().rpartition("http://127.0.0.1:")[2].isdecimal()  # it opens all the same


def test_the_demo_opens_without_a_word_where_all_is_well(demo: Callable[..., str]) -> None:
    said = demo("", 0, until="Running on")
    assert "Sessions are kept in SQLite\n" in said
    assert "answer" not in said


@pytest.mark.parametrize(
    ("port", "why"), [(0, "Address already in use"), (99_999, "port must be 0-65535")]
)
def test_the_demo_says_how_to_take_another_port(
    port: int, why: str, demo: Callable[..., str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = demo("", port or taken.getsockname()[1])
    assert why in said
    assert said.endswith("Choose another one: make demo PORT=5055\n")


@pytest.mark.parametrize("store", [None, ""])
def test_without_a_store_sessions_are_in_the_instance_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str | None
) -> None:
    monkeypatch.delenv("SHOP_STORE", raising=False)
    app = create_app(store, instance_path=tmp_path)
    Visitor(app).get("/product/KIT-101")
    shop_of(app).sessions.close(app)
    assert (tmp_path / "gsession.sqlite3").exists()


def test_the_secret_key_is_made_once_and_for_us_only(
    open_shop: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHOP_SECRET_KEY", raising=False)
    first, second = open_shop(), open_shop()
    assert first.secret_key == second.secret_key
    assert len(str(first.secret_key)) >= 43
    for name in ("secret_key", "shop.sqlite3"):
        mode = (Path(first.instance_path) / name).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
    monkeypatch.setenv("SHOP_SECRET_KEY", "from the environment")
    assert open_shop().secret_key == "from the environment"


def test_the_shop_keeps_its_stock_when_it_is_opened_again(open_shop: Opener) -> None:
    set_stock(open_shop(), "KIT-101", 3)
    app = open_shop()
    assert stock_of(app, "KIT-101") == 3
    assert app.test_cli_runner().invoke(args=["restock"]).exit_code == 0
    assert stock_of(app, "KIT-101") == 14


def test_the_demo_needs_flask_marshmallow_and_us_only() -> None:
    wanted = {"examples", "flask", "flask_gsession", "markupsafe", "marshmallow", "werkzeug"}
    for file in HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            else:
                continue
            roots = {name.partition(".")[0] for name in names}
            assert roots <= wanted | sys.stdlib_module_names, file


def test_the_catalogue_is_worth_a_visit() -> None:
    catalogue = Catalogue.read(HERE)
    assert len(catalogue.products) == 20
    for category in catalogue.categories:
        assert len(catalogue.within(category)) == 5
    for product in catalogue.products.values():
        assert product.picture.startswith("<svg")
        assert product.description
        assert len(product.details) == 3
    files = {path.stem for path in (HERE / "pictures").iterdir()}
    assert files == catalogue.products.keys()


@pytest.mark.parametrize(
    "change", [{"category": "nowhere"}, {"price": 0}, {"price": -1}, {"stock": -1}, {"twice": 1}]
)
def test_goods_that_cannot_be_sold_are_refused(change: dict[str, Any]) -> None:
    catalogue = Catalogue.read(HERE)
    good = catalogue.products["KIT-101"]
    fields: dict[str, Any] = {name: getattr(good, name) for name in Product.__slots__}
    twice = change.pop("twice", 0)
    products = [Product(**{**fields, **change})] * (1 + twice)
    with pytest.raises(ValueError, match="KIT-101"):
        Catalogue([Category("kitchen", "Kitchen", "")], products)


@pytest.mark.parametrize(
    ("cents", "language", "text"),
    [
        (0, "en", "€0.00"),
        (5, "en", "€0.05"),
        (123456789, "en", "€1,234,567.89"),
        (123450, "de", "1.234,50\N{NO-BREAK SPACE}€"),
        (123450, "fr", "1\N{NARROW NO-BREAK SPACE}234,50\N{NO-BREAK SPACE}€"),
        (10**17 + 1, "en", "€1,000,000,000,000,000.01"),
    ],
)
def test_prices_are_written_as_people_do(cents: int, language: str, text: str) -> None:
    assert formats.money(cents, language) == text


def test_times_are_written_as_people_do() -> None:
    when = datetime(2026, 3, 5, 7, 9, tzinfo=UTC)
    assert formats.moment(when) == "5 Mar 2026, 07:09 UTC"
    assert formats.moment(when, "de") == "05.03.2026, 07:09 UTC"
    assert formats.moment(when, "fr") == "05/03/2026, 07:09 UTC"
    assert formats.duration(timedelta(seconds=-3)) == "0 s"
    assert formats.duration(timedelta(seconds=62)) == "1 min 2 s"
    assert formats.duration(timedelta(hours=1, minutes=59, seconds=59)) == "1 h 59 min"
    assert formats.duration(timedelta(days=2, hours=3)) == "2 d 3 h"
    assert formats.size(999) == "999 bytes"
    assert formats.size(1234) == "1.2 KB"
