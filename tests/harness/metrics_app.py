"""The applications that gunicorn serves in test_metrics.py and test_prometheus.py."""

import os
import secrets

from flask import Flask, g, request
from prometheus_flask_exporter.multiprocess import GunicornInternalPrometheusMetrics
from redis import Redis

from examples.shop.app import create_app as create_demo
from flask_gsession import session, session_lock, session_transaction
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.operate.cleanup import CleanupWorker
from tests.harness.workers_app import create_app as create_workers_app


def create_app() -> Flask:
    """The application of workers_app.py with metrics, in addition to its own counts."""
    app = create_workers_app()
    SessionMetrics(app, GunicornInternalPrometheusMetrics(app), count_every=0.2)
    return app


def create_shop() -> Flask:
    """The demo shop with metrics, plus lost races, locks and a clean-up, which it lacks."""
    app = create_demo(
        os.environ["WORKERS_STORE"],
        instance_path=os.environ["WORKERS_INSTANCE"],
        SESSION_KEY_PREFIX=os.environ["WORKERS_PREFIX"],
        SESSION_NEAR_CACHE=1,
        SESSION_JOURNAL=True,
    )
    SessionMetrics(app, count_every=1)
    (ext,) = app.extensions["gsession"]
    with Redis.from_url(os.environ["WORKERS_STORE"], socket_timeout=10) as client:
        lock = f"{os.environ['WORKERS_PREFIX']}{{{'x' * 43}}}:lock"
        client.set(lock, "nobody 1 1\n", ex=3600)  # for the clean-up to find
    CleanupWorker(app, interval=1)

    def second_window(number: int) -> None:
        """Another request of this browser, in the middle of one."""
        window = app.test_client()
        window.set_cookie("session", request.cookies["session"])
        window.get(f"/second/{number}")

    @app.get("/second/<int:number>")
    def second(number: int) -> str:
        session["second"] = number
        return ""

    @app.get("/merged")
    def merged() -> str:
        session["first"] = session.get("first", 0) + 1
        next(iter(ext.journal("siem")), None)  # a consumer that falls behind
        second_window(session["first"])
        return ""

    @app.get("/counted")
    @session_transaction
    def counted() -> str:
        session["count"] = session.get("count", 0) + 1
        if "overtaken" not in g:
            g.overtaken = True
            second_window(1000 + session["count"])
        return ""

    @app.get("/bound")
    def bound() -> str:
        session.bind(secrets.token_hex(4))
        return ""

    @app.get("/locked")
    @session_lock
    def locked() -> str:
        return ""

    return app
