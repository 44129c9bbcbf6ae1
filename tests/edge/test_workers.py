"""Several real workers of a node, whose TCP connections to the centre are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from tests.harness.apps import until
from tests.harness.gunicorn import GEVENT, GTHREAD, Gunicorn, in_parallel
from tests.harness.marks import long
from tests.harness.topologies import TCPProxy
from tests.harness.uwsgi import Uwsgi

APP = "tests.edge.edge_app:create_app()"
WORKERS = 3
VISITORS = 6


def node(folder: Path, server: str, environment: dict[str, str]) -> Gunicorn:
    """A server with the workers of a node."""
    if server.startswith("uwsgi"):
        threads = "enable-threads = true\n" * (server == "uwsgi")
        return Uwsgi(
            folder,
            f"[uwsgi]\nmodule = wsgi:app\nmaster = true\nprocesses = {WORKERS}\n{threads}",
            environment,
            app="tests.edge.edge_app",
        )
    options = {"gthread": GTHREAD, "gevent": GEVENT}[server]
    return Gunicorn(folder, *options, workers=WORKERS, environment=environment, app=APP)


SERVERS = ["gthread", "gevent", "uwsgi", "uwsgi without threads"]


@pytest.mark.parametrize("server", long(SERVERS, SERVERS[1:]))
@pytest.mark.parametrize("kind", long(["redis", "mongodb"], ["mongodb"]))
def test_workers_of_a_node_keep_working_and_settle(
    kind: str, server: str, request: pytest.FixtureRequest, store_prefix: str, tmp_path: Path
) -> None:
    url = request.getfixturevalue("redis_url" if kind == "redis" else "emptied_mongodb_url")
    (tmp_path / "centre").mkdir()
    (tmp_path / "edge").mkdir()
    with TCPProxy(urlsplit(url).port or 0) as line:
        remote = quote(line.through(url), safe="")
        stores = {
            "centre": url,
            "edge": f"edge+sqlite:///edge.sqlite3?remote={remote}&offline_for=1h",
        }
        environments = {
            name: {
                "WORKERS_STORE": store,
                "WORKERS_PREFIX": store_prefix,
                "WORKERS_TIMEOUT": "2",
            }
            for name, store in stores.items()
        }
        centre = Gunicorn(
            tmp_path / "centre",
            *("--threads", "2"),
            workers=1,
            environment=environments["centre"],
            app=APP,
        )
        edge = node(tmp_path / "edge", server, environments["edge"])
        with centre, edge:
            cookies = [edge.post("/count").cookie or "" for _ in range(VISITORS)]
            counts = dict.fromkeys(cookies, 1)
            line.refuse()

            def post(path: str, cookie: str | None = None) -> str:
                """Each worker may refuse one write: the one that it learns of the cut by."""
                answer = edge.ask("POST", path, cookie)
                while answer.status == 503:
                    answer = edge.ask("POST", path, cookie)
                assert answer.status == 200
                return answer.cookie or ""

            for _ in range(4):
                in_parallel(*(lambda cookie=cookie: post("/count", cookie) for cookie in cookies))
            for cookie in cookies:
                counts[cookie] += 4
                assert edge.get("/all", cookie).body == {"count": counts[cookie]}
                centre.post("/count", cookie)
                counts[cookie] += 1
            made = post("/count")
            counts[made] = 1
            post("/logout", cookies[0])
            centre.post("/logout", cookies[1])
            for _ in range(2 * WORKERS):
                assert edge.get("/all", cookies[0]).body == {}
            line.forward()
            until(lambda: _is_settled(edge))
            for cookie in cookies[:2]:
                del counts[cookie]
                assert centre.get("/all", cookie).body == edge.get("/all", cookie).body == {}
            for cookie, count in counts.items():
                assert centre.get("/all", cookie).body == {"count": count}
                for _ in range(WORKERS):
                    assert edge.get("/all", cookie).body == {"count": count}
            assert edge.get("/edge").body["dropped"] == 1
            assert "Traceback" not in edge.log


def _is_settled(edge: Any) -> bool:
    """Whether each worker says so: one that is still cut off refuses what it has no copy of."""
    found: dict[int, Any] = {}
    for _ in range(20 * WORKERS):
        answer = edge.get("/edge")
        found[answer.worker] = answer.body
        if len(found) == WORKERS:
            break
    waits = [each["changes"] or each["ends"] or each["cut_off"] for each in found.values()]
    return len(waits) == WORKERS and not any(waits)
