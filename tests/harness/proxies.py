"""Real proxies, and WSGI applications behind them on loopback ports, for tests."""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from werkzeug.serving import make_server

FOLDER = Path(sys.prefix) / "proxies"
START = 20.0  # seconds
MISSING = (
    "{} is missing: install Debian's packages nginx and haproxy, or let "
    "tests/harness/setup_proxies.sh fetch them"
)


@contextmanager
def served(app: Any) -> Iterator[int]:
    """Serve a WSGI application in threads of this process; gives the port."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port


def program(name: str) -> tuple[str, dict[str, str]]:
    """The path of a proxy, and the environment that it needs."""
    found = shutil.which(name)
    if found is not None:
        return found, {}
    own = FOLDER / "usr" / "sbin" / name
    assert own.exists(), MISSING.format(name)
    libraries = {str(path.parent) for path in FOLDER.glob("usr/lib/*/*.so*")}
    return str(own), {"LD_LIBRARY_PATH": ":".join(sorted(libraries))}


@contextmanager
def running(name: str, port: int, folder: Path, *arguments: str) -> Iterator[None]:
    """Run a proxy until the end of the block; it listens on `port` by then."""
    path, environment = program(name)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [path, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START
        while True:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, log.read_text(errors="replace")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(START)


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, Any]:
    """The status and the body, of a request with these headers (`_` for `-`)."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=START)) as connection:
        named = {name.replace("__", " ").replace("_", "-"): text for name, text in headers.items()}
        connection.request(
            method, path, headers={name.replace(" ", "_"): text for name, text in named.items()}
        )
        response = connection.getresponse()
        return response.status, (response.read().decode(), response.headers)
