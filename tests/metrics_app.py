"""The application that gunicorn serves in test_metrics.py: that of test_workers.py, counted."""

from flask import Flask

from flask_gsession.contrib.metrics import SessionMetrics
from tests.workers_app import create_app as create_workers_app


def create_app() -> Flask:
    """The application, as the environment describes it."""
    app = create_workers_app()
    SessionMetrics(app, count_every=0.2)
    return app
