"""Responses to errors that are raised after the view has returned its response."""

from __future__ import annotations

import re

from flask import Flask, Response
from flask.signals import got_request_exception
from werkzeug.exceptions import HTTPException, InternalServerError

from .config import propagates_exceptions
from .events import logger

_OF_THE_BODY = re.compile(
    "accept-ranges|age|cache-control|content-(?!security).*|etag|expires|last-modified|location"
    "|refresh|set-cookie",
    re.IGNORECASE,
)


def response_to(app: Flask, error: Exception) -> Response:
    """The application's response if a view raises ``error``.

    The hooks that add ``Retry-After`` have run already, so this adds it to an application's error
    page.
    """
    response = _page_for(app, error)
    wait = getattr(error, "retry_after", None)
    if isinstance(wait, int) and response.status_code >= 300:
        response.headers.setdefault("Retry-After", str(wait))
    return response


def _page_for(app: Flask, error: Exception) -> Response:
    try:
        return app.make_response(app.handle_user_exception(error))
    except Exception as raised:
        if raised is error and propagates_exceptions(app):
            raise
        return _plain_error(app, error, handled=raised is not error)


def _plain_error(app: Flask, error: Exception, *, handled: bool) -> Response:
    """The response to an error without a handler, or with a handler that failed too."""
    if not isinstance(error, HTTPException):
        assert error.__traceback__ is not None  # it was raised
        app.log_exception((type(error), error, error.__traceback__))
        got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=error)
        error = InternalServerError(original_exception=error)
    if not handled:
        try:
            return app.make_response(app.handle_http_exception(error))
        except Exception:
            return _bare_error(app, error)
    return _bare_error(app, error)


def _bare_error(app: Flask, error: HTTPException) -> Response:
    logger.error("The error handler for %s failed", type(error).__name__, exc_info=True)
    return app.make_response(error.get_response())


def replace_response(response: Response, answer: Response) -> None:
    """Replace the contents of ``response``, which Flask already holds, with ``answer``'s."""
    close = getattr(response.response, "close", None)
    if close is not None:
        close()
    response.status = answer.status
    # Keep the view's headers about the exchange (CORS, a request id). Drop headers about the body
    # or the view's result.
    for name in {name for name, _ in response.headers}:
        if _OF_THE_BODY.fullmatch(name):
            del response.headers[name]
    for name, _ in answer.headers:
        response.headers.pop(name, None)
    response.headers.extend(answer.headers)
    response.response = answer.response
    response.direct_passthrough = answer.direct_passthrough
