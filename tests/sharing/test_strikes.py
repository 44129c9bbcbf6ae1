"""Exceptions that strike a call over gRPC from outside: by a signal, or by another thread."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.remote import channel, forks, shield
from flask_gsession.testing import HookedStore, a_record
from tests.harness.apps import PATIENCE, Site, until
from tests.harness.gunicorn import Gunicorn
from tests.harness.sharing import ROOT, ServeCommand, store_servers
from tests.request.test_own_writes import test_real_signals_count_once as count_once
from tests.stores.test_interrupts import TooLong, TooLongAsItIsUsual, handler, struck


def reach(url: str, timeout: float = PATIENCE) -> Any:
    return open_store(url, StoreOptions(timeout=timeout))[0]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeCommand]:
    """A server in another process."""
    folder = tmp_path_factory.mktemp("strikes")
    with ServeCommand(folder / "serve", {"SESSION_STORE": "memory://"}) as command:
        yield command


# The threads that run gRPC's code ----------------------------------------------------------------


def grpc_frames(act: Callable[[], object]) -> set[str]:
    """gRPC's functions that run on this thread, where an exception from outside may strike them."""
    folder, found = os.path.dirname(grpc.__file__) + os.sep, set[str]()

    def look(frame: FrameType, event: str, called: Any) -> None:
        if frame.f_code.co_filename.startswith(folder):
            found.add(frame.f_code.co_name)
        if event == "c_call" and str(getattr(called, "__module__", "")).startswith("grpc."):
            found.add(called.__name__)

    sys.setprofile(look)
    try:
        act()
    finally:
        sys.setprofile(None)
    return found


def test_no_thread_of_the_application_runs_code_of_grpc(redis_url: str, store_prefix: str) -> None:
    """It would keep locks if it were struck: one of them is shared by all channels and servers."""
    record, other = a_record(time.time), a_record(time.time)
    far = open_store(redis_url, StoreOptions(store_prefix, timeout=PATIENCE))[0]
    with store_servers() as serve:
        store = reach(serve(far))

        def use() -> None:
            store.create(record)
            assert store.load(record.key) == record
            store.renew(record, record.idle_expires_at)
            store.leases.acquire(record.key, "me", 1000, 1)
            store.leases.release(record.key, "me")
            store.scans.scan()
            store.checks.check()
            store.replace(record.key, other, record.version, None)
            store.delete(other.key)
            store.changes.subscribe(Hears())
            until(lambda: store.changes.feed(record.key))
            store.changes.moved()
            store.close()

        assert grpc_frames(use) == set()
    far.close()


class Hears:
    def changed(self, keys: object) -> None: ...

    def lost(self) -> None: ...


# A shield ---------------------------------------------------------------------------------------


def test_an_interrupted_call_ends_before_the_next_one_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on one connection: a lock is not released before it is acquired."""
    monkeypatch.setattr(shield, "_IN_ORDER", PATIENCE)  # a busy machine is late
    shielded, order = shield.Shield(), list[str]()
    leave = threading.Event()

    def slow() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # the caller waits by then
        leave.wait(PATIENCE)
        order.append("first")

    with handler(TooLong), pytest.raises(TooLong):
        shielded.run(slow, PATIENCE)
    threading.Timer(0.02, leave.set).start()
    shielded.run(lambda: order.append("second"), PATIENCE)
    assert order == ["first", "second"]


def test_an_interrupted_call_that_hangs_holds_nobody_up() -> None:
    shielded, leave = shield.Shield(), threading.Event()

    def hang() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # the caller waits by then
        leave.wait(PATIENCE)

    with handler(TooLong), pytest.raises(TooLong):
        shielded.run(hang, PATIENCE)
    assert shielded.run(lambda: 7, PATIENCE) == 7
    leave.set()


def workers() -> int:
    """The threads of all shields."""
    frames = sys._current_frames().values()
    return sum(frame.f_code is shield._work.__code__ for frame in frames)


def test_a_shield_leaves_no_thread_wherever_it_was_struck() -> None:
    gc.collect()
    before, shielded = workers(), shield.Shield()
    with handler(TooLong):
        for number in range(300):
            with suppress(TooLong):
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + number % 50 * 1e-6)
                shielded.run(int, PATIENCE)
                signal.setitimer(signal.ITIMER_REAL, 0)
    gc.collect()  # the exceptions, which hold workers
    assert shielded.run(lambda: 7, PATIENCE) == 7
    until(lambda: workers() <= before + 2)
    del shielded
    until(lambda: workers() <= before)


class Late(RuntimeError):
    """A deadline of an application."""


@pytest.mark.parametrize("kind", [pytest.param(TooLong, marks=pytest.mark.long), Late])
def test_no_step_of_a_shield_swallows_an_exception(kind: type[BaseException]) -> None:
    """The next call doesn't get the answer of the one that was struck."""
    shielded, step, struck = shield.Shield(), 0, True

    def strike(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left, struck
        if frame.f_code.co_filename != shield.__file__:
            return None
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if not left and not struck:
            struck = True
            raise kind
        return strike

    while struck:
        step += 1
        left, struck, tracing = step, False, sys.gettrace()
        sys.settrace(strike)
        try:
            answer = shielded.run(lambda step=step: step, PATIENCE)  # type: ignore[misc]
        except kind:
            assert struck
        else:
            assert answer == step
            assert not struck
        finally:
            sys.settrace(tracing)
        assert shielded.run(lambda: 0, PATIENCE) == 0
    assert step > 50


def test_without_another_thread_a_call_is_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shield, "start_new_thread", refuse)
    assert shield.Shield().run(lambda: 7, PATIENCE) == 7


def test_a_write_that_is_cancelled_while_others_settle_is_settled_too(
    command: ServeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, under the same key."""
    store, settled = reach(command.url), list[int]()
    far, call = store.channel, store.channel.call

    def calling(name: str, request: Any) -> Any:
        if name == "Settle":
            settled.extend(request.versions)
            if request.versions == [1]:
                far._note(2, ["x" * 43])
        return call(name, request)

    monkeypatch.setattr(far, "call", calling)
    far._note(1, ["x" * 43, "y" * 43])
    store.load("x" * 43)
    store.load("x" * 43)
    store.load("x" * 43)
    assert settled == [1, 2]
    store.load("y" * 43)
    assert settled == [1, 2, 1]
    store.close()


def test_a_channel_in_which_grpc_is_stuck_is_replaced(
    command: ServeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_OVERDUE", 0.01)
    store, leave = reach(command.url, 0.1), threading.Event()
    store.channel._connect().calls["Load"] = lambda *_, **__: leave.wait(PATIENCE)
    with pytest.raises(StoreUnavailable, match="stuck"):
        store.load("x" * 43)
    store.channel.timeout = PATIENCE
    assert store.load("x" * 43) is None
    leave.set()
    store.close()


# Signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TooLong, TooLongAsItIsUsual])
def test_a_deadline_by_signal_is_raised(kind: type[Exception], command: ServeCommand) -> None:
    store = reach(command.url)
    record = a_record(time.time)
    store.create(record)
    with handler(kind) as raised:
        for call in (lambda: store.load(record.key), lambda: store.renew(record, 1)):
            command.signal(signal.SIGSTOP)
            with pytest.raises(kind) as caught:
                struck(call)
            command.signal(signal.SIGCONT)
            assert caught.value is raised[-1]
    assert store.load(record.key) == record
    until(lambda: not forks.guard.calls)
    store.close()


@pytest.mark.long
def test_a_fork_ends_an_interrupted_call(command: ServeCommand) -> None:
    """It would wait for it, and gRPC doesn't survive a fork in the middle of a call."""
    store = reach(command.url)
    record = a_record(time.time)
    store.create(record)
    command.signal(signal.SIGSTOP)
    with handler(TooLong), pytest.raises(TooLong):
        struck(lambda: store.load(record.key))
    assert forks.guard.calls
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(20)
            status = int(store.load(record.key) != record)
        finally:
            os._exit(status)
    assert not forks.guard.calls
    command.signal(signal.SIGCONT)
    assert store.load(record.key) == record
    assert os.waitpid(child, 0)[1] == 0
    store.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a collection
@pytest.mark.parametrize(
    "url", ["memory", pytest.param("sqlite", marks=pytest.mark.long)], ids=["memory", "sqlite"]
)
def test_real_signals_count_once(url: str, tmp_path: Path) -> None:
    """Wherever the timer strikes, also while the request is on its way or in the other process."""
    far_url = "memory://" if url == "memory" else f"sqlite:///{tmp_path}/far.sqlite3"
    far = open_store(far_url, StoreOptions(timeout=PATIENCE))[0]
    with store_servers() as serve:
        store = HookedStore(reach(serve(far)))

        def make(**settings: Any) -> Site:
            return Site("grpc://", "", time.time, store=store, **settings)

        count_once(make)  # type: ignore[arg-type]  # it only calls it
        store.close()
    far.close()


ENDED = """
import signal, sys
from flask_gsession.stores import StoreOptions, open_store
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
store = open_store({url!r}, StoreOptions(timeout=60))[0]
store.load("x" * 43)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("calling", flush=True)
sys.stdin.readline()
store.load("x" * 43)
"""


@pytest.mark.long
def test_a_process_ends_in_the_middle_of_a_call(command: ServeCommand) -> None:
    """By Ctrl-C, and by `sys.exit` in a signal's handler, as gunicorn ends its workers."""
    code = ENDED.format(url=command.url)
    numbers = (signal.SIGINT, signal.SIGTERM)
    pipe = subprocess.PIPE
    with ExitStack() as running:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                text=True,
            )
            for _ in numbers
        ]
        for process in processes:
            running.enter_context(process)
            running.callback(process.kill)
        running.callback(command.signal, signal.SIGCONT)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "calling\n"
        command.signal(signal.SIGSTOP)
        for process, number in zip(processes, numbers, strict=True):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            time.sleep(0.1)  # it is in the call by then
            process.send_signal(number)
        outcomes = [process.communicate(timeout=30) for process in processes]
        assert [process.returncode for process in processes] == [-signal.SIGINT, 3], outcomes
        assert "KeyboardInterrupt" in outcomes[0][1]
        assert outcomes[1][1] == ""


@pytest.mark.long
def test_gunicorn_ends_workers_in_the_middle_of_a_call(tmp_path: Path) -> None:
    """A sync worker by SIGABRT after its timeout, and then by SIGQUIT; never by force."""
    with ServeCommand(tmp_path / "serve", {"SESSION_STORE": "memory://"}) as far:
        environment = {"WORKERS_STORE": far.url, "WORKERS_PREFIX": "unused:"}
        options = ("--worker-class", "sync", "--timeout", "2")
        with (
            Gunicorn(tmp_path, *options, workers=1, environment=environment) as server,
            ThreadPoolExecutor(1) as pool,
        ):
            cookie = server.log_in("17")
            far.signal(signal.SIGSTOP)
            hung = pool.submit(server.ask, "GET", "/whoami", cookie)
            server.wait_for_workers(2)
            assert hung.result().status == 500
            far.signal(signal.SIGCONT)
            assert server.get("/whoami", cookie).body["user"] == "17"
            far.signal(signal.SIGSTOP)
            hung = pool.submit(server.ask, "GET", "/whoami", cookie)
            time.sleep(0.3)  # it is in the call by then
            assert server.stop(signal.SIGQUIT) == 0
            assert hung.result().status == 500
            assert "SIGKILL" not in server.log


UNDER_GEVENT = """
from gevent import monkey
monkey.patch_all()
import random, sys, time
import gevent
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.testing import a_record

class TooLong(Exception):
    pass

store = open_store({url!r}, StoreOptions(timeout=20))[0]
record = a_record(time.time)
store.create(record)
struck = answered = 0

def work(number):
    global struck, answered
    for _ in range(80):
        try:
            with gevent.Timeout(random.uniform(0.0001, 0.04), TooLong):
                for _ in range(3):
                    assert store.load(record.key) == record
                    answered += 1
        except TooLong:
            struck += 1

gevent.joinall([gevent.spawn(work, number) for number in range(4)], raise_error=True)
assert store.load(record.key) == record
assert struck > 20 and answered > 20, (struck, answered)
store.close()
"""


@pytest.mark.long
def test_timeouts_of_gevent(command: ServeCommand) -> None:
    code = UNDER_GEVENT.format(url=command.url)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.long
def test_threads_that_other_threads_interrupt_get_answers(command: ServeCommand) -> None:
    """Also where the exceptions are kept, as error reports do."""
    store, over = reach(command.url), threading.Event()
    record = a_record(time.time)
    store.create(record)
    struck, answered = [0] * 4, [0] * 4
    kept: list[BaseException | None] = [None] * 4

    def work(number: int) -> None:
        while not over.is_set():
            try:
                while not over.is_set():
                    assert store.load(record.key) == record
                    answered[number] += 1
            except TooLong as error:
                struck[number] += 1
                kept[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    strike = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for _ in range(3000):
        time.sleep(random.uniform(0.002, 0.006))
        strike(ctypes.c_ulong(random.choice(threads).ident or 0), ctypes.py_object(TooLong))
    before = list(answered)
    until(lambda: all(now > then for now, then in zip(answered, before, strict=True)))
    over.set()
    for thread in threads:
        thread.join()
    assert min(struck) > 300
    store.close()
