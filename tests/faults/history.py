"""The history of the clients' operations, and the checks on it.

An operation is `ok` when its answer said so, `failed` when it is known to have done nothing, and
`unknown` when it may have been applied, or may be later: an error, a timeout, or no answer.

The checks use only the answers that clients got, never what happened inside the servers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["login", "read", "put", "count", "move", "lock", "rotate", "logout"]
Outcome = Literal["ok", "failed", "unknown"]

_NEVER = float("inf")
UPDATES: tuple[Kind, ...] = ("login", "put", "count", "move", "lock")
NUMBERS: dict[str, Kind] = {
    "n": "count",
    "b": "move",
    "l": "lock",
}  # and the operations that add one to each


@dataclass(slots=True)
class Operation:
    """One request of a client. Times are seconds of the harness's monotonic clock."""

    owner: str  # whose session it was sent for: no two sessions have the same
    kind: Kind
    token: int  # which of that session's tokens it carried: 0 from the login, 1 from a rotation...
    start: float
    end: float
    outcome: Outcome
    status: int = 0  # 0: no answer
    seen: dict[str, Any] | None = None  # the session in the answer; None if the answer had none
    key: str | None = None  # the key of a put; its value is `value_of(owner, key)`
    seconds: float | None = None  # as the worker measured it

    @property
    def latency(self) -> float:
        """The time in the worker; where that is not known, the time until the client gave up."""
        return self.end - self.start if self.seconds is None else self.seconds

    @property
    def alive(self) -> bool:
        """Whether the answer came from a living session."""
        return self.seen is not None and self.seen.get("owner") is not None


def value_of(owner: str, key: str) -> str:
    """The value that a put writes under a key. It names its owner."""
    return f"{owner} {key}"


@dataclass
class Verdict:
    """The counts, each with its total."""

    ok: int = 0
    failed: int = 0
    unknown: int = 0
    errors: int = 0  # answers with a status of 500
    answers: int = 0  # that named an owner
    foreign: int = 0  # ... and another session's
    acknowledged: int = 0  # updates of sessions that were still there to be looked at
    lost: int = 0
    twice: int = 0  # applied more often than sent
    torn: int = 0  # reads of half a transaction
    stale: int = 0  # reads without an update that was acknowledged before they began
    reads: int = 0
    ended: int = 0  # tokens whose end was acknowledged
    resurrected: int = 0  # ... that were answered from a living session later
    missing: int = 0  # tokens that were found to lead nowhere
    reappeared: int = 0  # ... and that were answered from a living session later
    adrift: int = 0  # sessions whose token got lost with the answer to a rotation
    unchecked: int = 0  # sessions that could not be read at the end
    worst: float = 0.0  # seconds
    over: int = 0  # operations over the time budget
    forever: int = 0  # stored keys without expiry
    leaks: list[str] = field(default_factory=list)
    recovery: float | None = None  # seconds until a login worked again; None: never
    examples: list[str] = field(default_factory=list)  # violations

    @property
    def broken(self) -> list[str]:
        """The violations in this history of a store's promises."""
        found = {
            "lost updates": self.lost,
            "updates applied twice": self.twice,
            "torn transactions": self.torn,
            "stale reads": self.stale,
            "resurrected sessions": self.resurrected,
            "sessions gone and there again": self.reappeared,
            "answers of another session": self.foreign,
            "keys without expiry": self.forever,
        }
        return [f"{count} {what}" for what, count in found.items() if count] + (
            [] if self.recovery is not None else ["no recovery"]
        )

    def _note(self, what: str, operation: Operation) -> None:
        if len(self.examples) < 20:
            self.examples.append(f"{what}: {operation}")


def check(
    operations: Iterable[Operation],
    *,
    budget: float,
    grace: float,
    patience: float = 0.0,
) -> Verdict:
    """Judges a history, whose last operation on each session reads its final state.

    :param budget: seconds that a request may take.
    :param patience: seconds on top of that for a request that waits for a lock.
    :param grace: seconds that an old token may still be used after an acknowledged rotation.
    """
    verdict = Verdict(recovery=0.0)
    by_owner: dict[str, list[Operation]] = {}
    for operation in operations:
        by_owner.setdefault(operation.owner, []).append(operation)
        most = budget + patience if operation.kind == "lock" else budget
        _judge_alone(operation, most, verdict)
    for history in by_owner.values():
        history.sort(key=lambda operation: operation.start)
        _judge_deaths(history, grace, verdict)
        _judge_updates(history, verdict)
    return verdict


def _judge_alone(operation: Operation, budget: float, verdict: Verdict) -> None:
    """The violations that one operation shows by itself."""
    setattr(verdict, operation.outcome, getattr(verdict, operation.outcome) + 1)
    verdict.errors += operation.status == 500
    verdict.worst = max(verdict.worst, operation.latency)
    verdict.over += operation.latency > budget
    seen = operation.seen
    if seen is None or seen.get("owner") is None:
        return
    verdict.answers += 1
    strange = [
        key
        for key, value in seen.get("keys", {}).items()
        if value != value_of(operation.owner, key)
    ]
    if seen["owner"] != operation.owner or strange:
        verdict.foreign += 1
        verdict._note("foreign", operation)
    if seen.get("a", 0) + seen.get("b", 0) != 0:
        verdict.torn += 1
        verdict._note("torn", operation)


def _judge_deaths(history: Sequence[Operation], grace: float, verdict: Verdict) -> None:
    """Nothing may be answered from a session whose end was acknowledged, or that was not there."""
    logouts = [op.end for op in history if op.kind == "logout" and op.outcome == "ok"]
    over = dict.fromkeys({op.token for op in history}, min(logouts)) if logouts else {}
    missing: dict[int, float] = {}
    for operation in history:
        if operation.kind == "rotate" and operation.outcome == "ok":
            for token in range(operation.token + 1):
                over[token] = min(over.get(token, _NEVER), operation.end + grace)
        elif operation.status == 401:  # the store was asked, and there was no session
            token = operation.token
            missing[token] = min(missing.get(token, _NEVER), operation.end)
    verdict.ended += len(over)
    verdict.missing += len(missing)
    risen, back = set(), set()
    for operation in history:
        if not operation.alive:
            continue
        if operation.start > over.get(operation.token, _NEVER):
            risen.add(operation.token)
            verdict._note("resurrected", operation)
        elif operation.start > missing.get(operation.token, _NEVER):
            back.add(operation.token)
            verdict._note("there again", operation)
    verdict.resurrected += len(risen)
    verdict.reappeared += len(back)


def _judge_updates(history: Sequence[Operation], verdict: Verdict) -> None:
    """Every read must show the writes acknowledged before it, and the last one all of them."""
    reads = [op for op in history if op.seen is not None and "keys" in op.seen and op.alive]
    for name, kind in NUMBERS.items():
        updates = [op for op in history if op.kind == kind]
        acknowledged = sorted(op.end for op in updates if op.outcome == "ok")
        possible = sorted(op.start for op in updates if op.outcome != "failed")
        excess = 0
        for read in reads:
            assert read.seen is not None
            verdict.reads += 1
            number = read.seen.get(name, 0)
            if number < bisect_left(acknowledged, read.start):
                verdict.stale += 1
                verdict._note(f"stale {name}", read)
            elif number - bisect_left(possible, read.end) > excess:
                excess = number - bisect_left(possible, read.end)
                verdict._note(f"too high {name}", read)
        verdict.twice += excess
    shown = reads[-1:]
    for last in shown:
        assert last.seen is not None
        sure = [op for op in history if op.outcome == "ok" and op.end < last.start]
        kinds = Counter(op.kind for op in sure)
        missing = [op for op in sure if op.kind == "put" and op.key not in last.seen["keys"]]
        for operation in missing:
            verdict._note("lost", operation)
        verdict.lost += len(missing)
        for name, kind in NUMBERS.items():
            verdict.lost += max(0, kinds[kind] - last.seen.get(name, 0))
        verdict.acknowledged += sum(kinds[kind] for kind in UPDATES)
    _judge_end(history, bool(shown), verdict)


def _judge_end(history: Sequence[Operation], judged: bool, verdict: Verdict) -> None:
    """A session that nobody ended must still be there."""
    outcomes = Counter((op.kind, op.outcome) for op in history)
    final = history[-1]
    if (
        not outcomes["login", "ok"]
        or outcomes["logout", "ok"]
        or outcomes["logout", "unknown"]
        or (final.kind == "read" and final.alive)
    ):
        return
    if outcomes["rotate", "unknown"]:
        verdict.adrift += 1
    elif any(op.status == 401 and op.token == final.token for op in history):
        lost = sum(outcomes[kind, "ok"] for kind in UPDATES)
        verdict.lost += lost
        verdict.acknowledged += 0 if judged else lost
        verdict._note("lost session", final)
    else:
        verdict.unchecked += 1
