"""gRPC servers of sessions for tests, in this process and in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from flask_gsession.events import Events
from flask_gsession.sharing.grants import FULL_ACCESS, Grants, GrantsFile
from flask_gsession.sharing.server import Server, Service
from flask_gsession.sharing.store_service import StoreService
from flask_gsession.stores import Store

ROOT = Path(__file__).parents[2]
START = 30.0  # seconds until the command serves, or has ended


@contextmanager
def serving(
    *services: Service,
    grants: Grants | GrantsFile = FULL_ACCESS,
    events: Events | None = None,
    threads: int = 8,
) -> Iterator[str]:
    """Serve on a free loopback port; gives HOST:PORT."""
    server = Server(list(services), grants, events or Events(), threads)
    port = server.listen("127.0.0.1:0", None)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop().wait()


@contextmanager
def store_servers() -> Iterator[Callable[[Store], str]]:
    """Gives a function that serves a store and returns its `grpc://` URL."""
    servers: list[Server] = []

    def serve(store: Store) -> str:
        server = Server([StoreService(store)], FULL_ACCESS, Events(), 16)
        port = server.listen("127.0.0.1:0", None)
        server.start()
        servers.append(server)
        return f"grpc://127.0.0.1:{port}"

    try:
        yield serve
    finally:
        for ended in [server.stop() for server in servers]:
            ended.wait()


class ServeCommand:
    """A `flask gsession serve` in a process of its own. A context manager.

    :param folder: for its files; made for it alone.
    :param settings: `SESSION_*` of its application, as text.
    :param options: of the command; without an address it listens on a Unix socket.
    """

    def __init__(self, folder: Path, settings: dict[str, str], *options: str) -> None:
        folder.mkdir(exist_ok=True)
        self.socket = folder / "grpc.sock"
        self._log = folder / "serve.log"
        if "--grpc" not in options:
            options = ("--grpc", f"unix:{self.socket}", *options)
        self._command = [
            *(sys.executable, "-m", "flask", "--app", "tests.harness.served_app"),
            *("gsession", "serve", *options),
        ]
        given = {f"FLASK_{name}": value for name, value in settings.items()}
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **given}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"grpc://{self.socket}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Return when it serves; again, where it was killed."""
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START
        while "Serving on" not in self.log:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"it does not serve. Its log:\n{self.log}")
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send a signal; after SIGSTOP, wait until the process has stopped."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def stop(self) -> int:
        """Ask it to end, and return its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(START)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
