"""A uWSGI of a test."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.harness.gunicorn import Gunicorn

UWSGI = Path(sys.executable).with_name("uwsgi")
APP = "tests.harness.workers_app"


class Uwsgi(Gunicorn):
    """As `Gunicorn`, with uWSGI and this configuration, which loads the module ``wsgi``.

    ``app``: the module that makes the application.
    """

    def __init__(
        self, folder: Path, configuration: str, environment: dict[str, str], app: str = APP
    ) -> None:
        found = re.search(r"^processes = (\d+)$", configuration, re.MULTILINE)
        assert found
        super().__init__(folder, workers=int(found[1]), environment=environment)
        self.configuration = configuration
        self._lazy = "lazy-apps" in configuration
        file = folder / "uwsgi.ini"
        file.write_text(configuration)
        (folder / "wsgi.py").write_text(f"from {app} import create_app\n\napp = create_app()\n")
        self._log = folder / "uwsgi.log"
        self._command = [str(UWSGI), "--ini", str(file), "--chdir", str(folder)]

    def _listen_at(self, socket: str) -> list[str]:
        return ["--http-socket", socket]

    def wait_for_workers(self, count: int) -> None:
        """Return when so many workers were forked in all, and have the application."""
        apps = count if self._lazy else 1
        self._wait(
            lambda: (
                self.log.count("spawned uWSGI worker") >= count
                and self.log.count("WSGI app 0 ") >= apps
            )
        )
