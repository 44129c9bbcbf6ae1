"""A visitor of an app: calls the WSGI application directly, with its cookies, off any network."""

from __future__ import annotations

from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any

from flask import Flask
from werkzeug.test import create_environ

Call = Callable[[], str]
"""One request (or one bare operation). Returns the body as text."""


class Visitor:
    """Keeps the cookies an app set, and makes prebuilt requests that carry them."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self._cookies: dict[str, str] = {}

    @property
    def cookie_bytes(self) -> int:
        """Bytes of the Cookie header's value."""
        return len(self._cookie_header())

    def visit(self, path: str) -> str:
        """Requests `path` once, keeps the cookies of the answer, returns the body."""
        headers: list[tuple[str, str]] = []
        body = self._request(path, headers)()
        for name, value in headers:
            if name.lower() == "set-cookie":
                for morsel in SimpleCookie(value).values():
                    self._cookies[morsel.key] = morsel.coded_value
        return body

    def prepare(self, path: str) -> Call:
        """Returns a function that requests `path` with today's cookies and drops new ones."""
        return self._request(path, [])

    def environ(self, path: str) -> dict[str, Any]:
        """The environ that a server passes for a request of `path` with the current cookies."""
        environ = create_environ(path, base_url="http://bench.example/")
        if self._cookies:
            environ["HTTP_COOKIE"] = self._cookie_header()
        return environ

    def _request(self, path: str, headers: list[tuple[str, str]]) -> Call:
        environ = self.environ(path)
        application = self.app.wsgi_app
        status = ""

        def start_response(line: str, fields: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal status
            status = line
            headers[:] = fields
            return None

        def call() -> str:
            answer = application(environ.copy(), start_response)
            body = b"".join(answer)
            answer.close()  # type: ignore[attr-defined]
            if not status.startswith("200"):
                raise RuntimeError(f"{path} answered {status}: {body[:200]!r}")
            return body.decode()

        return call

    def _cookie_header(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in self._cookies.items())
