"""The administrators' pages: find a user, see the user's sessions, and end them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

from flask import Blueprint, abort, current_app, flash, redirect, request, url_for
from flask.typing import ResponseReturnValue

from ..errors import SettingError
from ..extension import Session
from ..journal.consuming import MOST_SHOWN, latest_events
from ..request.session import repository_of
from ..users.rosters import checked_user_id
from .common import BASE, Pages
from .forms import check_form

_REASON = "by an administrator"
_LONGEST_REASON = 200  # characters


def admin_blueprint(
    allow: Callable[[], Any],
    ext: Session | None = None,
    *,
    find: Callable[[str], Any] | None = None,
    by: Callable[[], Any] | None = None,
    url_prefix: str = "/admin/sessions",
    minutes: float | timedelta | None = 10,
    method: str | Collection[str] | None = None,
    confirm_view: str | None = None,
    base: str = BASE,
    name: str = "gsession_admin",
) -> Blueprint:
    """A blueprint on which administrators see and end the sessions of any user.

    ``allow``: called at each request; must return True or False, may abort or redirect, and may be
    async. ``find``: turns an administrator's input, such as an address, into a user id, or None if
    there is no such user; by default, the input is the id. ``by``: returns the administrator's name
    for the audit log; by default, the user that the session is bound to. Other arguments as in
    ``devices_blueprint``; ``minutes=None`` requires no fresh authentication.

    ``/events`` shows the journal, if ``SESSION_JOURNAL`` is on.

    The audit log gets each session that ends, with the administrator and the reason. Raises
    ``SettingError`` without a function ``allow``, and at the first request if the administrator's
    name is unknown. Source: OWASP ASVS 7.4.5.
    """
    if not callable(allow):
        raise SettingError(
            "admin_blueprint needs allow=, a function that returns True for administrators: "
            "without it, every visitor could end all sessions"
        )
    pages = Pages(name, ext, url_prefix, base, minutes, method, confirm_view)
    blueprint = pages.blueprint

    def administrator() -> str:
        who = pages.session.owner if by is None else current_app.ensure_sync(by)()
        if not isinstance(who, (str, int)) or isinstance(who, bool) or not str(who).strip():
            raise SettingError(
                "admin_blueprint: the audit log needs the name of the administrator, and the "
                "session isn't bound to a user; pass by=, a function that returns it"
            )
        return str(who)

    @blueprint.before_request
    def check() -> ResponseReturnValue | None:
        if request.endpoint == f"{request.blueprint}.static":
            return None
        session = pages.session
        allowed = current_app.ensure_sync(allow)()
        if not isinstance(allowed, bool):  # such as a function that was not called, or a coroutine
            raise SettingError(
                f"admin_blueprint: allow returned a value of type {type(allowed).__name__}; it "
                "must return True or False"
            )
        if not allowed:
            abort(403, "Only administrators may see the sessions of other users.")
        administrator()
        if request.method == "POST":
            check_form(session)
        return None if request.endpoint == f"{request.blueprint}.users" else pages.fresh()

    def user() -> str:
        try:
            return checked_user_id(request.values.get("user", ""))
        except ValueError as error:
            abort(400, f"{error}.")

    def reason() -> str:
        given = " ".join(request.form.get("reason", "").split())
        return given[:_LONGEST_REASON] or _REASON

    def show(status: int, **values: Any) -> ResponseReturnValue:
        journal = repository_of(pages.session).journaling is not None
        return pages.render("admin", status, journal=journal, **values)

    def back(user_id: str) -> ResponseReturnValue:
        return redirect(url_for(".users", id=user_id), 303)

    @blueprint.get("")
    def users() -> ResponseReturnValue:
        wanted, user_id = request.args.get("user", "").strip(), request.args.get("id")
        try:
            if user_id is not None:
                wanted = user_id = checked_user_id(user_id)
            elif wanted:
                found = wanted if find is None else current_app.ensure_sync(find)(wanted)
                user_id = None if found is None else checked_user_id(found)
        except ValueError as error:
            return show(400, wanted=wanted, user=None, problem=f"{error}.")
        if user_id is None:
            problem = "There is no such user." if wanted else None
            status = 404 if wanted else 200
            return show(status, wanted=wanted, user=None, problem=problem)
        devices = pages.ext.users.devices(user_id)
        return show(200, wanted=wanted, user=user_id, devices=devices, problem=None)

    @blueprint.get("/events")
    def events() -> ResponseReturnValue:
        journaling = repository_of(pages.session).journaling
        if journaling is None:
            abort(404, "There is no journal: SESSION_JOURNAL is off.")
        try:
            before = max(0, int(request.args.get("before", "0")))
        except ValueError:
            abort(400, "before must be a number.")
        latest = latest_events(journaling, before)
        earlier = latest[-1].number if len(latest) == MOST_SHOWN else None
        return pages.render("admin_events", events=latest, earlier=earlier)

    @blueprint.route("/end", methods=["GET", "POST"])
    def end() -> ResponseReturnValue:
        user_id = user()
        device_id = request.values.get("device", "")
        if request.method == "POST":
            who = administrator()
            if pages.ext.users.revoke(user_id, device_id, reason=reason(), by=who):
                flash("The session has ended.", "success")
                return back(user_id)
        for device in pages.ext.users.devices(user_id):
            if device.id == device_id:
                return pages.render("admin_end", user=user_id, device=device)
        abort(404, "This device is not signed in to that account any more.")

    @blueprint.route("/end-all", methods=["GET", "POST"])
    def end_all() -> ResponseReturnValue:
        user_id = user()
        if request.method != "POST":
            devices = pages.ext.users.devices(user_id)
            return pages.render("admin_end_all", user=user_id, devices=devices)
        count = pages.ext.users.revoke_all(user_id, reason=reason(), by=administrator())
        flash(f"{count} {'session has' if count == 1 else 'sessions have'} ended.", "success")
        return back(user_id)

    return blueprint
