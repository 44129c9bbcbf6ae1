"""The versions of redis-py that work, and the errors for the others."""

import re
import socket

import pytest
from redis import Redis

from flask_gsession.errors import SettingError
from flask_gsession.stores.redis import driver
from flask_gsession.stores.redis.client_pool import ClientPool


@pytest.mark.parametrize("version", ["5.0.0", "5.3.1", "6.4.0", "8.0.1", "8.1.0", "9.0.0rc1"])
def test_a_version_that_works_is_taken(version: str) -> None:
    driver.check_version(version)


@pytest.mark.parametrize("version", ["3.5.3", "4.6.0", "8.0.0"])
def test_a_version_that_does_not_work_is_refused(version: str) -> None:
    message = f"redis-py {re.escape(version)} doesn't work.*5.0 or newer.*8.0.0.*pip install"
    with pytest.raises(SettingError, match=message):
        driver.check_version(version)


def test_a_client_whose_answers_would_be_mixed_up_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before 3.2, hiredis can't distinguish messages that the server pushes from answers."""
    clients = {
        protocol: Redis.from_url("redis://localhost", protocol=protocol) for protocol in (2, 3)
    }
    for client in clients.values():
        ClientPool(client)
    monkeypatch.setattr(driver, "PUSHED", ())
    ClientPool(clients[2])
    with pytest.raises(SettingError, match=r"protocol=3.*install hiredis 3.2 or newer"):
        ClientPool(clients[3])


def test_errors_about_a_topology_are_known_in_every_version() -> None:
    moved = driver.as_driver_error(driver.ResponseError("MOVED 3999 127.0.0.1:6381"))
    assert (type(moved).__name__, moved.slot_id, moved.port) == ("MovedError", 3999, 6381)
    refusal = driver.ResponseError("WRONGTYPE Operation against a key")
    assert driver.as_driver_error(refusal) is refusal
    assert driver.as_driver_error(b"MOVED") == b"MOVED"


class Connection:
    def __init__(self) -> None:
        self._sock, self.server = socket.socketpair()


@pytest.mark.parametrize("poll", [True, False], ids=["poll", "select"])
def test_a_connection_that_is_closed_or_unread_is_seen(
    poll: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not poll:
        monkeypatch.delattr("select.poll")
    connection = Connection()
    with connection._sock, connection.server:
        assert not driver.is_closed_or_unread(connection)
        connection.server.sendall(b"+OK\r\n")
        assert driver.is_closed_or_unread(connection)
        connection._sock.recv(100)
        assert not driver.is_closed_or_unread(connection)
        connection.server.close()
        assert driver.is_closed_or_unread(connection)
