"""The application of workers_app, with pages for tests of live updates.

`WORKERS_HEARTBEAT`     `SESSION_LIVE_HEARTBEAT`, in seconds
`WORKERS_TIMEOUT`       `SESSION_STORE_TIMEOUT`, in seconds
`WORKERS_USER_STREAMS`  `SESSION_LIVE_USER_STREAMS`
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from flask import Flask, current_app

from flask_gsession import session
from flask_gsession.live.hints import Hints
from flask_gsession.live.streams import slots
from tests.harness import workers_app

Answer = dict[str, Any]


def create_app() -> Flask:
    """The application, as the environment describes it."""
    settings = {
        "SESSION_LIVE_HEARTBEAT": float(os.environ.get("WORKERS_HEARTBEAT", 15)),
        "SESSION_LIVE_USER_STREAMS": int(os.environ.get("WORKERS_USER_STREAMS", 10)),
        "SESSION_STORE_TIMEOUT": float(os.environ.get("WORKERS_TIMEOUT", 20)),
    }
    app = workers_app.create_app(**settings)
    (ext,) = app.extensions["gsession"]

    @app.post("/bind/<user>")
    def bind(user: str) -> Answer:
        session.bind(user)
        return {}

    @app.post("/publish/<user>/<int:number>")
    def publish(user: str, number: int) -> Answer:
        ext.live.publish(user, "number", {"number": number, "text": "x" * 900})
        return {}

    @app.get("/figures")
    def figures() -> Answer:
        """The streams and watches of this worker."""
        hints: Hints = ext.live.hints()
        status = Path("/proc/self/status").read_text()
        return {
            "streams": len(slots),
            "watches": len(hints.watches()),
            "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),
            "kilobytes": int(status.partition("VmRSS:")[2].split()[0]),
            "near": current_app.config["SESSION_NEAR_CACHE"],
        }

    return app
