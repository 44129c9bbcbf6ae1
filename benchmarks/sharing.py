"""The cost of sharing: a load over gRPC beside a bare call, and verifying a visitor."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from flask import Flask, session

from benchmarks.measure import Effort, Spread, interleave, paired, ratios
from benchmarks.visitor import Visitor
from flask_gsession import Session
from flask_gsession.protocol import gsession_pb2 as pb
from flask_gsession.protocol.messages import to_message
from flask_gsession.sharing.forward_auth import verify_blueprint
from flask_gsession.stores import Record, StoreOptions, open_store
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import a_record

LOAD, CHECK, CACHED = "load over gRPC", "verify on Redis", "verify, cached"
LIMITS = {LOAD: 1.5, CHECK: 1.3, CACHED: 0.8}
BESIDE = {
    LOAD: "a bare unary call and the server's own load",
    CHECK: "a session read on Redis",
    CACHED: "a session read on Redis",
}
BYTES = 1000  # of the record's payload

_PATH = "/bench/Bare"
_THREADS = 8
_PATHS = ("/plain", "/plain/verify", "/read", "/session/verify")


@dataclass(frozen=True)
class SharingCost:
    """An operation and its baseline, in microseconds."""

    operation: str
    beside: str
    us: Spread
    us_beside: Spread
    ratio: Spread


def sharing(url: str, effort: Effort) -> list[SharingCost]:
    """Time each operation and its baseline in turns. ``url``: a Redis."""
    return [_load(effort), *_verify(url, effort)]


def _cost(operation: str, mine: list[float], beside: list[float]) -> SharingCost:
    ratio = Spread.of(ratios(mine, beside))
    return SharingCost(operation, BESIDE[operation], Spread.of(mine), Spread.of(beside), ratio)


def _load(effort: Effort) -> SharingCost:
    record = a_record(time.time, payload=bytes(BYTES))
    near = MemoryStore()
    near.create(record)
    with _servers(record) as (bare_port, port):
        store = open_store(f"grpc://127.0.0.1:{port}", StoreOptions(timeout=10))[0]
        store.create(record)
        request = pb.LoadRequest(key=record.key).SerializeToString()
        with closing(grpc.insecure_channel(f"127.0.0.1:{bare_port}")) as channel:
            bare = channel.unary_unary(_PATH)
            calls = {
                "bare": lambda: bare(request, timeout=10),
                "ours": lambda: store.load(record.key),
                "near": lambda: near.load(record.key),
            }
            figures = interleave(calls, effort)
        store.close()
    beside = [sum(pair) for pair in zip(figures["bare"], figures["near"], strict=True)]
    return _cost(LOAD, figures["ours"], beside)


@contextmanager
def _servers(record: Record) -> Iterator[tuple[int, int]]:
    """Both servers in one other process: a bare one that sends the same bytes, and ours."""
    reply = pb.LoadReply(record=to_message(record)).SerializeToString()
    command = [sys.executable, "-m", "benchmarks.sharing", reply.hex()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        bare, ours = map(int, process.stdout.readline().split())
        yield bare, ours
    finally:
        process.communicate()  # it ends with its input


def _serve(reply: bytes) -> None:
    from flask_gsession.events import Events
    from flask_gsession.sharing.grants import FULL_ACCESS
    from flask_gsession.sharing.server import Server
    from flask_gsession.sharing.store_service import StoreService

    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)
    bare = grpc.server(ThreadPoolExecutor(_THREADS))
    handlers = {_PATH.rpartition("/")[2]: handler}
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    bare_port = bare.add_insecure_port("127.0.0.1:0")
    bare.start()
    ours = Server([StoreService(MemoryStore())], FULL_ACCESS, Events(), _THREADS)
    port = ours.listen("127.0.0.1:0", None)
    ours.start()
    print(bare_port, port, flush=True)
    sys.stdin.read()
    bare.stop(None)
    ours.stop()


def _verify(url: str, effort: Effort) -> list[SharingCost]:
    plain, cached = _Checked(url, near_cache=0.0), _Checked(url, near_cache=5.0)
    with closing(plain), closing(cached):
        cached.wait_for_hits()
        calls = {path: plain.visitor.prepare(path) for path in _PATHS}
        calls[CACHED] = cached.visitor.prepare("/session/verify")
        figures = interleave(calls, effort)
    beside = paired(figures, "/read", minus="/plain")
    return [
        _cost(CHECK, paired(figures, "/session/verify", minus="/plain/verify"), beside),
        _cost(CACHED, paired(figures, CACHED, minus="/plain/verify"), beside),
    ]


class _Checked:
    """An application that verifies visitors, and one visitor."""

    def __init__(self, url: str, near_cache: float) -> None:
        self._app = app = Flask("bench")
        app.secret_key = "a benchmark's secret key, of a sensible length"
        self._ext = Session(
            app,
            store=url,
            key_prefix=f"bench-sharing-{near_cache}:",
            near_cache=near_cache,
            newcomers_per_minute=None,
        )
        app.register_blueprint(verify_blueprint(self._ext))

        @app.get("/seed")
        def seed() -> str:
            session["_user_id"] = "17"
            return "ok"

        @app.get("/read")
        def read() -> str:
            return str(session["_user_id"])

        @app.get("/plain")
        def plain() -> str:
            return "17"

        @app.get("/plain/verify")
        def plain_verify() -> Any:
            headers = {"X-Session-User": "17", "Cache-Control": "no-store", "Vary": "Cookie"}
            return "", 200, headers

        self.visitor = Visitor(app)
        self.visitor.visit("/seed")

    def wait_for_hits(self) -> None:
        """Until the near cache has proven that it is fresh."""
        near: Any = app_near(self._app, self._ext)
        deadline = time.monotonic() + 10
        while not near.figures().hits and time.monotonic() < deadline:
            self.visitor.visit("/session/verify")
            time.sleep(0.01)

    def close(self) -> None:
        store = self._ext.store(self._app)
        assert store.scans is not None
        for record in store.scans.scan().records:
            store.delete(record.key)
        self._ext.close(self._app)


def app_near(app: Flask, ext: Session) -> Any:
    """The near cache of an application."""
    return app.extensions["gsession"][ext].repository.near


if __name__ == "__main__":
    _serve(bytes.fromhex(sys.argv[1]))
