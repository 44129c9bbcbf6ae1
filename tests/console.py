"""The administrator's command, run in this process or in one that a test starts.

Such a process imports this file and what the command needs, and nothing that pytest needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import Result
from flask import Flask

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.events import SessionDestroyed
from flask_gsession.stores import Store

ROOT = Path(__file__).parent.parent


class Console:
    """An administrator of an application on the store of a site, or on one given."""

    def __init__(self, store: Store | str, **settings: Any) -> None:
        self.app = Flask(__name__)
        self.app.secret_key = "a key for tests"
        self.ext = Session(self.app, store=store, **settings)
        self.events: list[str] = []
        self.ext.on(SessionDestroyed, lambda event: self.events.append(event.handle))

    def run(self, *words: str, **options: Any) -> Result:
        """What came of `flask gsession` with these words."""
        return self.app.test_cli_runner().invoke(gsession, list(words), **options)

    def done(self, *words: str, **options: Any) -> str:
        """What it printed, and it ended with 0."""
        result = self.run(*words, **options)
        assert result.exit_code == 0, result.output
        return result.stdout

    def failed(self, *words: str, status: int = 1, **options: Any) -> str:
        """What it complained of."""
        result = self.run(*words, **options)
        assert result.exit_code == status, result.output
        assert not isinstance(result.exception, Exception) or result.exception is None
        return result.stderr
