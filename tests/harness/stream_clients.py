"""Clients of live streams in a process of their own, which a test may kill.

`python -m tests.harness.stream_clients PORT COOKIE...` opens a stream for each cookie, prints
`ready` once all have their first state, and reads nothing more. With `deaf` as the first cookie it
doesn't even read that.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryFile
from typing import Any, Self

from tests.harness.gunicorn import DEADLINE, ROOT, Gunicorn

DEAF = "deaf"


class StreamClients:
    """Such a process, as `stream_clients` starts it."""

    def __init__(self, port: int, cookies: Iterable[str], *, deaf: bool = False) -> None:
        arguments = [str(port), *([DEAF] if deaf else []), *cookies]
        self._command = [sys.executable, "-m", "tests.harness.stream_clients", *arguments]

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._errors = opened.enter_context(TemporaryFile())
            self._process = opened.enter_context(
                subprocess.Popen(
                    self._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._errors
                )
            )
            opened.callback(self.kill)  # first of all
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def wait(self) -> None:
        """Return when all have their streams. Raises `AssertionError` with the process's errors."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() == b"ready\n":
            return
        self.kill()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        raise AssertionError(f"not all clients have got a stream. Their errors:\n{errors}")

    def kill(self) -> None:
        """End it with SIGKILL: it says no goodbye, the system closes its sockets."""
        self._process.kill()
        self._process.wait()


@contextmanager
def stream_clients(
    server: Gunicorn, *groups: Iterable[str], deaf: bool = False
) -> Iterator[list[StreamClients]]:
    """A process for the cookies of each group. They start in parallel, and all have their streams.

    None is left at the end, also not of those that started beside one that failed.
    """
    with ExitStack() as opened:
        clients = [
            opened.enter_context(StreamClients(server.port, group, deaf=deaf)) for group in groups
        ]
        try:
            for each in clients:
                each.wait()
        except AssertionError as error:
            raise AssertionError(
                f"{error}\nThe end of the server's log:\n{server.log[-4000:]}"
            ) from None
        yield clients


def open_stream(
    port: int, cookie: str, *, buffer: int | None = None, after: str = ""
) -> socket.socket:
    """A stream whose answer nobody has read.

    ``buffer``: bytes that the system receives for it. ``after``: the last event that came before.
    """
    last = f"Last-Event-ID: {after}\r\n" if after else ""
    head = f"GET /live/stream HTTP/1.1\r\nHost: localhost\r\nCookie: session={cookie}\r\n"
    client = socket.socket()
    try:
        if buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(DEADLINE)
        client.connect(("127.0.0.1", port))
        client.sendall(f"{head}{last}\r\n".encode())
    except OSError:
        client.close()
        raise
    return client


class Page:
    """A page that keeps a stream as a browser does. A context manager."""

    def __init__(self, port: int, cookie: str) -> None:
        self._port, self._cookie = port, cookie
        #: the last state, the ids of the messages, and their contents from `live_app`
        self.state: dict[str, Any] = {}
        self.ids: list[int] = []
        self.numbers: list[int] = []
        #: how many streams it had; answers without a stream
        self.opened = 0
        self.refused: list[int] = []
        self._last = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(DEADLINE)

    def _run(self) -> None:
        while not self._closed.wait(0.2 if self.opened or self.refused else 0):
            with (
                suppress(OSError),
                open_stream(self._port, self._cookie, after=self._last) as stream,
            ):
                self._follow(stream)
            if self.state.get("who", "") is None:
                return

    def _follow(self, stream: socket.socket) -> None:
        stream.settimeout(0.2)
        received, kind = b"", b""
        while not self._closed.is_set():
            try:
                piece = stream.recv(65_536)
            except TimeoutError:
                continue
            if not piece:
                return
            *lines, received = (received + piece).split(b"\n")
            for line in lines:
                name, _, value = line.rstrip(b"\r").partition(b" ")
                if name == b"HTTP/1.1" and value.startswith(b"200"):
                    self.opened += 1
                elif name == b"HTTP/1.1":
                    self.refused.append(int(value[:3]))
                    return
                elif name == b"event:":
                    kind = value
                elif name == b"id:":
                    self._last = value.decode()
                elif name == b"data:" and kind == b"state":
                    self.state = json.loads(value)
                elif name == b"data:":
                    message = json.loads(value)
                    self.ids.append(message["id"])
                    self.numbers.append(message["data"]["number"])
                elif name == b"0":  # the last chunk
                    return


def _main(port: int, cookies: list[str]) -> None:
    deaf = cookies[0] == DEAF
    buffer = 4096 if deaf else None
    streams = [open_stream(port, cookie, buffer=buffer) for cookie in cookies[deaf:]]
    for stream in [] if deaf else streams:
        received = b""
        while b"event: state" not in received:
            piece = stream.recv(65_536)
            assert piece, received
            received += piece
    print("ready", flush=True)
    time.sleep(10 * DEADLINE)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
