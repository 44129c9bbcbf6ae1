"""Error pages in the shop's style. They work without the session, and so without its store."""

from flask import Flask, render_template, request
from werkzeug.exceptions import HTTPException, InternalServerError
from werkzeug.wrappers import Response

from flask_gsession import GSessionError, SessionConflict, StoreUnavailable

from . import preferences

TITLES = {
    400: "That form did not come through",
    404: "This shelf is empty",
    405: "That does not work here",
    409: "Two things happened at once",
    500: "Something broke on our side",
    503: "We will be right back",
}
TEXTS = {
    404: "There is nothing at this address.",
    405: "This address takes no such request. Please go back and try it from the page itself.",
    413: "That was more than a form of ours can hold.",
}


def register(app: Flask) -> None:
    """Use these pages in `app`."""

    # What these two say of themselves is for developers; the customer gets other words.
    @app.errorhandler(SessionConflict)
    def conflict(error: SessionConflict) -> Response:
        return _page(
            error,
            "Another tab changed your session in the same moment, so this did not go through. "
            "Please try it once more.",
        )

    @app.errorhandler(StoreUnavailable)
    def unavailable(error: StoreUnavailable) -> Response:
        return _page(
            error,
            "We cannot reach your cart at the moment. Please try again in a few seconds.",
        )

    @app.errorhandler(HTTPException)
    def other(error: HTTPException) -> Response:
        plain = error.description == type(error).description
        text = TEXTS.get(error.code or 0) if plain else None
        return _page(error, text or error.description or "")

    @app.errorhandler(InternalServerError)
    def broken(error: InternalServerError) -> Response:
        return _page(error, "It is written down and will be looked at.")


def _page(error: HTTPException, text: str) -> Response:
    # Keeps the headers of the error, Retry-After among them.
    response = Response(status=error.code, headers=error.get_headers(request.environ))
    code = error.code or 500
    title = TITLES.get(code, error.name)
    page = render_template("error.html", code=code, title=title, text=text, theme=_theme(error))
    response.set_data(page)
    response.mimetype = "text/html"
    return response


def _theme(error: HTTPException) -> str:
    if isinstance(error, (GSessionError, InternalServerError)):
        return str(preferences.DEFAULTS["theme"])
    try:
        return str(preferences.current()["theme"])
    except GSessionError:  # a missing page stays a missing page while the store is away
        return str(preferences.DEFAULTS["theme"])
