"""Sessions live and end in processes that are killed again and again, at any step.

``python -m tests.journal.storm URL PREFIX FOLDER SECONDS SEED``

Steps are the commands to the server, or the transactions on the file: a process is killed before
or after one of them. Others are killed at any moment. Each process is forked from one that has
nothing open. FOLDER/ledger has the visitors' requests with their answers, and FOLDER/events has the
consumer's events: one line each, written at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flask_gsession.errors import StoreUnavailable
from flask_gsession.journal import sweeping
from flask_gsession.journal.store import JournalingStore
from flask_gsession.journal.sweeping import Sweeper
from flask_gsession.stores.mongodb import round_trips
from flask_gsession.stores.redis.pool import Slot
from flask_gsession.stores.sqlite.file import SQLiteFile
from flask_gsession.tokens import session_key
from tests.harness.apps import Site, Visitor

SETTINGS: dict[str, Any] = {
    "journal": True,
    "idle_timeout": 1,
    "renew_interval": 0,
    "max_per_user": 5,
}
_PLANS = [
    ["put"],
    ["put", "put", "put"],
    ["put", "leave"],
    ["bind", "put", "leave"],
    ["put", "bind", "rotate", "put"],
    ["bind", "rotate", "leave"],
    ["bind", "revoke"],
    ["bind", "rotate"],
]
_LEAST = 1500  # bytes in the ledger
_AT_ONCE = 30  # visitors of one process
_MOST = 3.3  # the power of ten of the steps that a process survives, at most
_NAMED_MOST = 16  # the same within a named function
_LEASE = 1000  # milliseconds for which a dead sweeper holds the others up


class Lines:
    """A file that gets each line at once, so that a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, **fields: Any) -> None:
        os.write(self._file, json.dumps(fields).encode() + b"\n")


class Strike:
    """Kills this process at its step number ``at``, of all or of those within one function."""

    def __init__(self, folder: Path, at: int, named: str = "") -> None:
        self.log = Lines(folder / "strikes")
        self.left = at
        self.counts = not named
        self.named = named

    def step(self) -> None:
        if self.counts:
            self.left -= 1
            if self.left <= 0:
                self.log.write(within=self.named)
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*arguments: Any, **options: Any) -> Any:
            self.step()
            answer = function(*arguments, **options)
            self.step()
            return answer

        return stepping

    def only(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def named(*arguments: Any, **options: Any) -> Any:
            self.counts = True
            try:
                return function(*arguments, **options)
            finally:
                self.counts = False

        return named

    def arm(self) -> None:
        Slot.ask = self.around(Slot.ask)  # type: ignore[method-assign]
        SQLiteFile.within = self.around(SQLiteFile.within)  # type: ignore[method-assign]
        round_trips.count_round_trip = self.step
        if self.named:
            kind = Sweeper if self.named == "run" else JournalingStore
            setattr(kind, self.named, self.only(getattr(kind, self.named)))


def visit(site: Site, folder: Path, chance: random.Random) -> None:
    """Many visitors, each with a plan, in turns."""
    ledger = Lines(folder / "ledger")
    visits: list[Iterator[None]] = []
    while True:
        if len(visits) < _AT_ONCE:
            visits.append(one_visit(site, ledger, chance))
        turn = chance.choice(visits)
        try:
            next(turn)
        except StopIteration:
            visits.remove(turn)


def one_visit(site: Site, ledger: Lines, chance: random.Random) -> Iterator[None]:
    visitor = site.visitor()
    user = f"user-{chance.randrange(20)}"
    handle = None
    for step in chance.choice(_PLANS):
        ledger.write(at=time.time(), trying=step, handle=handle)
        response = visitor.ask(_ACTIONS[step](site, user))
        if response.status_code != 200:
            return  # only the journal has the outcome
        new = _handle_of(visitor)
        ledger.write(at=time.time(), done=step, handle=handle, new=new)
        handle = new
        yield


def _handle_of(visitor: Visitor) -> str | None:
    return session_key(visitor.token) if visitor.cookie else None


def _put(site: Site, user: str) -> Callable[[Any], None]:
    return lambda session: session.update(number=session.get("number", 0) + 1)


def _bind(site: Site, user: str) -> Callable[[Any], None]:
    return lambda session: session.bind(user)


def _rotate(site: Site, user: str) -> Callable[[Any], None]:
    return lambda session: session.rotate()


def _leave(site: Site, user: str) -> Callable[[Any], None]:
    return lambda session: session.destroy()


def _revoke(site: Site, user: str) -> Callable[[Any], Any]:
    return lambda session: site.ext.users.revoke_all(user, reason="a test", by="admin")


_ACTIONS: dict[str, Callable[[Site, str], Callable[[Any], object]]] = {
    "put": _put,
    "bind": _bind,
    "rotate": _rotate,
    "leave": _leave,
    "revoke": _revoke,
}


def sweep(site: Site, folder: Path, chance: random.Random) -> None:
    sweeper = sweeper_of(site)
    while True:
        with suppress(StoreUnavailable):
            sweeper.run()
        time.sleep(0.02)


def sweeper_of(site: Site) -> Sweeper:
    repository = site.app.extensions["gsession"][site.ext].repository
    return Sweeper(repository.journaling, site.clock)


def consume(site: Site, folder: Path, chance: random.Random) -> None:
    events = Lines(folder / "events")
    with site.app.app_context():
        consumer = site.ext.journal("siem", follow=True)
        consumer._poll = 0.05
        for event in consumer:
            events.write(**event.as_dict())
            if chance.random() < 0.1:
                event.ack()


ROLES = {"visitors": visit, "more visitors": visit, "sweeper": sweep, "consumer": consume}
_NAMED = {  # functions in which a role is killed
    "visitors": ("delete",),
    "more visitors": ("create", "replace_with_lease", "delete"),
    "sweeper": ("run",),
    "consumer": ("run",),
}


def play(role: str, url: str, prefix: str, folder: Path, seed: int) -> None:
    """The work of a child, until it is killed."""
    chance = random.Random(seed)
    sweeping._LEASE = _LEASE
    how = chance.random()
    if how < 0.3:
        Strike(folder, int(10 ** chance.uniform(0, _MOST))).arm()
    elif how < 0.9:
        Strike(folder, chance.randrange(1, _NAMED_MOST), chance.choice(_NAMED[role])).arm()
    site = Site(url, prefix, time.time, **SETTINGS)
    ROLES[role](site, folder, chance)


def enough(folder: Path) -> bool:
    """Whether visitors did so much that there is something to check, also on a busy machine."""
    ledger = folder / "ledger"
    return ledger.exists() and ledger.stat().st_size > _LEAST


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(1)
    return child


def main(url: str, prefix: str, folder: str, seconds: str, seed: str) -> None:
    """Keep all roles played, and kill one now and then; say how often each was killed."""
    chance = random.Random(int(seed))
    over = time.monotonic() + float(seconds)
    playing: dict[int, str] = {}
    killed: Counter[str] = Counter()
    failed = []
    next_kill = time.monotonic() + 0.3
    while (time.monotonic() < over or not enough(Path(folder))) and not failed:
        for role in ROLES.keys() - playing.values():
            number = chance.randrange(2**32)
            child = forked(
                lambda role=role, number=number: play(role, url, prefix, Path(folder), number)
            )
            playing[child] = role
        if time.monotonic() > next_kill:
            os.kill(chance.choice([*playing]), signal.SIGKILL)
            next_kill = time.monotonic() + chance.uniform(0.1, 2)
        dead, status = os.waitpid(-1, os.WNOHANG)
        if not dead:
            time.sleep(0.005)
            continue
        role = playing.pop(dead)
        killed[role] += 1
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            failed.append(role)
    for child in playing:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(json.dumps(killed))
    if failed:
        sys.exit(f"failed by itself: {failed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
