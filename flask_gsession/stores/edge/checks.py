"""Doctor checks for an edge: its own file and queue, then the store at the centre."""

from __future__ import annotations

from ...errors import StoreUnavailable
from ..parts import Checks, EdgeFigures, Finding
from ..sqlite.health import SQLiteChecks
from .copy import Copy
from .link import Link

_LATE = 3600  # seconds that a change may wait


class EdgeChecks(Checks):
    """The part ``checks`` of an edge store."""

    def __init__(self, copy: Copy, link: Link, centre: Checks | None) -> None:
        self._copy = copy
        self._link = link
        self._centre = centre
        self._file = SQLiteChecks(copy.file)

    def check(self) -> list[Finding]:
        found = [finding._replace(check=f"edge: {finding.check}") for finding in self._file.check()]
        figures = self._copy.figures()
        found.append(_queue(figures))
        if figures.trouble:
            found.append(
                Finding(
                    "error",
                    "edge: settling",
                    figures.trouble,
                    "The waiting changes are kept. Repair this, then run flask gsession edge sync.",
                )
            )
        if self._centre is not None:
            try:
                found += [
                    finding._replace(check=f"centre: {finding.check}")
                    for finding in self._centre.check()
                ]
            except StoreUnavailable as error:
                found.append(
                    Finding(
                        "error",
                        "centre",
                        f"it can't be reached: {error.detail}",
                        "The edge serves its copies, for offline_for after they were confirmed.",
                    )
                )
        return found


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
