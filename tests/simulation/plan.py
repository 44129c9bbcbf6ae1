"""The parts of a schedule: browsers, their requests, and the operations of views.

Everything is drawn from one random generator, so a seed is a schedule.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

# Times in seconds. Small, so that a schedule meets them.
IDLE, ABSOLUTE, PERMANENT, RENEW, GRACE = 100, 160, 130, 10, 10

POLICIES = {
    "hits": "counter",
    "visits": "counter",
    "tags": "set",
    "map": "dict",
    "log": "append",
    "refused": "reject",
}


class Op(NamedTuple):
    """One statement of a view. `tag` is unique in the schedule."""

    kind: str
    tag: str
    argument: Any = None

    def __str__(self) -> str:
        argument = "" if self.argument is None else f" {self.argument}"
        return f"{self.kind}{argument} [{self.tag}]"


Held = dict[str, Any]
Mapping = MutableMapping[str, Any]


def read(session: Mapping, held: Held, op: Op) -> Any:
    return dict(session)


def get(session: Mapping, held: Held, op: Op) -> Any:
    return session.get(op.argument)


def assign(session: Mapping, held: Held, op: Op) -> Any:
    session[op.argument] = op.tag


def assign_own(session: Mapping, held: Held, op: Op) -> Any:
    """A key that no other request writes."""
    session[op.tag] = op.tag


def nested(session: Mapping, held: Held, op: Op) -> Any:
    """A change inside a list that has no policy."""
    session.setdefault("cart", []).append(op.tag)


def count(session: Mapping, held: Held, op: Op) -> Any:
    session["hits"] = session.get("hits", 0) + 1


def look(session: Mapping, held: Held, op: Op) -> Any:
    """Keep a number in a variable, to write it later."""
    held["visits"] = session.get("visits", 0)
    return held["visits"]


def count_on(session: Mapping, held: Held, op: Op) -> Any:
    """Add to the number that was read earlier."""
    before = held["visits"] if "visits" in held else session.get("visits", 0)
    held["visits"] = session["visits"] = before + 1


def append(session: Mapping, held: Held, op: Op) -> Any:
    """Append to a list that the view holds on to."""
    if "log" not in held:
        held["log"] = session.setdefault("log", [])
    held["log"].append(op.tag)


def add(session: Mapping, held: Held, op: Op) -> Any:
    session.setdefault("tags", set()).add(op.tag)


def discard(session: Mapping, held: Held, op: Op) -> Any:
    tags = session.setdefault("tags", set())
    out = min(tags, default=None)
    tags.discard(out)
    return out


def enter(session: Mapping, held: Held, op: Op) -> Any:
    session.setdefault("map", {})[op.argument or op.tag] = op.tag


def pop(session: Mapping, held: Held, op: Op) -> Any:
    held.pop(op.argument, None)
    return session.pop(op.argument, None)


def permanent(session: Mapping, held: Held, op: Op) -> Any:
    session["_permanent"] = op.argument


#: The operations of views on a mapping: on the session, and on the model's view of it.
ON_MAPPINGS = {
    function.__name__: function
    for function in (
        read,
        get,
        assign,
        assign_own,
        nested,
        count,
        look,
        count_on,
        append,
        add,
        discard,
        enter,
        pop,
        permanent,
    )
}

_PLAIN = ("a", "b", "c")

# Each kind of operation, how often it is chosen, and its argument.
_CHOICES: dict[str, tuple[int, tuple[Any, ...]]] = {
    "read": (4, (None,)),
    "get": (2, ("a", "b", "hits", "visits", "log", "refused")),
    "assign": (5, (*_PLAIN, *_PLAIN, "refused")),
    "assign_own": (6, (None,)),
    "nested": (2, (None,)),
    "count": (5, (None,)),
    "look": (3, (None,)),
    "count_on": (4, (None,)),
    "append": (4, (None,)),
    "add": (3, (None,)),
    "discard": (1, (None,)),
    "enter": (3, (None, None, "x")),
    "pop": (3, ("a", "b", "c", "hits", "visits", "tags", "log", "map", "refused")),
    "permanent": (1, (True, True, False)),
    "atomic": (5, ("atoms", "hits", "log", "a")),
    "fleeting": (4, (("a", 1), ("a", 10), ("a", 60), ("b", 10))),
    "ttl": (2, ("a", "a", "b")),
    "take": (4, ("a", "a", "b", "c")),
    "transact": (3, (None,)),
    "clear": (2, (None,)),
    "rotate": (4, (None, None, 0, 0, 30)),
    "destroy": (3, (None,)),
    "reload": (2, (None,)),
    "lifetime": (1, (20, 50, 150)),
    "force": (1, (None,)),
    "think": (2, (None,)),
}

# Faults that tend to occur together. A schedule has one of these themes, or a random choice.
_THEMES = (
    ("look", "count_on", "atomic"),
    ("count", "count_on", "look", "atomic", "reload", "assign"),
    ("rotate", "assign_own"),
    ("rotate", "count", "atomic"),
    ("append", "atomic"),
    ("take", "assign", "read"),
    ("count", "append", "transact", "atomic", "rotate"),
    ("count", "append", "atomic"),
    ("count", "transact", "append"),
    ("assign_own", "pop", "take", "clear", "transact"),
    ("rotate", "assign", "transact", "nested", "destroy"),
    ("fleeting", "take", "atomic", "ttl"),
    ("fleeting", "read", "assign", "pop", "rotate", "ttl"),
    ("count", "atomic"),
    ("append", "add", "discard", "enter", "pop", "nested"),
    ("assign", "assign_own", "reload", "append"),
    ("count", "append", "assign_own", "atomic", "rotate"),
    ("rotate", "destroy", "assign_own", "count", "read"),
    ("destroy", "clear", "rotate", "assign_own", "atomic"),
    ("pop", "clear", "assign", "assign_own", "count", "append"),
    ("read", "lifetime", "permanent", "think", "count", "assign_own", "force"),
)


@dataclass(frozen=True)
class RequestPlan:
    """One request: its browser, its view's operations, and whether the view survives errors."""

    name: str
    browser: str
    ops: tuple[Op, ...]
    tolerant: bool = False
    stale_token: bool = False  # brings a token that the browser had earlier


@dataclass(frozen=True)
class Plan:
    """One schedule. Rates are chances from 0 to 1 at each step."""

    seed: int
    site: str
    opening: tuple[RequestPlan, ...]  # one after the other, without faults
    requests: tuple[RequestPlan, ...]  # in parallel
    fault_rate: float
    clock_rate: float
    stay: float  # that the request that ran last goes on
    strikes: bool  # nothing goes wrong but interrupts, which every view catches
    together: bool  # all of them look at their sessions before any goes on

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, site {self.site}, faults {self.fault_rate:g}, "
            f"clock {self.clock_rate:g}, stay {self.stay:g}{', strikes' if self.strikes else ''}"
            f"{', together' if self.together else ''}"
        ]
        for request in (*self.opening, *self.requests):
            notes = [
                note
                for note, said in (
                    ("catches errors", request.tolerant),
                    ("brings an old token", request.stale_token),
                )
                if said
            ]
            ops = ", ".join(map(str, request.ops))
            lines.append(f"  {request.name}: {ops}{' (' + '; '.join(notes) + ')' if notes else ''}")
        return "\n".join(lines)


def make_plan(seed: int, sites: tuple[str, ...]) -> tuple[Plan, Random]:
    """The plan of a seed, and the generator that goes on to draw the schedule."""
    rng = Random(seed)
    browsers = ("A", "B") if rng.random() < 0.4 else ("A",)
    # Each schedule uses few operations and arguments, so that rare ones meet each other.
    strikes = rng.random() < 0.1
    if strikes:
        kinds = ["count", "append", "transact", "transact", "atomic", rng.choice(sorted(_CHOICES))]
    elif rng.random() < 0.7:
        kinds = list(rng.choice(_THEMES))
    else:
        kinds = rng.sample(sorted(_CHOICES), rng.randint(2, 7))
    weights = [_CHOICES[kind][0] for kind in kinds]
    arguments = {
        kind: [rng.choice(_CHOICES[kind][1]) for _ in range(rng.randint(1, 2))] for kind in kinds
    }

    def request(name: str, browser: str, ops: int, **how: bool) -> RequestPlan:
        chosen = rng.choices(kinds, weights, k=ops)
        return RequestPlan(
            name,
            browser,
            tuple(
                Op(kind, f"{name}.{number}", rng.choice(arguments[kind]))
                for number, kind in enumerate(chosen)
            ),
            **how,
        )

    opening = tuple(
        RequestPlan(
            f"{browser}0",
            browser,
            tuple(
                Op(kind, f"{browser}0.{number}", argument)
                for number, (kind, argument) in enumerate(
                    (
                        ("assign", "a"),
                        ("assign", "b"),
                        ("count", None),
                        ("count_on", None),
                        ("append", None),
                    )
                )
                if rng.random() < 0.7
            ),
        )
        for browser in browsers
        if rng.random() < 0.9
    )
    requests = []
    for number in range(1, rng.randint(2, 5) + 1):
        browser = rng.choice(browsers)
        requests.append(
            request(
                f"{browser}{number}",
                browser,
                rng.choice((3, 4, 5) if strikes else (1, 2, 2, 3, 4, 5)),
                tolerant=rng.random() < 0.3 or strikes,
                stale_token=rng.random() < 0.1,
            )
        )
    plan = Plan(
        seed,
        rng.choice(sites),
        opening,
        tuple(requests),
        fault_rate=0.2 if strikes else rng.choice((0, 0, 0.1, 0.2, 0.35)),
        clock_rate=rng.choice((0, 0, 0.04, 0.15)),
        stay=rng.choice((0, 0, 0.3, 0.6)),
        strikes=strikes,
        together=rng.random() < 0.4,
    )
    return plan, rng
