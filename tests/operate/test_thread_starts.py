"""Two requests that come first start one background thread."""

from __future__ import annotations

from pathlib import Path

import pytest
from flask import Flask
from prometheus_client import CollectorRegistry

from flask_gsession import Session
from flask_gsession.contrib import metrics_watch
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.contrib.metrics_watch import StoreWatch
from flask_gsession.operate import cleanup
from tests.harness.apps import until
from tests.harness.interleaving import before_line


def test_two_threads_that_meet_an_outage_start_one_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(metrics_watch, "_keep_watching", lambda *_: started.append(_))
    app = Flask(__name__)
    ext = Session(app, store="memory://")
    SessionMetrics(app, registry=CollectorRegistry())
    (watch,) = app.extensions["gsession-metrics"].values()
    with before_line(StoreWatch._begin, "self._wake = threading.Event()", watch._begin):
        watch._begin()
    until(lambda: started)
    assert len(started) == 1
    ext.close(app)


def test_two_requests_start_one_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(cleanup, "_work", lambda *_: started.append(_))
    app = Flask(__name__)
    ext = Session(app, store=f"sqlite:///{tmp_path}/sessions.sqlite3")
    cleanup.CleanupWorker(app)
    worker = app.extensions[cleanup.NAME][ext]
    with before_line(cleanup._Worker.begin, "is_before_fork()", worker.begin):
        worker.begin()
    until(lambda: started)
    assert len(started) == 1
    worker.end()
    ext.close(app)
