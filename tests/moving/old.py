"""Old sessions for tests: real applications on Flask-Session, and records as it writes them."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
from cachelib.file import FileSystemCache

from tests.harness.apps import Site, Visitor

ROOT = Path(__file__).parent.parent.parent
KEY = "a key for tests"
UNTIL = "2100-01-01"
VERSIONS = ("0.5", "0.8")


def visit(site: Site, cookie: str) -> Visitor:
    """A browser that has only the old cookie."""
    visitor = site.visitor()
    visitor.set_cookie("session", cookie)
    return visitor


def environment(version: str) -> dict[str, str]:
    """The environment variables of a Python that has this version of Flask-Session.

    0.8 is in the environment of the tests. 0.5 lies in a folder in front of it, with packages of
    its time, which is made once.
    """
    if version == "0.8":
        return dict(os.environ)
    folder = ROOT / ".venv" / f"flask-session-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = folder / "ready"
        if not ready.exists():
            wanted = ROOT / "tests" / "moving" / f"flask_session_{version}.txt"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            options = ["--disable-pip-version-check", "--upgrade", "--target", str(folder)]
            subprocess.run([*command, *options, "-r", str(wanted)], check=True, timeout=300)
            ready.touch()
    return {**os.environ, "PYTHONPATH": str(folder)}


class OldApp:
    """A process with an application on Flask-Session. A context manager; ends the process."""

    def __init__(self, version: str, kind: str, url: str, **config: Any) -> None:
        config = {"SECRET_KEY": KEY, "SESSION_TYPE": kind, **config}
        variables = environment(version) | {
            "OLD_APP": json.dumps({"config": config, "url": url}),
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("old_app.py"))],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.communicate()[1])
        self.base = f"http://127.0.0.1:{int(line)}"

    def ask(self, browser: requests.Session, path: str, **options: Any) -> requests.Response:
        """Post to `path`, or get it if that is `/get`."""
        method = "GET" if path == "/get" else "POST"
        response = browser.request(method, self.base + path, timeout=30, **options)
        assert response.status_code == 200, response.text[:2000]
        return response

    def browser(self, **values: Any) -> requests.Session:
        """A browser with a session that holds these values."""
        browser = requests.Session()
        self.ask(browser, "/set", json=values)
        return browser

    def values(self, browser: requests.Session) -> dict[str, Any]:
        """The session that this browser has here."""
        values: dict[str, Any] = self.ask(browser, "/get").json()
        values.pop("_permanent", None)
        return values

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class OldFiles:
    """The folder of Flask-Session's type `filesystem`, without an application."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = FileSystemCache(str(folder), threshold=0)

    @property
    def config(self) -> dict[str, Any]:
        """Flask-Session's settings for it, and the end of the import."""
        return {
            "SESSION_TYPE": "filesystem",
            "SESSION_FILE_DIR": str(self.folder),
            "SESSION_IMPORT_UNTIL": UNTIL,
        }

    def add(self, sid: str | None = None, **values: Any) -> str:
        """Store a session; returns its id, which is the cookie's value."""
        sid = sid or secrets.token_urlsafe(32)
        self.cache.set(f"session:{sid}", values, timeout=10**9)
        return sid

    def has(self, sid: str) -> bool:
        return bool(self.cache.has(f"session:{sid}"))

    def remove(self, sid: str) -> None:
        self.cache.delete(f"session:{sid}")

    def put_raw(self, sid: str, pickled: bytes) -> None:
        """Store these bytes in the place of the pickle."""
        self.add(sid, a=1)
        path = Path(self.cache._get_filename(f"session:{sid}"))
        path.write_bytes(path.read_bytes()[:4] + pickled)
