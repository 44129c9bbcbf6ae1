"""Views for users who have confirmed who they are within the last minutes ("sudo mode")."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flask import redirect, request, url_for

from .authentication import load_user
from .errors import ConfirmationRequired, SettingError
from .request.confirming import checked_methods, confirmed_at
from .request.decorators import current_session
from .request.lifecycle import Lifecycle
from .request.loading import open_from_store
from .request.ownership import signed_in_at
from .request.session import SessionData, lifecycle_of

R = TypeVar("R", bound=Callable[..., Any])

_MOST_MINUTES = 31 * 24 * 60
#: How far the clocks of two servers may differ, in milliseconds.
_SKEW = 60_000


def require_fresh(
    minutes: float | timedelta = 10,
    method: str | Collection[str] | None = None,
    *,
    view: str | None = None,
    session: SessionData | None = None,
) -> Callable[[R], R]:
    """Require that the user has confirmed who they are within the last ``minutes``.

    A confirmation is a sign-in, or ``session.confirm(method)``. ``method``: the accepted method, a
    list of methods, or None for any. For two factors, put one decorator above the other.

    Other requests get a 401 with a challenge for API clients: ``ConfirmationRequired``, for which
    you can write an error handler. A browser that opens a page is redirected to ``view`` (an
    endpoint, by default ``SESSION_CONFIRM_VIEW``), with the way back in ``next``: see ``next_url``.
    ``session``: the ``ext.session`` of a second ``Session``.

    Put it below ``@app.route``, or in ``decorators`` of a class-based view. Works on async views
    too. Costs as much as reading the session. Raises ``SettingError`` for wrong arguments. Source:
    OWASP ASVS 7.5.1, 7.5.3; RFC 9470.
    """
    if callable(minutes):
        raise SettingError("require_fresh needs parentheses: @require_fresh()")
    seconds = _in_seconds(minutes)
    try:
        methods = checked_methods(method)
    except ValueError as error:
        raise SettingError(f"require_fresh: {error}") from None

    def answer() -> Any:
        """The response instead of the view; None if the user may continue."""
        target: Any = session
        if target is None:
            opened = current_session("require_fresh")
            load_user()  # Flask-Login may find that another browser has the session
        else:
            opened = target._get_current_object()
        life = lifecycle_of(opened)
        open_from_store(life, "a check for fresh authentication")
        at = confirmed_at(opened, signed_in_at(life), methods)
        if at is not None and -_SKEW <= life.repository.now() - at <= seconds * 1000:
            return None
        return _challenge(life, max(1, int(seconds)), methods or (), view)

    def decorate(called: R) -> R:
        if inspect.iscoroutinefunction(called):

            @functools.wraps(called)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                refused = answer()
                return await called(*args, **kwargs) if refused is None else refused

            return run_async  # type: ignore[return-value]  # the wrapped view has the same signature

        @functools.wraps(called)
        def run(*args: Any, **kwargs: Any) -> Any:
            refused = answer()
            return called(*args, **kwargs) if refused is None else refused

        return run  # type: ignore[return-value]  # the wrapped view has the same signature

    return decorate


def next_url(default: str = "/") -> str:
    """The URL to continue with after a sign-in or a confirmation: the request's ``next``.

    Returns ``default`` if the request has no ``next``, or one that leads to another site.
    Otherwise, a link to your page could send your users to an attacker's site.
    """
    wanted = request.values.get("next", "")
    return wanted if _is_own(wanted) else default


def _in_seconds(minutes: object) -> float:
    if isinstance(minutes, timedelta):
        minutes = minutes / timedelta(minutes=1)
    if (
        isinstance(minutes, bool)
        or not isinstance(minutes, (int, float))
        or not 0 < minutes <= _MOST_MINUTES
    ):
        raise SettingError(
            f"require_fresh: minutes is {ascii(minutes)[:60]}; allowed: more than 0, and at most "
            f"{_MOST_MINUTES}, or a timedelta"
        )
    return minutes * 60


def _challenge(life: Lifecycle, seconds: int, methods: Collection[str], view: str | None) -> Any:
    view = view or life.repository.settings.confirm_view
    if (
        view is None
        or life.presented().by_header
        or not _opens_a_page()
        # Otherwise the browser would be redirected here again and again.
        or request.endpoint == (f"{request.blueprint}{view}" if view.startswith(".") else view)
    ):
        raise ConfirmationRequired(seconds, methods, signed_in=life.handle is not None)
    back = _way_back()
    target = url_for(view) if back is None else url_for(view, next=back)
    response = redirect(target, 302 if _is_read() else 303)
    response.cache_control.no_store = True
    return response


def _opens_a_page() -> bool:
    """Whether a browser shows the response to its user. Scripts get the 401."""
    mode = request.headers.get("Sec-Fetch-Mode")
    if mode is not None:
        return mode == "navigate"
    return any(kind == "text/html" for kind in request.accept_mimetypes.values())


def _is_read() -> bool:
    return request.method in ("GET", "HEAD")


def _way_back() -> str | None:
    """The page to return to; for a submitted form, the page that it was on."""
    try:
        page = urlsplit(request.url if _is_read() else request.referrer or "")
    except ValueError:  # not a URL
        return None
    if f"{page.scheme}://{page.netloc}/" == request.host_url:
        back = "/" + page._replace(scheme="", netloc="", fragment="").geturl().lstrip("/")
        if _is_own(back):
            return back
    return None


def _is_own(url: str) -> bool:
    """Whether browsers treat this as a path on this host.

    They drop tabs and line breaks, and treat a backslash as a slash (WHATWG URL, 4.4).
    """
    return (
        url.startswith("/")
        and not url.startswith("//")
        and "\\" not in url
        and url.isprintable()
        and " " not in url
    )
