"""Several processes whose sessions are behind one `flask gsession serve`: G3, G4 and G8 by gRPC."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.gunicorn import GEVENT, GTHREAD, Gunicorn
from tests.harness.servers import mongo_server, redis_server, with_database
from tests.harness.sharing import ServeCommand
from tests.harness.uwsgi import Uwsgi
from tests.processes.test_uwsgi import CONFIGURATIONS
from tests.processes.test_uwsgi import test_workers_share_sessions_and_no_connection as share
from tests.processes.test_workers import (
    PRELOADED,
    Setup,
    forget,
    must_stop_cleanly,
    test_a_counter_under_a_lock_counts_every_request,
    test_a_logout_in_the_middle_of_writes_is_the_end,
    test_an_answer_is_always_about_the_owner_of_its_cookie,
    test_an_atomic_counter_counts_every_request,
    test_keys_written_in_parallel_all_survive,
)
from tests.processes.test_workers import (
    test_a_session_from_before_the_fork_is_everywhere as preloaded,
)

__all__ = [
    "test_a_counter_under_a_lock_counts_every_request",
    "test_a_logout_in_the_middle_of_writes_is_the_end",
    "test_an_answer_is_always_about_the_owner_of_its_cookie",
    "test_an_atomic_counter_counts_every_request",
    "test_keys_written_in_parallel_all_survive",
]

SETUPS = [
    Setup("redis", 2, GTHREAD),
    Setup("sqlite", 2, GEVENT),
    Setup("mongodb", 2, ("--preload",), warm=True),
]
assert PRELOADED


def url_of(store: str, folder: Path, name: str) -> str:
    if store == "sqlite":
        return f"sqlite:///{folder}/sessions.sqlite3"
    return (
        redis_server().url
        if store == "redis"
        else with_database(mongo_server().url, f"test_{name}")
    )


@pytest.fixture(scope="module", params=SETUPS, ids=str)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gunicorn]:
    """A gunicorn of each setup in turn, in front of a server of sessions."""
    setup: Setup = request.param
    folder, name = tmp_path_factory.mktemp("gunicorn"), secrets.token_hex(6)
    settings = {
        "SESSION_STORE": url_of(setup.store, folder, name),
        "SESSION_KEY_PREFIX": f"test-{name}:",
    }
    try:
        with ServeCommand(folder / "serve", settings) as far:
            environment = {"WORKERS_PREFIX": "ignored:", "WORKERS_STORE": far.url}
            if setup.warm:
                environment["WORKERS_WARM"] = "yes"
            with Gunicorn(
                folder, *setup.options, workers=setup.workers, environment=environment
            ) as gunicorn:
                yield gunicorn
                if setup.warm:
                    preloaded(gunicorn)
                must_stop_cleanly(gunicorn)
            assert far.stop() == 0
            assert "Traceback" not in far.log, far.log
    finally:
        forget(setup.store, name)


@pytest.mark.parametrize(
    ("store", "configuration", "near"),
    [
        pytest.param("sqlite", "plain", "0", id="plain"),
        pytest.param("redis", "documented", "0.5", id="near", marks=pytest.mark.long),
    ],
)
def test_workers_of_uwsgi_share_sessions(
    store: str, configuration: str, near: str, tmp_path: Path, store_prefix: str
) -> None:
    """They are forked in C after the application has used a session."""
    settings = {
        "SESSION_STORE": url_of(store, tmp_path, ""),
        "SESSION_KEY_PREFIX": store_prefix,
    }
    with ServeCommand(tmp_path / "serve", settings) as far:
        environment = {
            "WORKERS_PREFIX": "ignored:",
            "WORKERS_STORE": far.url,
            "WORKERS_WARM": "yes",
            "WORKERS_NEAR": near,
        }
        with Uwsgi(tmp_path, CONFIGURATIONS[configuration], environment) as server:
            share(server)
