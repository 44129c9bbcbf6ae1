"""Streams, and functions of `on_change`, beside clients and functions that misbehave."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

import pytest

from flask_gsession.live.live import Change
from flask_gsession.live.servers import Connection
from flask_gsession.live.streams import Limits, Slots, TooManyStreams
from tests.harness.apps import SiteMaker, until

DEADLINE = 30  # seconds

of_memory = pytest.mark.parametrize("store_url", ["memory://"])


def test_a_slot_may_be_freed_while_slots_are_counted() -> None:
    """By another thread, or by the finalizer of a stream."""
    slots = Slots()

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            slots.free(first)
            return str(self) == str(other)

    first = slots.take(Limits(Name("ada"), 3, 2))
    slots.take(Limits("bob", 3, 2))
    slots.take(Limits("ada", 3, 2))
    assert len(slots) == 2
    with pytest.raises(TooManyStreams):
        slots.take(Limits("eve", 2, 2))


def test_a_stream_that_ends_during_a_client_check_causes_no_error() -> None:
    slots = Slots()
    taken: list[object] = []

    def ends() -> bool:
        slots.free(taken[0])
        return True

    taken.append(slots.take(Limits("ada", 1, 1, ends)))
    slots.take(Limits("bob", 1, 1))
    assert len(slots) == 1


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has this option")
def test_a_client_that_stops_reading_occupies_no_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    Connection(accepted.fileno()).expect_reader(0.1)

    def write() -> None:
        try:
            while True:
                accepted.sendall(bytes(65536))
        except OSError:
            failed.set()

    failed = threading.Event()
    threading.Thread(target=write, daemon=True).start()
    with client, accepted:
        assert failed.wait(DEADLINE)
    for hidden in (None, -1):
        Connection(hidden).expect_reader(1.0)  # a server that hides it, or has closed it


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has this option")
def test_a_vanished_client_causes_no_server_error() -> None:
    """gunicorn logs any other exception than these with its traceback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    connection = Connection(accepted.fileno())
    connection.expect_reader(0.1)
    with client, accepted:
        accepted.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                accepted.send(bytes(65536))
        assert not connection.is_gone()
        until(connection.is_gone)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            accepted.send(b"more")


@of_memory
def test_a_function_that_exits_or_gets_no_thread_stops_no_later_call(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site, calls = make_site(), []

    @site.ext.live.on_change()
    def exits(change: Change) -> None:
        calls.append(change.user_id)
        raise SystemExit

    def none_left(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    with site.app.app_context(), monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        site.ext.live._queue.add(site.app, Change(None, "a"))
        assert "called later: can't start" in caplog.text
    for user in "bc":
        site.ext.live._queue.add(site.app, Change(None, user))
        until(lambda user=user: user in calls)  # type: ignore[misc]
    assert calls == ["a", "b", "c"]
