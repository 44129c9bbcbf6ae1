"""Faults in the servers, the network, the workers or their clock."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from redis.crc import key_slot

from tests.faults.history import Kind
from tests.faults.load import Load
from tests.faults.modes import Cluster, Mode, ReplicaSet, Several, SQLite
from tests.faults.workers import Workers
from tests.harness.servers import Server
from tests.harness.topologies import TCPProxy

CALM = 0.7  # seconds between two strikes


@dataclass
class Scene:
    """The servers and workers that a fault strikes under load."""

    mode: Mode
    place: str
    workers: Workers
    load: Load
    proxy: TCPProxy | None
    rng: Random
    seconds: float
    strikes: int = 0
    notes: list[str] = field(default_factory=list)

    def until_over(self) -> Iterator[None]:
        """Go on for `seconds`, at least once."""
        end = time.monotonic() + self.seconds
        while True:
            yield
            self.strikes += 1
            if time.monotonic() >= end:
                return

    @property
    def server(self) -> Any:
        """The one server, or the primary."""
        if isinstance(self.mode, Several):
            return self.mode.servers.primary()
        return self.mode.server  # type: ignore[attr-defined]  # the modes of one server have it


@dataclass(frozen=True)
class Fault:
    """A fault, and the applications that it needs.

    `stated`: the modes in which its losses are reported, without failing.
    """

    name: str
    what: str
    inject: Callable[[Scene], None]
    modes: tuple[str, ...]
    stated: tuple[str, ...] = ()
    ours_only: bool = False  # nothing of it can be done to Flask-Session
    proxy: bool = False
    preload: bool = False
    clients: int = 8
    sessions: int = 4
    workers: int = 3
    threads: int = 4
    pool: int = 4
    small_disk: bool = False
    without: tuple[Kind, ...] = ()  # operations that the clients leave out


def nothing(scene: Scene) -> None:
    time.sleep(scene.seconds)


def kill(scene: Scene) -> None:
    """SIGKILL, and started again on the same files."""
    for _ in scene.until_over():
        scene.server.kill()
        time.sleep(scene.rng.uniform(0.1, 0.5))
        scene.server.start()
        time.sleep(CALM)


def freeze(seconds: float) -> Callable[[Scene], None]:
    """SIGSTOP for that long."""

    def inject(scene: Scene) -> None:
        server: Server = scene.server
        with server.paused():
            scene.strikes += 1
            time.sleep(seconds)

    return inject


def delay(scene: Scene) -> None:
    """Requests or replies that come late, up to beyond the time budget."""
    assert scene.proxy is not None
    for _ in scene.until_over():
        way = scene.rng.choice(["request", "reply"])
        with scene.proxy.delay(scene.rng.choice([0.05, 0.3, 1.5]), way):  # type: ignore[arg-type]
            time.sleep(CALM)
        time.sleep(CALM / 2)


def drip(scene: Scene) -> None:
    """Three bytes at a time."""
    assert scene.proxy is not None
    for _ in scene.until_over():
        with scene.proxy.drip(3, scene.rng.choice([0.01, 0.1])):
            time.sleep(CALM)
        time.sleep(CALM / 2)


def cut(scene: Scene) -> None:
    """Replies that end in their middle, with the connection."""
    assert scene.proxy is not None
    before = scene.proxy.cuts
    for _ in scene.until_over():
        with scene.proxy.cut(scene.rng.randrange(1, 40), times=3):
            time.sleep(0.1)
    scene.strikes = scene.proxy.cuts - before


def lose(scene: Scene) -> None:
    """Writes that are applied, and whose reply gets lost with the connection."""
    assert scene.proxy is not None
    redis = "redis" in scene.mode.name
    words = [b"EVALSHA", b"SET", b""] if redis else [b"update", b"insert", b"delete", b""]
    before = scene.proxy.cuts
    for _ in scene.until_over():
        with scene.proxy.lose_reply(scene.rng.choice(words), times=3):
            time.sleep(0.05)
    scene.strikes = scene.proxy.cuts - before


def fail_over(scene: Scene) -> None:
    """SIGKILL of the primary; another takes over, and the dead one comes back behind it."""
    servers = scene.mode.servers  # type: ignore[attr-defined]  # these modes have it
    wait = servers.wait_for_primary if isinstance(scene.mode, ReplicaSet) else None
    for _ in scene.until_over():
        old = servers.kill_primary()
        (wait or servers.wait_for_failover)(old)
        servers.start()
        time.sleep(CALM)


def hand_over(scene: Scene) -> None:
    """A failover that somebody asked for, with the primary alive."""
    servers = scene.mode.servers  # type: ignore[attr-defined]  # these modes have it
    for _ in scene.until_over():
        if isinstance(scene.mode, ReplicaSet):
            servers.wait_for_primary(servers.step_down())
        else:
            servers.wait_for_failover(servers.failover())
            servers.start()
        time.sleep(CALM)


def migrate(scene: Scene) -> None:
    """Slots that hold sessions move to other nodes."""
    assert isinstance(scene.mode, Cluster)
    servers = scene.mode.servers
    for _ in scene.until_over():
        keys = [
            key for node in servers.primaries() for key in node.command("KEYS", f"{scene.place}*")
        ]
        if keys:
            with servers.migrating(key_slot(scene.rng.choice(keys).encode())):
                time.sleep(0.1)
        time.sleep(0.1)


HOLDER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
db.execute("BEGIN IMMEDIATE")
time.sleep(float(sys.argv[2]))
"""


def locked(scene: Scene) -> None:
    """Another process holds the write lock, for less and for more than the time budget."""
    assert isinstance(scene.mode, SQLite)
    path = str(scene.mode.path(scene.place))
    for _ in scene.until_over():
        held = str(scene.rng.choice([0.3, 1.5]))
        subprocess.run([sys.executable, "-c", HOLDER, path, held], check=True)
        time.sleep(CALM / 2)


def fill_disk(scene: Scene) -> None:
    """No space is left on the disk of the file."""
    assert isinstance(scene.mode, SQLite)
    folder = scene.mode.path(scene.place).parent
    if small_disk(folder):
        inside = Path(f"/proc/{scene.workers.pid}/root{folder}")
        scene.notes.append("a tmpfs of 16 MB")
        for _ in scene.until_over():
            with _filled(inside / "filler"):
                time.sleep(2 * CALM)
            time.sleep(CALM)
        return
    scene.notes.append("RLIMIT_FSIZE")
    for _ in scene.until_over():
        with _no_longer_files(scene.workers.alive(), folder):
            time.sleep(2 * CALM)
        time.sleep(CALM)


@contextmanager
def _filled(path: Path) -> Iterator[None]:
    end = time.monotonic() + 0.3  # and the space that a checkpoint frees in that time
    with path.open("wb", buffering=0) as file:
        while time.monotonic() < end:
            try:
                file.write(bytes(4096))
            except OSError:
                time.sleep(0.01)
    try:
        yield
    finally:
        path.unlink()


@contextmanager
def _no_longer_files(pids: list[int], folder: Path) -> Iterator[None]:
    most = max(path.stat().st_size for path in folder.iterdir())
    for pid in pids:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        for pid in pids:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)


def small_disk(folder: Path) -> tuple[str, ...]:
    """A command prefix that gives a program 16 MB of tmpfs at `folder`; empty if not allowed.

    The mount is in a namespace of the program's own: it ends with the program.
    """
    mount = ("sh", "-c", f'mount -t tmpfs -o size=16m none "{folder}" && exec "$@"', "sh")
    unshare = _unshare()
    return (*unshare, *mount) if unshare else ()


@cache
def _unshare() -> tuple[str, ...]:
    for options in (("--mount",), ("--mount", "--user", "--map-root-user")):
        command = ("unshare", *options)
        with suppress(OSError):
            done = subprocess.run(
                [*command, "mount", "-t", "tmpfs", "-o", "size=16m", "none", "/mnt"],
                stderr=subprocess.DEVNULL,
                check=False,
            )
            if done.returncode == 0:
                return command
    return ()


def kill_worker(scene: Scene) -> None:
    """SIGKILL of a worker, whose successor gunicorn starts."""
    for _ in scene.until_over():
        scene.workers.kill_worker(scene.rng.choice(scene.workers.alive()))
        time.sleep(CALM)


def interrupt(scene: Scene) -> None:
    """Exceptions raised asynchronously in threads that are inside the driver."""
    scene.workers.control["interrupts"] = 15.0
    scene.notes.append("see 500s")
    try:
        time.sleep(scene.seconds)
    finally:
        scene.workers.control["interrupts"] = 0.0


def jump(scene: Scene) -> None:
    """The workers' clocks jump five minutes ahead and back, and some are ahead of others."""
    control = scene.workers.control
    for name in ("offset", "skew"):
        for _ in range(2):
            control[name] = 300.0
            time.sleep(scene.seconds / 4)
            control[name] = 0.0
            scene.strikes += 1
            time.sleep(scene.seconds / 8)


REDIS = ("redis-always", "redis-everysec")
MONGO = ("mongodb-one", "mongodb-bare")
ASYNCHRONOUS = ("redis-sentinel", "redis-confirmed", "redis-cluster")
SETS = (*ASYNCHRONOUS, "mongodb-set")
ALL = ("memory", "sqlite", *REDIS, *MONGO, *SETS)
SOLID = ("sqlite", "redis-always", "mongodb-one")

FAULTS = [
    Fault("none", "nothing at all", nothing, ALL),
    Fault("kill", "kill -9 of the server", kill, (*REDIS, *MONGO), stated=(REDIS[1], MONGO[1])),
    Fault("stop-1", "SIGSTOP for 1 s", freeze(1), ("redis-always", "mongodb-one")),
    Fault(
        "stop-5",
        "SIGSTOP for 5 s",
        freeze(5),
        ("redis-always", "mongodb-one", *SETS),
        stated=ASYNCHRONOUS,
    ),
    Fault("stop-30", "SIGSTOP for 30 s", freeze(30), ("redis-always", "mongodb-one")),
    Fault("delay", "late requests and replies", delay, SOLID[1:], proxy=True),
    Fault("drip", "three bytes at a time", drip, SOLID[1:], proxy=True),
    Fault("cut", "replies cut in the middle", cut, SOLID[1:], proxy=True),
    Fault("lose", "replies lost after the write", lose, SOLID[1:], proxy=True),
    Fault("failover", "kill -9 of the primary", fail_over, SETS, stated=ASYNCHRONOUS),
    Fault(
        "handover",
        "a failover on demand",
        hand_over,
        (*ASYNCHRONOUS[:2], "mongodb-set"),
        stated=ASYNCHRONOUS[:2],
    ),
    Fault("migrate", "slots move", migrate, ("redis-cluster",), ours_only=True),
    Fault("locked", "another process writes", locked, ("sqlite",)),
    Fault("full", "disk full", fill_disk, ("sqlite",), small_disk=True),
    Fault("worker", "kill -9 of workers", kill_worker, SOLID),
    Fault("fork", "fork after connect", nothing, SOLID, preload=True),
    Fault("interrupt", "exceptions inside the driver", interrupt, ("memory", *SOLID)),
    Fault(
        "threads",
        "500 threads, a pool of 10",
        nothing,
        ("memory", *SOLID),
        clients=500,
        sessions=50,
        workers=1,
        threads=500,
        pool=10,
    ),
    Fault(
        "clock",
        "clock jumps, no rotations",
        jump,
        ("memory", *SOLID),
        ours_only=True,
        without=("rotate",),
    ),
    # A clock that is wrong by more than the grace takes an old token for over, or for good.
    Fault(
        "clock-rotate",
        "clock jumps, and rotations",
        jump,
        ("redis-always",),
        stated=("redis-always",),
        ours_only=True,
    ),
]
