"""The password once more, before something that a thief could do as well."""

from flask import Blueprint, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from flask_gsession import next_url, session

from ..accounts import sign_in_needed
from ..limits import WRONG_PASSWORD, limit_sign_in
from ..services import shop

pages = Blueprint("confirm", __name__)


@pages.get("/confirm")
@sign_in_needed
def ask() -> ResponseReturnValue:
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
    return redirect(next_url(url_for("gsession_devices.devices")), 303)
