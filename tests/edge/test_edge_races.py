"""An edge's thread and link at an interrupt, or beside another thread."""

from __future__ import annotations

from threading import Thread

import pytest

from flask_gsession.errors import CutOff, StoreUnavailable
from flask_gsession.stores.edge import worker
from flask_gsession.stores.edge.link import Link
from tests.harness.interleaving import before_line


class Interrupt(BaseException):
    """Raised by a signal handler."""


def test_an_edge_whose_thread_was_interrupted_at_its_start_starts_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def strike(_: Thread) -> None:
        raise Interrupt

    monkeypatch.setattr(worker, "is_at_work", lambda: True)
    edge = worker.Worker(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(worker.threading.Thread, "start", strike)
        with pytest.raises(Interrupt):
            edge.start(bool, bool, bool)
    assert edge.lacks_thread


def test_a_link_that_is_restored_during_a_call_still_gives_its_reason() -> None:
    link = Link()
    link.mark_cut(StoreUnavailable("lost"))
    with (
        before_line(Link.call, "raise CutOff(", link.mark_restored),
        pytest.raises(CutOff, match="lost"),
    ):
        link.call("load", bool)
