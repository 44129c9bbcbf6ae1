"""A gunicorn of a test: started on a free loopback port, asked, reloaded and ended."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0  # seconds until gunicorn is up, an answer is there, or gunicorn is down
THREADS = 4

CONFIGURATION = """
control_socket_disable = True  # newer versions put one into the user's home

def post_worker_init(worker):
    with open({path!r}, "a") as ready:
        ready.write(f"{{worker.pid}}\\n")
"""
GTHREAD = ("--worker-class", "gthread", "--threads", "4")
GEVENT = ("--worker-class", "gevent")


class Answer(NamedTuple):
    """A response. `cookie`: the one that it sets or deletes, or None."""

    status: int
    body: dict[str, Any]
    cookie: str | None
    worker: int


class Gunicorn:
    """A gunicorn that serves tests/harness/workers_app.py on a loopback port. A context manager.

    :param folder: for its files; made for it alone. :param options: of gunicorn's command line.
    :param workers: how many. :param environment: the variables for tests/harness/workers_app.py;
    the instance folder is added. :param app: another application than that one. :param
    configuration: more for gunicorn's configuration file.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        workers: int,
        environment: dict[str, str],
        app: str = "tests.harness.workers_app:create_app()",
        configuration: str = "",
    ) -> None:
        self.workers = workers
        self._app = app
        self.instance = folder / "instance"
        self._ready = folder / "ready"
        self._log = folder / "gunicorn.log"
        config = folder / "gunicorn.conf.py"
        config.write_text(CONFIGURATION.format(path=str(self._ready)) + configuration)
        self._command = [
            *(sys.executable, "-m", "gunicorn", "--config", str(config)),
            *("--chdir", str(ROOT), "--workers", str(workers), "--graceful-timeout", "30"),
            *("--timeout", "120", "--worker-tmp-dir", str(folder), *options),
        ]
        self._environment = {
            **os.environ,
            **environment,
            "WORKERS_INSTANCE": str(self.instance),
            "PYTHONPATH": str(ROOT),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        # Gunicorn gets a socket that listens already: nobody can take the port in between.
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
            self.port = listener.getsockname()[1]
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._command, *self._listen_at(f"fd://{listener.fileno()}")],
                    env=self._environment,
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        try:
            self.wait_for_workers(self.workers)
        except BaseException:
            self._kill()
            raise
        return self

    def _listen_at(self, socket: str) -> list[str]:
        return ["--bind", socket, self._app]

    def __exit__(self, *_: object) -> None:
        self._kill()

    @property
    def log(self) -> str:
        """The output of gunicorn and the application so far."""
        return self._log.read_text(errors="replace")

    def pids(self) -> list[int]:
        """The workers that were ever ready."""
        return [int(line) for line in self._ready.read_text().split()]

    def wait_for_workers(self, count: int) -> None:
        """Return when `count` workers in all have been ready since the start."""
        self._wait(lambda: self._ready.exists() and len(self.pids()) >= count)

    def reload(self) -> None:
        """Replace all workers by new ones, as after a deployment; return when that is done."""
        assert self._process is not None
        before = self.pids()
        self._process.send_signal(signal.SIGHUP)
        self.wait_for_workers(len(before) + self.workers)
        self._wait(lambda: not any(is_alive(pid) for pid in before))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask gunicorn to end by this signal, wait for it, and return its exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(DEADLINE)

    def _wait(self, done: Callable[[], bool]) -> None:
        assert self._process is not None
        deadline = time.monotonic() + DEADLINE
        while not done():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"gunicorn did not get there. Its log:\n{self.log}")
            time.sleep(0.02)

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def ask(self, method: str, path: str, cookie: str | None = None) -> Answer:
        """One request, on a connection of its own: any worker may take it."""
        headers = {"Connection": "close"}
        if cookie is not None:
            headers["Cookie"] = f"session={cookie}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with closing(connection):
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            text = response.read()
        morsel = SimpleCookie(response.headers.get("Set-Cookie", "")).get("session")
        return Answer(
            response.status,
            json.loads(text) if response.headers.get_content_subtype() == "json" else {},
            None if morsel is None else morsel.value,
            int(response.headers.get("X-Worker", "0")),
        )

    def post(self, path: str, cookie: str | None = None) -> Answer:
        """A POST that must succeed."""
        answer = self.ask("POST", path, cookie)
        assert answer.status == 200, (answer, self.log)
        return answer

    def get(self, path: str, cookie: str | None = None) -> Answer:
        """A GET that must succeed."""
        answer = self.ask("GET", path, cookie)
        assert answer.status == 200, (answer, self.log)
        return answer

    def log_in(self, user: str) -> str:
        """The cookie of a new session of `user`."""
        cookie = self.post(f"/login/{user}").cookie
        assert cookie
        return cookie


class Stream:
    """A stream of live updates, as a browser opens it. A context manager."""

    def __init__(self, port: int, cookie: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        self._cookie = cookie

    def __enter__(self) -> Self:
        try:
            self._connection.request(
                "GET", "/live/stream", headers={"Cookie": f"session={self._cookie}"}
            )
            self.response = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()
        self._connection.close()

    def state(self) -> dict[str, Any]:
        """The next state."""
        line = b""
        while not line.startswith(b"data: "):
            line = self.response.readline()
            assert line, "the stream ended"
        state: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
        return state


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def in_parallel(*tasks: Callable[[], Any]) -> list[Any]:
    """The results of the tasks, which start at the same moment, each in its own thread."""
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        start.wait(DEADLINE)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [running.result() for running in [pool.submit(run, task) for task in tasks]]
