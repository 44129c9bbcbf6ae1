"""Listeners and hints beside threads that close them."""

from __future__ import annotations

from threading import Semaphore
from typing import Any

from flask import Flask

from flask_gsession import Session
from flask_gsession.errors import StoreUnavailable
from flask_gsession.live.hints import Hints
from flask_gsession.live.listener import Listener
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.wrappers.near_cache import KeptRecords
from tests.harness.interleaving import before_line


def test_a_listener_goes_on_after_a_connection_fails_to_close() -> None:
    opened = Semaphore(0)

    class Fails:
        unproven, one_feed, timeout = "", True, 1.0
        moved = shifted = bool

        def servers(self) -> tuple[str]:
            return ("",)

        def server_of(self, key: str) -> str:
            return ""

        def open(self, server: object) -> Fails:
            opened.release()
            return self

        def beat(self) -> None:
            raise StoreUnavailable("lost")

        def shut(self) -> None:
            pass

        def close(self) -> None:
            raise StoreUnavailable("gRPC is stuck")

    source: Any = Fails()
    listener, subscriber = Listener(source), KeptRecords(MemoryStore(), 1.0, 0)
    listener.subscribe(subscriber)
    listener.start()
    assert opened.acquire(timeout=30)
    assert opened.acquire(timeout=30)
    listener.close()


def test_hints_that_are_closed_leave_a_new_watch_its_subscription() -> None:
    app = Flask(__name__)
    ext = Session(app, store="memory://")
    with app.app_context():
        hints = ext.live.hints()
    hints.watch(None, "1", lambda *_: None)

    def watch() -> None:
        hints.watch(None, "2", lambda *_: None)

    with before_line(Hints.close, "thread.join(_TICK)", watch):
        hints.close()
    assert hints._is_heard
    ext.close(app)
