"""Gunicorn with the application under test on a loopback port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.faults.control import Control

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 60.0  # seconds until all workers are up
STOP_TIMEOUT = 60.0

State = dict[str, int | None]

CONFIGURATION = """
control_socket_disable = True  # newer versions put one into the user's home

def post_worker_init(worker):
    from tests.faults.app import watch
    watch(worker.app.callable)
    with open({ready!r}, "a") as ready:
        ready.write(f"{{worker.pid}}\\n")
"""


class Workers:
    """A gunicorn with threads. A context manager.

    :param folder: for its files; made for it alone.
    :param environment: the settings of `tests.faults.app`, except the folder.
    :param prefix: of the command line: a program that runs gunicorn.
    """

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        *,
        workers: int,
        threads: int,
        preload: bool = False,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.control = Control(folder / "control")
        self.port = 0
        self.threads = threads
        self._count = workers
        self._ready = folder / "ready"
        self._log = folder / "gunicorn.log"
        (folder / "gunicorn.conf.py").write_text(CONFIGURATION.format(ready=str(self._ready)))
        self._command = [
            *prefix,
            *(sys.executable, "-m", "gunicorn", "--config", f"{folder}/gunicorn.conf.py"),
            *("--chdir", str(ROOT), "--workers", str(workers), "--threads", str(threads)),
            *("--worker-class", "gthread", "--worker-tmp-dir", str(folder)),
            *("--timeout", "120", "--graceful-timeout", "10", *(["--preload"] * preload)),
        ]
        self._environment = {
            **os.environ,
            **environment,
            "FAULTS_FOLDER": str(folder),
            "PYTHONPATH": str(ROOT),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # Gunicorn gets a socket that listens already: nobody can take the port in between.
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            self.port = listener.getsockname()[1]
            bind = ("--bind", f"fd://{listener.fileno()}", "tests.faults.app:create_app()")
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._command, *bind],
                    env=self._environment,
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        try:
            self._wait(lambda: len(self._started()) >= self._count)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    @property
    def pid(self) -> int:
        """The id of the process that the command line started."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """The output of gunicorn and the application so far."""
        return self._log.read_text(errors="replace")

    def alive(self) -> list[int]:
        """The workers that are ready, and have not ended."""
        return [pid for pid in self._started() if _is_alive(pid)]

    def kill_worker(self, pid: int) -> None:
        """End a worker as a crash does, and wait for its successor."""
        before = len(self._started())
        os.kill(pid, signal.SIGKILL)
        self._wait(lambda: len(self._started()) > before)

    def states(self) -> dict[int, State]:
        """The threads, sockets, files and pool slots of each worker."""
        number = self.control["report"] + 1
        self.control["report"] = number
        reports = {pid: self.folder / f"report-{pid}-{number:.0f}" for pid in self.alive()}
        self._wait(lambda: all(path.exists() or not _is_alive(p) for p, path in reports.items()))
        return {pid: json.loads(path.read_text()) for pid, path in reports.items() if path.exists()}

    def stop(self) -> bool:
        """Ask gunicorn to end; whether it did by itself."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _started(self) -> list[int]:
        return [int(x) for x in self._ready.read_text().split()] if self._ready.exists() else []

    def _wait(self, done: Callable[[], bool]) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while not done():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"gunicorn did not get there. Its log:\n{self.log[-1500:]}")
            time.sleep(0.02)

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
