"""Shared by the pages: templates, style, sign-in, fresh authentication, times."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from flask import Blueprint, abort, current_app, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from werkzeug.wrappers import Response

from ..authentication import load_user
from ..config import csrf_field
from ..errors import SettingError
from ..extension import NAME, Session
from ..freshness import require_fresh
from ..interface import GSessionInterface
from ..request.session import SessionData, repository_of
from .forms import FIELD, form_token

BASE = "gsession/base.html"
_STEPS = ((60, "minute"), (3600, "hour"), (86_400, "day"))
_LONGEST_AGO = 7 * 86_400  # seconds; for older times, a date is clearer


class Pages:
    """One set of pages: its blueprint, and the session and users that it works on.

    ``ext``: None for the application's first ``Session``. ``minutes``: how long a confirmation is
    valid; None requires none.
    """

    def __init__(
        self,
        name: str,
        ext: Session | None,
        url_prefix: str,
        base: str,
        minutes: float | timedelta | None,
        method: str | Collection[str] | None,
        confirm_view: str | None,
    ) -> None:
        if not url_prefix.startswith("/") or url_prefix.endswith("/"):
            raise SettingError(
                f"url_prefix is {url_prefix!r}; allowed: a path such as '/devices', without a "
                "slash at its end"
            )
        self._ext = ext
        self._base = base
        self._fresh = None if minutes is None else (minutes, method, confirm_view)
        if minutes is not None:
            require_fresh(minutes, method)  # checks the arguments now
        self.blueprint = Blueprint(
            name,
            __name__,
            url_prefix=url_prefix,
            template_folder="templates",
            static_folder="static",
            static_url_path="/static",
        )
        self.blueprint.after_request(self._protect)

    @property
    def ext(self) -> Session:
        return self._first if self._ext is None else self._ext

    @property
    def session(self) -> SessionData:
        """The session of this request. Flask-Login may end its sign-in first."""
        if self.ext is self._first:
            load_user()
        session: Any = self.ext.session
        opened = session._get_current_object()
        if not isinstance(opened, SessionData):
            raise SettingError(f"{self.blueprint.name} needs a SECRET_KEY")
        return opened

    def fresh(self) -> ResponseReturnValue | None:
        """The response to users who must first confirm who they are, or raises the challenge."""
        if self._fresh is None:
            return None
        minutes, method, view = self._fresh
        session = None if self.ext is self._first else self.ext.session

        def passed() -> None:
            """Called if no challenge is needed."""

        return require_fresh(minutes, method, view=view, session=session)(passed)()

    def render(self, template: str, status: int = 200, **values: Any) -> ResponseReturnValue:
        session = self.session
        now = datetime.fromtimestamp(repository_of(session).now() / 1000, UTC)
        page = render_template(
            f"gsession/{template}.html",
            gsession_base=self._base,
            gsession_token=lambda: form_token(session),
            gsession_token_field=FIELD,
            csrf_field=csrf_field(current_app),
            gsession_style=url_for(".static", filename="pages.css"),
            ago=lambda when: ago(when, now),
            moment=moment,
            **values,
        )
        return page, status

    def _protect(self, response: Response) -> Response:
        """Forbid caches to store the page, and other sites to frame it."""
        if request.endpoint != f"{request.blueprint}.static":
            response.cache_control.no_store = True
            response.headers.setdefault("X-Frame-Options", "DENY")
            response.headers.setdefault("Referrer-Policy", "same-origin")
        return response

    @property
    def _first(self) -> Session:
        """The ``Session`` that serves ``flask.session``."""
        interfaces: dict[Session, GSessionInterface] = current_app.extensions.get(NAME, {})
        if not interfaces:
            raise SettingError(f"{self.blueprint.name} needs a Session: call Session(app)")
        return next(iter(interfaces))


def sign_in(view: str | None, back: str) -> ResponseReturnValue:
    """Redirect a visitor who isn't signed in to the sign-in page: yours, or Flask-Login's."""
    if view is not None:
        if request.method in ("GET", "HEAD"):
            back = request.script_root + request.full_path.rstrip("?")
        return redirect(url_for(view, next=back), 303)
    app: Any = current_app
    if hasattr(app, "login_manager"):
        answer: ResponseReturnValue = app.login_manager.unauthorized()
        return answer
    abort(401, "Sign in first.")


def ago(when: datetime, now: datetime) -> str:
    """A time such as "5 minutes ago"; a date if it is more than a week ago."""
    seconds = (now - when).total_seconds()
    if seconds < 60:
        return "just now"
    if seconds >= _LONGEST_AGO:
        return f"on {when.day} {when:%b %Y}"
    size, unit = next(step for step in reversed(_STEPS) if seconds >= step[0])
    count = int(seconds // size)
    return f"{count} {unit}{'s' if count > 1 else ''} ago"


def moment(when: datetime) -> str:
    """A time such as "3 May 2026, 14:05 UTC"."""
    return f"{when.day} {when:%b %Y, %H:%M} UTC"
