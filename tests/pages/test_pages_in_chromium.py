"""The pages in their own layout, in a real browser, under the strictest policy for contents."""

from __future__ import annotations

import pytest
from flask import Flask, Response, redirect, render_template_string, request
from playwright.sync_api import Browser, Page, Route, ViewportSize, expect

from flask_gsession import Session, session
from flask_gsession.pages.admin import admin_blueprint
from flask_gsession.pages.devices import devices_blueprint
from flask_gsession.pages.live import live_blueprint
from tests.harness.browser import PATIENCE, assert_accessible
from tests.harness.serving import served

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SMALL = """() => [...document.querySelectorAll("a, button, input:not([type=hidden])")]
  .filter(each => each.getBoundingClientRect().height < 44).map(each => each.outerHTML)"""


def application() -> Flask:
    app = Flask("pages")
    app.secret_key = "a key for tests"
    app.config["SESSION_STORE"] = "memory://"
    app.config["SESSION_COOKIE_SAMESITE"] = "Strict"
    Session(app)
    app.register_blueprint(devices_blueprint())
    app.register_blueprint(live_blueprint(keys=["cart"]))
    app.register_blueprint(admin_blueprint(lambda: session.owner == "ada"))

    @app.get("/enter")
    def enter() -> object:
        session.bind("ada")
        return redirect("/devices")

    @app.get("/cart")
    def cart() -> str:
        if "own" in request.args:
            session["cart"] = "tea again"
        return render_template_string(
            """<!doctype html><output>{{ session.get("cart") }}</output><script
            src="{{ url_for('gsession_live.script') }}" data-state="{{ live_state() }}"></script>"""
        )

    @app.get("/cart/<thing>")
    def put(thing: str) -> str:
        session["cart"] = thing
        return ""

    @app.after_request
    def strict(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        return response

    return app


def assert_good(page: Page, *schemes: str) -> None:
    """On a phone and a desktop, light or dark."""
    for scheme in schemes or ("dark",):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]  # one of its literals
        assert_accessible(page)
    for width in (375, 1200):
        page.set_viewport_size(ViewportSize(width=width, height=740))
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{page.url} is {wide} pixels wide"
        assert page.evaluate(SMALL) == [], f"too small to tap on {page.url}"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_the_pages(chromium: Browser) -> None:
    with (
        served(application()) as address,
        chromium.new_context(base_url=address) as desk,
        chromium.new_context(base_url=address) as phone,
    ):
        page, other = desk.new_page(), phone.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        for each in (page, other):
            each.set_default_timeout(1000 * PATIENCE)
            each.goto("/enter")
        page.reload()
        heading = page.get_by_role("heading", level=1)
        expect(heading).to_have_text("Your devices")
        assert_good(page, "light", "dark")
        page.get_by_role("link", name="Sign out all other devices").click()
        assert_good(page)
        page.get_by_role("link", name="Cancel").click()
        page.get_by_role("link", name="Sign out Chrome on Linux").click()
        assert_good(page)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Chrome on Linux is signed out.")
        assert other.goto("/devices").status == 401  # type: ignore[union-attr]

        page.goto("/admin/sessions")
        page.get_by_label("User").fill("ada")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=2)).to_have_text("1 session of ada")
        assert_good(page)
        page.get_by_role("link", name="End Chrome on Linux").click()
        expect(heading).to_have_text("End this session of ada?")
        assert_good(page)
        page.get_by_role("link", name="Cancel").click()
        page.get_by_role("link", name="End all sessions").click()
        assert_good(page)
        assert complaints == []
        page.goto("/admin/sessions?user=" + "x" * 300)
        expect(page.get_by_label("User")).to_have_accessible_description(
            "user_id has 300 characters; at most 256 are allowed."
        )
        assert_good(page)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_change_before_the_first_look_of_the_script(chromium: Browser) -> None:
    with served(application()) as address, chromium.new_context(base_url=address) as browser:
        page = browser.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto("/cart/tea")
        page.add_init_script(
            """document.addEventListener("gsession:changed", ({detail}) => {
              document.title += "changed " + detail.keys;
            })"""
        )

        def late(route: Route) -> None:
            browser.request.get("/cart/milk")
            route.continue_()

        page.route("**/live/state*", late, times=1)
        page.goto("/cart")
        expect(page).to_have_title("changed cart")
        expect(page.get_by_role("status")).to_have_text("tea")
        with page.expect_response("**/live/state*"):
            page.goto("/cart?own")
        browser.request.get("/cart/water")
        expect(page).to_have_title("changed cart")  # once: not for the change of its own request
