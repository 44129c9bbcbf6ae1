"""Error pages in the shop's style. They work without the session store."""

from urllib.parse import urlsplit

from flask import Flask, render_template, request
from werkzeug.exceptions import HTTPException, InternalServerError
from werkzeug.wrappers import Response

from flask_gsession import GSessionError, SessionConflict, StoreUnavailable

from . import visitor

TITLES = {
    400: "That form did not come through",
    403: "For staff only",
    404: "This shelf is empty",
    405: "That does not work here",
    409: "Two things happened at once",
    429: "That was too often",
    500: "Something broke on our side",
    503: "We will be right back",
}
TRY_AGAIN = (409, 503)
TEXTS = {
    404: "There is nothing at this address.",
    405: "You can't send that to this address. Please go back and try it from the page itself.",
    429: "You have tried to sign in too often. Please wait a while before you try again.",
    413: "That was more than our forms accept.",
}


def register(app: Flask) -> None:
    """Use these pages in `app`."""

    # The messages of these two errors are for developers; customers get other words.
    @app.errorhandler(SessionConflict)
    def conflict(error: SessionConflict) -> Response:
        return _page(
            error,
            "Another tab changed your session at the same moment, so this did not go through. "
            "Please try it once more.",
        )

    @app.errorhandler(StoreUnavailable)
    def unavailable(error: StoreUnavailable) -> Response:
        return _page(
            error,
            "We can't reach your cart at the moment. Please try again in a few seconds.",
        )

    @app.errorhandler(HTTPException)
    def other(error: HTTPException) -> Response:
        # The description of a 429 is the limit, such as "10 per 1 hour".
        plain = error.description == type(error).description or error.code == 429
        text = TEXTS.get(error.code or 0) if plain else None
        return _page(error, text or error.description or "")

    @app.errorhandler(InternalServerError)
    def broken(error: InternalServerError) -> Response:
        return _page(error, "We have a note of it, and will look into it.")


def _page(error: HTTPException, text: str) -> Response:
    # Keeps the headers of the error, Retry-After among them.
    response = Response(status=error.code, headers=error.get_headers(request.environ))
    if isinstance(error, (GSessionError, InternalServerError)):
        visitor.forget()  # the page must not fail as well
    code = error.code or 500
    page = render_template(
        "error.html",
        code=code,
        title=TITLES.get(code, error.name),
        text=text,
        again=_again() if code in TRY_AGAIN else None,
    )
    response.set_data(page)
    response.mimetype = "text/html"
    return response


def _again() -> str | None:
    """The URL to try again: this page, or the one with the form."""
    if request.method in ("GET", "HEAD"):
        return request.full_path.rstrip("?")
    form = urlsplit(request.referrer or "")
    if form.netloc == request.host and form.path.startswith("/"):
        # Without the host, so that it stays in the shop whatever the path looks like.
        return f"/{form.path.lstrip('/')}"
    return None
