"""The administrator's command, run in this process or in one that a test starts.

Such a process imports this file and the command's modules, but nothing of pytest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import Result
from flask import Flask

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.events import SessionDestroyed
from flask_gsession.stores import Store

ROOT = Path(__file__).parents[2]


class Console:
    """An administrator of an application on the store of a site, or on one given."""

    def __init__(self, store: Store | str, **settings: Any) -> None:
        self.app = Flask(__name__)
        self.app.secret_key = "a key for tests"
        self.ext = Session(self.app, store=store, **settings)
        self.events: list[str] = []
        self.ext.on(SessionDestroyed, lambda event: self.events.append(event.handle))

    def run(self, *words: str, **options: Any) -> Result:
        """The result of `flask gsession` with these words."""
        return self.app.test_cli_runner().invoke(gsession, list(words), **options)

    def done(self, *words: str, **options: Any) -> str:
        """The output of a command that must succeed."""
        result = self.run(*words, **options)
        assert result.exit_code == 0, result.output
        return result.stdout

    def failed(self, *words: str, status: int = 1, **options: Any) -> str:
        """The error message of a command that must fail."""
        result = self.run(*words, **options)
        assert result.exit_code == status, result.output
        assert not isinstance(result.exception, Exception) or result.exception is None
        return result.stderr


SLOW = """
import signal, sys, time
from flask_gsession.cli import gsession
from flask_gsession.stores import StoreOptions, open_store
from tests.harness.console import Console

url, prefix, operation, calls = sys.argv[1:5]
del sys.argv[1:5]
store = open_store(url, StoreOptions(prefix, timeout=10))[0]
asked = store.upkeep if operation == "tidy" else store
call, left = getattr(asked, operation), int(calls)

def slow(*arguments, **options):
    global left
    if not left:
        print("there", flush=True)
        while True:  # until it is struck; one long sleep would miss what strikes just before it
            time.sleep(0.05)
    left -= 1
    return call(*arguments, **options)

setattr(asked, operation, slow)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
with Console(store).app.app_context():
    gsession()
"""


def struck(
    url: str, prefix: str, how: signal.Signals, operation: str, calls: int, *words: str
) -> str:
    """The output of `flask gsession` with these words in a process that gets a signal.

    That is after so many calls of an operation of the store.
    """
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, url, prefix, operation, str(calls), *words],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(how)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == (130 if how is signal.SIGINT else -how)
    return complaint
