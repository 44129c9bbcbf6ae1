"""The demo shop in a real browser: headless Chromium, against gunicorn with two workers."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Page,
    Request,
    ViewportSize,
    expect,
)

import examples
from examples.shop.accounts import DEMO_PASSWORD
from tests.harness.apps import until
from tests.harness.browser import PATIENCE, assert_accessible
from tests.harness.servers import RedisServer

ROOT = Path(examples.__file__).parents[1]
IPHONE = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like "
    "Gecko) Version/17.5 Mobile/15E148 Safari/604.1"
)

# Runs its arguments until its standard input closes, which the kernel sees to however we end.
UNTIL_WE_END = '"$@" & read -r end; kill $!; wait'


@contextmanager
def serving(instance: Path, store: str, prefix: str, more: str = "") -> Iterator[str]:
    """The shop under gunicorn on a free port; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # The listener exists before the server does: requests wait for it, and nobody else can
        # take the port.
        application = (
            f"examples.shop.app:create_app({store!r}, instance_path={str(instance)!r}, "
            f"SESSION_KEY_PREFIX={prefix!r}, SESSION_STORE_TIMEOUT=20, {more})"
        )
        gunicorn = [
            *(sys.executable, "-m", "gunicorn", "--workers", "2", "--threads", "4"),
            *("--bind", f"fd://{listener.fileno()}", "--timeout", "120"),
            *("--graceful-timeout", "1", application),
        ]
        log = instance / "gunicorn.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["sh", "-c", UNTIL_WE_END, "sh", *gunicorn],
                cwd=ROOT,
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.communicate(timeout=PATIENCE)
    assert "Traceback" not in log.read_text(errors="replace")


@pytest.fixture
def shop(store_url: str, store_prefix: str, tmp_path: Path) -> Iterator[str]:
    """The address of a shop on the store."""
    with serving(tmp_path, store_url, store_prefix) as address:
        yield address


def session_cookie(context: BrowserContext) -> str | None:
    found = [cookie for cookie in context.cookies() if cookie.get("name") == "session"]
    assert all(cookie.get("httpOnly") and cookie.get("sameSite") == "Lax" for cookie in found)
    return found[0].get("value") if found else None


def watched(page: Page, shop: str) -> list[str]:
    """The browser's complaints from now on; requests to other hosts count as such."""
    complaints: list[str] = []

    def look_at_request(request: Request) -> None:
        if not request.url.startswith(shop):
            complaints.append(f"elsewhere: {request.url}")

    def look_at_failure(request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left before it came
            complaints.append(f"{request.failure}: {request.url}")

    def look_at_message(text: str) -> None:
        if "401 (UNAUTHORIZED)" not in text:  # the page listens, and the session has ended
            complaints.append(text)

    page.on("console", lambda message: look_at_message(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", look_at_request)
    page.on("requestfailed", look_at_failure)
    return complaints


# Pages look the same on every store; test_shop.py visits them on each.
@pytest.mark.parametrize("store_url", ["redis"], indirect=True)
def test_a_visit(chromium: Browser, shop: str) -> None:
    with chromium.new_context(color_scheme="light", base_url=shop) as context:
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        complaints = watched(page, shop)

        # Looking around leaves no cookie; the first product does.
        page.goto("/")
        expect(page).to_have_title(re.compile("Larch & Linen"))
        page.get_by_role("navigation", name="Categories").get_by_text("Desk").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Desk")
        assert session_cookie(context) is None
        page.get_by_role("link", name="Brass fountain pen").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Brass fountain pen")
        stranger = session_cookie(context)
        assert stranger is not None
        assert page.evaluate("document.cookie") == ""

        page.get_by_label("Quantity").fill("2")
        page.get_by_role("button", name="Add to cart").click()
        expect(page.get_by_role("status")).to_have_text("Brass fountain pen is in your cart.")
        expect(page.locator(".count")).to_have_text("2")
        page.get_by_label("Brass fountain pen: Quantity").fill("3")
        page.get_by_role("button", name="Update Brass fountain pen").click()
        expect(page.locator("#total")).to_have_text("€174.00")

        # Signing in on the way changes the token and keeps the cart.
        page.get_by_role("link", name="To the checkout").click()
        page.get_by_label("Name").fill("mira")
        page.get_by_label("Password").fill(DEMO_PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Checkout")
        signed_in = session_cookie(context)
        assert signed_in not in (None, stranger)
        page.get_by_role("button", name="Place the order").click()
        expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"Order \d+"))
        expect(page.get_by_role("status")).to_have_text("Thank you. Your order is placed.")
        expect(page.locator(".total")).to_contain_text("€174.00")
        expect(page.locator(".count")).to_have_text("0")

        # Dark, whatever the system likes.
        light = background(page)
        page.get_by_role("link", name="Preferences").click()
        page.get_by_label("Dark").evaluate("input => input.value = 'pink'")  # by no page of ours
        page.get_by_label("Dark").check()
        page.get_by_role("button", name="Save").click()
        themes = page.get_by_role("group", name="Theme")
        expect(themes).to_have_accessible_description("Choose one of: Like my system, Light, Dark.")
        expect(page.locator("html")).to_have_attribute("data-theme", "system")
        complaints.clear()  # the browser's, of the status 422
        page.get_by_label("Dark").check()
        page.get_by_label("Language").select_option("Deutsch")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        assert brightness(background(page)) < 60 < 200 < brightness(light)
        page.goto("/product/DSK-202")
        expect(page.locator(".price").first).to_have_text("58,00\N{NO-BREAK SPACE}€")

        # The session page shows the public side and not the token.
        page.get_by_role("link", name="Session", exact=True).click()
        handle = page.locator("#handle").inner_text()
        assert re.fullmatch(r"[\w-]{43}", handle)
        token = str(signed_in).partition(".")[0]
        assert token not in page.content()
        page.get_by_role("button", name="Rotate the token").click()
        expect(page.locator("#handle")).not_to_have_text(handle)
        expect(page.get_by_text("as Mira Holm")).to_be_visible()
        rotated = session_cookie(context)
        assert rotated not in (None, signed_in)

        # Signed out: the old cookie is worth nothing, the theme stays.
        page.get_by_role("navigation", name="You").get_by_text("Sign out").click()
        expect(page.get_by_role("status")).to_have_text("You are signed out.")
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        assert session_cookie(context) not in (None, rotated)
        context.add_cookies([{"name": "session", "value": str(rotated), "url": shop}])
        page.goto("/orders")
        expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")

        page.goto("/product/KIT-101")
        page.get_by_role("link", name="Session", exact=True).click()
        page.get_by_role("link", name="Forget everything").click()
        page.get_by_role("button", name="Forget everything").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Everything is forgotten")
        assert session_cookie(context) is None
        assert complaints == []


def background(page: Page) -> str:
    page.wait_for_load_state()
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return colour


def brightness(colour: str) -> float:
    """The mean of red, green and blue in `rgb(...)`, 0 to 255."""
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    return sum(parts) / 3


def test_a_phone_and_a_keyboard(
    chromium: Browser,
    sqlite_url: str,
    tmp_path: Path,
    store_prefix: str,
) -> None:
    phone = ViewportSize(width=360, height=740)
    with (
        serving(tmp_path, sqlite_url, store_prefix) as shop,
        chromium.new_context(viewport=phone, color_scheme="dark", base_url=shop) as context,
    ):
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto("/product/KIT-101")
        assert brightness(background(page)) < 60  # the system's taste, as none was chosen
        page.keyboard.press("Tab")
        expect(page.get_by_text("Skip to the content")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        page.get_by_label("Quantity").fill("99")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Quantity")).to_have_accessible_description(
            "Only 14 left in stock."
        )
        page.get_by_label("Quantity").fill("1")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("Your cart")
        for path in ("/", "/product/DSK-203", "/cart", "/sign-in", "/preferences", "/session"):
            page.goto(path)
            assert_fits(page, path)
        for width in (500, 720, 740, 1020, 1280):
            page.set_viewport_size(ViewportSize(width=width, height=740))
            assert_fits(page, f"{width} pixels")


def assert_fits(page: Page, what: str) -> None:
    """Nothing is wider than the window, and the cart ends the line that the shop's name begins."""
    window: dict[str, int] = page.evaluate(
        "({inner: innerWidth, scroll: document.documentElement.scrollWidth})"
    )
    assert window["scroll"] <= window["inner"], what
    brand = page.locator(".brand").bounding_box()
    cart = page.locator(".top .cart").bounding_box()
    assert brand is not None
    assert cart is not None
    assert cart["y"] < brand["y"] + brand["height"], what
    assert cart["x"] + cart["width"] > 0.9 * min(window["inner"], 72 * 16), what


# Levels of headings, and texts that are too pale: less than 4.5 to 1 (WCAG 2.1, 1.4.3), or 3 to 1
# where they are large.
LOOK = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const linear = c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map(c => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const [r, g, b, a = 1] = numbers(getComputedStyle(element).backgroundColor);
      if (a > .99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const pale = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("svg")) continue;
    const style = getComputedStyle(element);
    const two = [light(numbers(style.color).slice(0, 3)), light(behind(element))].sort();
    const ratio = (Math.max(...two) + .05) / (Math.min(...two) + .05);
    const large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) pale.push(`${element.textContent.trim()}: ${ratio.toFixed(1)}`);
  }
  const headings = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")];
  return {pale, levels: headings.map(heading => Number(heading.tagName[1]))};
}"""


def assert_sound(page: Page, what: str, *navigations: str) -> None:
    """On a light phone and a dark desktop: the page fits, is legible, and has the navigation."""
    for scheme, width in (("light", 375), ("dark", 1200)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]  # one of its literals
        page.set_viewport_size(ViewportSize(width=width, height=740))
        where = f"{what}, {scheme}, {width}"
        assert_fits(page, where)
        found = page.evaluate(LOOK)
        assert found["pale"] == [], where
        levels = found["levels"]
        assert levels.count(1) == 1, where
        assert levels[0] == 1, where
        assert all(after <= before + 1 for before, after in pairwise(levels)), where
        for name in navigations or ("Categories", "You"):
            expect(page.get_by_role("navigation", name=name)).to_be_visible()


def test_small_pages(chromium: Browser, redis_url: str, tmp_path: Path, store_prefix: str) -> None:
    with (
        serving(tmp_path, redis_url, store_prefix) as shop,
        chromium.new_context(base_url=shop) as context,
    ):
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        heading = page.get_by_role("heading", level=1)
        page.goto("/nothing-here")
        expect(heading).to_have_text("This shelf is empty")
        assert_sound(page, "404")
        page.goto("/category/outdoors")
        assert_sound(page, "a category")

        page.goto("/product/KIT-101")
        page.get_by_role("button", name="Add to cart").click()
        expect(heading).to_have_text("Your cart")
        quantity = page.get_by_label("Gooseneck kettle 0.9 l: Quantity")
        quantity.fill("99")
        page.get_by_role("button", name="Update Gooseneck kettle").click()
        expect(quantity).to_have_accessible_description("Only 14 left in stock.")
        expect(quantity).to_have_value("99")
        assert_sound(page, "a refused quantity")

        page.get_by_role("link", name="Session", exact=True).click()
        page.get_by_role("link", name="Forget everything").click()
        expect(heading).to_have_text("Forget everything?")
        expect(page.locator("main")).to_contain_text("Your cart with 1 piece")
        assert_sound(page, "forget")
        page.get_by_role("link", name="Keep it").click()
        expect(page.locator(".count")).to_have_text("1")

        page.goto("/orders")
        expect(page.get_by_text("To see your orders, please sign in.")).to_be_visible()
        page.goto("/checkout")
        expect(page.get_by_text("To order, please sign in.")).to_be_visible()
        assert_sound(page, "sign-in")
        page.get_by_label("Name").fill("mira")
        page.get_by_label("Password").fill(DEMO_PASSWORD)
        page.get_by_label("Keep me signed in").check()
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("button", name="Place the order").click()
        expect(heading).to_have_text("Order 1")
        assert_sound(page, "an order")
        page.get_by_role("link", name="Orders").first.click()
        expect(heading).to_have_text("Your orders")
        assert_sound(page, "orders")
        page.get_by_role("navigation", name="You").get_by_text("Sign out").click()

        page.goto("/sign-in")
        page.get_by_label("Name").fill("jonas")
        page.get_by_label("Password").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_text("Wrong name or password.")).to_be_visible()
        token = page.locator("input[name=csrf_token]").last.input_value()
        for _ in range(9):
            wrong = {"csrf_token": token, "name": "jonas", "password": "wrong"}
            assert page.request.post("/sign-in", form=wrong).status == 401
        page.get_by_label("Password").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(heading).to_have_text("That was too often")
        expect(page.get_by_text("tried to sign in too often")).to_be_visible()
        assert_sound(page, "a limited sign-in")


def test_devices(chromium: Browser, sqlite_url: str, tmp_path: Path, store_prefix: str) -> None:
    """Two browsers of one person share cart and preferences. The one signs the other out.

    Then the staff does it.
    """
    with (
        serving(tmp_path, sqlite_url, store_prefix) as shop,
        chromium.new_context(base_url=shop) as desk,
        chromium.new_context(base_url=shop, user_agent=IPHONE) as phone,
    ):
        here, there = desk.new_page(), phone.new_page()
        complaints = watched(here, shop)
        for page, product, back in (
            (here, "KIT-101", "preferences"),
            (there, "DSK-201", "devices"),
        ):
            page.set_default_timeout(1000 * PATIENCE)
            page.goto(f"/product/{product}")
            page.get_by_role("button", name="Add to cart").click()
            expect(page.locator(".count")).to_have_text("1")
            light = background(page)
            page.goto(f"/sign-in?next=/{back}")
            page.get_by_label("Name").fill("mira")
            page.get_by_label("Password").fill(DEMO_PASSWORD)
            page.get_by_role("button", name="Sign in").click()
            if page is here:
                here.get_by_label("Dark").check()
                here.get_by_role("button", name="Save").click()
        expect(there.get_by_role("heading", level=1)).to_have_text("Your devices")
        here.goto("/devices")
        for page in (here, there):
            expect(page.locator(".count")).to_have_text("2")
            assert background(page) != light
        assert_sound(here, "devices")
        assert_accessible(here)
        here.get_by_role("link", name="Sign out Safari on iPhone").click()
        expect(here.get_by_role("heading", level=1)).to_have_text("Sign out Safari on iPhone?")
        here.locator("main").get_by_role("button", name="Sign out").click()
        expect(here.get_by_role("status")).to_have_text("Safari on iPhone is signed out.")
        expect(here.get_by_text("You aren't signed in anywhere else.")).to_be_visible()
        there.reload()
        expect(there.get_by_role("heading", level=1)).to_have_text("Sign in")
        expect(there.locator(".count")).to_have_text("0")
        assert background(there) == light
        assert complaints == []

        there.get_by_label("Name").fill("sofia")
        there.get_by_label("Password").fill(DEMO_PASSWORD)
        there.get_by_role("button", name="Sign in").click()
        there.get_by_role("link", name="See a customer's").click()
        there.get_by_label("User").fill("mira")
        there.get_by_role("button", name="Find").click()
        expect(there.get_by_role("heading", level=2)).to_have_text("1 session of mira")
        assert_fits(there, "sessions of a user")
        assert_accessible(there)
        there.get_by_role("link", name="End all sessions").click()
        there.get_by_label("Reason").fill("She asked for it")
        there.get_by_role("button", name="End all sessions").click()
        expect(there.get_by_role("status")).to_have_text("1 session has ended.")
        here.goto("/orders")
        expect(here.get_by_role("heading", level=1)).to_have_text("Sign in")


def test_open_pages_follow(
    chromium: Browser, sqlite_url: str, tmp_path: Path, store_prefix: str
) -> None:
    """Two tabs of one browser share a stream; another browser is signed out from this one."""
    with (
        serving(tmp_path, sqlite_url, store_prefix, "SESSION_LIVE_POLL=1") as shop,
        chromium.new_context(base_url=shop) as context,
        chromium.new_context(base_url=shop) as other_context,
    ):
        streams: list[Page] = []

        def note(request: Request) -> None:
            if "/live/stream" in request.url:
                streams.append(request.frame.page)

        def opened(of: BrowserContext) -> Page:
            page = of.new_page()
            page.set_default_timeout(1000 * PATIENCE)
            complaints.append(watched(page, shop))
            page.on("request", note)
            page.goto("/product/KIT-101")
            return page

        def in_line(page: Page, count: int) -> Page:
            """The page, once so many tabs have asked to lead, so that their order is certain."""
            asked = (
                "navigator.locks.query().then(locks => locks.held.length + locks.pending.length)"
            )
            until(lambda: page.evaluate(asked) == count)
            return page

        complaints: list[list[str]] = []
        leader = in_line(opened(context), 1)
        follower = in_line(opened(context), 2)
        buyer = in_line(opened(context), 3)
        buyer.get_by_role("button", name="Add to cart").click()
        for page in (leader, follower):
            expect(page.locator(".count")).to_have_text("1")
        assert set(streams) == {leader}
        with follower.expect_request("**/live/stream*"):
            leader.close()
        buyer.goto("/product/KIT-101")
        buyer.get_by_role("button", name="Add to cart").click()
        expect(follower.locator(".count")).to_have_text("2")
        assert set(streams) == {leader, follower}

        # Without Web Locks, as without HTTPS, each tab polls.
        follower.add_init_script("delete Navigator.prototype.locks")
        follower.goto("/cart")
        buyer.close()
        buyer = opened(context)
        buyer.add_init_script("delete Navigator.prototype.locks")
        buyer.goto("/product/KIT-101")
        streams.clear()
        buyer.get_by_role("button", name="Add to cart").click()
        expect(follower.locator(".count")).to_have_text("3")
        assert streams == []

        other = opened(other_context)
        for page in (buyer, other):
            page.goto("/sign-in")
            page.get_by_label("Name").fill("mira")
            page.get_by_label("Password").fill(DEMO_PASSWORD)
            page.get_by_role("button", name="Sign in").click()
            expect(page.get_by_role("status")).to_have_text("Welcome, Mira.")
        buyer.goto("/devices")
        buyer.get_by_role("link", name="Sign out all other devices").click()
        buyer.get_by_role("button", name="Sign out the others").click()
        expect(other.get_by_role("status")).to_contain_text("You are signed out")
        assert complaints == [[]] * len(complaints)


def test_an_outage(chromium: Browser, own_redis: RedisServer, tmp_path: Path) -> None:
    with (
        serving(tmp_path, own_redis.url, "outage:") as shop,
        chromium.new_context(base_url=shop) as context,
    ):
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        heading = page.get_by_role("heading", level=1)
        page.goto("/product/KIT-101")
        page.get_by_role("button", name="Add to cart").click()
        expect(page.locator(".count")).to_have_text("1")
        own_redis.kill()
        page.goto("/category/outdoors")  # stays open
        expect(heading).to_have_text("Outdoors")
        assert_sound(page, "a category in an outage", "Categories")
        page.goto("/cart")
        expect(heading).to_have_text("We will be right back")
        assert_sound(page, "503", "Categories")
        own_redis.start()
        again = page.get_by_role("link", name="Try again")
        assert again.get_attribute("href") == "/cart"
        # The page listens for changes, and its failures may have opened the circuit for a moment.
        back = time.monotonic() + PATIENCE
        with page.expect_navigation():  # else the page before it could be read, and left
            again.click()
        while heading.text_content() == "We will be right back" and time.monotonic() < back:
            page.wait_for_timeout(200)
            page.goto("/cart")
        expect(heading).not_to_have_text("We will be right back")
