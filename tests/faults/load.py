"""The clients: threads that read, write, rotate and log out, several of them on each session."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.cookies import CookieError, SimpleCookie
from typing import Any, NamedTuple

from tests.faults.history import NUMBERS, Kind, Operation, Outcome, value_of

PATIENCE = 15.0  # seconds until a client gives up
MOST_PUTS = 60  # of one session; then it logs out
WEIGHTS: dict[Kind, int] = {
    "read": 35,
    "put": 22,
    "count": 24,
    "move": 12,
    "lock": 6,
    "rotate": 4,
    "logout": 3,
}
AFTER_A_FAILURE = 0.05  # seconds that a client waits


class Answer(NamedTuple):
    """A response. Without a status, there was none. `cookie`: the one set or deleted, or None."""

    status: int
    body: dict[str, Any]
    cookie: str | None
    seconds: float | None
    sent: bool  # whether the request may have reached a worker


class Visitor:
    """One session, as its clients know it."""

    def __init__(self, owner: str, cookie: str) -> None:
        self.owner = owner
        self.cookies = [cookie]
        self.puts = 0
        self.rotating = threading.Lock()
        self.leaving = threading.Lock()


class Load:
    """Clients on the port of a server, from `start` to `finish`; `operations` is the history.

    :param clients: how many threads. :param sessions: how many sessions live at a time, so that
    several clients share each. :param without: the operations they leave out. :param seed: for
    their operations. The outcome depends on the machine, too.
    """

    def __init__(
        self, port: int, *, clients: int, sessions: int, seed: int, without: tuple[Kind, ...] = ()
    ) -> None:
        self.port = port
        self._weights = {kind: weight for kind, weight in WEIGHTS.items() if kind not in without}
        self.operations: list[Operation] = []
        self._live: list[Visitor] = []
        self._left: list[Visitor] = []  # logged out, or found ended
        self._all: list[Visitor] = []
        self._sessions = sessions
        self._made = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._may_go = threading.Event()
        self._may_go.set()
        self._idle = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(f"{seed} {number}"),))
            for number in range(clients)
        ]

    def start(self) -> None:
        """Let the clients begin."""
        for thread in self._threads:
            thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Have no request on its way for the length of a `with` block."""
        self._may_go.clear()
        for _ in self._threads:
            self._idle.acquire()
        try:
            yield
        finally:
            self._may_go.set()

    def finish(self) -> None:
        """Stop the clients, and wait for their last answers."""
        self._over.set()
        self._may_go.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def wait_until_served(self, seconds: float) -> float | None:
        """How long it takes until a login works; None when it takes longer than `seconds`."""
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            if self._log_in() is not None:
                return time.monotonic() - begin
            time.sleep(0.05)
        return None

    def look_at_everything(self, rng: random.Random, seconds: float = 10.0) -> None:
        """Read every session with its newest token, and try some older and ended ones again."""
        deadline = time.monotonic() + seconds
        for visitor in self._left:
            for kind in ("put", "read"):
                self._do(kind, visitor, rng.randrange(len(visitor.cookies)))
        for visitor in self._all:
            for token in range(len(visitor.cookies) - 1):
                self._do("read", visitor, token)
            while self._do("read", visitor).status not in (200, 401):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)

    def ask(self, method: str, path: str, cookie: str | None = None) -> Answer:
        """One request, on a connection of its own: any worker may take it."""
        headers = {"Connection": "close"}
        if cookie is not None:
            headers["Cookie"] = f"session={cookie}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            try:
                connection.connect()
            except OSError:
                return Answer(0, {}, None, None, sent=False)
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            text = response.read()
            found = response.headers
        except (OSError, http.client.HTTPException):
            return Answer(0, {}, None, None, sent=True)
        finally:
            connection.close()
        try:
            morsel = SimpleCookie(found.get("Set-Cookie", "")).get("session")
            body = json.loads(text) if found.get_content_subtype() == "json" else {}
        except (CookieError, ValueError):
            return Answer(0, {}, None, None, sent=True)
        seconds = float(found["X-Seconds"]) if "X-Seconds" in found else None
        value = None if morsel is None else morsel.value
        return Answer(response.status, body, value, seconds, sent=True)

    def _work(self, rng: random.Random) -> None:
        kinds = list(self._weights)
        weights = list(self._weights.values())
        while not self._over.is_set():
            if not self._may_go.is_set():
                self._idle.release()
                self._may_go.wait()
                continue
            with self._lock:
                short = len(self._live) < self._sessions
                left = rng.choice(self._left) if self._left and rng.random() < 0.06 else None
                visitor = rng.choice(self._live) if self._live else None
            if short:
                self._log_in()
            elif left is not None:
                kind: Kind = rng.choice(["read", "put", *NUMBERS.values()])
                self._do(kind, left, rng.randrange(len(left.cookies)))
            elif visitor is not None:
                kind = rng.choices(kinds, weights)[0]
                if visitor.puts >= MOST_PUTS:
                    kind = "logout"
                if kind == "read" and rng.random() < 0.3:
                    self._do(kind, visitor, rng.randrange(len(visitor.cookies)))  # old ones too
                else:
                    self._do(kind, visitor)

    def _log_in(self) -> Visitor | None:
        with self._lock:
            self._made += 1
            owner = f"s{self._made}"
        begin = time.monotonic()
        answer = self.ask("POST", f"/login/{owner}")
        visitor = None
        if answer.status == 200 and answer.cookie:
            visitor = Visitor(owner, answer.cookie)
            with self._lock:
                self._live.append(visitor)
                self._all.append(visitor)
        outcome: Outcome = "ok" if visitor else "unknown" if answer.sent else "failed"
        self._record(owner, "login", 0, begin, outcome, answer)
        return visitor

    def _do(self, kind: Kind, visitor: Visitor, token: int | None = None) -> Answer:
        """One operation on a session, by default with its newest token."""
        guard = {"rotate": visitor.rotating, "logout": visitor.leaving}.get(kind)
        if guard is not None and not guard.acquire(blocking=False):
            kind, guard = "read", None  # one rotation and one logout at a time
        try:
            with self._lock:
                newest = len(visitor.cookies) - 1
                token = newest if token is None else token
                cookie = visitor.cookies[token]
                key = None
                if kind == "put":
                    visitor.puts += 1
                    key = f"k{visitor.puts}"
            path = f"/{kind}"
            if key is not None:
                path += f"/{key}/{value_of(visitor.owner, key).replace(' ', '%20')}"
            begin = time.monotonic()
            answer = self.ask("GET" if kind == "read" else "POST", path, cookie)
            outcome = _outcome(kind, answer)
            self._record(visitor.owner, kind, token, begin, outcome, answer, key)
            with self._lock:
                if kind == "rotate" and outcome == "ok" and answer.cookie:
                    visitor.cookies.append(answer.cookie)
                gone = answer.status == 401 and token == len(visitor.cookies) - 1
                if (gone or (kind == "logout" and outcome != "failed")) and visitor in self._live:
                    self._live.remove(visitor)
                    self._left.append(visitor)
            return answer
        finally:
            if guard is not None:
                guard.release()

    def _record(
        self,
        owner: str,
        kind: Kind,
        token: int,
        begin: float,
        outcome: Outcome,
        answer: Answer,
        key: str | None = None,
    ) -> None:
        operation = Operation(
            owner,
            kind,
            token,
            begin,
            time.monotonic(),
            outcome,
            answer.status,
            answer.body if answer.status == 200 else None,
            key,
            answer.seconds,
        )
        self.operations.append(operation)  # atomic
        if answer.status not in (200, 401) and not self._over.is_set():
            time.sleep(AFTER_A_FAILURE)


def _outcome(kind: Kind, answer: Answer) -> Outcome:
    if answer.status == 200:
        # A rotation that found the session ended has no new token to give.
        return "failed" if kind == "rotate" and not answer.cookie else "ok"
    # Not with 409: a write whose reply was lost finds the session ended when it is repeated.
    if kind == "read" or not answer.sent or answer.status == 401:
        return "failed"
    return "unknown"
