"""The page "your devices": where a user is signed in, with buttons to sign out there."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from flask import Blueprint, abort, flash, redirect, request, url_for
from flask.typing import ResponseReturnValue

from ..extension import Session
from ..users.users import UserDevice
from .common import BASE, Pages, sign_in
from .forms import check_form

_REASON = "by the user"


def devices_blueprint(
    ext: Session | None = None,
    *,
    url_prefix: str = "/devices",
    minutes: float | timedelta = 10,
    method: str | Collection[str] | None = None,
    confirm_view: str | None = None,
    sign_in_view: str | None = None,
    base: str = BASE,
    name: str = "gsession_devices",
) -> Blueprint:
    """A blueprint on which users see their sessions, and end one of them or all others.

    To end a session, the user must have confirmed who they are: ``minutes``, ``method`` and
    ``confirm_view`` are as in ``require_fresh``. ``sign_in_view``: the endpoint for visitors who
    aren't signed in, with the way back in ``next``; by default Flask-Login's, or a 401. ``base``:
    the template that the pages extend. ``ext``: by default the application's first ``Session``.
    ``name``: of the blueprint; its endpoints are ``devices``, ``end`` and ``end_others``.

    Forms carry their own token, and also your ``csrf_token()`` if templates have one, such as
    Flask-WTF's. Responses are never stored or framed. Raises ``SettingError`` for wrong arguments.
    The list costs one round trip in addition to the session's, and ending a session as many as
    ``ext.users.revoke``. Source: OWASP ASVS 7.4.3, 7.5.2.
    """
    pages = Pages(name, ext, url_prefix, base, minutes, method, confirm_view)
    blueprint = pages.blueprint

    @blueprint.before_request
    def check() -> ResponseReturnValue | None:
        if request.endpoint == f"{request.blueprint}.static":
            return None
        session = pages.session
        if session.owner is None:
            return sign_in(sign_in_view, url_for(".devices"))
        if request.method == "POST":
            check_form(session)
        # The session may see the list anyway. Ending a session needs fresh authentication.
        return None if request.endpoint == f"{request.blueprint}.devices" else pages.fresh()

    def listed() -> list[UserDevice]:
        return pages.ext.users.devices(pages.session.owner or "")

    def back() -> ResponseReturnValue:
        return redirect(url_for(".devices"), 303)

    @blueprint.get("")
    def devices() -> ResponseReturnValue:
        return pages.render("devices", devices=listed())

    @blueprint.route("/<device_id>/end", methods=["GET", "POST"])
    def end(device_id: str) -> ResponseReturnValue:
        session = pages.session
        if device_id == session.device_id:
            abort(409, "This is the device that you are using. To end it, sign out.")
        device = next((device for device in listed() if device.id == device_id), None)
        if request.method == "POST":
            # If the device isn't listed, this may finish a revocation that an outage interrupted.
            if pages.ext.users.revoke(session.owner or "", device_id, reason=_REASON):
                label = device and device.label
                flash(f"{label or 'The device'} is signed out.", "success")
                return back()
        elif device is not None:
            return pages.render("end_device", device=device)
        abort(404, "This device is not signed in to your account any more.")

    @blueprint.route("/end-others", methods=["GET", "POST"])
    def end_others() -> ResponseReturnValue:
        if request.method != "POST":
            others = [device for device in listed() if not device.current]
            return pages.render("end_others", devices=others)
        pages.ext.users.revoke_others(reason=_REASON)
        flash("All other devices are signed out.", "success")
        return back()

    return blueprint
