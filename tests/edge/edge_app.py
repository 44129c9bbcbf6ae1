"""The application that gunicorn serves in test_workers.py; `WORKERS_STORE` is its store."""

import os
from typing import Any

from flask import Flask, Response

from flask_gsession import Session, session

Answer = dict[str, Any]


def create_app() -> Flask:
    """The application, as the environment describes it."""
    app = Flask(__name__, instance_path=os.environ["WORKERS_INSTANCE"])
    app.config.update(
        SECRET_KEY="workers",
        SESSION_KEY_PREFIX=os.environ["WORKERS_PREFIX"],
        SESSION_STORE=os.environ["WORKERS_STORE"],
        SESSION_STORE_TIMEOUT=float(os.environ.get("WORKERS_TIMEOUT", 10)),
        SESSION_EDGE_SYNC=0.5,
        SESSION_MERGE_POLICIES={"count": "counter"},
    )
    ext = Session(app)

    @app.after_request
    def _name_the_worker(response: Response) -> Response:
        response.headers["X-Worker"] = str(os.getpid())
        return response

    @app.post("/count")
    def count() -> Answer:
        session["count"] = session.get("count", 0) + 1
        return {"count": session["count"]}

    @app.get("/all")
    def everything() -> Answer:
        return session.copy()

    @app.post("/logout")
    def log_out() -> Answer:
        session.destroy()
        return {}

    @app.get("/edge")
    def edge() -> Answer:
        part = ext.store().edge
        return {} if part is None else {"cut_off": part.cut_off, **part.figures()._asdict()}

    return app
