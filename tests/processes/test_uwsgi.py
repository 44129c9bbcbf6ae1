"""Sessions under a real uWSGI, which forks its workers in C, so that Python runs no fork hooks."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.gunicorn import ROOT, THREADS, Answer, Stream, in_parallel
from tests.harness.marks import long
from tests.harness.uwsgi import Uwsgi

WORKERS = 2
MOST_ROUNDS = 20
STORES = ["sqlite", "redis", "mongodb"]


def documented() -> str:
    """The configuration that docs/how-to/deployment.md recommends."""
    page = (ROOT / "docs" / "how-to" / "deployment.md").read_text()
    block = re.search(r"^```ini\n(\[uwsgi\]\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert block, "the page has no configuration of uWSGI"
    return block[1]


PREFORKED = (
    f"[uwsgi]\nmodule = wsgi:app\nmaster = true\nprocesses = {WORKERS}\ndie-on-term = true\n"
)
CONFIGURATIONS = {
    "documented": documented(),
    "lazy": f"{PREFORKED}lazy-apps = true\n",
    "threads": f"{PREFORKED}enable-threads = true\nthreads = 4\n",
    "plain": PREFORKED,
}


class Setup(NamedTuple):
    """One way to run uWSGI."""

    store: str
    configuration: str

    def __str__(self) -> str:
        return f"{self.store}-{self.configuration}"


SETUPS = [Setup(store, name) for store in STORES for name in CONFIGURATIONS]
SHORT = {"documented": STORES, "lazy": ["redis"], "threads": ["sqlite"], "plain": ["mongodb"]}
RARE = [setup for setup in SETUPS if setup.store not in SHORT[setup.configuration]]


@pytest.fixture(params=long(SETUPS, RARE), ids=str)
def server(request: pytest.FixtureRequest, tmp_path: Path, store_prefix: str) -> Iterator[Uwsgi]:
    """A server whose application logs somebody in while it is loaded."""
    setup: Setup = request.param
    environment = {
        "WORKERS_STORE": request.getfixturevalue(f"{setup.store}_url"),
        "WORKERS_PREFIX": store_prefix,
        "WORKERS_WARM": "yes",
    }
    with Uwsgi(tmp_path, CONFIGURATIONS[setup.configuration], environment) as uwsgi:
        yield uwsgi


def test_workers_share_sessions_and_no_connection(server: Uwsgi) -> None:
    """Sessions from before the fork, and new ones. No visitor gets another's answer."""
    early = server.get("/warm-cookie").body["cookie"]
    shared = server.log_in("shared")
    each = 8

    def work(thread: int) -> list[Answer]:
        mine = server.log_in(f"visitor-{thread}")
        answers = []
        for _ in range(each):
            answers += [server.get("/whoami", early), server.post("/count", shared)]
            answers.append(server.post("/count-locked", shared))
            found = server.get("/whoami", mine)
            assert found.body["user"] == f"visitor-{thread}"
        return answers

    answers: list[Answer] = []
    rounds = 0
    while len({answer.worker for answer in answers}) < 2 and rounds < MOST_ROUNDS:
        rounds += 1  # on a busy machine, one worker may have done all before the other woke up
        answers += chain(*in_parallel(*(lambda t=t: work(t) for t in range(THREADS))))
    users = {answer.body["user"] for answer in answers if "user" in answer.body}
    assert users == {"early"}
    assert server.get("/all", shared).body == {
        "user": "shared",
        "count": rounds * THREADS * each,
        "locked": rounds * THREADS * each,
    }
    assert len({answer.worker for answer in answers}) > 1
    listen(server, shared)
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
    assert "(HTTP/1.1 503)" not in server.log, server.log


def listen(server: Uwsgi, cookie: str) -> None:
    """Pages get a stream, or poll."""
    state = server.get("/live/state", cookie).body
    threads = re.search("^threads = [2-9]", server.configuration, re.MULTILINE) is not None
    assert state["stream"] == threads
    with Stream(server.port, cookie) as stream:
        assert stream.response.status == (200 if threads else 501)
        if threads:
            first = stream.state()
            server.post("/count", cookie)
            assert stream.state() != first
    assert server.post("/count", cookie)
    assert server.get("/live/state", cookie).body["keys"] != state["keys"]
