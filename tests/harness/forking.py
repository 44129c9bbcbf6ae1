"""An application to use across forks, and processes forked from a test.

It imports no test and no pytest: test_forks_in_c.py starts many processes that import this.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from flask import Flask
from flask.testing import FlaskClient

from flask_gsession import Session, session

DEADLINE = 60  # seconds
PATIENCE = 20  # seconds a store may take: slow is not wrong


class Site(NamedTuple):
    """An application with sessions, and its extension."""

    app: Flask
    ext: Session

    def client(self, cookie: str | None = None) -> FlaskClient:
        """A browser, with the session cookie of another one where it is given."""
        client = self.app.test_client()
        if cookie is not None:
            client.set_cookie("session", cookie)
        return client

    def log_in(self, user: str) -> str:
        """The cookie of a new session of `user`."""
        client = self.client()
        post(client, f"/login/{user}")
        cookie = client.get_cookie("session")
        assert cookie is not None
        return cookie.value


def make_site(store: Any, prefix: str, **settings: Any) -> Site:
    """An application whose views say whose session they found, and count in it."""
    app = Flask(__name__)
    app.secret_key = "forks and threads"
    app.testing = True
    ext = Session(app, store=store, key_prefix=prefix, store_timeout=PATIENCE, **settings)

    @app.post("/login/<user>")
    def login(user: str) -> dict[str, Any]:
        session["user"] = user
        return {"user": user}

    @app.post("/count")
    def count() -> dict[str, Any]:
        return {"user": session["user"], "count": session.update_atomic("n", lambda n: n + 1, 0)}

    @app.post("/put/<key>")
    def put(key: str) -> dict[str, Any]:
        session[key] = session["user"]
        return {"user": session["user"]}

    @app.get("/all")
    def everything() -> dict[str, Any]:
        return session.copy()

    return Site(app, ext)


def post(client: FlaskClient, path: str) -> dict[str, Any]:
    """The answer to a POST that must succeed."""
    response = client.post(path)
    assert response.status_code == 200, response.status
    answer: dict[str, Any] = response.json
    return answer


def get(client: FlaskClient, path: str) -> dict[str, Any]:
    """The answer to a GET that must succeed."""
    response = client.get(path)
    assert response.status_code == 200, response.status
    answer: dict[str, Any] = response.json
    return answer


class Child:
    """A forked process that runs `function`. `result` waits for its result."""

    fork = staticmethod(os.fork)

    def __init__(self, function: Callable[[], Any]) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        with warnings.catch_warnings():
            # Newer Pythons warn of forks beside threads, such as pymongo's: our subject.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = self.fork()
        if self._pid == 0:
            self._be_the_child(function, writer)
        os.close(writer)
        self._reader = reader

    def _be_the_child(self, function: Callable[[], Any], writer: int) -> None:
        """Never returns: the rest of the test run is the parent's."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, sys.__stderr__ or 2, chain=True)
        signal.alarm(DEADLINE)
        try:
            answer = {"result": function()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with suppress(BaseException), os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)

    def result(self) -> Any:
        """The result of `function`, or an assertion error with its exception."""
        with os.fdopen(self._reader) as pipe:
            text = pipe.read()
        _, status = os.waitpid(self._pid, 0)
        assert status == 0, f"the child ended with status {status}"
        answer = json.loads(text)
        assert "error" not in answer, answer["error"]
        return answer["result"]


class Gate:
    """Something that one process waits for and another one lets happen, once."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def open(self) -> None:
        os.write(self._writer, b"!")

    def wait(self) -> None:
        os.read(self._reader, 1)

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


@contextmanager
def gates(count: int) -> Iterator[list[Gate]]:
    """So many gates, released at the end."""
    made = [Gate() for _ in range(count)]
    try:
        yield made
    finally:
        for gate in made:
            gate.close()
