"""``flask gsession edge``, the doctor, the metrics and the URL of an edge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from flask import Flask
from prometheus_client import CollectorRegistry

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.errors import SettingError
from flask_gsession.stores.edge import EdgeStore
from tests.edge.story import POLICIES, add
from tests.harness.apps import SiteMaker
from tests.harness.edges import EdgeSite, Network


@pytest.fixture
def edge(tmp_path: Path, store_prefix: str, clock: Any) -> Any:
    with (
        SiteMaker("memory://", store_prefix, clock) as make,
        Network(make, tmp_path, merge_policies=POLICIES).edge() as edge,
    ):
        yield edge


def run(edge: EdgeSite, *arguments: str) -> tuple[int, str]:
    result = edge.app.test_cli_runner().invoke(gsession, arguments)
    return result.exit_code, result.output


def test_status_and_sync(edge: EdgeSite) -> None:
    visitor, other = edge.visitor(), edge.visitor()
    visitor.run(add)
    other.run(add)
    edge.cut()
    visitor.run(add)
    other.run(lambda session: session.destroy())
    edge.clock.advance(60)
    status = json.loads(run(edge, "edge", "status", "--json")[1].partition("\n")[2])
    assert status["centre"] == "can't be reached: the wire is cut"
    assert (status["ends_waiting"], status["changes_waiting"]) == (1, 1)
    code, output = run(edge, "edge", "sync")
    assert code == 1
    assert "the wire is cut" in output
    edge.back()
    code, output = run(edge, "edge", "sync")
    assert code == 0
    assert "Settled 1 ends and 1 changed sessions; 0 were dropped" in output
    assert "settled so far   1\n" in run(edge, "edge", "status")[1]


def test_the_doctor_looks_at_both_ends(edge: EdgeSite) -> None:
    def found() -> dict[str, str]:
        output = run(edge, "doctor", "--json")[1]
        rows = json.loads(output[output.index("[\n") :])
        return {row["check"]: row["severity"] for row in rows}

    checks = found()
    assert checks["edge: integrity"] == checks["edge: queue"] == "ok"
    assert checks["edge: offline_for"] == "ok"
    edge.edge.offline_for = 3601  # the idle timeout is two hours
    assert found()["edge: offline_for"] == "warning"
    visitor = edge.visitor()
    visitor.run(add)
    edge.cut()
    visitor.run(add)
    edge.clock.advance(7200)
    edge.edge.link.mark_restored()  # as another process believes, which tries to settle
    run(edge, "edge", "sync")
    assert edge.edge.figures().trouble
    checks = found()
    assert checks["edge: queue"] == "warning"
    assert checks["centre"] == "error"
    assert "edge: settling" not in checks  # the same trouble


def test_the_metrics_show_waiting_changes(edge: EdgeSite) -> None:
    registry = CollectorRegistry()
    SessionMetrics(edge.app, registry=registry)
    visitor = edge.visitor()
    edge.cut()
    visitor.run(add)
    value = registry.get_sample_value
    assert value("gsession_edge_cut_off", {"session": "session"}) == 1
    assert value("gsession_edge_queue", {"kind": "changes"}) == 1
    assert value("gsession_edge_dropped", {"session": "session"}) == 0


def test_another_store_is_not_an_edge() -> None:
    app = Flask(__name__)
    app.secret_key = "x"
    Session(app, store="memory://")
    result = app.test_cli_runner().invoke(gsession, ["edge", "status"])
    assert result.exit_code == 1
    assert "the store is not an edge" in result.output


def opened(url: str, folder: Path) -> Any:
    app = Flask(__name__, instance_path=str(folder))
    app.secret_key = "x"
    return Session(app, store=url).store(app)


def test_an_edge_url(tmp_path: Path) -> None:
    remote = quote("redis://:pass@localhost:1/0", safe="")
    store = opened(f"edge+sqlite:///e.sqlite3?remote={remote}&offline_for=2h&outbox=7", tmp_path)
    assert isinstance(store, EdgeStore)
    assert store.copy.file.path == tmp_path / "e.sqlite3"
    assert store.near is not None
    assert store.near.bound == 2
    assert type(store.centre).__name__ == "RedisStore"
    store.close()
    plain = opened(f"edge+sqlite:///e.sqlite3?remote={remote}&fresh_for=0", tmp_path)
    assert plain.near is None
    plain.close()


def test_two_sessions_need_an_outbox_each(tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.secret_key = "x"
    url = "edge+sqlite:///e.sqlite3?remote=redis%3A%2F%2Flocalhost%3A1%2F0"
    stores = [
        Session(app, store=url, cookie_name=name, **how).store(app)  # type: ignore[arg-type]
        for name, how in (("one", {}), ("two", {"key_prefix": "two:"}))
    ]
    with pytest.raises(SettingError, match="each would merge the other's changes"):
        Session(app, store=url, cookie_name="three")
    for store in stores:
        store.close()


WRONG = {
    "": "has no remote",
    "?remote=redis": "has no remote",
    "?remote=redis://localhost&db=1": "has the option 'db'",
    "?remote=memory://": "the memory of one process",
    "?remote=edge%2Bsqlite:///x": "an edge",
    "?remote=redis://localhost&offline_for=0": "offline_for='0'",
    "?remote=redis://localhost&offline_for=15min": "offline_for='15min'",
    "?remote=redis://localhost&offline_for=31d": "offline_for='31d'",
    "?remote=redis://localhost&outbox=-1": "outbox='-1'",
    "?remote=redis://localhost&remote=redis://secret": "names an option twice",
    "?remote=nosuch://user:secret@localhost": "the remote of SESSION_STORE is a URL",
}


@pytest.mark.parametrize("query", WRONG)
def test_a_wrong_edge_url_is_refused(query: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as error:
        opened(f"edge+sqlite:///edge.sqlite3{query}", tmp_path)
    assert WRONG[query] in str(error.value)
    assert "secret" not in str(error.value)


def test_an_edge_needs_a_path(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="names no file"):
        opened("edge+sqlite://?remote=redis://localhost", tmp_path)
