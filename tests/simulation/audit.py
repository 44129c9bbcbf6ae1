"""A schedule as seen from outside, and the rules that it must keep whatever happened inside.

The model follows every effect on the store; the audit knows only the answers to requests. Each
would catch most faults that the other misses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .model import Line, Violation
from .plan import GRACE, Op

OK, FAILED, UNKNOWN = "ok", "failed", "unknown"


@dataclass(eq=False)
class Segment:
    """A part of a request during which it had one session; `line` is known once it is stored."""

    line: Line | None = None


@dataclass(eq=False)
class Done:
    """One operation, and the answer to its caller."""

    op: Op
    segment: Segment
    at: int = 0  # place in the order of all events
    began_at: int = 0  # milliseconds
    ended_at: int = 0
    outcome: str = UNKNOWN
    result: Any = None
    on_live: bool = False  # there was a stored session


class Visit:
    """One request as its client knows it. Times are milliseconds, `began` and `ended` an order."""

    def __init__(self, name: str, browser: str, tick: Callable[[], int], now: int) -> None:
        self.name, self.browser, self.tick = name, browser, tick
        self.token: str | None = None
        self.began, self.began_at = tick(), now
        self.ended: int | None = None
        self.ended_at = 0
        self.status: int | None = None  # None: no response arrived
        #: whether it was served a stored session at its first operation
        self.found: bool | None = None
        self.told_dropped = False
        self.done: list[Done] = []

    def receive(self, status: int, now: int) -> None:
        """The response arrived."""
        self.status, self.ended, self.ended_at = status, self.tick(), now

    @property
    def acknowledged(self) -> bool:
        """Whether everything that it did and that did not fail is promised to be stored."""
        return self.status == 200 and not self.told_dropped

    def discard_pending(self) -> None:
        """Changes that were not stored yet never will be."""
        for done in self.done:
            if done.outcome == "pending":
                done.outcome = UNKNOWN

    def confirm_pending(self) -> None:
        """Changes that were not stored yet are stored now."""
        for done in self.done:
            if done.outcome == "pending":
                done.outcome = OK

    def settle(self) -> None:
        """Note for each operation what its client may assume."""
        for done in self.done:
            if done.outcome == "pending":
                done.outcome = OK if self.acknowledged else UNKNOWN


def check(visits: list[Visit], finals: Iterable[tuple[Line, dict[str, Any]]]) -> None:
    """Raise `Violation` where the history breaks a guarantee.

    `finals` are the sessions that are alive in the end, with their values.
    """
    for visit in visits:
        visit.settle()
        _only_its_own(visit)
        for done in visit.done:
            if done.op.kind == "destroy" and done.outcome == OK:
                _dead_to(visits, visit, done.at, "logged out")
            elif done.op.kind == "rotate" and done.outcome == OK and done.on_live:
                _rotated(visits, visit, done)
    _once(visits)
    _in_time(visits)
    ops: dict[Line, list[Done]] = {}
    for visit in visits:
        for done in visit.done:
            if done.segment.line is not None and done.outcome != FAILED:
                ops.setdefault(done.segment.line, []).append(done)
    for line, values in finals:
        if not line.apart:
            _nothing_lost(line, ops.get(line, []), values)


def _only_its_own(visit: Visit) -> None:
    for done in visit.done:
        if done.op.kind == "read" and done.result is not None:
            for text in _texts(done.result):
                if "." in text and not text.startswith(visit.browser):
                    raise Violation(f"{visit.name} read {text!r}, which another browser wrote")


def _once(visits: list[Visit]) -> None:
    taken = Counter(
        (done.segment.line, done.result)
        for visit in visits
        for done in visit.done
        if done.op.kind == "take" and done.result is not None
    )
    for (_, tag), times in taken.items():
        if times > 1:
            raise Violation(f"{tag!r} was taken {times} times")


def _in_time(visits: list[Visit]) -> None:
    """Nobody read a value after its expiry."""
    every = [(visit, done) for visit in visits for done in visit.done]
    ends = {
        done.op.tag: done.began_at + done.op.argument[1] * 1000
        for _, done in every
        if done.op.kind == "fleeting"
    }
    for visit, done in every if ends else ():
        # A take concerns the value that was there when its save began.
        seen_at = done.began_at if done.op.kind == "take" else done.ended_at
        if done.op.kind in ("read", "get", "take") and done.result is not None:
            for text in _texts(done.result):
                if text in ends and seen_at >= ends[text]:
                    raise Violation(f"{visit.name} read {text!r}, which had expired")


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, (list, set)):
        for item in value:
            yield from _texts(item)


def _dead_to(visits: list[Visit], ender: Visit, since: int, how: str, at: int = 0) -> None:
    for later in visits:
        if (
            later.token == ender.token
            and later.began > since
            and later.began_at >= at
            and later.found
        ):
            raise Violation(f"{later.name} was served with the token that {ender.name} {how}")


def _rotated(visits: list[Visit], visit: Visit, done: Done) -> None:
    if not visit.acknowledged or visit.ended is None:
        return
    if done.op.argument == 0:
        _dead_to(visits, visit, visit.ended, "rotated away at once")
        return
    # Where several rotate at once, the first one's grace counts.
    graces = [
        GRACE if other.op.argument is None else other.op.argument
        for each in visits
        for other in each.done
        if other.op.kind == "rotate"
    ]
    _dead_to(visits, visit, visit.ended, "rotated away before", visit.ended_at + max(graces) * 1000)


def _nothing_lost(line: Line, ops: list[Done], values: dict[str, Any]) -> None:
    cleared = any(done.op.kind == "clear" for done in ops)
    gone = {done.op.argument for done in ops if done.op.kind == "pop"}

    def tags(*kinds: str, of: Any = None) -> Counter[str]:
        return Counter(
            {
                done.op.tag: 1 if done.outcome == OK else 0
                for done in ops
                if done.op.kind in kinds and (of is None or done.op.argument == of)
            }
        )

    def check_count(key: str, written: Counter[str]) -> None:
        stored = values.get(key, 0)
        too_few = stored < written.total() and not cleared and key not in gone
        if too_few or stored > len(written):
            raise Violation(
                f"{line.name}[{key!r}] is {stored}: {written.total()} were acknowledged, "
                f"{len(written)} tried"
            )

    def check_tags(key: str, stored: list[str], written: Counter[str]) -> None:
        found = Counter(stored)
        twice = [tag for tag, times in found.items() if times > 1]
        lost = [tag for tag, acknowledged in written.items() if acknowledged and not found[tag]]
        strange = [tag for tag in found if tag not in written]
        if twice or strange or (lost and not cleared and key not in gone):
            raise Violation(
                f"{line.name}[{key!r}] is {stored}: lost {lost}, twice {twice}, strange {strange}"
            )

    hits = tags("count")
    hits.update(tags("atomic", of="hits"))
    check_count("hits", hits)
    check_count("visits", tags("count_on"))
    check_count("atoms", tags("atomic", of="atoms"))
    log = tags("append")
    log.update(tags("atomic", of="log"))
    check_tags("log", values.get("log", []), log)
    own = tags("assign_own")
    check_tags("own keys", [values[key] for key in values if "." in key], own)
    discarded = {done.result for done in ops if done.op.kind == "discard"}
    added = tags("add")
    for tag in discarded & added.keys():
        added[tag] = 0
    check_tags("tags", list(values.get("tags", ())), added)
    entered = tags("enter")
    for done in ops:
        if done.op.argument == "x":
            entered[done.op.tag] = 0
    check_tags("map", list(values.get("map", {}).values()), entered)
