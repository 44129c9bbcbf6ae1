"""Where a person is signed in, and the buttons that end it."""

from flask import Blueprint, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from flask_gsession import next_url, require_fresh, session

from ..accounts import sign_in_needed
from ..limits import WRONG_PASSWORD, limit_sign_in
from ..services import shop

pages = Blueprint("devices", __name__)


@pages.get("/devices")
@sign_in_needed
def devices() -> ResponseReturnValue:
    """The list, the last seen first."""
    return render_template("devices.html", devices=shop().sessions.users.devices(session["user"]))


@pages.post("/devices/<device>/end")
@sign_in_needed
@require_fresh(minutes=10)
def end(device: str) -> ResponseReturnValue:
    """End one session."""
    if shop().sessions.users.revoke(session["user"], device):
        flash("That device is signed out.", "success")
    return redirect(url_for("devices.devices"), 303)


@pages.post("/devices/end-others")
@sign_in_needed
@require_fresh(minutes=10)
def end_others() -> ResponseReturnValue:
    """End all sessions but this one."""
    shop().sessions.users.revoke_others()
    flash("All other devices are signed out.", "success")
    return redirect(url_for("devices.devices"), 303)


@pages.get("/confirm")
@sign_in_needed
def confirm() -> ResponseReturnValue:
    """Ask for the password again."""
    return render_template("confirm.html", errors={}, next=next_url())


@pages.post("/confirm")
@sign_in_needed
@limit_sign_in
def check() -> ResponseReturnValue:
    """Go on where the password was asked for."""
    if shop().accounts.check(session["user"], request.form.get("password", "")) is None:
        errors = {"password": "Wrong password."}
        return render_template("confirm.html", errors=errors, next=next_url()), WRONG_PASSWORD
    session.confirm()
    return redirect(next_url(url_for("devices.devices")), 303)
