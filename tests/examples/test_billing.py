"""The shop and its billing: two services, one session, and different rights."""

import http.client
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlencode

import pytest

ROOT = Path(__file__).parents[2]
START = 60.0  # seconds


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has."""
    for _ in range(100):
        port = random.randrange(12_000, 20_000)  # below the ports that systems hand out
        try:
            for other in range(port, port + count):
                socket.create_server(("127.0.0.1", other)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no ports in a row are free")


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The shop's; the billing is at the next one."""
    port, log = free_ports(3), tmp_path_factory.mktemp("billing") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.billing", "--port", str(port)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START
        while not all(listens(each) for each in range(port, port + 3)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START)
    assert not any(listens(each) for each in range(port, port + 3)), "a process is left behind"


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


def test_the_billing_writes_into_the_session_of_the_shop(port: int) -> None:
    browser = Browser()
    browser.ask(port, "POST", "/add", good="mug")
    browser.ask(port, "POST", "/add", good="pot")
    assert "mug, pot. Invoice: none" in browser.ask(port, "GET", "/")[1]
    assert browser.ask(port + 1, "POST", "/pay")[0] == 302
    page = browser.ask(port, "GET", "/")[1]
    assert "In your cart: nothing" in page
    assert " over 33 euros" in page
    assert browser.ask(port + 1, "POST", "/pay")[0] == 400


def test_the_billing_sees_nothing_else(port: int) -> None:
    browser = Browser()
    browser.ask(port, "POST", "/add", good="mug")
    assert browser.ask(port + 1, "GET", "/address")[0] == 403


def test_a_logout_at_the_shop_is_one_at_the_billing(port: int) -> None:
    browser = Browser()
    browser.ask(port, "POST", "/add", good="mug")
    kept = browser.cookie
    browser.ask(port, "POST", "/logout")
    browser.cookie = kept
    assert browser.ask(port + 1, "POST", "/pay")[0] == 401
    assert Browser().ask(port + 1, "POST", "/pay")[0] == 401
