"""The demo shop. Run it from the root of the repository:

    python -m examples.shop

`SHOP_STORE` names the session store, for example `redis://localhost:6379/0`; without it sessions
live in a SQLite file of the instance folder.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

from flask import Flask, request
from werkzeug.wrappers import Response

from flask_gsession import Session

from . import accounts, csrf, errors, formats, limits, visitor
from .catalogue import Catalogue
from .database import Database
from .instance import secret_key
from .orders import Orders
from .services import EXTENSION, Shop, shop
from .views import blueprints

HERE = Path(__file__).parent

STORES = {
    "redis": "Redis",
    "rediss": "Redis",
    "unix": "Redis",
    "mongodb": "MongoDB",
    "memory": "memory",
}

HEADERS = {
    # Everything the pages use is a file of the shop.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    store: str | None = None,
    *,
    instance_path: str | os.PathLike[str] | None = None,
    **settings: object,
) -> Flask:
    """Open the shop.

    :param store: a `SESSION_STORE` URL; None asks `SHOP_STORE`, empty is the embedded default.
    :param instance_path: the folder for stock, orders and the secret key; `instance` beside this
        file by default.
    :param settings: further settings of Flask or Flask-GSession, for example `TESTING=True`.
    """
    folder = Path(instance_path or HERE / "instance").absolute()
    app = Flask(__name__, instance_path=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if store is None:
        store = os.environ.get("SHOP_STORE", "")
    if store:
        app.config["SESSION_STORE"] = store
    app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
    app.config["SESSION_CONFIRM_VIEW"] = "confirm.ask"
    app.config["MAX_CONTENT_LENGTH"] = 64 * 1024
    app.config.update(settings)
    if not app.config["SECRET_KEY"]:
        app.config["SECRET_KEY"] = secret_key(folder)
    sessions = Session(app)

    database = Database(folder / "shop.sqlite3")
    catalogue = Catalogue.read(HERE)
    orders = Orders(database, catalogue)
    app.extensions[EXTENSION] = Shop(
        catalogue=catalogue,
        orders=orders,
        accounts=accounts.Accounts(database),
        sessions=sessions,
        sessions_in=STORES.get(urlsplit(store).scheme.partition("+")[0], "SQLite"),
    )
    for blueprint in blueprints:
        app.register_blueprint(blueprint)
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    csrf.protect(app)
    errors.register(app)
    _add_page_values(app)
    limits.start(app)
    app.cli.command("restock", help="Fill the shop's shelves again.")(orders.restock)
    return app


def _add_page_values(app: Flask) -> None:
    """Add values to every template, and headers to every response."""

    @app.context_processor
    def helpers() -> dict[str, object]:
        # Functions, because a page that does not call them does not touch the session.
        return {
            "shop": shop,
            "known": visitor.known,
            "person": visitor.person,
            "runs_the_shop": accounts.runs_the_shop,
            "prefs": visitor.prefs,
            "cart_count": visitor.cart_count,
            "csrf_token": csrf.token,
            "csrf_field": csrf.FIELD,
            "money": lambda cents: formats.money(cents, visitor.prefs()["language"]),
            "moment": lambda when: formats.moment(when, visitor.prefs()["language"]),
            "duration": formats.duration,
            "size_of": formats.size,
        }

    @app.after_request
    def harden(response: Response) -> Response:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        if request.endpoint != "static":  # a page shows whose it is, so no one else may keep it
            response.headers.setdefault("Cache-Control", "private, no-cache")
        return response
