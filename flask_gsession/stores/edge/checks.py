"""Doctor checks for an edge: its own file and queue, then the store at the centre."""

from __future__ import annotations

from ...errors import StoreUnavailable
from ..base import Store
from ..parts import Checks, EdgeFigures, Finding, parts_of
from ..sqlite.health import SQLiteChecks
from .copy import Copy
from .waiting import Waiting

#: A key that no session has, and under which the centre stores nothing.
PROBE = "flask-gsession-edge-probe".ljust(43, "-")
_LATE = 3600  # seconds that a change may wait before we warn


class EdgeChecks(Checks):
    """The part ``checks`` of an edge store."""

    def __init__(self, copy: Copy, waiting: Waiting, centre: Store) -> None:
        self._waiting = waiting
        self._centre = centre
        self._file = SQLiteChecks(copy.file)

    def check(self) -> list[Finding]:
        found = [finding._replace(check=f"edge: {finding.check}") for finding in self._file.check()]
        figures = self._waiting.figures()
        found.append(_queue(figures))
        centre, reached = self._check_centre()
        if figures.trouble and reached:  # otherwise the trouble is the same
            found.append(
                Finding(
                    "error",
                    "edge: settling",
                    figures.trouble,
                    "The waiting changes are kept. Fix this, then run flask gsession edge sync.",
                )
            )
        return found + centre

    def _check_centre(self) -> tuple[list[Finding], bool]:
        """The findings, and whether the centre can be reached."""
        try:
            self._centre.load(PROBE)
            checks = parts_of(self._centre).checks
            return [
                finding._replace(check=f"centre: {finding.check}")
                for finding in ([] if checks is None else checks.check())
            ], True
        except StoreUnavailable as error:
            unreached = Finding(
                "error",
                "centre",
                f"it can't be reached: {error.detail}",
                "The edge serves each copy until offline_for after its last confirmation.",
            )
            return [unreached], False


def _queue(figures: EdgeFigures) -> Finding:
    waiting = f"{figures.ends} ends and {figures.changes} changed sessions wait for the centre"
    if figures.lag > _LATE:
        hours = figures.lag / 3600
        return Finding(
            "warning",
            "edge: queue",
            f"{waiting}, for up to {hours:.1f} hours",
            "If a session's idle timeout passes at the centre before that, these changes are lost.",
        )
    return Finding("ok", "edge: queue", waiting)
