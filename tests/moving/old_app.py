"""An application on Flask-Session, to run in an environment of its own: `python old_app.py`.

`OLD_APP` holds, as JSON, its configuration and a URL for the session store. Prints its port. With
`"package": "flask_gsession"` nothing but the import changes.
"""

import datetime
import decimal
import importlib
import json
import os
import sys
import threading
import warnings
from uuid import UUID

warnings.simplefilter("ignore")

from flask import Flask, jsonify, request, session  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402

given = json.loads(os.environ["OLD_APP"])
Session = importlib.import_module(given.get("package", "flask_session")).Session
app = Flask(__name__)
app.config.update(given["config"])
kind, url = app.config["SESSION_TYPE"], given["url"]
if kind == "redis":
    from redis import Redis

    app.config["SESSION_REDIS"] = Redis.from_url(url)
elif kind == "mongodb":
    from pymongo import MongoClient

    app.config["SESSION_MONGODB"] = MongoClient(url)
elif kind == "sqlalchemy":
    from flask_sqlalchemy import SQLAlchemy

    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SESSION_SQLALCHEMY"] = SQLAlchemy(app)
elif kind == "cachelib":
    from cachelib.file import FileSystemCache

    app.config["SESSION_CACHELIB"] = FileSystemCache(url, threshold=0)
elif kind == "filesystem":
    app.config["SESSION_FILE_DIR"] = url
Session(app)
if kind == "sqlalchemy":
    with app.app_context():
        app.config["SESSION_SQLALCHEMY"].create_all()

SPECIAL = {
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5),
    "decimal": decimal.Decimal("9.90"),
    "uuid": UUID(int=7),
    "tuple": (1, "two"),
    "bytes": b"\x00\xff",
    "set": {1, 2},
    "number keys": {1: "one"},
}


@app.post("/set")
def set_values():
    session.update(request.get_json())
    return jsonify(dict(session))


@app.post("/special/<name>")
def set_special(name):
    session[name] = SPECIAL[name]
    return "set"


@app.get("/get")
def get_values():
    return jsonify(dict(session))


@app.post("/slow")
def slow():
    """Load the session, wait for a second request, and save it."""
    session["slow"] = True
    entered.set()
    assert released.wait(20)
    return "slow"


entered, released = threading.Event(), threading.Event()


@app.post("/release")
def release():
    """Wait until the slow request has its session; with `?go`, let it end."""
    if "go" in request.args:
        released.set()
    else:
        assert entered.wait(20)
    return "released"


@app.post("/logout")
def logout():
    session.clear()
    if "_permanent" in session:  # 0.8 keeps that
        session.modified = True
    return "out"


@app.get("/")
def page():
    return "<!doctype html><title>page</title>"


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.port, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()
