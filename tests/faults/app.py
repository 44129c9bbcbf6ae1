"""The application under test, with Flask-GSession or Flask-Session behind ``flask.session``.

Environment variables shape it:

`FAULTS_CANDIDATE`  `ours` or `flask-session`
`FAULTS_STORE`      the URL of the store
`FAULTS_PREFIX`     of the keys, or the name of the MongoDB database
`FAULTS_FOLDER`     where the numbers of `tests.faults.control` are, and the reports go
`FAULTS_GRACE`      seconds that an old token may still be used
`FAULTS_TIMEOUT`    seconds for a store call
`FAULTS_POOL`       connections
`FAULTS_WARM`       any text: use a session before the workers are forked
`FAULTS_REPLICAS`   that must confirm a logout
`FAULTS_BROKEN`     a way of `tests.faults.broken` in which ours is to be broken

Each answer names the owner that the session holds. 401 says that there is no session.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from flask import Flask, abort, current_app, session

from flask_gsession.stores import Store
from flask_gsession.stores.wrappers.wrapper import innermost
from tests.faults.control import Control

Answer = dict[str, Any]

LOCK_TIMEOUT = 2.0  # seconds that a dead holder blocks the others
LOCK_WAIT = 1.0  # seconds that they wait
TICK = 0.02  # seconds between two looks at the control
DRIVERS = ("/redis/", "/pymongo/", "/flask_gsession/stores/", "/sqlite3/")


class Interrupted(BaseException):
    """Interrupts a request inside the driver, as a signal handler's exception would."""


class Outer:
    """Around the application: the time that a request took, and an answer to an interrupted one."""

    def __init__(self, app: Flask) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Callable[..., Any]) -> Iterable[bytes]:
        begin = time.monotonic()

        def start(status: str, headers: list[tuple[str, str]], info: Any = None) -> Any:
            headers.append(("X-Seconds", f"{time.monotonic() - begin:.4f}"))
            return start_response(status, headers, info)

        try:
            return self.app.wsgi_app(environ, start)
        except Interrupted:
            start("500 Interrupted", [("Content-Length", "0")])
            return [b""]


def create_app() -> Outer:
    """The application, as the environment describes it."""
    environment = os.environ
    folder = Path(environment["FAULTS_FOLDER"])
    control = Control(folder / "control")
    app = Flask(__name__, instance_path=str(folder / "instance"))
    app.config.update(SECRET_KEY="faults", SESSION_KEY_PREFIX=environment["FAULTS_PREFIX"])
    if environment["FAULTS_CANDIDATE"] == "ours":
        actions = _ours(app, control)
    else:
        actions = _flask_session(app)
    _add_views(app, *actions)
    outer = Outer(app)
    if environment.get("FAULTS_WARM"):
        client = app.test_client()
        if client.post("/login/warm").status_code != 200 or client.get("/read").status_code != 200:
            raise RuntimeError("no session before the fork")
    return outer


def _ours(app: Flask, control: Control) -> tuple[Callable[..., Any], ...]:
    from flask_gsession import Session, session_transaction
    from flask_gsession import session as ours

    def clock() -> float:
        skew = control["skew"] if os.getpid() % 2 else 0.0
        return time.time() + control["offset"] + skew

    if replicas := int(os.environ["FAULTS_REPLICAS"]):
        app.config["SESSION_LOGOUT_REPLICAS"] = replicas
    ext = Session(
        app,
        clock=clock,
        store=os.environ["FAULTS_STORE"],
        store_timeout=float(os.environ["FAULTS_TIMEOUT"]),
        pool_max=int(os.environ["FAULTS_POOL"]),
        rotation_grace=float(os.environ["FAULTS_GRACE"]),
    )
    if broken := os.environ.get("FAULTS_BROKEN"):
        from tests.faults.broken import BREAKS

        BREAKS[broken](app.session_interface.repository)  # type: ignore[attr-defined]  # ours
    app.extensions["faults"] = ext.store(app)

    def count() -> int:
        return int(ours.update_atomic("n", lambda n: n + 1, 0))

    def lock() -> None:
        with ours.lock(timeout=LOCK_TIMEOUT, wait=LOCK_WAIT):
            _add()

    return count, session_transaction(_move), lock, lambda: ours.rotate(), lambda: ours.destroy()


def _flask_session(app: Flask) -> tuple[Callable[..., Any], ...]:
    from flask_session import Session as FlaskSession  # type: ignore[import-untyped]

    url, prefix = os.environ["FAULTS_STORE"], os.environ["FAULTS_PREFIX"]
    if url.startswith("redis"):
        from redis import Redis

        app.config.update(SESSION_TYPE="redis", SESSION_REDIS=Redis.from_url(url))
    else:
        from pymongo import MongoClient

        client: Any = MongoClient(url, w="majority")
        app.config.update(SESSION_TYPE="mongodb", SESSION_MONGODB=client, SESSION_MONGODB_DB=prefix)
    FlaskSession(app)

    def count() -> int:
        session["n"] = session.get("n", 0) + 1
        return int(session["n"])

    def rotate() -> None:
        current_app.session_interface.regenerate(session)  # type: ignore[attr-defined]

    return count, _move, _add, rotate, lambda: session.clear()


def _move() -> None:
    """Two keys that belong together: their sum is 0."""
    session["a"] = session.get("a", 0) - 1
    session["b"] = session.get("b", 0) + 1


def _add() -> None:
    """An addition that needs a lock, if there are locks."""
    session["l"] = session.get("l", 0) + 1


def _add_views(
    app: Flask,
    count: Callable[[], int],
    move: Callable[[], None],
    lock: Callable[[], None],
    rotate: Callable[[], None],
    log_out: Callable[[], None],
) -> None:
    def owner() -> str:
        found = session.get("owner")
        if found is None:
            abort(401)
        return str(found)

    def everything(found: str) -> Answer:
        values = dict(session)
        keys = {key: value for key, value in values.items() if key[:1] == "k"}
        numbers = {name: values.get(name, 0) for name in ("n", "a", "b", "l")}
        return {"owner": found, "keys": keys, **numbers}

    @app.post("/login/<name>")
    def login(name: str) -> Answer:
        session["owner"] = name
        return {"owner": name}

    @app.get("/read")
    def read() -> Answer:
        return everything(owner())

    @app.post("/put/<key>/<value>")
    def put(key: str, value: str) -> Answer:
        found = owner()
        session[key] = value
        return {"owner": found}

    @app.post("/count")
    def count_() -> Answer:
        found = owner()
        return {"owner": found, "count": count()}

    @app.post("/move")
    def move_() -> Answer:
        found = owner()
        move()
        return {"owner": found}

    @app.post("/lock")
    def lock_() -> Answer:
        found = owner()
        lock()
        return {"owner": found}

    @app.post("/rotate")
    def rotate_() -> Answer:
        found = owner()
        rotate()
        return {"owner": found}

    @app.post("/logout")
    def log_out_() -> Answer:
        found = everything(owner())
        log_out()
        return found


# In each worker, beside the requests ------------------------------------------------------------


def watch(outer: Outer) -> None:
    """Follow the control, in a thread of this worker. Called by gunicorn."""
    folder = Path(os.environ["FAULTS_FOLDER"])
    threading.Thread(target=_watch, args=(outer.app, folder), name="faults", daemon=True).start()


def _watch(app: Flask, folder: Path) -> None:
    control = Control(folder / "control")
    reported = 0.0
    due = 0.0
    while True:
        time.sleep(TICK)
        due = min(due + control["interrupts"] * TICK, 2.0)
        while due >= 1:
            due -= 1
            _interrupt()
        if control["report"] != reported:
            reported = control["report"]
            report = folder / f"report-{os.getpid()}-{reported:.0f}"
            report.with_suffix(".new").write_text(json.dumps(_state(app)))
            report.with_suffix(".new").rename(report)


def _interrupt() -> None:
    """Raise `Interrupted` in one thread that is inside a driver, if there is one."""
    mine = threading.get_ident()
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = top
        inside = within = False
        while frame is not None and thread != mine:
            inside = inside or any(part in frame.f_code.co_filename for part in DRIVERS)
            within = within or frame.f_code is Outer.__call__.__code__
            frame = frame.f_back
        if inside and within:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread), ctypes.py_object(Interrupted)
            )
            return


def _state(app: Flask) -> dict[str, int | None]:
    """The resources of this worker. A fault must not leave it with more."""
    sockets = files = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        sockets += target.startswith("socket:")
        files += not target.startswith("socket:")
    # Gunicorn starts the threads of its pool when it first needs them.
    threads = [t for t in threading.enumerate() if not t.name.startswith("ThreadPoolExecutor")]
    return {
        "threads": len(threads),
        "sockets": sockets,
        "files": files,
        "slots": slots_in_use(app.extensions.get("faults")),
    }


def slots_in_use(store: Store | None) -> int | None:
    """The number of connections in use from the store's pools; None if they don't say."""
    inner: Any = None if store is None else innermost(store)
    if hasattr(inner, "commands"):  # Redis
        pool = inner.commands.pool
        pools = [*pool._pools.values()] if hasattr(pool, "_pools") else [pool]
        if not all(hasattr(pool, "_lent") for pool in pools):
            return None  # of a client
        # A lost slot is made again when it is needed.
        there = sum(slot() is not None for pool in pools for slot in pool._lent.slots)
        return there - sum(len(pool._lent.idle) for pool in pools)
    if hasattr(inner, "driver") and inner.driver.collection is not None:  # MongoDB
        servers = inner.driver.collection.database.client._topology._servers.values()
        return sum(int(server.pool.active_sockets) for server in servers)
    return None
