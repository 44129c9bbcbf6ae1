"""The application that gunicorn serves in test_workers.py; environment variables shape it.

`WORKERS_STORE`     `SESSION_STORE`; unset for the default
`WORKERS_PREFIX`    `SESSION_KEY_PREFIX`
`WORKERS_NEAR`      `SESSION_NEAR_CACHE`, in seconds
`WORKERS_INSTANCE`  the instance folder
`WORKERS_WARM`      any text: use a session while the application is made, so that a connection
                    is open before `gunicorn --preload` forks
"""

import os
import time
from typing import Any

from flask import Flask, Response, abort

from flask_gsession import Session, session, session_lock
from flask_gsession.operate.cleanup import CleanupWorker
from flask_gsession.pages.live import live_blueprint

Answer = dict[str, Any]


def create_app(**more: Any) -> Flask:
    """The application, as the environment and `more` settings describe it."""
    app = Flask(__name__, instance_path=os.environ["WORKERS_INSTANCE"])
    app.config.update(
        SECRET_KEY="workers", SESSION_KEY_PREFIX=os.environ["WORKERS_PREFIX"], WARM_COOKIE=None
    )
    if store := os.environ.get("WORKERS_STORE"):
        app.config["SESSION_STORE"] = store
    app.config["SESSION_NEAR_CACHE"] = float(os.environ.get("WORKERS_NEAR", 0))
    # The tests need correct answers, even from a very slow machine.
    app.config["SESSION_STORE_TIMEOUT"] = 20
    app.config.update(SESSION_LOCK_WAIT=60, SESSION_LOCK_TIMEOUT=60, SESSION_LOCK_WARN=None)
    app.config.update(more)
    Session(app)
    app.register_blueprint(live_blueprint(keys=["count"]))

    @app.after_request
    def _name_the_worker(response: Response) -> Response:
        response.headers["X-Worker"] = str(os.getpid())
        return response

    @app.post("/login/<user>")
    def login(user: str) -> Answer:
        session["user"] = user
        return {"user": user}

    @app.get("/whoami")
    def whoami() -> Answer:
        return {"user": session.get("user"), "handle": session.handle}

    @app.get("/plain")
    def plain() -> Answer:
        return {"user": None, "handle": "no session"}

    @app.get("/all")
    def everything() -> Answer:
        return session.copy()

    @app.post("/count")
    def count() -> Answer:
        return {"count": session.update_atomic("count", lambda count: count + 1, 0)}

    @app.post("/count-locked")
    @session_lock
    def count_locked() -> Answer:
        count = session.get("locked", 0)
        time.sleep(0.002)
        session["locked"] = count + 1
        return {"count": count + 1}

    @app.post("/put/<key>/<int:value>")
    def put(key: str, value: int) -> Answer:
        if "user" not in session:
            abort(401)
        session[key] = value
        return {"user": session["user"]}

    @app.post("/logout")
    def logout() -> Answer:
        session.destroy()
        return {}

    @app.get("/warm-cookie")
    def warm_cookie() -> Answer:
        return {"cookie": app.config["WARM_COOKIE"]}

    if os.environ.get("WORKERS_WARM"):
        client = app.test_client()
        answer = client.post("/login/early")
        if answer.status_code != 200:
            raise RuntimeError(f"no session while the application is made: {answer.status}")
        cookie = client.get_cookie("session")
        assert cookie is not None
        app.config["WARM_COOKIE"] = cookie.value
    return app


def create_cleaned_app() -> Flask:
    """The same, with a worker that cleans up in small steps."""
    app = create_app()
    CleanupWorker(app, batch=1)
    return app
