"""gRPC channels and streams while another thread drops or closes them, or forks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.live.listener import now
from flask_gsession.protocol import gsession_pb2 as pb
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.remote import channel as remote_channel
from flask_gsession.stores.remote import forks
from flask_gsession.stores.remote.address import Address
from flask_gsession.stores.remote.changes import RemoteChanges, RemoteSource
from flask_gsession.stores.remote.channel import Channel, _Connected
from tests.harness.interleaving import before_line


@pytest.fixture
def channel() -> Iterator[Channel]:
    """To a server that isn't there."""
    store: Any = open_store("grpc://127.0.0.1:1", StoreOptions(timeout=0.2))[0]
    yield store.channel
    store.close()


def test_a_channel_that_is_closed_before_a_call_is_sent_is_replaced(channel: Channel) -> None:
    """Without a server, the call fails like any other; it isn't refused by gRPC itself."""
    with (
        before_line(Channel._send, "return send(", channel._close_all),
        pytest.raises(grpc.RpcError),
    ):
        channel._send("Load", b"", 0.2)


def test_a_call_is_not_prepared_for_a_channel_that_another_thread_dropped(
    channel: Channel,
) -> None:
    with (
        before_line(_Connected.prepare, "method = _METHODS[name]", channel._drop),
        pytest.raises(grpc.RpcError),
    ):
        channel._send("Load", b"", 0.2)
    assert channel._connected is None or channel._connected.calls == {}
    with pytest.raises(grpc.RpcError):
        channel._send("Load", b"", 0.2)


def test_dropped_channels_are_closed_by_two_threads(channel: Channel) -> None:
    channel._dropped = [(0.0, lambda: None)]
    with before_line(Channel._close_dropped, "._dropped.", lambda: channel._close_dropped(0.0)):
        channel._close_dropped(0.0)
    assert channel._dropped == []


def test_a_stream_that_begins_or_fails_before_a_fork_keeps_no_other_open() -> None:
    guard, ended = forks.ForkGuard(), []

    class Stream:
        def end_before_fork(self) -> None:
            guard.remove(self)
            ended.append(self)
            raise StoreUnavailable("gRPC is stuck")

    streams = [Stream(), Stream()]
    for stream in streams:
        guard.add(stream)
    guard.before_fork()
    guard.after_fork()
    assert ended == streams


def test_a_stream_that_is_just_beginning_ends_before_a_fork() -> None:
    guard, begins, ended = forks.ForkGuard(), Event(), Event()
    kind = type("Stream", (), {"end_before_fork": lambda _: (guard.remove(stream), ended.set())})
    stream: Any = kind()

    def begin() -> None:
        begins.set()
        while not guard.forking:
            time.sleep(0.001)
        time.sleep(0.05)  # the fork has ended other streams already
        guard.add(stream)

    thread = Thread(target=guard.run, args=(begin,))
    thread.start()
    assert begins.wait(30)
    guard.before_fork()
    guard.after_fork()
    thread.join(30)
    assert ended.is_set()


def test_a_call_gives_up_in_time_while_the_channel_is_being_opened(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC may be stuck there, with the lock that other threads need to open the channel."""
    monkeypatch.setattr(remote_channel, "_OVERDUE", 0.01)
    leave, left = Event(), []
    monkeypatch.setattr(channel, "_open", lambda: left.append(leave.wait(5)))
    with pytest.raises(StoreUnavailable, match="stuck"):
        channel.call("Load", pb.LoadRequest())
    assert left == []
    leave.set()


def test_a_watch_without_a_thread_leaves_no_stream_open(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[bool] = []
    call = SimpleNamespace(cancel=lambda: cancelled.append(True))
    channel: Any = SimpleNamespace(
        stream=lambda *arguments: arguments[-1](call), shielded=lambda call: call(), timeout=1.0
    )

    def refuse(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refuse)
    with pytest.raises(StoreUnavailable, match="needs a thread") as raised:
        RemoteChanges(channel, 1.0, bool)
    assert cancelled
    streams = [each for each in forks.guard.streams if isinstance(each, RemoteChanges)]
    assert call not in [each._call for each in streams], raised  # whose traceback keeps the stream


def test_servers_that_keep_changing_never_overflow() -> None:
    source: Any = RemoteSource(Channel(Address.of("grpc://127.0.0.1:1"), 1.0))
    for _ in range(1100):
        source._stream = type("Stream", (), {"number": 1})
        source.answered_by(2, 1)
    assert source._open_at <= now() + 60
