"""Kills a settling process at its steps: `python -m tests.edge.killed URL PREFIX FOLDER STRIDE`.

Steps are the calls to the centre and the transactions on the node's file, before and after each.
Processes are forked from one that has nothing open, so each takes a moment only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from flask_gsession.stores.sqlite.file import SQLiteFile
from flask_gsession.testing import FakeClock
from tests.edge.story import POLICIES, add, check, go_through
from tests.harness.apps import SiteMaker
from tests.harness.edges import EdgeSite, Network

START = 1_796_000_000.0


class Strike:
    """Kills this process at its step number ``at``."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self, edge: EdgeSite) -> None:
        edge.wire.hook = edge.wire.after = self.step
        within: Callable[..., Any] = SQLiteFile.within

        def stepping(file: SQLiteFile, work: Any, **how: Any) -> Any:
            self.step()
            answer = within(file, work, **how)
            self.step()
            return answer

        SQLiteFile.within = stepping  # type: ignore[method-assign]


def main(url: str, prefix: str, folder: str, stride: str = "1") -> None:
    """Strike at every step, or every so many steps, until the process survives."""
    for number in count(1, int(stride)):
        place = Path(folder, str(number))
        place.mkdir()
        own = f"{prefix}{number}:"

        def sites(later: float, place: Path = place, own: str = own) -> tuple[SiteMaker, Network]:
            maker = SiteMaker(url, own, FakeClock(START + later))
            return maker, Network(maker, place, merge_policies=POLICIES)

        def struck(number: int = number, sites: Any = sites, place: Path = place) -> None:
            maker, network = sites(0)
            with maker, network.edge() as edge:
                cookies = go_through(edge, network.centre)
                (place / "cookies").write_text(json.dumps(cookies))
                edge.back()
                Strike(number).arm(edge)
                edge.settle()

        def replaced(sites: Any = sites, place: Path = place) -> None:
            maker, network = sites(30)  # the lease is over
            cookies = json.loads((place / "cookies").read_text())
            with maker, network.edge() as edge:
                network.centre.visitor(cookies["changed"]).run(add)
                edge.settle()
                if edge.edge.figures().dropped > 1:
                    # It was noted that the session is sent, and then it wasn't.
                    made = cookies.pop("made")
                    assert network.centre.visitor(made).run(dict) == {}
                check(network.centre, cookies, changed=1)
                check(edge, cookies, changed=1)
                figures = edge.edge.figures()
                assert (figures.ends, figures.changes, figures.trouble) == (0, 0, ""), figures

        survived = in_a_process(struck) == 0
        if in_a_process(replaced):
            sys.exit(f"struck at step {number}")
        if survived:
            print(number)
            return


def in_a_process(work: Callable[[], None]) -> int:
    """The exit status of a forked process that does this; minus the number of a signal."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
