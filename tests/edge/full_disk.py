"""A node on a full disk: `python -m tests.edge.full_disk FOLDER`.

FOLDER is a small tmpfs; or an ordinary one, if this machine allows no mounts, whose files then
can't grow.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flask_gsession.testing import FakeClock
from tests.edge.story import POLICIES, add, at, known
from tests.harness.apps import SiteMaker
from tests.harness.edges import EdgeSite, Network


class Disk:
    """The disk of a folder, to be filled up and freed again."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / "filler"
        self._is_small = os.path.ismount(folder)
        self._folder = folder

    def fill(self) -> None:
        if not self._is_small:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            most = max(path.stat().st_size for path in self._folder.iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            return
        with self._filler.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        self._filler.unlink(missing_ok=True)


def main(folder: Path) -> None:
    """Fill the disk while the node is cut off, then while it is connected."""
    disk = Disk(folder)
    with SiteMaker("memory://", "full:", FakeClock()) as make:
        network = Network(make, folder, merge_policies=POLICIES)
        with network.edge() as edge:
            while_cut_off(network, edge, disk)
            while_connected(network, edge, disk)


def while_cut_off(network: Network, edge: EdgeSite, disk: Disk) -> None:
    visitors = [known(edge, n=0, note="x" * 2000) for _ in range(100)]
    leaving = [known(edge) for _ in range(10)]
    edge.cut()
    accepted = [0] * len(visitors)
    for number, visitor in enumerate(visitors[:20]):
        visitor.run(add)
        accepted[number] += 1
    disk.fill()
    refused = 0
    while refused < 20:  # first use up the free space in the file and its log
        for number, visitor in enumerate(visitors):
            status = visitor.ask(lambda session: (add(session), session.update(note=pad(session))))
            assert status.status_code in (200, 503)
            accepted[number] += status.status_code == 200
            refused += status.status_code == 503
    ended = [visitor.ask(lambda session: session.destroy()).status_code for visitor in leaving]
    for number, visitor in enumerate(visitors):
        assert visitor.run(lambda session: session["n"]) == accepted[number]
    edge.back()
    settled = edge.edge.settle()
    assert settled is None or settled.reached, settled
    assert at(network.centre, visitors[0]).run(lambda session: session["n"]) in (0, accepted[0])
    disk.free()
    assert edge.settle().trouble == ""
    for number, visitor in enumerate(visitors):
        for browser in (at(network.centre, visitor), visitor):
            assert browser.run(lambda session: session["n"]) == accepted[number]
    for status, visitor in zip(ended, leaving, strict=True):
        there = at(network.centre, visitor) if visitor.cookie else visitor
        assert there.run(dict) == ({} if status == 200 else {"n": 1})
    print(f"{sum(accepted)} changes accepted, {refused} refused; logouts: {ended}")


def while_connected(network: Network, edge: EdgeSite, disk: Disk) -> None:
    """Its sessions are the centre's, so it only can't copy them."""
    visitor, other = known(edge, n=0), known(edge, n=0)
    disk.fill()
    count = 0
    for size in range(20):
        visitor.run(lambda session, size=size: (add(session), session.update(x="x" * size * 1000)))
        count += 1
    new = edge.visitor()
    new.run(add)
    assert at(network.centre, visitor).run(lambda session: session["n"]) == count
    responses = {other.ask(lambda session: session.destroy()).status_code for _ in range(2)}
    assert responses <= {200, 503}
    rotated = visitor.ask(lambda session: session.rotate())
    assert rotated.status_code in (200, 503)
    assert visitor.run(lambda session: session["n"]) == count
    disk.free()
    edge.cut()
    # No copy is served that lacks a write which was answered: none at all, or the last one.
    copy: Callable[[Any], Any] = lambda session: session["n"]  # noqa: E731
    if visitor.ask(copy).status_code == 200:
        assert visitor.run(copy) == count
    edge.settle()


def pad(session: Any) -> str:
    return str(session["note"]) + "x" * 500


if __name__ == "__main__":
    main(Path(sys.argv[1]))
