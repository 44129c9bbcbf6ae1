"""The connections of a Redis store: bounded, lent one at a time, and never lost."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from redis import Redis
from redis._parsers import _HiredisParser, _RESP2Parser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from flask_gsession.errors import LeaseLost, Stale, StoreUnavailable
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.base import new_version
from flask_gsession.stores.redis.pool import Slot, _BoundedSocket, bounded
from flask_gsession.testing import a_pointer, a_record
from tests.harness.apps import until
from tests.harness.servers import RedisServer

SIZE = 4


class Interrupt(BaseException):
    """Raised by a worker's time limit in the middle of anything."""


@pytest.fixture
def store(redis_url: str, store_prefix: str) -> Iterator[Any]:
    options = StoreOptions(prefix=store_prefix, pool_max=SIZE, timeout=10)
    store: Any = open_store(redis_url, options)[0]
    yield store
    store.close()


def soon() -> float:
    return time.monotonic() + 0.05


def in_time() -> float:
    return time.monotonic() + 30


def test_no_more_connections_than_allowed_are_lent(store: Any) -> None:
    pool = store.commands.pool
    slots = [pool.take(in_time()) for _ in range(SIZE)]
    with pytest.raises(RedisTimeoutError, match="all 4 connections were in use"):
        pool.take(soon())
    pool.give(slots[0])
    assert pool.take(soon()) is slots[0]


def test_the_connection_used_last_is_lent_first(store: Any) -> None:
    record = a_record(time.time)
    store.create(record)
    for _ in range(20):
        assert store.load(record.key) == record
    assert sum(slot.connection is not None for slot in store.commands.pool._lent.idle) == 1


def test_a_waiting_caller_gets_a_returned_connection(store: Any) -> None:
    pool = store.commands.pool
    slots = [pool.take(in_time()) for _ in range(SIZE)]
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(pool.take(time.monotonic() + 30)))
    waiting.start()
    while not pool._lent.returned.waiting:
        time.sleep(0.001)
    pool.give(slots.pop())
    waiting.join(30)
    assert len(got) == 1


def test_callers_that_wait_while_the_pool_is_closed_get_new_connections(store: Any) -> None:
    """As live updates close it when they begin to follow a server."""
    pool = store.commands.pool
    lent = [pool.take(in_time()) for _ in range(SIZE)]
    got: list[Any] = []

    def take() -> None:
        slot = pool.take(in_time())
        got.append(slot)
        until(lambda: len(got) >= SIZE)  # so the others wait again
        pool.give(slot)

    waiting = [threading.Thread(target=take) for _ in range(2 * SIZE)]
    for thread in waiting:
        thread.start()
    until(lambda: pool._lent.returned.waiting == 2 * SIZE)
    pool.close()
    for thread in waiting:
        thread.join(30)
    assert len(got) == 2 * SIZE
    assert {*got}.isdisjoint(lent)


def test_a_pool_that_is_closed_under_load_fails_no_caller(store: Any) -> None:
    pool = store.commands.pool
    over = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not over.is_set():
                slot = pool.take(in_time())
                answer = slot.ask(b"PING\r\n")
                assert answer == b"PONG"
                pool.give(slot)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3 * SIZE)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        pool.close()
        time.sleep(0.002)
    over.set()
    for thread in threads:
        thread.join(30)
    assert errors == []
    slots = [pool.take(in_time()) for _ in range(SIZE)]
    with pytest.raises(RedisTimeoutError, match="all 4 connections were in use"):
        pool.take(soon())
    assert len({*slots}) == SIZE


def test_a_slot_that_was_dropped_comes_back(store: Any) -> None:
    pool = store.commands.pool
    slots = [pool.take(in_time()) for _ in range(SIZE)]
    slots[0].ask(b"PING\r\n")
    connection = slots[0].connection
    del slots[0]
    gc.collect()  # redis-py 5 leaves a cycle where an older server refuses CLIENT SETINFO
    assert connection._sock is None
    assert pool.take(soon()).connection is not connection


def test_nothing_is_sent_past_the_deadline(store: Any) -> None:
    pool = store.commands.pool
    slot = pool.take(in_time())
    with pytest.raises(RedisTimeoutError):
        pool.take(time.monotonic()).ask(b"PING\r\n")  # while it connects
    slot.ask(b"PING\r\n")
    pool.give(slot)
    assert pool.take(time.monotonic()) is slot
    with pytest.raises(TimeoutError, match="the time for this command is over"):
        slot.ask(b"PING\r\n")
    slot.connection.deadline.at = in_time()
    assert slot.ask(b"ECHO ok\r\n") == b"ok"


class Unreachable:
    """A connection of the client that notes how long it may try."""

    def __init__(self, socket_connect_timeout: float) -> None:
        self.socket_connect_timeout = socket_connect_timeout

    def _connect(self) -> None:
        raise RedisTimeoutError(self.socket_connect_timeout)


def test_connecting_ends_with_the_call() -> None:
    connection: Any = bounded(Unreachable)(socket_connect_timeout=1.0)
    for left, least, most in ((0.05, 0, 0.05), (60, 1.0, 1.0), (-1, 0, 0.001)):
        connection.deadline.at = time.monotonic() + left
        with pytest.raises(RedisTimeoutError) as caught:
            connection._connect()
        assert least <= caught.value.args[0] <= most


def test_interrupts_lose_no_slot(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is interrupted between any two steps, hundreds of times."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # also inside of a __del__
    record = a_record(time.time)
    store.create(record)
    stopped = threading.Event()
    wrong: list[object] = []

    def work() -> None:
        while not stopped.is_set():
            try:
                while not stopped.is_set():
                    if (found := store.load(record.key)) != record:
                        wrong.append(found)
            except Interrupt:
                continue

    def survive() -> None:
        while not stopped.is_set():
            try:
                work()
            except Interrupt:
                continue

    threads = [threading.Thread(target=survive) for _ in range(2 * SIZE)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 1
    sent = 0
    while time.monotonic() < end or sent <= 100:
        for thread in threads:
            sent += ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Interrupt)
            )
        time.sleep(0.005)
    stopped.set()
    for thread in threads:
        thread.join(30)
    assert not wrong
    if redis.__version__ == "5.0.0":  # ties frames and an error of the server in a cycle
        gc.collect()
    slots = [store.commands.pool.take(in_time()) for _ in range(SIZE)]
    assert [slot.ask(b"PING\r\n") for slot in slots] == [b"PONG"] * SIZE


def test_an_interrupt_while_a_failed_connection_closes_costs_a_clients_pool_no_place(
    redis_url: str,
) -> None:
    client = Redis(
        connection_pool=redis.BlockingConnectionPool.from_url(
            redis_url, max_connections=1, timeout=0.1
        )
    )
    store: Any = open_store(client, StoreOptions())[0]
    assert store.load("A" * 43) is None  # connects
    patch = pytest.MonkeyPatch()
    for method in ("send_packed_command", "disconnect"):
        patch.setattr(redis.Connection, method, interrupted)
    with pytest.raises(Interrupt), undone(patch):
        store.load("A" * 43)
    assert store.load("A" * 43) is None
    store.close()
    client.close()


@contextmanager
def undone(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo the patch after the block, while an exception still holds the block's objects."""
    try:
        yield
    finally:
        patch.undo()


def interrupted(*_: object) -> None:
    raise Interrupt


@pytest.mark.parametrize("unread", [b"PING\r\n", b"EXISTS a\r\n", b"HGETALL a\r\n"])
def test_a_load_that_gets_another_commands_reply_is_repeated(store: Any, unread: bytes) -> None:
    """Of any type: a reply that nobody read comes before the reply of the next command."""
    record = a_record(time.time)
    store.create(record)
    slot = store.commands.pool.take(in_time())
    assert slot.ask(b"PING\r\n") == b"PONG"
    slot.connection._sock.sendall(unread)
    store.commands.pool.give(slot)
    assert store.load(record.key) == record


def test_connections_that_the_server_closed_cost_nobody_an_error(
    own_redis: RedisServer, store_prefix: str
) -> None:
    """After a restart every idle connection is dead; the first request already succeeds."""
    options = StoreOptions(prefix=store_prefix, pool_max=SIZE, timeout=10)
    store: Any = open_store(own_redis.url, options)[0]
    slots = [store.commands.pool.take(time.monotonic() + 10) for _ in range(SIZE)]
    for slot in slots:
        slot.ask(b"PING\r\n")
        store.commands.pool.give(slot)
    own_redis.kill()
    with pytest.raises(StoreUnavailable):
        store.load("A" * 43)
    own_redis.start()
    assert store.load("A" * 43) is None
    store.close()


def test_a_closed_store_keeps_no_connection_and_can_be_used_again(store: Any) -> None:
    record = a_record(time.time)
    store.create(record)
    lent = store.commands.pool.take(time.monotonic() + 10)
    idle = store.commands.pool.take(time.monotonic() + 10)
    for slot in (lent, idle):
        slot.ask(b"PING\r\n")
    store.commands.pool.give(idle)
    store.close()
    assert idle.connection._sock is None
    store.commands.pool.give(lent)
    assert lent.connection._sock is None
    assert store.load(record.key) == record


def test_a_store_that_is_not_used_any_more_is_closed_at_once(redis_url: str) -> None:
    store: Any = open_store(redis_url, StoreOptions())[0]
    assert store.load("A" * 43) is None
    (connection,) = (slot.connection for slot in store.commands.pool._lent.idle if slot.connection)
    gc.collect()
    gc.disable()
    try:
        del store
        assert connection._sock is None
    finally:
        gc.enable()


@pytest.mark.parametrize("meanwhile", ["a write", "a rotation", "a write and a restart"])
def test_a_repeat_that_meets_another_write_is_in_doubt(
    meanwhile: str, store: Any, redis_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Applied, the answer lost, then overwritten: to merge and write again would apply it twice.

    A restarted server knows no scripts any more: there the repeat carries the source.
    """
    record = a_record(time.time)
    store.create(record)
    store.save(record, record.version)  # so the server has the script
    mine, theirs = (record._replace(version=new_version()) for _ in range(2))
    rotated = a_record(time.time)
    ask, answers = Slot.ask, 0

    def lose_the_first_answer(self: Slot, request: bytes) -> Any:
        nonlocal answers
        answers += 1
        answer = ask(self, request)
        if answers == 1:
            if meanwhile == "a rotation":
                store.replace(record.key, rotated, mine.version, a_pointer(record, rotated))
            else:
                store.save(theirs, mine.version)
            if "restart" in meanwhile:
                redis_client.script_flush()
            raise RedisConnectionError("Connection closed by server.")
        return answer

    monkeypatch.setattr(Slot, "ask", lose_the_first_answer)
    with pytest.raises(StoreUnavailable, match="a reply was lost"):
        store.save(mine, record.version)
    if meanwhile == "a rotation":
        assert store.load(rotated.key) == rotated
    else:
        assert store.load(record.key) == theirs


def test_every_write_sets_the_life_of_its_value(store: Any, redis_client: Any) -> None:
    record = a_record(time.time, idle=1000)
    later = record._replace(version=new_version(), idle_expires_at=record.idle_expires_at + 60_000)
    rotated = a_record(time.time, idle=2000)
    writes = {
        record: lambda: store.create(record),
        later: lambda: store.save(later, record.version),
        later._replace(idle_expires_at=later.idle_expires_at + 60_000): lambda: store.renew(
            later, later.idle_expires_at + 60_000
        ),
        rotated: lambda: store.replace(record.key, rotated, later.version, None),
    }
    for there, write in writes.items():
        write()
        left = there.idle_expires_at - time.time() * 1000
        assert left - 30_000 < redis_client.pttl(store.names.record(there.key)) < left + 1000


@pytest.mark.parametrize("verb", ["save", "replace"])
def test_a_write_that_meets_a_renewal_keeps_lease_and_deadline(
    verb: str, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses it, and before it is sent again, the lease is lost."""
    record = a_record(time.time)
    store.create(record)
    store.leases.acquire(record.key, "me", 60_000, 1)
    store.renew(record, record.idle_expires_at + 5000)
    run, deadlines = store.commands.run, []

    def lose_the_lease(deadline: float, *arguments: Any) -> Any:
        deadlines.append(deadline)
        reply = run(deadline, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(store.commands, "run", run)
            store.leases.release(record.key, "me")
        return reply

    monkeypatch.setattr(store.commands, "run", lose_the_lease)
    new = a_record(time.time)
    writes: dict[str, Callable[[], object]] = {
        "save": lambda: store.leases.save(
            record._replace(version=new.version), record.version, "me"
        ),
        "replace": lambda: store.leases.replace(record.key, new, record.version, None, "me"),
    }
    with pytest.raises(LeaseLost):
        writes[verb]()
    assert len(deadlines) == 2
    assert deadlines[0] == deadlines[1]


def test_a_pointer_is_never_renewed(store: Any) -> None:
    old, new = a_record(time.time), a_record(time.time)
    store.create(old)
    store.replace(old.key, new, old.version, a_pointer(old, new))
    pointer = store.load(old.key)
    assert not store.renew(pointer, pointer.idle_expires_at + 5000)
    assert store.load(old.key) == pointer


def test_a_connection_that_was_closed_while_idle_puts_no_write_in_doubt(
    own_redis: RedisServer, store_prefix: str
) -> None:
    """The server never saw the first try: the write has lost an ordinary race."""
    store: Any = open_store(own_redis.url, StoreOptions(prefix=store_prefix))[0]
    record = a_record(time.time)
    store.create(record)
    (slot,) = (slot for slot in store.commands.pool._lent.idle if slot.connection is not None)
    slot.connection.deadline.at -= 60  # a minute ago
    with Redis.from_url(own_redis.url) as admin:
        admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(Stale):
        store.save(record._replace(version=new_version()), new_version())
    store.close()


class Pieces:
    """A socket on which an answer arrives in these pieces."""

    def __init__(self) -> None:
        self.coming: list[bytes] = []

    def settimeout(self, seconds: float) -> None: ...

    def shutdown(self, how: int) -> None: ...

    def close(self) -> None: ...

    def sendall(self, request: bytes) -> None: ...

    def recv(self, size: int) -> bytes:
        if not self.coming:
            raise TimeoutError
        piece, rest = self.coming[0][:size], self.coming[0][size:]
        self.coming[:1] = [rest] if rest else []
        return piece

    def recv_into(self, buffer: bytearray) -> int:
        piece = self.recv(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


LONG = bytes(range(256)) * 300

ANSWERS: dict[bytes, Any] = {
    b"$5\r\nhello\r\n": b"hello",
    b"$0\r\n\r\n": b"",
    b"$4\r\n\r\n\r\n\r\n": b"\r\n\r\n",
    b"$8\r\n$2\r\nOK\r\n\r\n": b"$2\r\nOK\r\n",
    b"$-1\r\n": None,
    b"+OK\r\n": b"OK",
    b":17\r\n": 17,
    b"*2\r\n$1\r\na\r\n:1\r\n": [b"a", 1],
    b"-ERR no\r\n": ResponseError,
}


@pytest.mark.parametrize("parser", [_HiredisParser, _RESP2Parser], ids=["hiredis", "plain"])
def test_an_answer_in_any_pieces_is_the_same(parser: type) -> None:
    connection: Any = bounded(redis.Connection)(parser_class=parser, protocol=2)
    connection.set_parser(parser)
    connection.deadline.at = in_time()
    slot, wire = Slot(None), Pieces()
    slot.connection = connection
    connection._sock = _BoundedSocket(wire, connection.deadline)
    connection._parser.on_connect(connection)

    def ask(*pieces: bytes) -> Any:
        wire.coming = [piece for piece in pieces if piece]
        try:
            answer = slot.ask(b"")
        except ResponseError as error:
            answer = type(error)
        assert not wire.coming
        return answer

    for sent, answer in ANSWERS.items():
        for cut in range(len(sent)):
            assert ask(sent[:cut], sent[cut:]) == answer, (sent, cut)
        assert ask(*(sent[at : at + 1] for at in range(len(sent)))) == answer, sent
    for length in (16_370, 16_374, 16_375, 16_376, 16_384, 65_536, 70_000):
        whole = b"$%d\r\n%b\r\n" % (length, LONG[:length])
        assert ask(whole) == LONG[:length]
        assert ask(whole[:-1], whole[-1:]) == LONG[:length]
    # An extra answer stays in front of later ones, as it does with the client.
    assert ask(b"$3\r\none\r\n$3\r\ntwo\r\n") == b"one"
    assert ask() == b"two"
    assert ask(b"$5\r\nthree\r\n") == b"three"
    # With nothing left to come it is a timeout, not half an answer.
    with pytest.raises((RedisTimeoutError, TimeoutError)):
        ask(b"$5\r\nhel")
