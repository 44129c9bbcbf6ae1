"""Flask's session interface: opens and saves sessions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from flask import Flask, Request, Response, has_request_context, request
from flask.globals import request_ctx
from flask.sessions import SessionInterface, SessionMixin
from werkzeug.local import LocalProxy

from .authentication import FORGOTTEN, forget_remembered, rotate_after_a_step
from .error_pages import replace_response, response_to
from .errors import LogoutUnconfirmed, StoreUnavailable, UnsupportedType
from .events import WriteDropped, logger
from .remember import drop_cookie
from .repository.repository import Repository
from .request.late_changes import late_changes, report_late
from .request.lifecycle import ONE_KEY, Lifecycle
from .request.saving import end_request
from .request.session import (
    SessionData,
    add_further,
    begin_error_page,
    begin_response,
    close_unused,
    lifecycle_of,
    repository_of,
)
from .request.site_data import CLEARED, write_header
from .request.state import IN_RESPONSE, IN_VIEW, SAVED, Outage
from .stores.base import Store
from .streams import can_read_session
from .token_transport import TokenTransport
from .watching.debug import begin, report

if TYPE_CHECKING:
    from .live.hints import Hints

#: The request's attribute for sessions of the application's further ``Session`` objects. It isn't
#: in the environment, which an application may pass on to another.
_FURTHER = "_gsession_further"
_SAVED = "_gsession_saved"

# Bypasses the proxy, which takes longer.
_current_context = request_ctx._get_current_object  # type: ignore[attr-defined]


class GSessionInterface(SessionInterface):
    """Opens and saves the sessions of one ``Session`` on one application.

    Flask opens the session before routing, for every request, so opening only remembers the
    request. Cookie attributes are Flask's own ``SESSION_COOKIE_*``.
    """

    session_class = SessionData

    def __init__(self, repository: Repository, store: Store, *, owns_store: bool = True) -> None:
        self.repository = repository
        self.store = store
        self.owns_store = owns_store
        #: watches sessions and users, from the first use of ``ext.live``
        self.hints: Hints | None = None
        #: whether the application has further ``Session`` objects
        self.has_further = False
        self._live = repository.live
        self._misses_key = False
        self._token_header = repository.settings.token_header
        self._remembers = repository.settings.remember == "session"
        self._debug = repository.settings.debug
        vary = ["Cookie"] if self._token_header is None else ["Cookie", self._token_header]
        self._vary = ", ".join(vary)
        self.tokens = TokenTransport(repository, self)
        repository.last_seen_version = self.tokens.last_seen_version

    def get_cookie_name(self, app: Flask) -> str:
        """The cookie's name, which belongs to this ``Session``, not to the application."""
        return self._live.cookie_name()

    def open_session(self, app: Flask, request: Request) -> SessionData | None:
        """A session that is loaded at the first look; None without a ``SECRET_KEY``.

        No round trip.
        """
        if not self._live.secret_key():
            self._report_missing_key(app)
            return None
        try:
            context = _current_context()
            hooks = context._after_request_functions if context.request is request else None
        except RuntimeError:
            hooks = None
        if app.after_request_funcs and hooks is not None:  # one of them may have the first look
            session = SessionData(self.repository, self.tokens.present, app, request)
            hooks.append(partial(begin_response, session))
        else:
            session = SessionData(self.repository, self.tokens.present, app, request, hooks)
        if self._debug:
            begin(session, request)
        return session

    def _report_missing_key(self, app: Flask) -> None:
        if not self._misses_key:
            self._misses_key = True
            logger.error(
                "The application %r has no SECRET_KEY, so its sessions are empty and can't be "
                "changed. Set SECRET_KEY.",
                app.name,
            )

    def has_opened(self, session: object) -> bool:
        """Whether this interface opened ``session``."""
        return isinstance(session, SessionData) and repository_of(session) is self.repository

    def open_further(self, app: Flask, request: Request) -> SessionMixin:
        """The session of a second ``Session`` on the application: one object per request."""
        opened: dict[object, Any] = vars(request).setdefault(_FURTHER, {})
        session = opened.get(self)
        if session is None:
            made = self.open_session(app, request)
            # An atomic step, so that all threads of the request get the same one.
            session = opened.setdefault(self, self.make_null_session(app) if made is None else made)
            if made is not None and session is made:
                if _SAVED in vars(request):
                    close_unused(made)
                of_request = session_of_request()
                if isinstance(of_request, SessionData):
                    add_further(of_request, made)
        session.accessed = True
        return session

    def regenerate(self, session: SessionMixin) -> None:
        """Give the session a new token, for code written for Flask-Session.

        Equals ``session.rotate(grace=0)``: the old token stops working at once.
        """
        if isinstance(session, SessionData):
            session.rotate(grace=0)

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Store the request's changes. Set or delete the cookie only if necessary.

        When Flask calls it, a failure becomes the application's own error response. Only errors in
        the program raise, and only if the application lets exceptions through (tests, debug mode).
        When the application calls it, every failure raises, since this response may never be sent.
        """
        if type(session) is LocalProxy:  # type: ignore[comparison-overlap]  # saved by hand
            session = session._get_current_object()
            session.accessed = True  # as Flask 3.1.3 does
        if self.has_further and has_request_context():
            self._save_all(app, session, response)
        elif isinstance(session, SessionData):
            if session.accessed:
                life = session.lifecycle or lifecycle_of(session)
                self._save(app, session, life, response)
                self._write_headers(app, session, life, response)
            else:
                close_unused(session)
                if type(response.response) is not list:
                    self._follow_body(session, response)

    def _follow_body(self, session: SessionData, response: Response) -> None:
        """Prepare for a streamed body, which can look at the session after a view that didn't."""
        if response.is_streamed:
            response.call_on_close(lambda: _report_late_changes(session))
        if can_read_session(response):
            self.add_vary(response)

    def _save_all(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Save the sessions of all ``Session`` objects of the application."""
        of_request = vars(request)
        sessions: list[tuple[GSessionInterface, SessionMixin]] = [(self, session)]
        sessions += of_request.get(_FURTHER, {}).items()
        opened = [(by, each) for by, each in sessions if isinstance(each, SessionData)]
        if any(not _is_by_hand(each) for _, each in opened):
            of_request[_SAVED] = True
        for interface, each in opened:
            if each.accessed:
                interface._save(app, each, lifecycle_of(each), response)
            else:
                close_unused(each)
                interface._follow_body(each, response)
        # After all saves: if one fails, the new response needs the cookies of the others.
        for interface, each in opened:
            if each.accessed:
                interface._write_headers(app, each, lifecycle_of(each), response)

    def _save(self, app: Flask, session: SessionData, life: Lifecycle, response: Response) -> None:
        by_hand = False
        if life.phase != IN_RESPONSE:
            if life.phase == SAVED:
                return
            # If nothing has looked at the session, only a streamed body shows that Flask saves it.
            by_hand = life.opened or response.is_sequence
        if "security" in app.extensions:
            rotate_after_a_step(session, life)
        try:
            end_request(life, by_hand=by_hand and _is_of_request(session))
        except Exception as error:
            self._failed(app, life, response, error, by_hand=by_hand)
            return
        if life.outage is not None:
            self._report_outage(app, life, life.outage, response, by_hand=by_hand)
        if type(response.response) is not list and response.is_streamed:
            response.call_on_close(lambda: _report_late_changes(session))

    def _report_outage(
        self, app: Flask, life: Lifecycle, outage: Outage, response: Response, *, by_hand: bool
    ) -> None:
        """Replace a response that hides an outage, or an error page that met it once more."""
        if outage.loading and (outage.unseen or life.error_page):
            if by_hand:
                raise outage.error
            replace_response(response, response_to(app, outage.error))

    def add_vary(self, response: Response) -> None:
        headers = response.headers
        for name, _ in headers:
            if len(name) == 4 and name.lower() == "vary":
                # Join the lines first: ``vary`` reads only one, and replaces all of them.
                headers["Vary"] = ", ".join(headers.getlist("Vary"))
                response.vary.update(self._vary.split(", "))
                return
        headers.add("Vary", self._vary)

    def _write_headers(
        self, app: Flask, session: SessionData, life: Lifecycle, response: Response
    ) -> None:
        self.add_vary(response)
        if life.cookie != "keep" or self._token_header is not None:
            self.tokens.write_token(app, life, response)
        of_request = life.request.__dict__ if life.request is not None else {}
        if (
            self._remembers
            or self.repository.imports is not None
            or FORGOTTEN in of_request
            or CLEARED in of_request
        ):
            self._drop_cookies(app, life, response)
        near = life.near
        if near is not None and life.seen.record is not near.record:
            self.tokens.send_version(life, near.record, response)
        if life.trace is not None:
            report(session, response)

    def _drop_cookies(self, app: Flask, life: Lifecycle, response: Response) -> None:
        """Delete cookies of other libraries or stores that this request has ended."""
        request, imports = life.request, self.repository.imports
        if request is None:
            return
        if imports is not None and (life.drops_old_cookie or life.cookie == "delete"):
            imports.forget_cookie(request, response)
        if self._remembers:
            drop_cookie(app, response)
        if FORGOTTEN in vars(request):
            forget_remembered(app, response)
        if CLEARED in vars(request):
            write_header(request, response)

    def _failed(
        self, app: Flask, life: Lifecycle, response: Response, error: Exception, *, by_hand: bool
    ) -> None:
        """Replace the response with the application's error response, since the save failed."""
        if life.trace is not None:
            life.trace.failure = type(error).__name__
        if isinstance(error, UnsupportedType) and not self.repository.settings.debug:
            error.add_note("With SESSION_DEBUG = True the line that assigns such a value raises.")
        outage = isinstance(error, StoreUnavailable)
        if outage and not isinstance(error, LogoutUnconfirmed):  # there, the changes are stored
            life.repository.events.emit(WriteDropped, life.handle, "store unavailable")
        if by_hand:
            raise error
        if outage and self.repository.settings.on_store_error == "keep-response":
            return
        replace_response(response, response_to(app, error))


def _is_by_hand(session: SessionData) -> bool:
    """Whether the application saves the session, instead of Flask with its response."""
    life = session.lifecycle
    return life is not None and life.phase == IN_VIEW


def _is_of_request(session: SessionData) -> bool:
    """Whether it is ``flask.session``, not another session, as from a test client."""
    return has_request_context() and session_of_request() is session


def session_of_request() -> object:
    """The object behind ``flask.session``. Looking at it here doesn't count as access."""
    context = _current_context()
    try:
        return context._session
    except AttributeError:  # before Flask 3.1.3
        return context.session


def note_error_page(app: Flask, **_: Any) -> None:
    """Called when Flask makes an error page: from now on, its sessions must not raise."""
    if has_request_context():
        for session in (session_of_request(), *vars(request).get(_FURTHER, {}).values()):
            if isinstance(session, SessionData):
                begin_error_page(session)


def _report_late_changes(session: SessionData) -> None:
    life = session.lifecycle
    if life is not None:
        for key in late_changes(life):
            report_late(life, ONE_KEY, key)
