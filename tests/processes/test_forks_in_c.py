"""Forks in C, like uWSGI's, which run no hooks of Python: each process keeps its own state."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EACH = 15

Run = Callable[[str], Any]


@pytest.fixture(params=["sqlite", "redis", "mongodb"])
def url(request: pytest.FixtureRequest) -> str:
    """A `SESSION_STORE` of each kind that several processes can share."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
def log() -> list[str]:
    """The standard error of the processes."""
    return []


@pytest.fixture
def run(url: str, tmp_path: Path, log: list[str]) -> Run:
    """Runs a function of forking_in_c.py, and returns its result."""

    def run(name: str) -> Any:
        folder = tmp_path / "folder"
        folder.mkdir()
        command = [sys.executable, "-W", "ignore", "-m", "tests.processes.forking_in_c"]
        ran = subprocess.run(
            [*command, name, url, str(folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        log.append(ran.stderr)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


def test_processes_work_in_parallel(run: Run, url: str, log: list[str]) -> None:
    """On SQLite, the child refuses and says why, and damages nothing."""
    refuses = url.startswith("sqlite")
    assert run("used_in_a_request") == {
        "parent": [200],
        "children": [503] if refuses else [200],
        "lost": 0,
    }
    if refuses:
        assert "was open when this process was forked" in log[0]
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_use_outside_requests_leaves_nothing_open(run: Run) -> None:
    assert run("used_outside_requests") == {"found": True, "counts": [1, 2, 3]}


@pytest.mark.parametrize("url", ["redis"], indirect=True)
def test_a_store_without_requests_shares_no_connection(run: Run) -> None:
    assert run("a_bare_store") == [True, True]


def test_a_store_that_is_closed_before_the_fork(run: Run) -> None:
    assert run("closed_before") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("url", ["redis"], indirect=True)
def test_each_process_watches_for_itself(run: Run) -> None:
    assert run("live") == [True] * 4


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_another_file_at_the_place_of_one_that_was_open(run: Run) -> None:
    assert run("replaced_file") == [503, {"user": "bob", "count": 1}]


def test_a_fork_in_the_middle_of_a_request(run: Run, url: str) -> None:
    assert run("inside_a_request") == ([3, 1] if url.startswith("sqlite") else [0, 2])


def test_locks_across_the_fork(run: Run) -> None:
    """The child doesn't rely on its parent's thread to extend its locks."""
    assert run("locks") == [["LockMisused", {}, {}], {"user": "alice", "held": True}]


@pytest.mark.parametrize("url", ["redis"], indirect=True)
def test_no_figure_is_lost_or_counted_twice(run: Run) -> None:
    assert run("metrics") == [2 * EACH, True]


@pytest.mark.parametrize("url", ["redis"], indirect=True)
def test_rate_limits_are_counted_together(run: Run) -> None:
    assert run("rate_limits") == [200, 200, 200, 200, 200, 200, 429, 429]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_large_values_in_files(run: Run) -> None:
    assert run("large_values") == [5000, 42, 10000, 42]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_child_has_a_worker_that_cleans_up(run: Run) -> None:
    assert run("cleanup") is True


@pytest.mark.parametrize("url", ["redis"], indirect=True)
def test_a_client_of_the_application(run: Run) -> None:
    assert run("a_client") == [1, 2, 3, 4]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_circuits_of_a_child_are_closed(run: Run) -> None:
    assert run("circuits") == ["loaded", True]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_children_draw_different_pauses(run: Run) -> None:
    assert run("pauses") == 3
