"""Model: no end of a session is lost, where session, index and journal are in different places.

As in a Redis Cluster: each step below is atomic on one key, and a process may be killed before any
of its steps. One session, a process that creates it, one that renews it, one that ends it, and two
that sweep, of which the last comes when all others are over.

The protocol, as in ``stores/redis/cluster_journal.py``

1. a write first puts a place for the session into the index, unless there is one; a place may be
   early, never too late;
2. an end puts a place that is due soon, then a marker with the entry in the session's place, then
   the entry into the journal, then removes the marker;
3. the sweep looks at places that are due. A marker: it goes on with 2. An expired session: the
   marker, only if the session is still expired, then as 2. A live one: the place moves to its end.
   Nothing there: the place goes;
4. the server itself removes a session only long after its end.

Invariants

- none lost: a session that was there has an end in the journal, once the last sweep is over;
- no end of the living: while a session is served, its end isn't in the journal.

A sweep that moves the place of a live session may overwrite a place that 2 made in between; after
a crash the end then comes as late as the session would have expired. That is a limit, no fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .explorer import NOTHING, Break, Broken, Explored, Model, Program, Scenario, World, clock

LIFE, LONGER, LONG_AFTER = 2.0, 4.0, 9.0
FOREVER = float("inf")
SESSION, PLACE = "session", "place"
MARKER = -1.0  # instead of the session's end

BREAKS = {
    name: Break(meaning, scenario)
    for name, (meaning, scenario) in {
        "index last": ("1 after the session itself", "create"),
        "no marker": ("2 deletes the session, then adds the entry", "end"),
        "entry first": ("2 adds the entry before the marker", "end, renew"),
        "marker first": ("2 removes the marker before it adds the entry", "end"),
        "no place": ("2 puts no place", "end of before"),
        "sweep: drops": ("3 removes the place of a live session", "sweep, renew"),
        "sweep: ignores": ("3 removes the place of a marker", "end, sweep"),
        "server": ("4 as soon as the session has expired", "create"),
    }.items()
}


class JournalWorld(World):
    """``log``: the entries. ``lived``: whether the end of a session must be there.

    The end of a session of before the journal must be, once somebody wrote it or began to end it.
    """

    def __init__(self, broken: Broken = NOTHING, **facts: Any) -> None:
        start = facts.pop("start", "")
        super().__init__(**{"log": (), "lived": False, **facts})
        self.broken = broken
        if start:
            self.put(SESSION, LIFE, self.hold(LIFE))
        if start == "indexed":
            self.put(PLACE, LIFE, FOREVER)
            self.facts["lived"] = True

    def hold(self, end: float) -> float:
        """When the server removes a session."""
        return end if "server" in self.broken else LONG_AFTER + end

    def end_of(self) -> float | None:
        """When the session ends; None without a session."""
        there = self.store.get(SESSION)
        return None if there is None or there.value == MARKER else there.value

    def is_served(self) -> bool:
        end = self.end_of()
        return end is not None and self.time < end

    # Steps.

    def expect(self, due: float, *, replace: bool = False) -> None:
        if replace or PLACE not in self.store:
            self.put(PLACE, due, FOREVER)
        if SESSION in self.store:
            self.facts["lived"] = True
        self.saw(None)

    def leave(self) -> None:
        self.store.pop(PLACE, None)
        self.saw(None)

    def write(self, end: float) -> bool:
        """Create the session."""
        self.put(SESSION, end, self.hold(end))
        if self.is_served():  # or it was paused for so long that nobody will be served
            self.facts["lived"] = True
        return bool(self.saw(True))

    def renew(self, end: float) -> bool:
        done = self.is_served()
        if done:
            self.put(SESSION, end, self.hold(end))
        return bool(self.saw(done))

    def mark(self, *, expired: bool, to: float | None = MARKER) -> bool:
        """Replace the session by a marker, or by nothing."""
        end = self.end_of()
        fits = end is not None and (self.time >= end) == expired
        if fits:
            self.facts["lived"] = True
        if fits and to is None:
            del self.store[SESSION]
        elif fits:
            self.put(SESSION, MARKER, LONG_AFTER * 2)
        return bool(self.saw(fits))

    def unmark(self) -> None:
        there = self.store.get(SESSION)
        if there is not None and there.value == MARKER:
            del self.store[SESSION]
        self.saw(None)

    def enter(self) -> None:
        self.facts["log"] = (*self.facts["log"], "end")
        if len(self.facts["log"]) > 3:  # repeats change nothing
            self.facts["log"] = self.facts["log"][:3]
        self.saw(None)


def create(world: JournalWorld) -> Program:
    order: list[Callable[[], object]] = [lambda: world.expect(LIFE), lambda: world.write(LIFE)]
    if "index last" in world.broken:
        order.reverse()
    for step in order:
        yield
        step()


def renew(world: JournalWorld) -> Program:
    yield
    world.expect(LONGER)
    yield
    world.renew(LONGER)


def end(world: JournalWorld) -> Program:
    broken = world.broken
    if "no place" not in broken:
        yield
        world.expect(0, replace=True)
    if "entry first" in broken:
        yield
        world.enter()
    yield
    if not world.mark(expired=False, to=None if "no marker" in broken else MARKER):
        return
    yield from settle(world)


def settle(world: JournalWorld) -> Program:
    order: list[Callable[[], object]] = [world.enter, world.unmark]
    if "marker first" in world.broken:
        order.reverse()
    for step in (*order, world.leave):
        yield
        step()


def sweep(world: JournalWorld) -> Program:
    yield
    place = world.load(PLACE)
    if place is None or place.value > world.time:
        return
    yield
    there = world.load(SESSION)
    now = world.time
    if there is None:
        yield
        world.leave()
    elif there.value == MARKER:
        if "sweep: ignores" in world.broken:
            yield
            world.leave()
        else:
            yield from settle(world)
    elif now < there.value:
        yield
        if "sweep: drops" in world.broken:
            world.leave()
        else:
            world.expect(there.value, replace=True)
    else:
        yield
        if world.mark(expired=True):
            yield from settle(world)


def late(world: JournalWorld) -> Program:
    return clock(world, LIFE, LONGER)


def scenarios(broken: Broken) -> Mapping[str, Scenario]:
    """The scenarios; in each, the clock also passes the ends of the session."""
    indexed = {"start": "indexed"}
    return {
        "create": Scenario({}, 1, {"a": create, "s": sweep, "clock": late}),
        "end": Scenario(indexed, 1, {"a": end, "clock": late}),
        "end of before": Scenario({"start": "before"}, 1, {"a": end}),
        "end, renew": Scenario(indexed, 2, {"a": end, "b": renew, "clock": late}),
        "end, sweep": Scenario(indexed, 2, {"a": end, "s": sweep, "clock": late}),
        "end twice": Scenario(indexed, 2, {"a": end, "b": end}),
        "sweep, renew": Scenario(indexed, 2, {"b": renew, "s": sweep, "clock": late}),
        "two sweeps, renew": Scenario(
            indexed, 2, {"b": renew, "s": sweep, "t": sweep, "clock": late}
        ),
    }


def check(world: JournalWorld, broken: Broken) -> str:
    if world.facts["log"] and world.is_served():
        return "a session is served after its end"
    return ""


def final(world: JournalWorld, broken: Broken) -> str:
    """Everybody is gone; the last sweeps come when every session has ended."""
    after = world.copy()
    after.broken = broken
    after.tick(max(after.time, LONGER + 1))
    for _ in range(3):
        after.alone(sweep)
    if after.facts["lived"] and not after.facts["log"]:
        return "the end of a session is lost"
    return ""


MODEL = Model(BREAKS, scenarios, JournalWorld, check, final)


def run(name: str, broken: Broken = NOTHING) -> Explored:
    return MODEL.explore(name, broken)
