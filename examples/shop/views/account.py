"""Signing in and out, and preferences."""

from flask import Blueprint, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from flask_gsession import next_url, session

from .. import accounts, preferences
from ..formats import LANGUAGES
from ..limits import WRONG_PASSWORD, limit_sign_in
from ..services import shop

pages = Blueprint("account", __name__)

#: Where the sign-in page may send someone afterwards: never to an address from outside.
RETURN_TO = {
    "checkout": "basket.checkout",
    "place": "basket.checkout",
    "orders": "basket.orders",
    "order": "basket.orders",
}
REASONS = {
    "basket.checkout": "To order, please sign in. Your cart comes with you.",
    "basket.orders": "To see your orders, please sign in.",
}


@pages.get("/sign-in")
def sign_in() -> ResponseReturnValue:
    """The sign-in form."""
    if "user" in session:
        return redirect(url_for("basket.orders"), 303)
    return _sign_in_page("", {})


@pages.post("/sign-in")
@limit_sign_in
def check() -> ResponseReturnValue:
    """Sign in with name and password."""
    name, password = request.form.get("name", "").strip(), request.form.get("password", "")
    errors = {}
    if not name:
        errors["name"] = "Give your name."
    if not password:
        errors["password"] = "Give your password."
    person = None if errors else shop().accounts.check(name.lower(), password)
    if person is None:
        if errors:
            return _sign_in_page(name, errors), 422
        # The same message for both, so that it doesn't reveal which names exist.
        return _sign_in_page(name, {"password": "Wrong name or password."}), WRONG_PASSWORD
    accounts.sign_in(person, keep="keep" in request.form)
    flash(f"Welcome, {person.first_name}.", "success")
    wanted = RETURN_TO.get(request.form.get("next", ""))
    target = url_for(wanted) if wanted else next_url(url_for("goods.catalogue"))
    return redirect(target, 303)


def _sign_in_page(name: str, errors: dict[str, str]) -> str:
    return render_template(
        "sign_in.html",
        name=name,
        errors=errors,
        next=request.values.get("next", ""),
        reason=REASONS.get(RETURN_TO.get(request.values.get("next", ""), "")),
        keep="keep" in request.form,
        people=accounts.DEMO_PEOPLE,
        password=accounts.DEMO_PASSWORD,
        staff=accounts.STAFF,
    )


@pages.post("/sign-out")
def sign_out() -> ResponseReturnValue:
    """End the session. How the shop should look is not personal: it moves to the next one."""
    kept = preferences.preferences.session.get(preferences.KEY)
    session.destroy()
    if kept is not None:
        session[preferences.KEY] = kept
    flash("You are signed out.", "info")
    return redirect(url_for("goods.catalogue"), 303)


@pages.get("/preferences")
def show_preferences() -> ResponseReturnValue:
    """The preferences form."""
    return _preferences_page(preferences.current(), {})


@pages.post("/preferences")
def change_preferences() -> ResponseReturnValue:
    """Keep preferences."""
    wanted, errors = preferences.check(request.form)
    if errors:
        return _preferences_page(wanted, errors), 422
    preferences.keep(wanted)
    flash("Your preferences are saved.", "success")
    return redirect(url_for("account.show_preferences"), 303)


def _preferences_page(wanted: preferences.Preferences, errors: dict[str, str]) -> str:
    return render_template(
        "preferences.html",
        wanted=wanted,
        errors=errors,
        themes=preferences.THEMES,
        languages=LANGUAGES,
    )
