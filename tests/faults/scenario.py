"""One fault in one mode: start, load, strike, heal, look."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from tests.faults.app import LOCK_WAIT
from tests.faults.history import Kind, Operation, Verdict, check
from tests.faults.inject import Fault, Scene, small_disk
from tests.faults.load import Load
from tests.faults.modes import Mode, SQLite, count_forever, proxy_for
from tests.faults.workers import State, Workers

Candidate = Literal["ours", "flask-session"]

TIMEOUT = 1.0  # seconds: SESSION_STORE_TIMEOUT, as it is by default
SLACK = 0.5  # seconds on top of the grace
# A request loads and saves, with a budget for each. The rest is for a machine that is busy with
# the servers, the workers and the clients.
BUDGET = 2 * TIMEOUT + 1.0
# SESSION_ROTATION_GRACE. A request that lasts longer than that beside a rotation loses what it
# wrote, as `docs/guarantees.md` says, and the history would show a lost update.
GRACE = BUDGET
FAR_OVER = 2 * BUDGET  # seconds: no noise of the machine explains that
RECOVERY = 30.0  # seconds until the workers must serve again
CALM_DOWN = 5.0  # seconds until threads and sockets must be back to where they were


@dataclass
class Outcome:
    """The result of one scenario."""

    candidate: Candidate
    mode: str
    fault: str
    stated: bool  # whether losses are stated here, and not failed
    logouts_hold: bool  # whether logouts are promised all the same
    verdict: Verdict
    strikes: int
    notes: list[str] = field(default_factory=list)
    history: list[Operation] = field(default_factory=list)

    def _risen(self) -> list[str]:
        count = self.verdict.resurrected if self.logouts_hold else 0
        return [f"{count} resurrected sessions"] if count else []

    @property
    def failures(self) -> list[str]:
        """The violations that were found."""
        if self.candidate != "ours":
            return []
        verdict = self.verdict
        promised = [] if self.stated else verdict.broken
        always = [
            *self._risen(),
            *(f"{verdict.foreign} answers of another session" for _ in range(verdict.foreign > 0)),
            *(f"{verdict.forever} keys without expiry" for _ in range(verdict.forever > 0)),
            *(["no recovery"] if verdict.recovery is None else []),
            *([f"a request took {verdict.worst:.1f} s"] if verdict.worst > FAR_OVER else []),
        ]
        return list(dict.fromkeys([*promised, *always, *verdict.leaks]))


def run(
    fault: Fault,
    mode: Mode,
    *,
    seed: int,
    seconds: float,
    warm: float = 1.0,
    grace: float = GRACE,
    candidate: Candidate = "ours",
    broken: str | None = None,
) -> Outcome:
    """Runs one scenario. The mode is started, and left running and well.

    :param seed: for the clients' operations and the time of the fault. :param seconds: that a fault
    lasts that has no length of its own. :param warm: seconds under load before it; half of that
    after it. :param broken: a way of `tests.faults.broken` in which ours is to be broken.
    """
    mode.start()
    rng = Random(f"{seed} {candidate} {mode.name} {fault.name}")
    place = f"faults_{secrets.token_hex(4)}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gsession-faults-")))
        proxy = stack.enter_context(proxy_for(mode)) if fault.proxy else None
        url = mode.url(place)
        environment = {
            "FAULTS_CANDIDATE": candidate,
            "FAULTS_STORE": url if proxy is None else _led_through(proxy.through(url)),
            "FAULTS_PREFIX": place,
            "FAULTS_GRACE": str(grace),
            "FAULTS_TIMEOUT": str(TIMEOUT),
            "FAULTS_REPLICAS": str(mode.logout_replicas),
            "FAULTS_POOL": str(fault.pool),
            "FAULTS_WARM": "yes" if fault.preload else "",
            "FAULTS_BROKEN": broken or "",
        }
        single = mode.name == "memory"
        disk = small_disk(mode.path(place).parent) if fault.small_disk else ()  # type: ignore[attr-defined]
        workers = stack.enter_context(
            Workers(
                folder,
                environment,
                workers=1 if single else fault.workers,
                threads=fault.threads if fault.threads > 4 or not single else 8,
                preload=fault.preload,
                prefix=disk,
            )
        )
        # Only a logout waits for replicas, a rotation that leaves the old token a grace does not.
        without: tuple[Kind, ...] = ("rotate",) if mode.logout_replicas else ()
        load = Load(
            workers.port,
            clients=fault.clients,
            sessions=fault.sessions,
            seed=seed,
            without=(*fault.without, *without),
        )
        stack.callback(load.finish)
        load.start()
        time.sleep(warm)
        with load.paused():
            before = workers.states()
        scene = Scene(mode, place, workers, load, proxy, rng, seconds)
        try:
            fault.inject(scene)
        finally:
            if proxy is not None:
                proxy.forward()
            mode.start()
        recovery = load.wait_until_served(RECOVERY)
        time.sleep(warm / 2)
        load.finish()
        time.sleep(grace + SLACK + 0.1)  # until the last rotation must be over
        load.look_at_everything(rng)
        after = SLACK + (grace if candidate == "ours" else 0.0)
        # Beside the wait, a lock is acquired and released.
        patience = LOCK_WAIT + 2 * TIMEOUT
        verdict = check(load.operations, budget=BUDGET, grace=after, patience=patience)
        verdict.recovery = recovery
        most = fault.pool if mode.pooled else fault.threads
        verdict.leaks = _leaks(workers, before, mode.hosts * most)
        if disk:
            assert isinstance(mode, SQLite)
            inside = Path(f"/proc/{workers.pid}/root{mode.path(place).parent}")
            copy = folder / "copy"  # SQLite itself follows that path to the wrong place
            shutil.copytree(inside, copy)
            verdict.forever = count_forever(copy / mode.path(place).name)
        else:
            verdict.forever = mode.forever(place)
        if not workers.stop():
            verdict.leaks.append("gunicorn did not end by itself")
        notes = scene.notes
        if "Exception ignored" in workers.log or "Fatal" in workers.log:
            notes.append("see the log")
    return Outcome(
        candidate,
        mode.name,
        fault.name,
        mode.name in fault.stated,
        mode.logout_replicas > 0,
        verdict,
        scene.strikes,
        notes,
        load.operations,
    )


def _led_through(url: str) -> str:
    """Through a proxy there is only one server, which may be a replica set of one."""
    if url.startswith("mongodb") and "directConnection" not in url:
        return f"{url}{'&' if '?' in url else '?'}directConnection=true"
    return url


def _leaks(workers: Workers, before: dict[int, State], pools: int) -> list[str]:
    """The resources that the workers hold more of than before the fault, after a pause.

    Idle pools may have filled up since, to `pools` connections in all.
    """
    deadline = time.monotonic() + CALM_DOWN
    while True:
        found = [
            line
            for pid, after in workers.states().items()
            for line in _more_than(before.get(pid) or _most(before), after, pools)
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _most(states: dict[int, State]) -> State:
    """The most that any worker had: the measure of one that was started later."""
    names = ("threads", "sockets", "files")
    return {name: max(state[name] or 0 for state in states.values()) for name in names}


def _more_than(before: State, after: State, pools: int) -> list[str]:
    allowed = {
        "threads": (before["threads"] or 0) + 2,
        "sockets": (before["sockets"] or 0) + pools,
        "files": (before["files"] or 0) + 3 * pools,  # a connection of SQLite has three
        "slots": 0,
    }
    return [
        f"{after[name]} {name}, {before.get(name)} before"
        for name, most in allowed.items()
        if (after[name] or 0) > most
    ]
