"""Runs an example that has several processes, and visits its services."""

from __future__ import annotations

import http.client
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).parents[2]
START = 60.0  # seconds


@contextmanager
def running(module: str, ports: int, folder: Path) -> Iterator[int]:
    """Run ``python -m module`` on so many ports in a row; gives the first one.

    At the end, nothing listens to them any more.
    """
    first, log = _free_ports(ports), folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", str(first)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START
        while not all(_listens(port) for port in range(first, first + ports)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield first
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START)
    left = [port for port in range(first, first + ports) if _listens(port)]
    assert left == [], "a process is left behind"


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for _ in range(100):
        port = random.randrange(12_000, 20_000)  # below the ports that systems hand out
        try:
            for other in range(port, port + count):
                socket.create_server(("127.0.0.1", other)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no ports in a row are free")


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Browser:
    """Keeps the cookie, for both services: cookies know no ports."""

    def __init__(self) -> None:
        self.cookie = ""

    def ask(self, port: int, method: str, path: str, **form: str) -> tuple[int, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=START)) as connection:
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            if self.cookie:
                headers["Cookie"] = self.cookie
            connection.request(method, path, urlencode(form), headers)
            response = connection.getresponse()
            for cookie in response.headers.get_all("Set-Cookie", []):
                if cookie.startswith("session="):
                    self.cookie = cookie.partition(";")[0]
            return response.status, response.read().decode()
